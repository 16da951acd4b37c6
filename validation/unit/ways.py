"""How our kernels can be launched, whatever the table of launch parameters says of this machine.

Selected attention goes by query or by block. Whatever is the faster, both must be right, and so must the sums over a
block's queries where these come in several pieces, as in long sequences.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from nsa.kernels import tuning

SELECTED = ("selected_forward", "selected_forward_key_major", "selected_bwd_dq", "selected_bwd_dkdv")
WAYS = {"by_query": {"KEY_MAJOR": False, "CHUNK": 8, "BLOCK_N": 32}, "by_block": {"KEY_MAJOR": True, "CHUNK": 8}}


@contextmanager
def launched(names: tuple[str, ...], **parameters: Any) -> Iterator[None]:
    """The kernels of those names are launched with these parameters."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(tuning.override(name, **parameters))
        yield
