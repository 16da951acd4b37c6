"""How our kernels can be launched, whatever the table of configurations says of this machine.

Selected attention goes by query, by tiles of queries or by block. Whatever is the fastest, all must be right, and so
must the sums over a block's queries where these come in several pieces, as in long sequences.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from nsa.kernels.configs import KERNELS, override

SELECTED = (
    "selected_forward",
    "selected_forward_key_major",
    "selected_forward_tiles",
    "selected_forward_hopper",
    "selected_bwd_dq",
    "selected_bwd_dq_tiles",
    "selected_bwd_dq_hopper",
    "selected_bwd_dkdv",
)
_QUERY_MAJOR = {"key_major": False, "CHUNK": 8, "BLOCK_N": 32, "longest": 0}
WAYS = {
    "by_query": {**_QUERY_MAJOR, "most_keys": 0},
    "by_tile": {**_QUERY_MAJOR, "most_keys": 1 << 20, "BLOCK_M": 32},
    "by_block": {"key_major": True, "CHUNK": 8, "longest": 0},
}


def fitting(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Those of the values that a kernel's configuration has fields for."""
    return {field: values[field] for field in KERNELS[name].__dataclass_fields__ if field in values}


@contextmanager
def launched(names: tuple[str, ...], **parameters: Any) -> Iterator[None]:
    """The kernels of those names are launched with these values of their configurations."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(override(name, **fitting(name, parameters)))
        yield
