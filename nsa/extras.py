"""Packages that `nsa` itself does not need: what is said where one is missing."""

import re
from importlib.metadata import PackageNotFoundError, version


def require(extra: str, package: str, release: str = "") -> None:
    """Checks that a package of an extra is installed, before anything imports it.

    Args:
        extra: its name in `pip install "nsa[extra]"`.
        package: as `pip` names it.
        release: what its version begins with; `"0.3"` is every 0.3.x.

    Raises:
        ModuleNotFoundError: the package is missing, or another release of it is installed; the message names the extra.
    """
    wanted = " ".join(filter(None, (package, release)))
    remedy = f'pip install "nsa[{extra}]"'
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ModuleNotFoundError(f"{wanted} is missing, of the extra `{extra}`: {remedy}", name=package) from None
    if release and not re.match(rf"{re.escape(release)}(?!\d)", found):
        message = f"{wanted} is needed, of the extra `{extra}`, and {package} {found} is installed: {remedy}"
        raise ModuleNotFoundError(message, name=package)
