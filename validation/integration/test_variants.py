"""What else a training may be told to do is done alike by one process and by several."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from validation import runs
from validation.integration import ranks
from validation.integration.layouts import BY_NAME, GLOBAL_BATCH_SIZE, SEQ_LEN, Layout, OneProcess, assert_same, train


@dataclass(frozen=True)
class Variant:
    """Options of a training.

    Attributes:
        layouts: where it may matter.
        for_layout: other options, that one process does without, because they are not to change anything.
        beside: options of the training that it must differ from; none for one that has no options of its own.
        seeded: whether all start from one checkpoint of step 0, whose weights nobody else starts with.
        metrics: to compare beside loss and gradient norm.
        gpu: whether only processes on GPUs can do it.
    """

    name: str
    options: tuple[str, ...]
    layouts: tuple[str, ...]
    for_layout: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    seeded: bool = False
    metrics: tuple[str, ...] = ()
    gpu: bool = False

    @property
    def marks(self) -> list[pytest.MarkDecorator]:
        return [ranks.on_gpus] if self.gpu else []


# Adam divides by the gradient's own size: only below its epsilon does it matter how long a gradient is.
ROUGH = ("--optimizer.eps=1e-3",)
VALIDATED = ("--validation.enable", "--validation.freq=5", "--validation.steps=2", f"--validation.seq_len={SEQ_LEN}")
DECAYED = ("--lr_scheduler.decay_ratio=0.8", "--lr_scheduler.decay_type=linear", "--lr_scheduler.min_lr_factor=0")
SELECTIVE = ("--activation_checkpoint.mode=selective",)
# A folder of short files, which is made for these tests: of the corpus, the first may be longer than all steps.
FOLDER = "--training.dataset_path"
SHORT = (FOLDER,)

VARIANTS = (
    Variant("validation", VALIDATED, ("fsdp2", "tp2", "pp2-1f1b", "cp2-headtail"), metrics=(runs.VALIDATION_LOSS,)),
    Variant("clipping", ("--training.max_norm=0.1", *ROUGH), ("fsdp2-tp2", "pp2-fsdp2", "cp2"), beside=ROUGH),
    Variant(
        "accumulation",
        (),
        ("fsdp2", "tp2", "pp2-1f1b", "cp2"),
        (f"--training.local_batch_size={GLOBAL_BATCH_SIZE // 4}",),
    ),
    Variant("schedule", DECAYED, ("fsdp2", "pp2-1f1b"), metrics=("lr",)),
    Variant("loop", (), ("fsdp2-tp2",), ("--optimizer.implementation=for-loop",)),
    Variant("foreach", (), ("fsdp2-tp2",), ("--optimizer.implementation=foreach",)),
    Variant("adam", ("--optimizer.name=Adam",), ("fsdp2-tp2",)),
    Variant("seeded", (), ("fsdp2", "tp2"), seeded=True),
    # Its weights are made elsewhere.
    Variant(
        "offload", ("--optimizer.name=Adam",), ("fsdp2",), ("--training.enable_cpu_offload",), seeded=True, gpu=True
    ),
    Variant("recompute", (), ("fsdp2-tp2", "pp2-1f1b", "cp2"), ("--activation_checkpoint.mode=full",)),
    Variant("recompute-some", (), ("fsdp2",), (*SELECTIVE, "--activation_checkpoint.selective_ac_option=2")),
    Variant("recompute-ops", (), ("fsdp2",), (*SELECTIVE, "--activation_checkpoint.selective_ac_option=op")),
    Variant("documents", ("--nsa.attn_mask_type=block_causal", *SHORT), ("fsdp2", "tp2"), beside=SHORT),
)


InFolder = Callable[[tuple[str, ...]], tuple[str, ...]]
OptionsOf = Callable[[Variant], tuple[str, ...]]


@pytest.fixture(scope="module")
def in_folder(tmp_path_factory: pytest.TempPathFactory) -> InFolder:
    """Completes options that name a folder of short files, the same whatever else changes."""
    folder = tmp_path_factory.mktemp("short")
    words = ("def", "return", "value", "for", "in", "range", "self", "import", "None", "yield")
    for i in range(200):
        chosen = (
            words[(i * 31 + j * j * 7 + j) % len(words)] + str((i + j) * 7919 % 97) for j in range(5 + i * 13 % 50)
        )
        (folder / f"{i:03}.py").write_text(" ".join(chosen) + "\n")

    def completed(options: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{option}={folder}" if option == FOLDER else option for option in options)

    return completed


@pytest.fixture
def options_of(one_process: OneProcess, in_folder: InFolder) -> OptionsOf:
    """Gives all options of a variant that one process has as well."""

    def options(variant: Variant) -> tuple[str, ...]:
        given = in_folder(variant.options)
        if not variant.seeded:
            return given
        saved = one_process("--checkpoint.create_seed_checkpoint", "--debug.seed=1")
        return (*given, f"--checkpoint.initial_load_path={saved / 'checkpoint' / 'step-0'}")

    return options


@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        pytest.param(
            variant,
            BY_NAME[name],
            id=f"{variant.name}-{name}",
            marks=[*variant.marks, *BY_NAME[name].marks],
        )
        for variant in VARIANTS
        for name in variant.layouts
    ],
)
def test_a_variant_trains_as_in_one_process(
    variant: Variant, layout: Layout, one_process: OneProcess, options_of: OptionsOf, tmp_path: Path
) -> None:
    options = options_of(variant)
    train(layout, tmp_path, *options, *variant.for_layout)
    assert_same(tmp_path, one_process(*options), (runs.LOSS, "grad_norm", *variant.metrics))


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(variant, id=variant.name, marks=variant.marks)
        for variant in VARIANTS
        if variant.options or variant.seeded
    ],
)
def test_a_variant_is_not_the_training_without(
    variant: Variant, one_process: OneProcess, options_of: OptionsOf, in_folder: InFolder
) -> None:
    """Otherwise the comparison would show nothing."""
    beside = in_folder(variant.beside)
    plain, varied = (runs.read_metrics(one_process(*options)) for options in (beside, options_of(variant)))
    names = variant.metrics or (runs.LOSS,)
    assert [varied[name] for name in names] != [plain[name] for name in names]
