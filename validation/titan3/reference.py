"""The first losses by TorchTitan 0.2.2, which 0.3 is held to: `python -m validation.titan3.reference` saves them.

Both train on the same text, which no installation of Python changes.
"""

import json
import random
import tempfile
from pathlib import Path

from validation import runs

FILE = Path(__file__).parent / "losses.json"
FLAVORS = ("debug", "debug_dense")
TOTAL_STEPS, STEPS, SEQ_LEN = 50, 10, 256
"""Of the schedule, of those that are compared, and tokens a row."""


def write_corpus(folder: Path) -> None:
    """Writes text that a model learns quickly: sentences of a few words that were drawn once."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(60)]
    folder.mkdir(exist_ok=True)
    for number in range(40):
        sentences = (" ".join(draw.choices(words, k=draw.randint(4, 9))) for _ in range(150))
        (folder / f"{number}.txt").write_text(".\n".join(sentences) + ".\n")


def losses(flavor: str, folder: Path) -> list[float]:
    """Losses of the first steps by TorchTitan 0.2.2 in one process."""
    write_corpus(folder / "corpus")
    options = (
        f"--model.flavor={flavor}",
        f"--training.dataset_path={folder / 'corpus'}",
        f"--training.seq_len={SEQ_LEN}",
        f"--training.steps={STEPS}",
        f"--lr_scheduler.total_steps={TOTAL_STEPS}",
        "--training.mixed_precision_param=float32",
        "--metrics.log_freq=1",
        "--validation.no-enable",
        "--checkpoint.no-enable",
    )
    return list(runs.train(options, folder / flavor)[runs.LOSS].values())


def saved(flavor: str) -> list[float]:
    """Those in the file."""
    return json.loads(FILE.read_text())[flavor]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = {flavor: losses(flavor, Path(scratch)) for flavor in FLAVORS}
    FILE.write_text(json.dumps(found, indent=1) + "\n")
