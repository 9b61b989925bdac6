"""Execute a validated configuration: everything before and after the loop.

Nothing is written until the configuration, the data and the run directory have been checked.
"""

import contextlib
import datetime
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.batches import Batches, ValidationWindows
from data.dataset import TokenDataset
from data.errors import DataError
from data.files import sync_directory, why_not_written
from data.manifest import Manifest
from data.tokenizers import open_tokenizer
from sophia import kernels
from training import hardware, records
from training.architectures import build_model, forward_flops
from training.config import ConfigurationError, ExternalConfig, RunConfig, RunHeldError, micro_batch_size, refusal
from training.corpus import open_corpus
from training.curvature import CurvaturePass
from training.distributed import Distributed
from training.evaluation import bits_per_byte
from training.exits import EXIT_DIVERGED, EXIT_FAILED, EXIT_PREEMPTED
from training.exports import Exports
from training.external import has_evaluation_mode
from training.loop import NotSaved, Run, TrainingState, train
from training.optimizers import build_optimizers
from training.recording.ledger import CompilationClock, Ledger
from training.recording.profiling import profiler
from training.recording.recorder import Recorder
from training.recording.terminal import Display
from training.recording.trackers import build_tracker
from training.records import RecordError, RunRecord, Status, flatten
from training.reliability import checkpoints
from training.reliability.checkpoints import EVALUATED, Checkpoint, CheckpointError
from training.reliability.guards import RanksDiffer
from training.reliability.resumption import (
    SAME_COMMAND,
    Decision,
    check_tokens,
    decide,
    how_to_resume,
    is_restart,
)
from training.reliability.run_directory import REPLACED, RunDirectory, is_run, refuse_links
from training.reliability.signals import StopSignals
from training.reliability.watchdog import Watchdog
from training.strategies import build_strategy
from training.strategies.base import NumberPiece, Piece, Strategy
from training.strategies.state import refuse_unsavable_state
from training.weights import InitialWeights

EXIT_CODES: dict[Status, int] = {
    "completed": 0,
    "failed": EXIT_FAILED,
    "diverged": EXIT_DIVERGED,
    "preempted": EXIT_PREEMPTED,
}


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
    """Replace `auto` in the configuration by what this machine supports. The run's name and record use the result.

    Raises:
        ConfigurationError: compilation is requested and no compiler works.
    """
    precision = hardware.resolve_precision(config.train, device)
    compiled = hardware.resolve_compile(config.train, warn=warn)
    train_config = config.train.model_copy(update={"precision": precision, "compile": compiled})
    return config.model_copy(update={"train": train_config})


def _resolve_for_ranks(config: RunConfig, distributed: Distributed) -> tuple[RunConfig, int]:
    """Return the resolved configuration and each rank's micro-batch size."""
    if config.strategy.name == "single" and distributed.world_size > 1:
        raise ConfigurationError(
            f"strategy=single: cannot run on {distributed.world_size} ranks; choose strategy=ddp or start one process"
        )
    micro = micro_batch_size(config, distributed.world_size)
    return resolve(config, distributed.device, warn=distributed.is_main), micro


def execute(config: RunConfig, begun: Callable[[], None] = lambda: None) -> Outcome:
    """Execute a run from set-up to summary. Every rank calls it.

    Args:
        config: the run.
        begun: called before a stop signal no longer ends the process immediately.

    Raises:
        ConfigurationError: the configuration cannot be run here; nothing has been written.
        DataError: the corpus's tokens are missing or damaged; nothing has been written.
    """
    if config.strategy.name == "deepspeed":
        from training.strategies.deepspeed import prepare_environment

        prepare_environment(config.train.device)
    if config.train.device == "cpu" or not torch.cuda.is_available():
        hardware.keep_memory_mapped()
    with (
        StopSignals(EXIT_PREEMPTED, speaks=int(os.environ.get("RANK", 0)) == 0, begun=begun) as stop,
        contextlib.ExitStack() as held,
    ):
        distributed = Distributed.start(config.train.device, _collective_timeout(config))
        if distributed.world_size > 1:
            stop.begin()  # the ranks stop together, in the loop: the others would wait for a rank that exits alone
        try:
            outcome = _execute(config, distributed, stop, held)
            distributed.stop()
            if outcome.status == "completed":
                distributed.end_after_main()
        except (ConfigurationError, DataError):  # on every rank
            distributed.stop()
            raise
        except Exception as error:
            distributed.failed(error)
            raise
        return outcome


