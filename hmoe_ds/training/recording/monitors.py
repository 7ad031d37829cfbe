"""DeepSpeed's monitors (TensorBoard, W&B, Comet, CSV files), which get what `metrics.jsonl` gets.

Sections of a DeepSpeed JSON turn them on. The engine does not see these: by itself DeepSpeed would log the learning
rate over a number of samples that means nothing here, and checkpoints would keep the keys to services.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.durable import replace_text
from data_pipeline.errors import PipelineError
from hmoe_ds.config import ConfigError
from hmoe_ds.training.best_effort import say
from hmoe_ds.training.recording.mlflow_sender import reason

TENSORBOARD, WANDB, COMET, CSV = "tensorboard", "wandb", "comet", "csv_monitor"
# The package that writes what a section asks for; CSV files need none.
_PACKAGES = {TENSORBOARD: "tensorboard", WANDB: "wandb", COMET: "comet_ml"}
_WANDB_PROJECT = "hmoe_ds"

_SWITCH, _NUMBER, _TEXT = "true or false", "a positive whole number", "a text"
_FILES = {"enabled": _SWITCH, "output_path": _TEXT, "job_name": _TEXT}
# What a section may hold, as DeepSpeed 0.19.8 has it.
SECTIONS = {
    TENSORBOARD: _FILES,
    CSV: _FILES,
    WANDB: {"enabled": _SWITCH, "group": _TEXT, "team": _TEXT, "project": _TEXT},
    COMET: {
        "enabled": _SWITCH,
        "samples_log_interval": _NUMBER,
        "online": _SWITCH,
        "project": _TEXT,
        "workspace": _TEXT,
        "api_key": _TEXT,
        "experiment_name": _TEXT,
        "experiment_key": _TEXT,
        "mode": _TEXT,
    },
}


def check_sections(settings: Mapping[str, Any], name: str) -> None:
    """Raise ConfigError for what the monitors' sections of `settings`, from the file `name`, cannot hold."""
    for kind, section in settings.items():
        if kind not in SECTIONS:
            continue
        if not isinstance(section, dict) or not isinstance(section.get("enabled"), bool):
            raise ConfigError(f'{name} has {kind} without a switch: expected an object such as {{"enabled": true}}')
        for key, value in section.items():
            expected = SECTIONS[kind].get(key)
            if expected is None:
                raise ConfigError(
                    f"{name} sets '{kind}.{key}', which is not known: remove it (known: {', '.join(SECTIONS[kind])})"
                )
            if value is not None and not _is(value, expected):
                raise ConfigError(f"{name} has {kind}.{key} {value!r}: expected {expected}")


def _is(value: object, expected: str) -> bool:
    if expected == _SWITCH:
        return isinstance(value, bool)
    if expected == _NUMBER:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0
    return isinstance(value, str)


def check_packages(sections: Mapping[str, Any]) -> None:
    """Raise ConfigError when a monitor is on whose package is not installed here."""
    for kind, package in _PACKAGES.items():
        if kind in sections and sections[kind]["enabled"] and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"parallel.deepspeed_config has {kind}.enabled true, but the package {package} is not installed here: "
                f"pip install {package}, or set {kind}.enabled to false"
            )


def placed(sections: Mapping[str, Any], out: Path) -> dict[str, dict[str, Any]]:
    """The sections that are on, with what they leave open: files go into the folder `out` of the run."""
    on = {
        kind: {key: value for key, value in section.items() if value is not None}
        for kind, section in sections.items()
        if section["enabled"]
    }
    for kind in {TENSORBOARD, CSV} & on.keys():
        elsewhere = on[kind].get("output_path")
        own = {"output_path": str(out / kind), "job_name": on[kind].get("job_name", "")}
        on[kind] = ({"job_name": _name(out)} | on[kind]) if elsewhere else on[kind] | own
    if WANDB in on:
        on[WANDB].setdefault("project", _WANDB_PROJECT)
    if COMET in on:
        # DeepSpeed leaves out what comes less than 100 "samples" after the last; ours are steps.
        on[COMET].setdefault("samples_log_interval", 1)
    return on


def _name(out: Path) -> str:
    return out.resolve().name


class Monitors:
    """The monitors of a run, on rank 0; torch.distributed must be initialised if one is on.

    Args:
        sections: of the monitors, checked.
        out: folder of the run.
        step: steps done at this start. What files hold of later ones is of work that is done again, and dropped.

    Raises:
        PipelineError: one that is on cannot begin.
    """

    def __init__(self, sections: Mapping[str, Any], out: Path, step: int) -> None:
        on = placed(sections, out)
        self._master: Any = None
        if not on:
            return
        if WANDB in on:
            # Beside the run and under its name; one that was killed is continued.
            for name, value in (("WANDB_DIR", str(out)), ("WANDB_NAME", _name(out)), ("WANDB_RESUME", "auto")):
                os.environ.setdefault(name, value)
        from deepspeed.monitor.config import get_monitor_config
        from deepspeed.monitor.monitor import MonitorMaster

        try:
            self._master = MonitorMaster(get_monitor_config(on))
            if CSV in on:
                _cut_back(self._master.csv_monitor, step)
            if TENSORBOARD in on:
                _forget(self._master.tb_monitor, step)
        except Exception as error:  # each service has its own
            raise PipelineError(
                f"parallel.deepspeed_config turns on {' and '.join(on)}, and one of them cannot begin "
                f"({reason(error)}): mend that, or set enabled to false"
            ) from error

    def write(self, figures: Mapping[str, float]) -> None:
        """Send the finite figures of a line of `metrics.jsonl`. When that fails, the training goes on without it."""
        if self._master is None:
            return
        step = figures["step"]
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        try:
            self._master.write_events(
                [(name, value, step) for name, value in finite.items() if name not in ("step", "time")]
            )
        except Exception as error:  # whatever it is, the training goes on
            self._master = None
            say(
                f"monitors get nothing any more, from step {step} on ({reason(error)}): training goes on, and "
                "metrics.jsonl keeps what is logged",
                sys.stdout,
            )


def _cut_back(monitor: Any, step: int) -> None:
    """Drop the rows after `step` from DeepSpeed's CSV files, and have it write no second header into them."""
    for path in sorted(Path(monitor.log_dir).glob("*.csv")):
        header, *rows = path.read_text().splitlines() or [""]
        if header == f"step,{path.stem}":  # another one is not of a monitor
            kept = [row for row in rows if "," in row and int(row.partition(",")[0]) <= step]
            replace_text(path, "".join(f"{line}\r\n" for line in (header, *kept)))
            monitor.filenames.append(path.stem)


def _forget(monitor: Any, step: int) -> None:
    """Have TensorBoard forget what earlier files in its folder hold of steps after `step`."""
    from torch.utils.tensorboard import SummaryWriter

    first = monitor.summary_writer
    first.close()
    monitor.summary_writer = SummaryWriter(first.log_dir, purge_step=step + 1)
