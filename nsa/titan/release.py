"""Checks, when it is imported, that the release of TorchTitan is installed that this package is for.

It is imported before anything of TorchTitan's.

Raises:
    ModuleNotFoundError: another release is installed, or none; the message names the extra.
"""

from nsa.extras import require

require("titan", "torchtitan", "0.2.2")