def _collective_timeout(config: RunConfig) -> datetime.timedelta:
    """Return the time-out of a collective: longer than the watchdog's, whose report is better."""
    minutes = config.guards.hang_minutes
    return datetime.timedelta(minutes=10 + 2 * minutes) if minutes is not None else datetime.timedelta(days=1)


def _execute(config: RunConfig, distributed: Distributed, stop: StopSignals, held: contextlib.ExitStack) -> Outcome:
    hardware.release_earlier_runs(distributed.device)
    given = config
    config, micro = distributed.on_all(lambda: _resolve_for_ranks(given, distributed))
    distributed.agree(
        {"code": hardware.code_sha256()[:12]} | flatten(config.shared_by_ranks()),
        "start all ranks with the same code and configuration",
    )
    directory = Path(config.output_dir) / config.run_name
    place = held.enter_context(contextlib.closing(RunDirectory(directory)))
    decided = distributed.broadcast_object(distributed.on_main(lambda: _decide(config, place, distributed)))
    if decided.finished is not None:
        if distributed.is_main:
            began = f" (it began with resume={decided.origin})" if decided.origin else ""
            again = "run it again with overwrite=true"
            print(f"{directory} is already {decided.finished} for this configuration{began}; {again}")
        summary = distributed.broadcast_object(distributed.on_main(lambda: RunRecord.open(directory).summary)) or {}
        return Outcome(decided.finished, directory, summary.get("final_val_loss"))

    tokens_directory, manifest = open_corpus(config, distributed)
    if decided.metrics_bytes is not None:
        distributed.on_main(lambda: check_tokens(directory, manifest.sha256))
    model = distributed.on_all(lambda: build_model(config.model, manifest.vocab_size))
    flops = distributed.on_all(lambda: forward_flops(config.model, model, config.train.sequence_length))
    weights = distributed.on_all(lambda: InitialWeights(config.model, model, config.seeds.model))
    training_set, validation_set = distributed.on_all(
        lambda: [TokenDataset(tokens_directory, split) for split in ("train", "validation")]
    )
    length, rank, world_size = config.train.sequence_length, distributed.rank, distributed.world_size
    token_bytes, without_bytes = distributed.broadcast_object(
        distributed.on_main(lambda: _token_bytes(manifest, tokens_directory))
    )
    batches = Batches(
        training_set,
        config.seeds.data,
        config.train.global_batch_size,
        length,
        rank,
        world_size,
    )
    validation = ValidationWindows(validation_set, config.eval.tokens, length, rank, world_size)
    strategy = build_strategy(config, distributed)
    distributed.on_all(lambda: refuse_unsavable_state(build_optimizers(config.optimizer, compile_step=False), strategy))
    hardware.set_deterministic(config.train.deterministic)
    torch.manual_seed((config.seeds.model * world_size + rank) % 2**63)  # only dropout draws from this stream
    # Code compiled for this process's previous run counts against the recompilation limit, past which nothing is compiled.
    torch._dynamo.reset()
    kernels.reset()
    ledger = Ledger(distributed.device, CompilationClock.installed())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    compiled = bool(config.train.compile)
    strategy.prepare(
        model, weights, build_optimizers(config.optimizer, compile_step=compiled, kind_of=model.parameter_kind)
    )
    state = TrainingState()
    if decided.checkpoint is not None:
        state = _load(decided.checkpoint, strategy, ledger, distributed)

    display = Display(config.train.steps, state.step, enabled=distributed.is_main)
    held.callback(display.close)  # the recorder closes it too, unless it cannot be opened
    recorder = distributed.on_main(
        lambda: _open_record(config, place, decided, state.step, distributed, manifest, weights, display)
    ) or Recorder(place, display)
    if without_bytes is not None:
        recorder.message(f"no bits per byte: {without_bytes}")
    recorder.message(opening_line(config, parameters, manifest.vocab_size, distributed))
    if (how := how_to_resume(config, recorder.place.path)) != SAME_COMMAND:
        recorder.message(f"to resume this run, {how}")
    for line in decided.rejected:
        recorder.message(f"checkpoint skipped: {line}")
    if decided.checkpoint is not None:
        recorder.message(f"resuming from {decided.checkpoint} at step {state.step}")

    def report_export(line: str, step: int) -> None:
        recorder.write({"kind": "event", "event": "export", "step": step, "reason": line})
        recorder.message(line)

    exports = Exports(
        directory, config.checkpoint.export_at if distributed.is_main else (), tokens_directory, report_export
    )
    exports.start()  # those that were interrupted

    def save(current: TrainingState) -> None:
        saved = {
            "training": asdict(current),
            "good": current.skipped_in_a_row == 0,
            "val_loss": current.final_val_loss if current.evaluated_step == current.step else None,
            "ledger": ledger.state_dict(),
            "metrics_bytes": distributed.broadcast_object(distributed.on_main(recorder.sync)),
            "metrics_sha256": recorder.sha256,
            "config": config.model_dump(mode="json"),
            "data_manifest_sha256": manifest.sha256,
        }
        root, keeping = directory / "checkpoints", config.checkpoint
        checkpoints.save(root, current.step, _pieces(config, strategy, rank), saved, distributed, watchdog.progress)
        if distributed.is_main:
            exports.start()
            with contextlib.suppress(OSError):  # retried after the next save
                checkpoints.prune(
                    root, keeping.keep, keeping.keep_every, keep_best=keeping.keep_best, needed=exports.unfinished
                )

    def report_hang(line: str) -> None:
        recorder.write({"kind": "event", "event": "hang", "step": run.state.step, "reason": line})
        if problem := recorder.summarize(summarize(run, "failed", line)):
            recorder.message(problem)

    minutes = config.guards.hang_minutes
    watchdog = Watchdog(None if minutes is None else 60 * minutes, distributed, directory / "stacks", report_hang)
    with profiler(config.profile, directory, recorder.message, enabled=distributed.is_main) as profiler_step:
        run = Run(
            config=config,
            strategy=strategy,
            batches=batches,
            validation=validation,
            curvature=CurvaturePass.of(
                config.optimizer,
                config.seeds.curvature,
                config.train.global_batch_size,
                micro,
                shared_forward=config.train.shared_forward,
                progress=watchdog.progress,
            ),
            ledger=ledger,
            micro_batch_size=micro,
            eval_micro_batch_size=config.eval.micro_batch_size or micro,
            parameters=parameters,
            flops=flops,
            token_bytes=token_bytes,
            write=recorder.write,
            message=recorder.message,
            save=save,
            stop_requested=stop,
            failure=lambda: recorder.failure,
            progress=watchdog.progress,
            profiler_step=profiler_step,
            state=state,
            saved_step=state.step,
        )
        stop.begin()
        status = _train(run, watchdog, recorder, exports)
    return Outcome(status, directory, state.final_val_loss)


