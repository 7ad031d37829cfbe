"""A run: how it is, how far, how well, what it has kept, and the command that goes on with it."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.quantities import byte_size, duration
from hmoe_ds.config import RunConfig
from hmoe_ds.config_checks import checked_config
from hmoe_ds.inspect.checkpoint import Kept, look_at, topology_words
from hmoe_ds.inspect.model_size import architecture, parameters, parameters_fact
from hmoe_ds.inspect.noted import noted, read_notes
from hmoe_ds.inspect.report import Report, fact, files_fact, number, plural
from hmoe_ds.inspect.run_state import DONE, HELD, RunState, state_of
from hmoe_ds.inspect.step_log import Line, read_step_log
from hmoe_ds.inspect.trained import losses, validation_facts
from hmoe_ds.model.checkpoint_record import RECORD_FILE, CheckpointError, read_record
from hmoe_ds.run_files import CONFIG, RECORD, SKIPPED
from hmoe_ds.training.checkpoints.retention import DAMAGED
from hmoe_ds.training.recording.health import FIGURES, health_warnings
from hmoe_ds.training.run_folder import CHECKPOINTS, named_latest, read_run_record, step_of, tagged
from hmoe_ds.training.stopping.stop_file import STOP_FILE


def inspect_run(path: Path, verify: bool) -> Report:
    """What there is to know of a run.

    Args:
        path: its folder.
        verify: compare the files of its checkpoints with their checksums, not with their sizes alone.

    Raises:
        ConfigError: its record cannot be read, or is of another version.
        PipelineError: its metrics are damaged.
    """
    record = read_run_record(path)
    config = checked_config(record["config"], path / RECORD)
    here = dataclasses.replace(config, run=dataclasses.replace(config.run, out=str(path)))
    state, log = state_of(path), read_step_log(path)
    kept = _checkpoints(path, verify)
    last: Line = log.recent[-1] if log.recent else {"step": 0}
    lines_now = _of_this_start(log.recent, record, path)
    step = config.run.steps if state.name == DONE else int(last["step"] or 0)
    problems = [problem for each in kept for problem in each.problems]
    figures: dict[str, Any] = {
        "path": str(path),
        "state": state.name,
        "detail": state.detail,
        "step": step,
        "steps": config.run.steps,
        "logged_seconds_ago": max(0.0, time.time() - (last["time"] or 0.0)) if "time" in last else None,
        "molecules_per_second": _speed(lines_now),
        "seconds_left": _seconds_left(lines_now, config.run.steps - step),
        "ranks": noted(record, "ranks", int, path / RECORD),
        "dataset": config.data.paths,
        "trained": _trained(path, kept),
        "architecture": architecture(config.model, config.router),
        "groups": config.router.groups,
        "parameters": parameters(config.model, config.router, config.objective.molecule_heads),
        "losses": _losses(config, last),
        "validation": log.validation and {"step": log.validation["step"], **_validation(log.validation)},
        "skipped_steps": int(last.get("skipped_steps") or 0),
        "warnings": _warnings(config, path, last),
        "checkpoints": [each._asdict() for each in kept],
        "latest": named_latest(here),
        "best": _best(kept),
        "problems": problems,
        **_commands(config, path, record, state, kept),
    }
    return Report("run", "\n".join(_facts(figures, state, kept, verify)), figures, problems)


def _checkpoints(path: Path, verify: bool) -> list[Kept]:
    """Those of a run, oldest first."""
    found = []
    for folder in reversed(tagged(path / CHECKPOINTS)):
        try:
            each = look_at(folder, verify)
        except FileNotFoundError:
            continue  # a run that is going on has removed it
        if folder.exists():
            found.append(each)
    return found


def _of_this_start(lines: Sequence[Line], record: Mapping[str, Any], path: Path) -> list[Line]:
    """The lines since the run was started the last time, between which nothing but training lies.

    Without one yet, those before.
    """
    starts = noted(record, "starts", list, path / RECORD) or []
    begun = noted(starts[-1], "step", int, path / RECORD) if starts and isinstance(starts[-1], dict) else 0
    return [line for line in lines if (line["step"] or 0) > (begun or 0)] or list(lines)


def _speed(lines: Sequence[Line]) -> float | None:
    """Molecules per second, the mean over lines."""
    speeds = [speed for line in lines if (speed := line.get("molecules_per_second"))]
    return sum(speeds) / len(speeds) if speeds else None


def _seconds_left(lines: Sequence[Line], steps: int) -> float | None:
    """How long `steps` take at the pace of these lines, with the validations and checkpoints between them."""
    if not steps:
        return 0.0
    paces = [(at, when) for line in lines if (at := line.get("step")) and (when := line.get("time"))]
    if len(paces) < 2 or paces[-1][0] == paces[0][0]:
        return None
    (first_step, first_time), (last_step, last_time) = paces[0], paces[-1]
    return steps * (last_time - first_time) / (last_step - first_step)


def _losses(config: RunConfig, last: Line) -> dict[str, float | None]:
    """The last loss and the terms that it is made of."""
    terms = [f"loss_{name}" for name, weight in config.objective.weights.items() if weight > 0]
    return {name: last[name] for name in ("loss", *terms) if name in last}


def _validation(line: Line) -> Line:
    return {name: value for name, value in line.items() if name.startswith("validation_")}


def _trained(path: Path, kept: Sequence[Kept]) -> dict[str, Any] | None:
    """What the newest checkpoint that can be read notes of the molecules."""
    for each in reversed(kept):
        folder = path / CHECKPOINTS / each.name
        try:
            notes = read_notes(read_record(folder), folder / RECORD_FILE)
        except CheckpointError:  # it is among the problems
            continue
        sources = [source._asdict() for source in notes.sources]
        return {"molecules": notes.molecules, "standardize": notes.standardize, "sources": sources}
    return None


def _warnings(config: RunConfig, path: Path, last: Line) -> list[str]:
    """What a person should look at."""
    found = []
    skipped = int(last.get("skipped_steps") or 0)
    if skipped:
        found.append(
            f"the gradient was not finite in {skipped:,} of the steps, which changed nothing; their molecules are in "
            f"{path / SKIPPED}"
        )
    if "loss" in last and last["loss"] is None:
        found.append(f"the loss is not finite at step {last['step']:,}: lower optim.learning_rate")
    if all(name in last for name in FIGURES):  # older runs have fewer
        metrics = {name: float("nan") if (value := last[name]) is None else value for name in FIGURES}
        found += health_warnings(config, metrics).values()
    aside = sorted(each.name for each in (path / CHECKPOINTS).glob(f"*{DAMAGED}"))
    if aside:
        found.append(f"found to be damaged, and set aside: {', '.join(aside)}")
    return found


def _best(kept: Sequence[Kept]) -> str | None:
    """The checkpoint with the lowest validation loss; of equals the first."""
    validated = [each for each in kept if each.validation_loss is not None]
    return min(validated, key=lambda each: each.validation_loss or 0.0).name if validated else None


def _commands(
    config: RunConfig, path: Path, record: Mapping[str, Any], state: RunState, kept: Sequence[Kept]
) -> dict[str, str | None]:
    """What may be done next: `continue` it, `stop` it, `export` it; None for what cannot."""
    there = shlex.quote(str(path))
    resume = None
    if state.name != DONE and state.name not in HELD and (path / CONFIG).is_file():
        words = ["hmoe", "pretrain", "--config", str(path / CONFIG), "--num_ranks", str(record["ranks"])]
        # The configuration has the folder as it was given, which is another one seen from here.
        elsewhere = Path(config.run.out).resolve() != path.resolve()
        resume = shlex.join([*words, *(["--run.out", str(path)] if elsewhere else [])])
    return {
        "continue": resume,
        "stop": f"touch {there}/{STOP_FILE}" if state.name in HELD else None,
        "export": f"hmoe export {there} OUT" if kept else None,
    }


def _facts(figures: Mapping[str, Any], state: RunState, kept: Sequence[Kept], verify: bool) -> list[str]:
    ago, left, speed = (figures[name] for name in ("logged_seconds_ago", "seconds_left", "molecules_per_second"))
    detail = f" ({state.detail})" if state.detail else ""
    done = state.name == DONE
    return [
        fact("run", f"{figures['path']}: {state.name}{detail}"),
        fact(
            "step",
            f"{figures['step']:,} of {figures['steps']:,} ({figures['step'] / figures['steps']:.0%})",
            "" if ago is None else f"logged {duration(ago)} ago",
            "" if done or left is None else f"{duration(left)} of training left",
        ),
        fact("speed", "not measured yet" if speed is None else f"{speed:,.0f} molecules/s", _ranks(figures)),
        fact("data", *figures["dataset"]),
        *_data_facts(figures["trained"]),
        fact("model", figures["architecture"]),
        parameters_fact(figures["parameters"]),
        fact("loss", losses(figures["losses"], "loss") if figures["losses"] else "no step logged yet"),
        *_validation_facts(figures),
        *(fact("warning", warning) for warning in figures["warnings"]),
        *_checkpoint_facts(figures, kept, verify),
        *(fact(f"to {name}", figures[name]) for name in ("stop", "continue", "export") if figures[name]),
    ]


def _data_facts(trained: Mapping[str, Any] | None) -> list[str]:
    if trained is None or trained["molecules"] is None:
        return []
    sources = ", ".join(source["name"] for source in trained["sources"])
    return [fact("", f"{trained['molecules']:,} molecules" + (f" of {sources}" if sources else ""))]


def _ranks(figures: Mapping[str, Any]) -> str:
    return "" if figures["ranks"] is None else plural(figures["ranks"], "rank")


def _validation_facts(figures: Mapping[str, Any]) -> list[str]:
    measured = figures["validation"]
    if measured is None:
        return validation_facts({}, figures["groups"])
    return validation_facts(measured, figures["groups"], int(measured["step"]))


def _checkpoint_facts(figures: Mapping[str, Any], kept: Sequence[Kept], verify: bool) -> list[str]:
    if not kept:
        return [fact("checkpoint", "none yet")]
    lines = []
    for each in kept:
        loss = "" if each.validation_loss is None else f"validation loss {number(each.validation_loss)}"
        marks = [mark for mark in ("latest", "best") if figures[mark] == each.name]
        step = f"step {step_of(Path(each.name)):,}: {byte_size(each.bytes)}"
        lines.append(fact("checkpoint", step, topology_words(each.topology), loss, *marks))
    return [*lines, files_fact(sum(each.files for each in kept), figures["problems"], verify)]
