"""Reports of a run: terminal, `metrics.jsonl`, MLflow, monitors; loads in `load.jsonl`, splits in `allocation.jsonl`.

Does nothing on ranks other than 0.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from torch import Tensor

from hmoe_ds.config import RunConfig
from hmoe_ds.moe.allocation import Split
from hmoe_ds.moe.balance import RouterLoad, chosen_by_atoms
from hmoe_ds.moe.exchange import Traffic
from hmoe_ds.objectives.total import Normalizers
from hmoe_ds.run_files import ALLOCATION, LOAD, METRICS, SKIPPED
from hmoe_ds.training.checkpoints.checkpoint import TrainState
from hmoe_ds.training.curriculum import Stage
from hmoe_ds.training.deepspeed_config import monitor_sections
from hmoe_ds.training.recording.health import HealthWatch
from hmoe_ds.training.recording.memory_used import memory_used
from hmoe_ds.training.recording.metrics import (
    StepFile,
    StepSums,
    group_entropy,
    last_figures,
    load_imbalance,
    rms_ratio,
    starved_share,
)
from hmoe_ds.training.recording.monitors import Monitors
from hmoe_ds.training.recording.spool import FAILED, FINISHED, KILLED
from hmoe_ds.training.recording.terminal import Terminal
from hmoe_ds.training.recording.throughput import Throughput
from hmoe_ds.training.recording.tracking import Tracker
from hmoe_ds.training.stopping.stop import StoppedError

LOADS = 1000  # lines of `load.jsonl`, about, at most


class Recorder:
    """Writes down how a run goes, and with which end: it is the context of the training.

    Args:
        config: of the run, whose folder is there (`run_folder.begin_run`).
        state: where the run starts.
        rank: this rank.
        traffic: of this rank.
    """

    def __init__(self, config: RunConfig, state: TrainState, rank: int, traffic: Traffic) -> None:
        self._config = config
        self._active = rank == 0
        self._file: StepFile | None = None
        self._splits: StepFile | None = None
        self._tracker: Tracker | None = None
        self._load: StepFile | None = None
        self._loads_until = -1
        self._monitors: Monitors | None = None
        self._throughput = Throughput(config, traffic)
        self._terminal = Terminal(config.run.steps)
        self._validated: dict[str, float] = {}
        self._health = HealthWatch(config)
        if self._active:
            folder = Path(config.run.out)
            self._file = StepFile(folder / METRICS, after_step=state.step)
            self._load = StepFile(folder / LOAD, after_step=state.step)
            self._monitors = Monitors(monitor_sections(config), folder, state.step)
            self._validated = last_figures(folder / METRICS, ("validation_", "probe_"))
            if config.router.experts_at_start:
                self._splits = StepFile(folder / ALLOCATION, after_step=state.step)
            if (folder / SKIPPED).exists():
                StepFile(folder / SKIPPED, after_step=state.step)
            if config.run.mlflow:
                self._tracker = Tracker(folder, state.step, state.mlflow_run)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._terminal.close()
        if self._tracker is not None:
            self._tracker.close(FINISHED if kind is None else KILLED if kind is StoppedError else FAILED)

    @property
    def mlflow_run(self) -> str | None:
        """Id of the MLflow run, as soon as there is one."""
        return None if self._tracker is None else self._tracker.run_id

    def record(
        self,
        step: int,
        sums: StepSums,
        norm: Normalizers,
        validation: dict[str, float],
        *,
        stage: Stage,
        live_L: Tensor | None,
        splits: Mapping[int, Split],
        due: bool,
        learning_rate: float,
        grad_norm: float | Tensor,
        skipped: int,
        seconds: float,
        waited: float,
    ) -> None:
        """Record optimizer step `step` (1-based). The host waits for the device only when a line is due.

        Args:
            step: steps done.
            sums: losses, loads and traffic of the global batch.
            norm: size of the global batch.
            validation: figures of a validation and of probes after this step, or none.
            stage: of the curriculum, in this step.
            live_L: experts of each H-MoE layer that lived in this step; None when all live for good.
            splits: of experts after this step, by layer; all of them are recorded.
            due: whether this step gets a line.
            learning_rate: of this step.
            grad_norm: norm of the whole gradient before clipping.
            skipped: steps of the run so far whose gradient was not finite.
            seconds: duration of the step; if a line is due, with all that the device still had to do.
            waited: seconds of it that were spent waiting for molecules.
        """
        if not self._active:
            return
        self._throughput.add(norm, sums.load, seconds, waited)
        self._record_splits(step, splits)
        if not due:
            return
        losses, load, exchanged_bytes, _ = sums
        molecules, atoms = norm.molecules.item(), norm.atoms.item()
        objective, is_spread = self._config.objective, self._config.parallel.ep_size > 1
        learned = objective.contrast_learned_temperature
        atom_choices = chosen_by_atoms(load.atoms_LE, live_L, self._config.router)
        metrics = {
            "step": step,
            "time": time.time(),
            "loss": losses.total.item(),
            **{f"loss_{name}": getattr(losses, name).item() for name in objective.reported_terms},
            **({"contrast_temperature": losses.contrast_temperature.item()} if learned else {}),
            "learning_rate": learning_rate,
            "grad_norm": float(grad_norm),
            "skipped_steps": skipped,
            "group_entropy": group_entropy(load.molecules_G),
            "expert_load_max_over_mean": load_imbalance(*atom_choices),
            "starved_experts": starved_share(*atom_choices),
            "chosen_p": load.chosen_p.item() / molecules,
            "experts_per_atom": load.atoms_LE.sum(dim=1).mean().item() / atoms,
            "routed_over_dense_rms": rms_ratio(load.squares_L2),
            "molecules": molecules,
            **self._throughput.report(),
            **({"exchanged_bytes": exchanged_bytes.item()} if is_spread else {}),
            **({} if live_L is None else {"experts_live": live_L.double().mean().item()}),
            **(stage._asdict() if self._config.curriculum.active else {}),
            **memory_used(),
            **validation,
        }
        self._write(metrics)
        self._record_load(step, load)
        self._terminal.step(step, metrics["loss"], metrics["molecules_per_second"])
        if validation:
            self._terminal.validation(step, validation, self._validated)
            self._validated |= validation
        for warning in self._health.news(metrics):
            self._terminal.warn(step, warning)

    def flush(self) -> None:
        """Have on the disk what was recorded so far."""
        for file in (self._file, self._load, self._splits):
            if file is not None:
                file.flush()

    def _record_splits(self, step: int, splits: Mapping[int, Split]) -> None:
        if self._splits is not None:
            for layer, split in splits.items():
                self._splits.write({"step": step, "layer": layer, **split._asdict()})

    def _record_load(self, step: int, load: RouterLoad) -> None:
        """The load of every group and every expert, which would be too many names for `metrics.jsonl`.

        Not at every line of a long run: with hundreds of experts its file would become large.
        """
        part = step * LOADS // self._config.run.steps
        if self._load is not None and part > self._loads_until:
            self._loads_until = part
            counts = {"molecules_G": load.molecules_G, "atoms_LE": load.atoms_LE}
            self._load.write({"step": step, **{name: value.int().tolist() for name, value in counts.items()}})

    def _write(self, metrics: dict[str, float]) -> None:
        if self._file is not None:
            self._file.write(metrics)
        if self._tracker is not None:
            self._tracker.notify()
        if self._monitors is not None:
            self._monitors.write(metrics)
