"""The training loop, run by every rank: `deepspeed --module hmoe_ds.training.loop --config FILE [overrides]`."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import torch

from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.redact import redacted
from hmoe_ds.config import ConfigError, RunConfig
from hmoe_ds.config_parser import load_config
from hmoe_ds.data.plan import BatchPlan
from hmoe_ds.moe.balance import RouterLoad, measure_load, update_expert_bias, update_family_bias, update_route_bias
from hmoe_ds.moe.exchange import Traffic
from hmoe_ds.objectives.gather import gather_objects
from hmoe_ds.objectives.molecule import set_descriptor_scale
from hmoe_ds.objectives.total import PretrainingTask, count_normalizers
from hmoe_ds.training import exit_codes
from hmoe_ds.training.best_effort import say
from hmoe_ds.training.checkpoints.checkpoint import SaveError, TrainState, load_checkpoint, save_checkpoint
from hmoe_ds.training.checkpoints.mirror import Mirror
from hmoe_ds.training.checks.preflight import check_run
from hmoe_ds.training.due import due_after
from hmoe_ds.training.engine import (
    bound_collectives,
    build_engine,
    forget_gradients,
    init_distributed,
    loss_scale,
    set_learning_rate,
    wait_for_device,
)
from hmoe_ds.training.expert_clones import split_experts
from hmoe_ds.training.lock import locked_run
from hmoe_ds.training.outcome import note_done, note_failure, note_stopped
from hmoe_ds.training.prefetch import Prefetcher
from hmoe_ds.training.probe import Probe
from hmoe_ds.training.recording.metrics import StepTotals
from hmoe_ds.training.recording.recorder import Recorder
from hmoe_ds.training.run_folder import begin_run, has_checkpoint, open_datasets, steps_done
from hmoe_ds.training.skipped import DivergedError, record_skipped
from hmoe_ds.training.stopping.stop import StoppedError, StopRequest
from hmoe_ds.training.stopping.stop_file import STOP_FILE
from hmoe_ds.training.stopping.watchdog import Watchdog
from hmoe_ds.training.validation import validate

# So often ranks look whether they see the same checkpoints.
AGREEMENT_LOOKS, AGREEMENT_PAUSE_SECONDS = 15, 5.0


def train(config: RunConfig, rank: int, ranks: int) -> None:
    """Pretrain until `run.steps`, from the last checkpoint if there is one.

    Raises:
        StoppedError: on all ranks, when one was asked to stop; where the run is was saved.
        DivergedError: the gradient was not finite in too many steps in a row.
    """
    out = Path(config.run.out)
    stopping = StopRequest()
    watching = Watchdog(config.run.hang_seconds, rank, ranks, stopping)
    with stopping as stop, watching as watchdog, locked_run(out, rank):
        if rank == 0:
            stop.look_for(out / STOP_FILE)
        _train(config, rank, ranks, watchdog, stop)


def _train(config: RunConfig, rank: int, ranks: int, watchdog: Watchdog, stop: StopRequest) -> None:
    molecules, held_out = open_datasets(config)
    if rank == 0:
        begin_run(config, ranks, molecules.fingerprint, [store.extent for store in molecules.stores])
    plan = BatchPlan(molecules, config.data, config.optim.accumulation, config.run.seed)
    probe = Probe(config, molecules.standardized, rank, ranks)
    check_agreement(config, molecules.fingerprint + probe.fingerprint)
    traffic = Traffic(timed=rank == 0 and config.parallel.ep_size > 1)
    watchdog.progress(0)
    engine = build_engine(config, traffic)
    set_descriptor_scale(engine.module.model, molecules)
    state = TrainState(step=0, plan=plan.state_dict())
    watchdog.progress(0)
    if has_checkpoint(config):
        state = load_checkpoint(engine, config)
        plan.load_state_dict(state.plan)
    ahead = Prefetcher(molecules, plan, config, state.step, rank, ranks)
    mirror = Mirror(config, state.step, rank, lambda: watchdog.progress(config.run.steps))
    bound_collectives(config.run.hang_seconds)
    with Recorder(config, state, rank, traffic) as recorder, mirror, ahead:
        while state.step < config.run.steps:
            watchdog.progress(state.step + 1)
            started = time.perf_counter()
            learning_rate = set_learning_rate(engine, config, state.step)
            slices, stage, plan_state = ahead.step()
            waited = time.perf_counter() - started
            norm = count_normalizers(slices, engine.device)
            totals = StepTotals(traffic)
            for part in slices:
                part = part.to(engine.device)
                losses, encoding = engine(part, norm, stage.routing)
                engine.backward(losses.total * loss_scale(config))
                engine.step()
                load = measure_load(encoding.scaffold, encoding.atoms, part.batch.molecule_N, config.router)
                totals.add(losses, load)
                del losses, encoding  # not to be kept while the next slice is computed
            sums = totals.reduce(stop.asked)
            live_L = engine.module.model.encoder.live_experts()
            state.step, state.plan, splits = state.step + 1, plan_state, {}
            if engine.was_step_applied():
                state.skipped_in_a_row = 0
                balance_routers(engine.module, sums.load, config)
                splits = split_experts(engine, sums.load, config, state.step)
            else:
                forget_gradients(engine)
                state.skipped, state.skipped_in_a_row = state.skipped + 1, state.skipped_in_a_row + 1
                record_skipped(config, state.step, state.skipped_in_a_row, sums.losses.total, slices)

            due, stopping = due_after(state.step, config.run, probe.every), stop.agreed(sums.asked_to_stop)
            if any(due):
                wait_for_device()
            seconds = time.perf_counter() - started
            validation = validate(engine.module, held_out, config, rank, ranks) if due.validation else {}
            watchdog.progress(state.step)
            if due.probe:
                validation |= probe.measure(engine)
            recorder.record(
                state.step, sums, norm, validation, stage=stage, live_L=live_L, splits=splits, due=due.line,
                learning_rate=learning_rate, grad_norm=engine.get_global_grad_norm(), skipped=state.skipped,
                seconds=seconds, waited=waited,
            )  # fmt: skip
            if due.checkpoint or stopping:
                watchdog.progress(state.step)
                recorder.flush()
                state.mlflow_run = recorder.mlflow_run
                if keep_checkpoint(engine, config, state, molecules.provenance, validation, must=stopping):
                    mirror.push(state.step)
            if stopping:
                raise StoppedError(f"stopped after step {state.step} of {config.run.steps}, as it was asked to")


def keep_checkpoint(
    engine: deepspeed.DeepSpeedEngine,
    config: RunConfig,
    state: TrainState,
    provenance: dict[str, Any],
    validation: dict[str, float],
    must: bool,
) -> bool:
    """Save a checkpoint; -> whether it could be. Unless it `must` be, or is the last one, the run may go on without."""
    measured = {name: value for name, value in validation.items() if math.isfinite(value)}
    notes = {**provenance, "validation_loss": measured.get("validation_loss"), "validation": measured}
    try:
        save_checkpoint(engine, config, state, notes)
    except SaveError as error:
        if must or state.step == config.run.steps:
            raise
        if torch.distributed.get_rank() == 0:
            say(f"{error}; the training goes on, and saves again when the next checkpoint is due")
        return False
    return True


def check_agreement(config: RunConfig, molecules: str, looks: int = AGREEMENT_LOOKS) -> None:
    """Raise ConfigError, on all ranks, unless all of them see the same molecules and the same checkpoints.

    A network file system may show a machine an old list of checkpoints for up to a minute: so they look again.
    """
    for look in range(looks):
        seen = gather_objects((molecules, steps_done(config)))
        if all(other == seen[0] for other in seen):
            return
        if look == looks - 1 or any(other[0] != seen[0][0] for other in seen):
            break
        time.sleep(AGREEMENT_PAUSE_SECONDS)
    raise ConfigError(
        f"run.out {config.run.out}, data.path {config.data.path} or the files of probe.tables are not the same on "
        "all ranks: put them on a file system that all nodes share"
    )


def balance_routers(task: PretrainingTask, load: RouterLoad, config: RunConfig) -> None:
    """Move the balance biases of both levels by the load of one global batch."""
    encoder = task.model.encoder
    update_route_bias(encoder.scaffold_gate.route_bias, load.atoms_G, config.router.group_balance_rate)
    for layer, atoms_E in zip(encoder.moe_layers(), load.atoms_LE, strict=True):
        gate, router = layer.gate, config.router
        if gate.slots is None:
            update_expert_bias(gate.route_bias, atoms_E, router)
        else:
            update_family_bias(gate.route_bias, gate.slots, atoms_E, router.expert_balance_rate)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of each rank. It ends with one of `exit_codes`."""
    words = [word for word in (sys.argv[1:] if argv is None else argv) if not word.startswith("--local_rank")]
    try:
        config = load_config(words)
        check_run(config, int(os.environ.get("WORLD_SIZE", "1")))
    except (PipelineError, OSError) as error:
        sys.exit(_explain(error))
    try:
        code = _be_rank(config)
    except Exception as error:
        note_failure(Path(config.run.out), error)
        if isinstance(error, (PipelineError, OSError)):
            _leave(_explain(error))
        say(redacted(traceback.format_exc()))
        _leave(exit_codes.FAILED)
    if code != exit_codes.DONE:
        sys.exit(code)


