"""The release of TorchTitan that this package is for: to import this module is to check that it is installed.

It is imported before anything of TorchTitan's.

Raises:
    ModuleNotFoundError: it is not; the message names the extra.
"""

from nsa.extras import require

require("titan", "torchtitan", "0.2.2")
