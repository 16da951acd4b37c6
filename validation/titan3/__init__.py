"""TorchTitan 0.3, in an environment of its own: `tox run -e titan3`."""