def _be_rank(config: RunConfig) -> int:
    """Train as one of the ranks that the environment tells of; -> the exit code."""
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
        torch.use_deterministic_algorithms(True)
    rank, ranks = init_distributed()
    code = exit_codes.DONE
    try:
        train(config, rank, ranks)
    except StoppedError as stopped:
        code = exit_codes.REQUEUE
        if rank == 0:
            say(f"hmoe pretrain: {stopped}")
    torch.distributed.barrier()
    if rank == 0:
        (note_done if code == exit_codes.DONE else note_stopped)(Path(config.run.out))
    torch.distributed.destroy_process_group()
    return code


def _leave(code: int) -> NoReturn:
    """End this rank at once: not when an upload has come to its end, or a collective that other ranks never join."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _explain(error: Exception) -> int:
    """Say what is wrong; -> the exit code."""
    usage = isinstance(error, UsageError)
    # One rank of each machine speaks: what is wrong with a request may be the machine's, such as its cache folder.
    if os.environ.get("LOCAL_RANK", "0") == "0" or not usage:
        say(redacted(f"hmoe pretrain: error: {error}"))
    if isinstance(error, DivergedError):
        return exit_codes.DIVERGED
    return exit_codes.USAGE if usage else exit_codes.FAILED


if __name__ == "__main__":
    main()
