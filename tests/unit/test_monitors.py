"""DeepSpeed's monitors: what their sections may hold, where files go, and that one that fails stops no run."""

import json
import math
from pathlib import Path

import pytest
from deepspeed.monitor import monitor
from deepspeed.monitor.config import DeepSpeedMonitorConfig

from data_pipeline.errors import PipelineError
from hmoe_ds.config import ConfigError
from hmoe_ds.config_parser import load_config
from hmoe_ds.training.checks.preflight import check_run
from hmoe_ds.training.deepspeed_config import deepspeed_config, monitor_sections
from hmoe_ds.training.recording import monitors
from tests.distributed.harness import arguments


def config_with(folder: Path, *words: str, **sections):
    path = folder / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, **sections}))
    return load_config([*words, f"--parallel.deepspeed_config={path}"])


class Master:
    """Takes the place of DeepSpeed's: keeps what it is given, until it is to fail."""

    failing = False
    events: list[tuple[str, float, int]]

    def __init__(self, config) -> None:
        self.events = []
        Master.last = self

    def write_events(self, events) -> None:
        if Master.failing:
            raise ConnectionError("the service is gone")
        self.events += events


@pytest.fixture
def master(monkeypatch):
    monkeypatch.setattr(monitor, "MonitorMaster", Master)
    monkeypatch.setattr(Master, "failing", False)
    return Master


def test_the_sections_have_the_fields_of_deepspeed():
    fields = DeepSpeedMonitorConfig.model_fields
    assert {kind: set(known) for kind, known in monitors.SECTIONS.items()} == {
        kind: set(field.annotation.model_fields) for kind, field in fields.items()
    }


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"tensorboard": {"enable": True}}, "has tensorboard without a switch: expected an object such as"),
        ({"csv_monitor": True}, "has csv_monitor without a switch"),
        ({"wandb": {"enabled": True, "entity": "us"}}, "sets 'wandb.entity', which is not known.*team"),
        ({"wandb": {"enabled": True, "project": 3}}, "has wandb.project 3: expected a text"),
        ({"comet": {"enabled": False, "samples_log_interval": 0}}, "interval 0: expected a positive whole number"),
    ],
)
def test_sections_that_deepspeed_would_not_understand(section, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(config_with(tmp_path, **section))


def test_a_monitor_whose_package_is_missing_is_refused_before_the_start(dataset, tmp_path, monkeypatch):
    find = monitors.importlib.util.find_spec
    monkeypatch.setattr(monitors.importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    words = arguments(tmp_path / "run", dataset)
    with pytest.raises(ConfigError, match=r"wandb\.enabled true, but .* not installed here: pip install wandb"):
        check_run(config_with(tmp_path, *words, wandb={"enabled": True}), ranks=1)
    check_run(config_with(tmp_path, *words, wandb={"enabled": False}), ranks=1)


def test_the_engine_and_so_the_checkpoints_do_not_see_them(tmp_path):
    config = config_with(tmp_path, comet={"enabled": True, "api_key": "a secret"}, steps_per_print=5)
    settings = deepspeed_config(config)
    assert settings["steps_per_print"] == 5
    assert not settings.keys() & monitors.SECTIONS.keys()
    assert monitor_sections(config) == {"comet": {"enabled": True, "api_key": "a secret"}}


def test_files_go_into_the_folder_of_the_run_unless_another_is_given(tmp_path):
    out = tmp_path / "zinc"
    files = {"enabled": True, "job_name": None}
    assert monitors.placed({"tensorboard": files, "csv_monitor": {"enabled": False}}, out) == {
        "tensorboard": {"enabled": True, "output_path": str(out / "tensorboard"), "job_name": ""}
    }
    assert monitors.placed({"csv_monitor": {"enabled": True, "output_path": "logs"}}, out) == {
        "csv_monitor": {"enabled": True, "output_path": "logs", "job_name": "zinc"}
    }
    assert monitors.placed({"csv_monitor": {"enabled": True, "output_path": "logs", "job_name": "first"}}, out) == {
        "csv_monitor": {"enabled": True, "output_path": "logs", "job_name": "first"}
    }


def test_a_monitor_that_fails_under_way_is_named_once_and_left_out(master, tmp_path, capsys):
    monitor = monitors.Monitors({"comet": {"enabled": True}}, tmp_path, 0)
    monitor.write({"step": 1, "time": 1e9, "loss": 2.5, "validation_consistency": math.nan})
    assert master.last.events == [("loss", 2.5, 1)]
    assert capsys.readouterr().out == ""
    master.failing = True
    for step in (2, 3):
        monitor.write({"step": step, "loss": 2.0})
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "from step 2 on (the service is gone): training goes on" in said


def test_one_that_cannot_begin_is_an_error(monkeypatch, tmp_path):
    def refuse(config):
        raise ValueError("api_key not configured")

    monkeypatch.setattr(monitor, "MonitorMaster", refuse)
    with pytest.raises(PipelineError, match=r"turns on comet, and one of them cannot begin \(api_key not configured\)"):
        monitors.Monitors({"comet": {"enabled": True}}, tmp_path, 0)


def test_without_any_nothing_is_begun(monkeypatch, tmp_path):
    monkeypatch.setattr(monitor, "MonitorMaster", None)
    monitors.Monitors({}, tmp_path, 0).write({"step": 1, "loss": 2.0})
    monitors.Monitors({"tensorboard": {"enabled": False}}, tmp_path, 0).write({"step": 1, "loss": 2.0})