def _train(run: Run, watchdog: Watchdog, recorder: Recorder, exports: Exports) -> Status:
    """Run the loop and finish the record, however the loop ends."""
    status: Status = "failed"
    try:
        with watchdog:
            status = train(run)
    except (NotSaved, RanksDiffer) as error:  # on every rank: a failed disk or chip
        run.reason = str(error)
    except BaseException as error:
        run.reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        if status == "diverged":
            recorder.write({"kind": "event", "event": "diverged", "step": run.state.step, "reason": run.reason})
        try:
            if status == "completed":  # rank 0 may wait an hour for exports and trackers, the others' barrier does not
                run.strategy.distributed.stop()
        finally:
            exports.finish(
                run.stop_requested if status == "completed" else lambda: True,
                resumable=status not in ("completed", "diverged"),
            )
            problem = recorder.finish(summarize(run, status, run.reason))
            if problem is not None:
                run.reason = "\n".join(filter(None, (run.reason, problem)))
                if status in ("completed", "diverged"):  # a run without a summary is unfinished: a rerun writes it
                    status = "failed"
            recorder.message(closing_line(run, status, recorder.place.path))
    return status


def opening_line(config: RunConfig, parameters: int, vocab_size: int, distributed: Distributed) -> str:
    """Return what a run will do, in one line."""
    train, tokens = config.train, config.train.global_batch_size * config.train.sequence_length
    where = [f"{distributed.world_size} ranks"] if distributed.world_size > 1 else []
    where += [distributed.device.type, train.precision, *(["compiled"] if train.compile else [])]
    return (
        f"{config.model.name}, {parameters / 1e6:.1f}M parameters, on {config.data.name} (vocabulary {vocab_size:,}): "
        f"{train.steps:,} steps of {tokens:,} tokens with {config.optimizer.name}; {', '.join(where)}"
    )


