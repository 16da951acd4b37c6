"""The backends that the stages can run on."""

from typing import Literal

BackendName = Literal["auto", "eager", "triton"]
"""What `backend=` takes; `"auto"` is Triton where it supports the arguments, else eager."""
