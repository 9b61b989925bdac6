"""From a validated configuration to a finished run: everything before and after the loop.

Nothing is written until the configuration, the data and the run directory have been found in order.
"""

import contextlib
import json
import logging
import shutil
import signal
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml

from data.batches import Batches, ValidationWindows
from data.dataset import TokenDataset
from data.manifest import Manifest
from models import GPT2, GPT2Config
from training import checkpoints, hardware, records
from training.checkpoints import Checkpoint
from training.compose import validate
from training.config import ConfigurationError, RunConfig, micro_batch_size
from training.corpus import open_corpus
from training.curvature import CurvaturePass
from training.distributed import Distributed
from training.ledger import CompilationClock, Ledger
from training.loop import Run, TrainingState, train
from training.memory import keep_memory_mapped
from training.optimizers import build_optimizers
from training.profiling import profiler
from training.records import MetricsWriter, RunRecord, Status
from training.strategies import build_strategy
from training.terminal import Display
from training.trackers import NoTracker, Tracker, build_tracker
from training.weights import InitialWeights

log = logging.getLogger(__name__)

#: Process exit codes. 75 is sysexits.h's EX_TEMPFAIL: try again, the run goes on where it stopped.
EXIT_CODES: dict[Status, int] = {"completed": 0, "failed": 1, "diverged": 3, "preempted": 75}
EXIT_CONFIGURATION = 2


@dataclass(frozen=True)
class Outcome:
    """How a run ended, and where its record is."""

    status: Status
    directory: Path
    final_val_loss: float | None

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.status]


def resolve(config: RunConfig, device: torch.device, *, warn: bool = True) -> RunConfig:
    """The configuration with `auto` replaced by what this machine can do; the run's name and record are of this one.

    Raises:
        ConfigurationError: compilation is asked for and no compiler works.
    """
    precision = hardware.resolve_precision(config.train, device)
    compiled = hardware.resolve_compile(config.train, warn=warn)
    train_config = config.train.model_copy(update={"precision": precision, "compile": compiled})
    return config.model_copy(update={"train": train_config})


def execute(config: RunConfig) -> Outcome:
    """One run, from set-up to summary, on every rank of the environment.

    Raises:
        ConfigurationError: the configuration cannot be run here; nothing has been written.
        DataError: the corpus's tokens are missing or damaged; nothing has been written.
    """
    if config.strategy.name == "deepspeed":
        from training.strategies.deepspeed import prepare_environment

        prepare_environment(config.train.device)
    distributed = Distributed.start(config.train.device)
    try:
        outcome = _execute(config, distributed)
    except ConfigurationError:  # on every rank
        distributed.stop()
        raise
    except Exception as error:
        distributed.failed(error)
        raise
    distributed.stop()
    return outcome