def closing_line(run: Run, status: Status, directory: Path) -> str:
    """Return a run's last message: how it ended, why, and what to do."""
    loss = "-" if run.state.final_val_loss is None else f"{run.state.final_val_loss:.4f}"
    line = f"{status} at step {run.state.step}, validation loss {loss}: {directory}"
    if run.reason is not None:
        line = f"{line}\n{run.reason}"
    match status:
        case "completed":
            return f"{line}\npicture: python scripts/plot.py curves {directory}\ntext: python scripts/sample.py {directory}"
        case "preempted":
            return f"{line}\n{how_to_resume(run.config, directory)} to resume"
        case "failed":
            newest = None
            with contextlib.suppress(OSError):
                newest = next(iter(checkpoints.available(directory / "checkpoints")), None)
            remedy = "start over" if newest is None else f"resume from {newest.name}"
            return f"{line}\nfix the cause, then {how_to_resume(run.config, directory)} to {remedy}"
    return line


def summarize(run: Run, status: Status, reason: str | None) -> dict[str, Any]:
    """Return the content of summary.json."""
    ledger, state, config = run.ledger, run.state, run.config
    ledger.settle()
    return {
        "status": status,
        "reason": reason,
        "final_val_loss": state.final_val_loss,
        "final_val_bits_per_byte": bits_per_byte(state.final_val_loss, state.val_bytes_per_token),
        "best_val_loss": state.best_val_loss,
        "steps": state.step,
        "tokens": state.step * config.train.global_batch_size * config.train.sequence_length,
        "flops": ledger.flops,
        "seconds": ledger.seconds,
        "ledger": ledger.as_dictionary(),
        "bytes_communicated": ledger.bytes_communicated,
        "peak_memory_bytes": hardware.peak_memory_bytes(run.strategy.device),
        "parameters": run.parameters,
        "shared_forwards": ledger.shared_forwards,
        "skipped_steps": state.skipped_steps,
        "estimates_held_back": state.estimates_held_back,
        "loss_spikes": state.loss_spikes,
    }


def _token_bytes(manifest: Manifest, directory: Path) -> tuple[np.ndarray | None, str | None]:
    """Return the bytes of each token, or None and the reason: a run needs no tokenizer, and may lack it."""
    try:
        return open_tokenizer(manifest.tokenizer, directory).byte_lengths, None
    except DataError as error:
        return None, str(error)


def _decide(config: RunConfig, place: RunDirectory, distributed: Distributed) -> Decision:
    """Decide how the run starts, under the directory's lock if a run exists, so that the decision stays valid."""
    restored = False
    try:
        refuse_links(place.path)
        there = is_run(place.path) or (place.path / REPLACED).is_dir()
        if there and os.access(place.path, os.W_OK):
            place.take()
            restored = place.restore()
        restarted = not restored and is_restart(distributed.is_marked(f"started {place.path.absolute()}"), place.path)
        return decide(config, place.path, restarted=restarted)
    except OSError as error:
        raise refusal(
            f"output_dir={config.output_dir}: {error.filename or place.path} cannot be used: {error.strerror}; "
            "correct the permissions or choose another output_dir=",
            error,
        ) from error


