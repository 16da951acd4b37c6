"""Packages that `nsa` itself does not need, and the error where one is missing."""

import re
from importlib.metadata import PackageNotFoundError, version


def require(extra: str, package: str, release: str = "") -> None:
    """Checks that a package of an extra is installed, before anything imports it.

    Args:
        extra: its name in `pip install "nsa[extra]"`.
        package: as `pip` names it.
        release: beginning of its version; `"0.3"` is every 0.3.x; any version unless given.

    Raises:
        ModuleNotFoundError: the package is missing, or another release of it is installed; the message names the extra.
    """
    wanted = " ".join(filter(None, (package, release)))
    remedy = f'the extra `{extra}` brings it: pip install "nsa[{extra}]"'
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ModuleNotFoundError(f"{wanted} is missing; {remedy}", name=package) from None
    if release and not re.match(rf"{re.escape(release)}(?!\d)", found):
        raise ModuleNotFoundError(f"{wanted} is needed, but {found} is installed; {remedy}", name=package)