def _execute(config: RunConfig, distributed: Distributed) -> Outcome:
    if config.strategy.name == "single" and distributed.world_size > 1:
        raise ConfigurationError(
            f"strategy=single: there are {distributed.world_size} ranks; choose strategy=ddp or start one process"
        )
    keep_memory_mapped()
    config = resolve(config, distributed.device, warn=distributed.is_main)
    micro = micro_batch_size(config, distributed.world_size)
    directory = Path(config.output_dir) / config.run_name
    plan = distributed.broadcast_object(_plan(config, directory) if distributed.is_main else None)
    if isinstance(plan, ConfigurationError):
        raise plan
    if plan.finished is not None:
        if distributed.is_main:
            print(f"{directory} is already {plan.finished} for this configuration; overwrite=true runs it again")
        summary = RunRecord.open(directory).summary or {}
        return Outcome(plan.finished, directory, summary.get("final_val_loss"))

    tokens_directory, manifest = open_corpus(config, distributed)
    shape = model_shape(config, manifest)
    weights = InitialWeights(config.model, shape, config.seeds.model)
    length, rank, world_size = config.train.sequence_length, distributed.rank, distributed.world_size
    batches = Batches(
        TokenDataset(tokens_directory, "train"),
        config.seeds.data,
        config.train.global_batch_size,
        length,
        rank,
        world_size,
    )
    validation = ValidationWindows(
        TokenDataset(tokens_directory, "validation"), config.eval.tokens, length, rank, world_size
    )
    if config.train.deterministic:
        hardware.make_deterministic()
    torch.manual_seed(config.seeds.model * world_size + rank)  # dropout alone draws from this stream
    clock = CompilationClock.installed()
    ledger = Ledger(distributed.device, clock)
    strategy = build_strategy(config, distributed)
    with torch.device("meta"):
        model = GPT2(shape)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    strategy.prepare(model, weights, build_optimizers(config.optimizer, compile_step=bool(config.train.compile)))
    state = TrainingState()
    resume_at = None
    if plan.checkpoint is not None:
        checkpoint = Checkpoint(plan.checkpoint, verify=False)  # verified when the plan was made
        strategy.load(checkpoint)
        state = TrainingState(**checkpoint.state["training"])
        ledger.load_state_dict(checkpoint.state["ledger"])
        _restore_random_state(checkpoint, rank)
        resume_at = checkpoint.state["metrics_bytes"] if plan.own_checkpoint else None
    recorder = Recorder.open(config, directory, plan, distributed, manifest, weights, resume_at, state)
    for line in plan.rejected:
        recorder.message(f"passed over: {line}")
    if plan.checkpoint is not None:
        if plan.own_checkpoint and distributed.is_main:
            checkpoints.set_aside_newer(directory / "checkpoints", state.step)
        recorder.message(f"resuming from {plan.checkpoint} at step {state.step}")
        recorder.write({"kind": "event", "event": "resumed", "step": state.step, "world_size": world_size})
    root = directory / "checkpoints"

    def save(current: TrainingState) -> None:
        saved = {
            "training": asdict(current),
            "ledger": ledger.state_dict(),
            "metrics_bytes": distributed.broadcast_object(recorder.sync()),
            "config": config.model_dump(mode="json"),
        }
        pieces = [*strategy.pieces(), *_random_state(config, rank)]
        checkpoints.save(root, current.step, pieces, saved, distributed)
        if distributed.is_main:
            checkpoints.prune(root, config.checkpoint.keep)

    status: Status = "failed"
    with _stop_signals() as stop, profiler(config.profile, directory, enabled=distributed.is_main) as profiler_step:
        run = Run(
            config=config,
            strategy=strategy,
            batches=batches,
            validation=validation,
            curvature=CurvaturePass.of(
                config.optimizer, config.seeds.curvature, config.train.global_batch_size, micro
            ),
            ledger=ledger,
            micro_batch_size=micro,
            eval_micro_batch_size=config.eval.micro_batch_size or micro,
            parameters=parameters,
            write=recorder.write,
            save=save,
            stop_requested=stop,
            profiler_step=profiler_step,
            state=state,
        )
        try:
            status = train(run)
        finally:
            recorder.finish(status, run)
    return Outcome(status, directory, state.final_val_loss)


def model_shape(config: RunConfig, manifest: Manifest) -> GPT2Config:
    """The model's shape: the configuration's, with the vocabulary of the prepared tokens."""
    model = config.model
    return GPT2Config(
        vocab_size=manifest.vocab_size,
        n_layer=model.n_layer,
        n_head=model.n_head,
        n_embd=model.n_embd,
        block_size=model.block_size,
        bias=model.bias,
        dropout=model.dropout,
        attention_layer_scaling=model.attention_layer_scaling,
    )


@dataclass(frozen=True)
class _Plan:
    """What is to be done with the run directory."""

    finished: Status | None = None
    checkpoint: Path | None = None
    own_checkpoint: bool = False  # of this run: its record goes on; another's: a new record begins
    rejected: tuple[str, ...] = ()


