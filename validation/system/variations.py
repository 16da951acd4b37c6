"""How far training drifts by rounding alone: `100m` trained by kernels that only add in another order, beside eager.

On a GPU, where the table of configurations is one of measured kernels:

    for name in eager triton triton-unsplit triton-shares triton-byquery; do
        python -m validation.system.variations train $name --job.dump_folder out/variations/$name &&
            cp out/variations/$name/metrics.jsonl docs/runs/h200-variations-$name.jsonl
    done
    python -m validation.system.variations table docs/runs    # the table of docs/results.md

What follows the name is passed on to the trainer.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nsa import train
from nsa.kernels import configs
from validation.runs import LOSS, Metrics, read_log

CONTIGUOUS = [f"{branch}_{part}" for branch in ("window", "compressed") for part in ("forward", "bwd_dq", "bwd_dkdv")]

VARIATIONS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "triton": {},
    "triton-unsplit": {name: {"SPLIT": False} for name in CONTIGUOUS},
    "triton-shares": {name: {"num_programs": 64} for name in ("window_bwd_dkdv", "compressed_bwd_dkdv")},
    "triton-byquery": {
        **{name: {"key_major": False} for name in ("selected_forward", "selected_bwd_dkdv")},
        **{name: {"longest": 0} for name in ("selected_forward_hopper", "selected_bwd_dq_hopper")},
    },
}
"""Launch parameters that are replaced, by kernel: each variation adds the same numbers in another order."""

TITLES = ("eager", "Triton", "one loop for all tiles", "fewer shares of key tiles", "selected by query")
STEPS = (1, 10, 20, 30, 40, 50, 90, 120, 160, 200)
OPTIONS = (
    "--model.name=nsa",
    "--model.flavor=100m",
    f"--training.steps={STEPS[-1]}",
    "--checkpoint.no-enable",
    "--compile.no-enable",
)


def train_one(name: str, options: Sequence[str]) -> None:
    """Trains by the kernels of one variation, or by eager."""
    backend = "eager" if name == "eager" else "triton"
    with ExitStack() as stack:
        for kernel, parameters in VARIATIONS.get(name, {}).items():
            stack.enter_context(configs.override(kernel, **parameters))
        train.main([*OPTIONS, f"--nsa.backend={backend}", *options])


def table(read: Callable[[str], Metrics]) -> list[str]:
    """Rows of Markdown: losses at some steps, by how much those of the variations differ, and how far eager's is.

    Eager's run may be shorter than the others: its step takes seconds.

    Raises:
        ValueError: two variations have the same losses, so that one of them changed nothing.
    """
    eager, *others = (read(name)[LOSS] for name in ("eager", *VARIATIONS))
    for i, losses in enumerate(others):
        if losses in others[:i]:
            raise ValueError(f"{list(VARIATIONS)[i]} has the losses of {list(VARIATIONS)[others.index(losses)]}")
    rows = [f"| step | {' | '.join(TITLES)} | spread of the four | eager from their nearest |", "|---" * 8 + "|"]
    for step in STEPS:
        at_step = [other[step] for other in others]
        cells = ["not run", *(f"{figure:.4f}" for figure in (*at_step, max(at_step) - min(at_step))), ""]
        if step in eager:
            nearest = min(abs(eager[step] - loss) for loss in at_step)
            outside = nearest * (not min(at_step) <= eager[step] <= max(at_step))
            cells[0], cells[-1] = f"{eager[step]:.4f}", f"{outside:.4f}" if outside else "among them"
        rows.append(f"| {step} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train").add_argument("name", choices=("eager", *VARIATIONS))
    commands.add_parser("table").add_argument(
        "folder", type=Path, help="has h200-variations-eager.jsonl and the others"
    )
    given, options = parser.parse_known_args()
    if given.command == "train":
        train_one(given.name, options)
    elif options:
        parser.error(f"table takes a folder and nothing else, got {' '.join(options)}")
    else:
        print(*table(lambda name: read_log(given.folder / f"h200-variations-{name}.jsonl")), sep="\n")


if __name__ == "__main__":
    main()
