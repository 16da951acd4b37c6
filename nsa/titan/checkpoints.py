"""TorchTitan's checkpoints, which know the job they are of, survive a full disk, and are never mistaken for whole.

`nsa.titan.runs` has what is decided from files alone. Rank 0 decides it and all ranks of the job hear the same.
"""

import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpoint import DATALOADER, MODEL, TRAIN_STATE, CheckpointManager
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from nsa.titan import runs
from nsa.titan.data import CorpusLoader, tokenizer_name
from nsa.titan.hugging_face import write_config
from nsa.titan.refusals import JobError

Result = TypeVar("Result")

# Options that decide what is trained; those that need more than a look are in `job_of`. Others are about how: layout,
# compilation, checkpointing, logging, validation, communication. `training.steps` says how long.
OPTIONS = {
    "model": ("name", "converters"),
    "optimizer": ("name", "lr", "beta1", "beta2", "eps", "weight_decay"),
    "lr_scheduler": ("warmup_steps", "decay_ratio", "decay_type", "min_lr_factor"),
    "training": ("dataset", "seq_len", "max_norm", "dtype", "mixed_precision_param"),
}
SCHEDULE = "lr_scheduler.total_steps"
# Fields without which a position in the data means nothing.
_DATA = {"corpus", "tokenizer", "training.dataset", "training.dataset_path"}
# Arguments of the model that another option stands for, or that change nothing but how it is computed.
_ARGUMENTS_APART = (
    "_enforced",
    "nsa",
    "seed",
    "backend",
    "max_seq_len",
    "attention",
    "attn_mask_type",
    "attn_type",
    "initial_gates",
)


def job_of(trainer: Any) -> dict[str, Any]:
    """Everything that decides what a trainer trains, by the options that set it."""
    options, arguments = trainer.job_config, asdict(trainer.model_args)
    training = options.training
    job = {f"{s}.{name}": getattr(getattr(options, s), name) for s, names in OPTIONS.items() for name in names}
    job |= {f"model.{name}": value for name, value in arguments.items() if name not in _ARGUMENTS_APART}
    job |= {f"nsa.{name}": arguments[name] for name in ("attention", "attn_mask_type", "initial_gates")}
    job |= {f"nsa.{name}": value for name, value in arguments["nsa"].items()}
    if options.model.converters:
        job["quantize"] = asdict(options.quantize)
    parallel = trainer.parallel_dims
    ranks = parallel.dp_replicate * parallel.dp_shard
    job["training.global_batch_size"] = trainer.gradient_accumulation_steps * training.local_batch_size * ranks
    job[SCHEDULE] = options.lr_scheduler.total_steps or training.steps
    job["debug.seed"] = options.debug.seed or 0
    if isinstance(trainer.dataloader, CorpusLoader):
        job["corpus"] = trainer.dataloader.corpus  # wherever its folder lies
    else:
        job["training.dataset_path"] = training.dataset_path
    job["tokenizer"] = tokenizer_name(trainer.tokenizer)
    job["code"] = runs.code_version()
    return job