def _plan(config: RunConfig, directory: Path) -> "_Plan | ConfigurationError":
    """Decide between fresh, resumed and finished, without changing anything. Errors are returned, for every rank."""
    try:
        given = None if config.resume in ("auto", "never") else _given_checkpoint(Path(config.resume))
        if config.overwrite or not (directory / records.CONFIG_FILE).exists():
            return _Plan(checkpoint=given)
        _same_run(config, directory)
        if given is not None:
            own = given.resolve().parent == (directory / "checkpoints").resolve()
            if not own:
                raise ConfigurationError(
                    f"resume={config.resume}: {directory} already has a run of its own; give another name= or overwrite=true"
                )
            return _Plan(checkpoint=given, own_checkpoint=True)
        if config.resume == "never":
            raise ConfigurationError(
                f"resume=never: {directory} exists; choose resume=auto to go on, overwrite=true to replace it"
            )
        status = (RunRecord.open(directory).summary or {}).get("status")
        if status in ("completed", "diverged"):
            return _Plan(finished=status)
        newest, rejected = checkpoints.newest_valid(directory / "checkpoints")
        if newest is None:
            return _Plan(rejected=tuple(rejected))
        return _Plan(checkpoint=newest.directory, own_checkpoint=True, rejected=tuple(rejected))
    except ConfigurationError as error:
        return error


def _given_checkpoint(path: Path) -> Path:
    """The checkpoint that `resume=<path>` names: itself, or the newest valid one of a run directory."""
    if path.is_dir() and not (path / checkpoints.MANIFEST_FILE).exists():
        newest, rejected = checkpoints.newest_valid(path / "checkpoints")
        if newest is None:
            reason = "; ".join(rejected) or "there is none"
            raise ConfigurationError(f"resume={path}: no valid checkpoint in {path / 'checkpoints'} ({reason})")
        return newest.directory
    try:
        return Checkpoint(path).directory
    except checkpoints.CheckpointError as error:
        raise ConfigurationError(f"resume={path}: {error}; give a checkpoint or a run directory") from error


