"""When is the block of an answer selected, and when is the answer read from it? Looked at while models train.

python -m validation.system.watch --task copy --variants NSA --seeds 0 1 --steps 640 --out out/watch
"""

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch

from nsa.titan.runs import write_whole
from validation import reports
from validation.system.tasks import TASKS, UNASKED, VARIANTS, Model, Rows, Setting, Sparse, blocks_of, train, usual

ROWS = 256
"""Rows that every model is looked at with: the same ones at every step."""


@dataclass(frozen=True)
class Moment:
    """What a model does after a step, as parts of the questions.

    Attributes:
        selected: whose block a layer selects.
        answered: answered rightly.
        read: answered rightly, of those whose block is selected; None where there are none.
        guessed: answered rightly, of the others; None where there are none.
        gates: mean gates of the first layer at the questions: of the compressed, the selected and the window branch.
    """

    variant: str
    seed: int
    step: int
    selected: float
    answered: float
    read: float | None
    guessed: float | None
    gates: tuple[float, float, float]


def moment(model: Model, rows: Rows, variant: str, seed: int, step: int) -> Moment:
    """Asks a model the questions of `rows`, and looks at its selection and gates."""
    asked = rows.answers != UNASKED
    given = blocks_of(rows, model.setting, model.variant.blocks, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        right = (model(rows.tokens, given).argmax(-1) == rows.answers)[asked]
    needed = (rows.sources // model.setting.config.select_block_size)[asked]
    layers = [layer for layer in model.modules() if isinstance(layer, Sparse)]
    found = torch.stack([(layer.blocks[asked] == needed[:, None, None]).flatten(1).any(1) for layer in layers]).any(0)
    selected, answered = (part.double().mean().item() for part in (found, right))
    read, guessed = (part.double().mean().item() if len(part) else None for part in (right[found], right[~found]))
    compressed, chosen, window = layers[0].gates[asked].double().mean((0, 1)).tolist()
    return Moment(variant, seed, step, selected, answered, read, guessed, (compressed, chosen, window))


def watch(task: str, variant: str, seed: int, setting: Setting, every: int) -> list[Moment]:
    """Trains a model, and looks at it after every so many steps."""
    torch.set_num_threads(1)
    rows = TASKS[task](torch.Generator().manual_seed(10**7 + seed), ROWS, setting.length)
    seen: list[Moment] = []

    def look(step: int, model: Model) -> None:
        if step % every == 0:
            seen.append(moment(model, rows, variant, seed, step))

    train(task, variant, seed, setting, watch=look)
    return seen


def table(moments: Sequence[Moment]) -> list[str]:
    """Rows of Markdown."""
    titles = "model", "seed", "step", "block selected", "answered", "where selected", "where not"
    gates = "compressed gate", "selected gate", "window gate"
    rows = [f"| {' | '.join((*titles, *gates))} |", "|---" * (len(titles) + len(gates)) + "|"]
    for m in moments:
        parts = ["" if part is None else f"{part:.1%}" for part in (m.selected, m.answered, m.read, m.guessed)]
        cells = [m.variant, str(m.seed), str(m.step), *parts, *(f"{gate:.2f}" for gate in m.gates)]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def read(file: Path) -> list[Moment]:
    """Moments of a saved run."""
    saved = json.loads(file.read_text())["moments"]
    return [Moment(**moment | {"gates": tuple(moment["gates"])}) for moment in saved]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sparse = [name for name, variant in VARIANTS.items() if "nsa" in variant.layers]
    parser.add_argument("--task", choices=TASKS, default="copy")
    parser.add_argument("--variants", nargs="+", choices=sparse, default=["NSA"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="of training (default: those of the task)")
    parser.add_argument("--every", type=int, default=80, help="steps from one look to the next")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="models that are trained at a time")
    parser.add_argument("--out", type=Path, default=Path("out/watch"), help="folder of the result")
    given = parser.parse_args(arguments)
    setting = usual(given.task)
    setting = replace(setting, steps=given.steps or setting.steps)
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(watch, given.task, variant, seed, setting, given.every)
            for variant, seed in product(given.variants, given.seeds)
        ]
        moments = [moment for job in jobs for moment in job.result()]
    command = reports.command_line("validation.system.watch", arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    saved = {"command": command, "torch": torch.__version__, "moments": [asdict(moment) for moment in moments]}
    write_whole(given.out / "watch.json", json.dumps(saved) + "\n")
    print("\n".join(table(moments)))


if __name__ == "__main__":
    main()