def environment(folder: Path, assets: str | None = None) -> dict[str, str]:
    """Versions of the packages that a job runs on, and the path of its tokenizer relative to `folder`."""
    found = {"hf_assets_path": os.path.relpath(assets, folder)} if assets and os.path.isdir(assets) else {}
    for package in ("torch", "torchtitan", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def first_rank(decide: Callable[[], Result], job_config: JobConfig) -> Result:
    """What rank 0 decides, on every rank.

    Raises:
        SystemExit: rank 0 refused; it says why.
        OSError: rank 0 met one.
    """
    alone = dist.get_world_size() == 1 or job_config.comm.mode != "default"  # others are not real
    outcome: list[Any] = [None]
    if alone or dist.get_rank() == 0:
        try:
            outcome = [decide()]
        except runs.Refused as refusal:
            logger.error(str(refusal))
            outcome = [SystemExit(refusal.status)]
        except OSError as error:
            outcome = [OSError(str(error))]
    if not alone:
        dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


# The lock of this process, kept as long as it lives, or why it was refused.
_locks: dict[Path, IO[str] | runs.Refused] = {}


def lock_folder(job_config: JobConfig) -> None:
    """Locks `job.dump_folder` in the process of rank 0, before anything is written there, unless it has done so.

    A lock that another run has is not refused before `require_lock`, in which all ranks hear of it.

    Raises:
        SystemExit: the folder cannot be written to.
    """
    folder = Path(job_config.job.dump_folder)
    first = os.environ.get("RANK", "0") == "0"
    try:
        runs.require_writable(folder)
        if first and folder not in _locks:
            _locks[folder] = runs.lock(folder)
    except runs.InUse as refusal:
        _locks[folder] = refusal
    except runs.Refused as refusal:
        if first:
            logger.error(str(refusal))
        raise SystemExit(refusal.status) from None


def require_lock(job_config: JobConfig) -> None:
    """Ends all ranks where another run uses their folder.

    Raises:
        SystemExit: it does; rank 0 has said so.
    """

    def decide() -> None:
        held = _locks[Path(job_config.job.dump_folder)]
        if isinstance(held, runs.Refused):
            raise held

    first_rank(decide, job_config)


class Checkpoints(CheckpointManager):
    """TorchTitan's manager, made for a trainer that it finds among the states to save.

    A checkpoint of another job is refused, as is one that leaves nothing to train. A save that fails, on a full disk
    say, is removed, said, and does not end training; only the last one does.
    """

    def __init__(self, *args: Any, states: dict[str, Any], **kwargs: Any):
        super().__init__(*args, states=states, **kwargs)
        self._trainer = states[TRAIN_STATE]
        self._start = 0  # the step that was resumed from
        self._recorded = False
        self._saved = -1  # the last step whose save has begun and, as far as is known, succeeded

    @property
    def path(self) -> Path:
        """The folder of all checkpoints."""
        return Path(self.folder)

    @property
    def _allowed(self) -> Collection[str]:
        """Fields of the job that may differ from those of what is loaded."""
        return getattr(getattr(self._trainer.job_config, "nsa", None), "allow_changes", ())

    def _decide(self, decide: Callable[[], Result]) -> Result:
        return first_rank(decide, self._trainer.job_config)

    # Loading

    @torch.no_grad()
    def load(self, step: int = -1) -> bool:
        """Loads a checkpoint of this job; False where there is none.

        Raises:
            SystemExit: it cannot or must not be gone on from; rank 0 has said why.
        """
        if not self.enable:
            return False
        shapes = self._shapes()
        found, self.exclude_from_loading = self._decide(lambda: self._find(step, shapes))
        if found is None:
            # TorchTitan asks whether the folder exists where it means whether a checkpoint does: a first save that was
            # killed would keep it from the initial weights.
            self._require_weights()
            folder = str(self.path)
            self.folder = str(self.path / "none")
            try:
                loaded = super().load(-1)
            finally:
                self.folder = folder
        else:
            loaded = super().load(found)
        self._start = self._trainer.step
        return loaded

    def _require_weights(self) -> None:
        """Looks at weights in Hugging Face's format, from which this run begins if it does.

        Raises:
            SystemExit: they do not fit the model, or there are none.
        """
        if not self.initial_load_in_hf:
            return
        adapter = self.sd_adapter
        folder = Path(self.initial_load_path or (adapter and adapter.hf_assets_path) or "")

        def look() -> tuple[frozenset[int], bool]:
            try:
                misfits, changes = adapter.read(folder), adapter.differences(folder)
            except JobError as error:
                raise runs.Refused(f"checkpoint.initial_load_in_hf: {error}") from error
            runs.require_same_job(folder, changes, self._allowed, misfits[:5])
            return adapter.from_dense, adapter.tied

        adapter.from_dense, adapter.tied = self._decide(look)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter and buffer in the model, of all ranks' parts together."""
        own = {name: tuple(value.shape) for name, value in self.states[MODEL].state_dict().items()}
        if dist.get_world_size() == 1 or self._trainer.job_config.comm.mode != "default":
            return own
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        return {name: shape for part in parts for name, shape in part.items()}

    def _find(self, wanted: int, shapes: dict[str, tuple[int, ...]]) -> tuple[int | None, list[str]]:
        """The step to load, if any, and what of it to leave out.

        Raises:
            nsa.titan.runs.Refused: this run must not go on from it.
        """
        excluded = list(self.exclude_from_loading)
        step = runs.step_to_load(self.path, wanted, rewinds=not self.load_only)
        if step is None:
            self._require_initial(shapes)
            return None, excluded
        checkpoint = runs.checkpoints(self.path)[step]
        if step == 0:  # initial weights, which any job may begin with
            return step, excluded
        changes = self._require_job(step, checkpoint, shapes)
        runs.require_steps_left(checkpoint, step, self._trainer.job_config.training.steps)
        if _DATA & changes.keys():
            excluded.append(DATALOADER)
        self._require_state(checkpoint, excluded)
        if DATALOADER in excluded:
            logger.warning("The position in the data is not loaded: it begins with its first token")
        return step, excluded

    def _require_initial(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Says what was left unfinished; refuses initial weights that are not there or do not fit."""
        unfinished = list(runs.checkpoints(self.path))
        if unfinished:
            logger.warning(
                f"{self.folder} has saves that were not finished, of steps {unfinished}, and none to resume from"
            )
        if self.initial_load_in_hf or not self.initial_load_path:
            return
        initial = Path(self.initial_load_path)
        if not runs.is_whole(initial):
            raise runs.Refused(f"checkpoint.initial_load_path must be the folder of a checkpoint, got {str(initial)!r}")
        runs.require_same_job(initial, {}, (), self._misfits(initial, shapes))

    def _require_job(
        self, step: int, checkpoint: Path, shapes: dict[str, tuple[int, ...]]
    ) -> dict[str, tuple[Any, Any]]:
        """How this job differs from that of the checkpoint, where it may; refuses it where it must not."""
        job, before = job_of(self._trainer), runs.job_of(self.path, step)
        if before is None:
            logger.warning(f"{checkpoint} does not say of which job it is: nothing tells whether it is this one")
        changes: dict[str, tuple[Any, Any]] = {} if before is None else runs.differences(before, job)
        follows_steps = self._trainer.job_config.lr_scheduler.total_steps is None
        if SCHEDULE in changes and follows_steps:  # training on is ordinary
            self._warn_of_schedule(step, *changes.pop(SCHEDULE))
        runs.require_same_job(checkpoint, changes, self._allowed, self._misfits(checkpoint, shapes))
        if changes:
            logger.warning(f"Going on from {checkpoint} with other settings, as nsa.allow_changes says: {changes}")
        return changes

    def _warn_of_schedule(self, step: int, old: int, new: int) -> None:
        options = self._trainer.job_config
        before, after = (_learning_rates(options, total) for total in (old, new))
        changed = (n for n in range(step, options.training.steps) if before(n) != after(n))
        if (first := next(changed, None)) is not None:
            logger.warning(
                f"The learning rate falls over {new} steps, no longer over {old}: step {first + 1} has "
                f"{after(first):.3g} in place of {before(first):.3g}. --{SCHEDULE} {old} keeps it as it was"
            )

    def _misfits(self, checkpoint: Path, shapes: dict[str, tuple[int, ...]]) -> list[str]:
        saved = _metadata(checkpoint)
        if saved is None:
            return []
        return [
            f"{name} is {list(shape)}, and {list(saved[name].size) if name in saved else 'missing'} in the checkpoint"
            for name, shape in shapes.items()
            if name not in saved or tuple(saved[name].size) != shape
        ][:5]

    def _require_state(self, checkpoint: Path, excluded: list[str]) -> None:
        """Refuses a checkpoint without what a run goes on with."""
        if TRAIN_STATE in excluded:
            raise runs.Refused(
                f"without {TRAIN_STATE} (checkpoint.exclude_from_loading) training would begin at step 1 and save over "
                f"what {self.folder!r} has: begin in another folder with --job.dump_folder DIR "
                f"--checkpoint.initial_load_path {checkpoint}"
            )
        saved = _metadata(checkpoint)
        if saved is None:
            raise runs.Refused(
                f"{str(checkpoint)!r} has weights in Hugging Face's format, which is too little to go on from: start "
                f"another run with --job.dump_folder DIR --checkpoint.initial_load_in_hf "
                f"--checkpoint.initial_load_path {checkpoint}"
            )
        if f"{TRAIN_STATE}.step" not in saved:
            raise runs.Refused(
                f"{str(checkpoint)!r} has the model alone (checkpoint.last_save_model_only), which is too little to go "
                f"on from: start another run with --job.dump_folder DIR --checkpoint.initial_load_path {checkpoint}"
            )
        if DATALOADER in excluded:
            return
        missing = [name for name in self.states[DATALOADER].state_dict() if f"{DATALOADER}.{name}" not in saved]
        if missing:
            raise runs.Refused(
                f"{str(checkpoint)!r} has a position in the data of another loader or of an older version, without "
                f"{missing}: go on all the same, with the first token of the data, with "
                f"--checkpoint.exclude_from_loading {DATALOADER}"
            )

    # Saving

    def save(self, curr_step: int, last_step: bool = False) -> None:
        """Saves a checkpoint if one is due.

        Raises:
            SystemExit: the last one failed, or the step was saved by an earlier run; rank 0 has said why.
        """
        if not self._should_save(curr_step, last_step):
            return
        self._finish(last_step and curr_step == self._saved)
        if curr_step == self._saved:
            return
        try:
            if not self._recorded:
                self._decide(lambda: self._record(curr_step))
                self._recorded = True
            super().save(curr_step, last_step)
        except (CheckpointException, OSError) as error:
            self._failed(curr_step, error, last_step)
        else:
            self._saved = curr_step

    def dcp_save(self, state_dict: Any, checkpoint_id: str, *args: Any, **kwargs: Any) -> Any:
        """TorchTitan's; beside weights in Hugging Face's format also writes what model they are of."""
        result = super().dcp_save(state_dict, checkpoint_id, *args, **kwargs)
        if kwargs.get("to_hf"):
            dtype = next(iter(state_dict.values())).dtype

            def describe() -> None:
                shutil.rmtree(Path(checkpoint_id) / "sharded", ignore_errors=True)  # the same weights, in parts
                tokenizer = tokenizer_name(self._trainer.tokenizer)
                try:
                    write_config(Path(checkpoint_id), self._trainer.model_args, dtype, tokenizer)
                except JobError as error:
                    raise OSError(str(error)) from error

            self._decide(describe)
        return result

    def _record(self, step: int) -> None:
        """Records the job before its first save; a checkpoint that is there is not saved over."""
        checkpoint = self.path / f"step-{step}"
        if runs.is_whole(checkpoint):
            raise runs.Refused(f"{str(checkpoint)!r} is there already: remove it, or name another --job.dump_folder")
        known = environment(self.path, self._trainer.job_config.model.hf_assets_path)
        runs.record_job(self.path, job_of(self._trainer), self._start, known)

    def _finish(self, last: bool) -> None:
        """Waits for a save in the background."""
        try:
            self._async_wait()
        except (CheckpointException, OSError) as error:
            self.save_future = None
            step, self._saved = self._saved, -1
            self._failed(step, error, last)

    def _failed(self, step: int, error: BaseException, last: bool) -> None:
        def account() -> None:
            reason, remains = _reason(error, self.path.parent), self.path / f"step-{step}"
            if not runs.is_whole(remains):
                shutil.rmtree(remains, ignore_errors=True)
            saved = runs.saved_steps(self.path)
            stands = f"{self.path / f'step-{saved[-1]}'} is the last one" if saved else "no other one is there"
            then = "the run ends without it" if last else "training goes on"
            message = f"The checkpoint of step {step} could not be saved ({reason}): {then}, and {stands}"
            if last:
                raise runs.Refused(message)
            logger.error(message)

        self._decide(account)

    def _purge_stale_checkpoints(self) -> None:
        """Removes old checkpoints; only whole ones count as the latest."""
        if self.keep_latest_k > 0 and dist.get_rank() == 0:
            for checkpoint in runs.stale_checkpoints(self.path, self.keep_latest_k):
                self.purge_queue.put(str(checkpoint))


def _learning_rates(options: JobConfig, total: int) -> Callable[[int], float]:
    """The learning rate by the number of steps that were trained, on a schedule made for so many steps in all."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    logger.disabled = True  # what is said of a schedule was said when the run's own was made
    try:
        (factor,) = build_lr_schedulers([optimizer], options.lr_scheduler, total).schedulers[0].lr_lambdas
    finally:
        logger.disabled = False
    return lambda step: options.optimizer.lr * factor(step)


def _metadata(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint in PyTorch's format has, by name; None for another format."""
    if not (checkpoint / ".metadata").is_file():
        return None
    return FileSystemReader(checkpoint).read_metadata().state_dict_metadata


def _reason(error: BaseException, folder: Path) -> str:
    """What failed on some rank, and the room on the disk, because PyTorch's writer does not always tell a full one."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    first_line = next(iter(str(error).splitlines()), type(error).__name__)
    return f"{first_line}; {shutil.disk_usage(folder).free / 2**20:,.1f} MiB were free then"