def _same_run(config: RunConfig, directory: Path) -> None:
    """Raise ConfigurationError if the directory holds a run of another configuration, naming the differing keys."""
    try:
        there = validate(yaml.safe_load((directory / records.CONFIG_FILE).read_text()))
    except (ConfigurationError, yaml.YAMLError) as error:
        raise ConfigurationError(
            f"{directory / records.CONFIG_FILE} cannot be read ({error}); give another name= or overwrite=true"
        ) from error
    if there.identity() == config.identity() and there.seed == config.seed:
        return
    here_values, there_values = _flat(config.model_dump(mode="json")), _flat(there.model_dump(mode="json"))
    relevant = set(_flat(config.identity())) | set(_flat(there.identity())) | {"seed"}
    differing = sorted(key for key in relevant if here_values.get(key) != there_values.get(key))
    shown = ", ".join(f"{key}={there_values.get(key)} there and {here_values.get(key)} here" for key in differing[:4])
    raise ConfigurationError(
        f"name={config.run_name}: {directory} is a run of another configuration ({shown}); "
        "give another name= or overwrite=true"
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


class Recorder:
    """Where lines go: record first, then display and tracker. Rank 0 writes, the others do nothing."""

    def __init__(self, directory: Path, metrics: MetricsWriter | None, display: Display, tracker: Tracker) -> None:
        self._directory = directory
        self._metrics = metrics
        self._display = display
        self._tracker = tracker

    @classmethod
    def open(
        cls,
        config: RunConfig,
        directory: Path,
        plan: _Plan,
        distributed: Distributed,
        manifest: Manifest,
        weights: InitialWeights,
        resume_at: int | None,
        state: TrainingState,
    ) -> "Recorder":
        """Create or reopen the run directory; the first writes of a run happen here."""
        display = Display(config.train.steps, state.step, enabled=distributed.is_main)
        if not distributed.is_main:
            return cls(directory, None, display, NoTracker())
        if not plan.own_checkpoint and directory.exists():
            shutil.rmtree(directory)
        (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
        environment = {
            "versions": hardware.versions(),
            "git": hardware.git_state(),
            "hardware": hardware.describe(distributed.device),
            "world_size": distributed.world_size,
            "data_manifest_sha256": manifest.sha256,
            "initial_weights_sha256": weights.sha256(),
        }
        if not plan.own_checkpoint:
            records.write_config(directory, config.model_dump(mode="json") | {"name": config.run_name})
            records.write_environment(directory, environment)
        (directory / records.SUMMARY_FILE).unlink(missing_ok=True)
        metrics = MetricsWriter(directory, resume_at)
        display.message(f"run directory {directory}")
        return cls(directory, metrics, display, build_tracker(config, directory, environment))

    def write(self, line: Mapping[str, Any]) -> None:
        if self._metrics is None:
            return
        self._metrics.write(line)
        if line["kind"] == "train":
            self._display.step(line)
        elif line["kind"] == "eval":
            self._display.evaluation(line)
        self._tracker.log(json.loads(records.json_line(line)))

    def message(self, text: str) -> None:
        self._display.message(text)

    def sync(self) -> int:
        """The record is on the disk up to here: its size in bytes."""
        return self._metrics.sync() if self._metrics is not None else 0

    def finish(self, status: Status, run: Run) -> None:
        """Write the summary and close everything."""
        self._display.close()
        if self._metrics is None:
            return
        ledger, state, config = run.ledger, run.state, run.config
        ledger.settle()
        summary = {
            "status": status,
            "final_val_loss": state.final_val_loss,
            "best_val_loss": state.best_val_loss,
            "steps": state.step,
            "tokens": state.step * config.train.global_batch_size * config.train.sequence_length,
            "flops": ledger.flops,
            "seconds": ledger.seconds,
            "ledger": ledger.as_dictionary(),
            "bytes_communicated": ledger.bytes_communicated,
            "peak_memory_bytes": hardware.peak_memory_bytes(run.strategy.device),
            "parameters": run.parameters,
        }
        if status == "diverged":
            self.write({"kind": "event", "event": "diverged", "step": state.step})
        self._metrics.sync()
        self._metrics.close()
        records.write_summary(self._directory, summary)
        self._tracker.finish(summary)
        loss = "-" if state.final_val_loss is None else f"{state.final_val_loss:.4f}"
        self._display.message(f"{status} at step {state.step}, validation loss {loss}: {self._directory}")


@contextlib.contextmanager
def _stop_signals() -> Iterator[Any]:
    """A function that says whether SIGTERM, SIGINT or SIGUSR1 has asked to stop; a second signal exits at once."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            raise SystemExit(128 + number)
        received.append(number)

    previous = {}
    if _in_main_thread():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            previous[number] = signal.signal(number, handle)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


def _random_state(config: RunConfig, rank: int) -> Iterator[Any]:
    """With dropout, this rank's generator state as a piece of the checkpoint; without, nothing draws from it."""
    from training.strategies.base import Piece

    if config.model.dropout > 0:
        states = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            states["cuda"] = torch.cuda.get_rng_state()
        for device, values in states.items():
            yield Piece(f"rng.{device}.{rank}", (values.numel(),), 0, values)


def _restore_random_state(checkpoint: Checkpoint, rank: int) -> None:
    for name in checkpoint.names():
        if name == f"rng.cpu.{rank}":
            torch.set_rng_state(checkpoint.tensor(name))
        elif name == f"rng.cuda.{rank}" and torch.cuda.is_available():
            torch.cuda.set_rng_state(checkpoint.tensor(name))


def quiet_third_party_warnings() -> None:
    """Warnings of libraries that say nothing to a user of this project."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\..*")
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
