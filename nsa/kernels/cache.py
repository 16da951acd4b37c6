"""A place for compiled kernels where Triton's own, in the home, cannot be written to."""

import os
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir, mkdtemp


def use_writable() -> None:
    """Has Triton keep compiled kernels in the system's temporary folder where it could not keep them in the home.

    What `TRITON_CACHE_DIR` says is left as it is. Processes that are started later inherit the place.
    """
    if "TRITON_CACHE_DIR" in os.environ or _writable(Path(os.environ.get("TRITON_HOME", "~"), ".triton", "cache")):
        return
    folder = Path(gettempdir(), f"triton-of-user-{os.getuid()}")
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
    # Another user may have made a folder of that name, whose kernels would be loaded.
    usable = _writable(folder) and folder.stat().st_uid == os.getuid()
    os.environ["TRITON_CACHE_DIR"] = str(folder) if usable else mkdtemp(prefix="triton-")


def _writable(folder: Path) -> bool:
    """Whether a folder can be written to, or made where it is not there yet."""
    try:
        folder = folder.expanduser()
        while not folder.exists():
            folder = folder.parent
    except (OSError, RuntimeError):  # RuntimeError: no home is known
        return False
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
