"""A flavor of one's own in TorchTitan's trainer: docs/integrate.md.

python -m docs.examples.recipe --training.steps 20 --training.seq_len 256
"""

import sys
from collections.abc import Sequence

from nsa.titan.flavors import FLAVORS
from nsa.train import main

NAME = "mine"
FLAVORS[NAME] = {**FLAVORS["debug"], "dim": 96, "n_layers": 3, "n_heads": 6, "attention": "dense,nsa,nsa"}


def train(options: Sequence[str]) -> None:
    """Trains the flavor; options are those of `nsa.train`."""
    main([f"--model.flavor={NAME}", *options])


if __name__ == "__main__":
    train(sys.argv[1:])
