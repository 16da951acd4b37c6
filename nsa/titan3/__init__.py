"""The model in TorchTitan 0.3: its `ModelSpec`, configurations, layouts and data.

    python -m torchtitan.train --module nsa.titan3 --config nsa_debug

`config_registry` has the configurations. Sizes, initial weights, data and context parallelism are those of `nsa.titan`,
which is for TorchTitan 0.2.2. Checkpoints, metrics, signals and CUDA graphs are TorchTitan's own.

Raises:
    ModuleNotFoundError: another release of TorchTitan is installed, or none; the message names the extra.
"""

from nsa.extras import require

require("titan3", "torchtitan", "0.3")