def _open_record(
    config: RunConfig,
    place: RunDirectory,
    decided: Decision,
    step: int,
    distributed: Distributed,
    manifest: Manifest,
    weights: InitialWeights,
    display: Display,
) -> Recorder:
    """Create or reopen the record on rank 0, in a directory that this process holds: the first writes of a run.

    Raises:
        RunHeldError: another process has started this run since the decision.
        ConfigurationError: the directory cannot be written, or holds something that no run writes.
    """
    directory = place.path
    job = os.environ.get("SLURM_JOB_ID")
    environment = {
        "slurm_job": job,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "versions": hardware.versions(),
        "git": hardware.git_state(),
        "hardware": hardware.describe(distributed.device),
        "world_size": distributed.world_size,
        "data_manifest_sha256": manifest.sha256,
        "initial_weights_sha256": weights.sha256(),
    }
    try:
        if not directory.exists():
            directory.mkdir(parents=True, exist_ok=True)
            sync_directory(directory.parent)
        place.take()
        if decided.metrics_bytes is None:
            if (directory / records.CONFIG_FILE).exists():
                if not config.overwrite:
                    raise RunHeldError(f"{directory} was just started by another process; rerun the command")
                place.set_aside()
            records.write_config(directory, config.model_dump(mode="json") | {"name": config.run_name})
        if decided.metrics_bytes is None or not (directory / records.ENVIRONMENT_FILE).exists():
            records.write_environment(directory, environment)
        began = RunRecord.open(directory).environment
        if began.get("slurm_job") != job:
            records.write_environment(directory, began | {"slurm_job": job})
        (directory / "checkpoints").mkdir(exist_ok=True)
        (directory / records.SUMMARY_FILE).unlink(missing_ok=True)
        metrics = records.MetricsWriter(directory, decided.metrics_bytes)
        place.delete_replaced()
        display.message(f"run directory {directory}")
        tracker = build_tracker(config, directory, began, display.message)
        distributed.mark(f"started {directory.absolute()}")
        if decided.checkpoint is not None and decided.metrics_bytes is not None:
            checkpoints.set_aside_newer(directory / "checkpoints", Checkpoint(decided.checkpoint, verify=False).step)
        recorder = Recorder(place, display, metrics, tracker)
        if decided.checkpoint is not None:
            recorder.write(_resumed(began, step, environment))
        return recorder
    except RecordError as error:
        raise refusal(str(error), error) from error
    except OSError as error:
        reason, remedy = why_not_written(error)
        raise refusal(
            f"output_dir={config.output_dir}: {error.filename or directory} cannot be written: {reason}; "
            f"{remedy + ' or ' if remedy else ''}choose another output_dir=",
            error,
        ) from error


def _resumed(began: Mapping[str, Any], step: int, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return the event of a resumption, with what has changed since the run's start in the code and the processors."""
    line: dict[str, Any] = {"kind": "event", "event": "resumed", "step": step, "world_size": environment["world_size"]}
    for section, keys in (("git", ("commit", "dirty")), ("hardware", ("cpu", "gpu"))):
        now, then = ({key: one.get(section, {}).get(key) for key in keys} for one in (environment, began))
        if now != then:
            line[section] = now
    return line


def _load(path: Path, strategy: Strategy, ledger: Ledger, distributed: Distributed) -> TrainingState:
    """Load weights, optimizer state, ledger and generator states from a verified checkpoint.

    Raises:
        ConfigurationError: it was saved by another model or optimizer, or a rank cannot read it.
    """

    def reached() -> Checkpoint:
        try:
            return Checkpoint(path, verify=False)
        except CheckpointError as error:
            raise ConfigurationError(f"{error}; put output_dir= on a file system that all nodes share") from error

    checkpoint = distributed.on_all(reached)
    try:
        strategy.load(checkpoint)
    except (CheckpointError, ValueError) as error:
        raise ConfigurationError(f"{error}; choose the model= and optimizer= that {path} was saved with") from error
    ledger.load_state_dict(checkpoint.state.ledger.model_dump())
    for name in checkpoint.names():
        if name == f"rng.cpu.{distributed.rank}":
            torch.set_rng_state(checkpoint.tensor(name))
        elif name == f"rng.cuda.{distributed.rank}" and torch.cuda.is_available():
            torch.cuda.set_rng_state(checkpoint.tensor(name))
    return checkpoint.state.training


def _pieces(config: RunConfig, strategy: Strategy, rank: int) -> Iterator[Piece | NumberPiece]:
    """Return this rank's part of a checkpoint, with generator states if dropout or code from elsewhere may use them.

    The weights of an optimizer with an evaluation mode are saved as trained and, named "evaluated.<parameter>", as evaluated.
    """
    evaluated: list[Piece] = []
    # Now, and not while the ranks write: to evaluate may take collectives, and a rank whose disk is full would be missed.
    if any(has_evaluation_mode(optimizer) for optimizer in strategy.optimizers):
        with strategy.evaluating():
            evaluated = [
                piece._replace(name=EVALUATED + piece.name.removeprefix("model."), values=piece.values.clone())
                for piece in strategy.pieces()
                if isinstance(piece, Piece) and piece.name.startswith("model.")
            ]
    return itertools.chain(strategy.pieces(), evaluated, _generator_states(config, rank))


def _generator_states(config: RunConfig, rank: int) -> Iterator[Piece]:
    if config.model.dropout > 0 or not config.model.is_gpt2 or isinstance(config.optimizer, ExternalConfig):
        states = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            states["cuda"] = torch.cuda.get_rng_state()
        for device, values in states.items():
            yield Piece(f"rng.{device}.{rank}", (values.numel(),), 0, values)
