"""MLflow: what is logged, and that no server, however it fails, stops a run or loses a point of it."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import psutil
import pytest
import torch

from hmoe_ds.config import ConfigError
from hmoe_ds.config_parser import load_config
from hmoe_ds.moe.balance import RouterLoad
from hmoe_ds.moe.exchange import Traffic
from hmoe_ds.objectives.total import Losses, Normalizers
from hmoe_ds.training.checkpoints.checkpoint import TrainState
from hmoe_ds.training.checks.preflight import check_run
from hmoe_ds.training.curriculum import Stage
from hmoe_ds.training.launching.node import free_port
from hmoe_ds.training.recording import tracking
from hmoe_ds.training.recording.metrics import StepSums
from hmoe_ds.training.recording.recorder import Recorder
from hmoe_ds.training.recording.spool import read_delivery
from hmoe_ds.training.run_folder import begin_run
from hmoe_ds.training.stopping.stop import StoppedError
from tests.distributed.harness import arguments
from tests.unit.mlflow_server import Gate, MlflowServer

ROOT = Path(__file__).parents[2]
WAIT_SECONDS = 120
EXPERIMENT = "molecules of tests"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server that a test must start; the first test here does."""
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.launch()
    yield server
    server.stop()


@pytest.fixture
def gate(server, monkeypatch):
    server.wait()
    gate = Gate(server)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", gate.uri)
    yield gate
    gate.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """What failed is tried again at once, and the environment is that of this test."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    monkeypatch.setattr(tracking, "GATHER_SECONDS", 0.05)
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 60.0)


class Run:
    """A run whose training is only claimed: `record` is what the training loop calls after a step."""

    def __init__(self, folder: Path, step: int = 0, steps: int = 1000, mlflow_run: str | None = None) -> None:
        self.folder = folder
        config = load_config(["--run.out", str(folder), f"--run.steps={steps}", "--run.log_every=1"])
        begin_run(config, ranks=1, dataset="fingerprint of molecules", shards=[])
        state = TrainState(step=step, plan={}, mlflow_run=mlflow_run)
        self.recorder = Recorder(config, state, rank=0, traffic=Traffic())

    def record(self, steps) -> None:
        ones = torch.ones(4, dtype=torch.float64)
        load = RouterLoad(ones, ones, torch.ones(2, 8).double(), torch.tensor(4.0), torch.ones(2, 2).double())
        for step in steps:
            losses = Losses(*[torch.tensor(loss_of(step))] * len(Losses._fields))
            sums = StepSums(losses, load, torch.tensor(0.0), torch.tensor(0.0))
            self.recorder.record(
                step, sums, Normalizers(*torch.ones(11).unbind()),
                {"validation_consistency": math.nan}, stage=Stage(1.0, 1.0, 0.2, 1.0, 0.2), live_L=None, splits={},
                due=True, learning_rate=0.1, grad_norm=2.0, skipped=0, seconds=0.5, waited=0.1,
            )  # fmt: skip

    def close(self, error: type[BaseException] | None = None) -> None:
        self.recorder.__exit__(error, None, None)

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def loss_of(step: int) -> float:
    return 3.0 / step


def wait_for(condition) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.05)


def mlflow_run(server, folder: Path):
    """-> the only MLflow run of this name, found without what the folder says."""
    client = mlflow.MlflowClient(server.uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    found = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{folder.name}'")
    assert len(found) == 1, found
    return found[0]


def history(server, run_id: str, name: str = "loss") -> list[tuple[int, float]]:
    points = mlflow.MlflowClient(server.uri).get_metric_history(run_id, name)
    return sorted((point.step, point.value) for point in points)


def expected(steps) -> list[tuple[int, float]]:
    return [(step, pytest.approx(loss_of(step))) for step in steps]


def said(capfd) -> list[str]:
    """What was printed about MLflow since the last call."""
    out, err = capfd.readouterr()
    return [line for line in (out + err).splitlines() if "MLflow" in line or "urllib3" in line or "mlflow" in line]


def change_record(folder: Path, **changes) -> None:
    """Change fields of `mlflow.json`."""
    record = folder / "mlflow.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | changes))


def test_training_without_its_server_finishes_and_is_sent_later(dataset, server, tmp_path):
    out = tmp_path / "trained"
    command = [
        sys.executable,
        "-m",
        "hmoe_ds.training.loop",
        *arguments(out, dataset, run__mlflow="true", run__steps=2),
    ]
    nowhere = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=os.environ | nowhere)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "has not got 2 logged steps" in done.stdout
    server.wait()
    later = [sys.executable, "-m", "hmoe_ds.training.recording.tracking", str(out)]
    subprocess.run(later, check=True, cwd=ROOT, timeout=120, env=os.environ | {"MLFLOW_TRACKING_URI": server.uri})
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert history(server, mlflow_run(server, out).info.run_id) == [(1, losses[0]), (2, losses[1])]
    (out / "mlflow.json").write_text("")
    with pytest.raises(ConfigError, match=r"mlflow\.json cannot be read .*: delete it"):
        check_run(load_config(arguments(out, dataset, run__mlflow="true", run__steps=2)), ranks=1)


def test_a_server_that_is_killed_and_started_again_has_every_step_once(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    run = Run(tmp_path / "restart")
    run.record(range(1, 121))
    wait_for(lambda: read_delivery(run.folder).last_step == 120)
    server.stop()
    run.record(range(121, 241))
    server.launch()
    run.record(range(241, 301))
    wait_for(lambda: read_delivery(run.folder).last_step == 300)
    run.record([301])
    run.close()
    logged = mlflow_run(server, run.folder)
    assert history(server, logged.info.run_id) == expected(range(1, 302))
    assert logged.info.status == "FINISHED"
    assert ["not reachable" in line for line in said(capfd)] == [True, False]


def test_points_sent_late_carry_their_times_and_what_the_run_is(gate, server, tmp_path):
    gate.mode = 503
    run = Run(tmp_path / "described")
    run.record([1, 2])
    time.sleep(0.1)
    gate.mode = "open"
    run.close()
    logged = mlflow_run(server, run.folder)
    client = mlflow.MlflowClient(server.uri)
    times = {point.step: point.timestamp for point in client.get_metric_history(logged.info.run_id, "loss")}
    assert times == {line["step"]: int(1000 * line["time"]) for line in run.lines()}
    assert logged.info.start_time <= times[1] <= times[2] <= logged.info.end_time
    assert logged.data.params["optim.learning_rate"] == "0.001"
    assert logged.data.params["ranks"] == "1"
    assert logged.data.tags["dataset_fingerprint"] == "fingerprint of molecules"
    assert "validation_consistency" not in logged.data.metrics
    assert "time" not in logged.data.metrics
    assert client.list_artifacts(logged.info.run_id)[0].path == "config.yaml"


@pytest.mark.parametrize("mode", ["hang", 503, 401, 404])
def test_training_goes_on_while_the_server_fails_and_all_arrives_once_when_it_is_back(
    mode, gate, server, tmp_path, monkeypatch, capfd
):
    if mode == "hang":
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    gate.mode = mode
    run = Run(tmp_path / f"start {mode}")
    run.record(range(1, 61))  # all of these return while the server still fails
    wait_for(lambda: len(gate.requests) >= 2)
    gate.mode = "open"
    wait_for(lambda: read_delivery(run.folder).config_sent)
    assert read_delivery(run.folder).last_step == 60
    gate.mode = mode
    before = len(gate.requests)
    run.record(range(61, 121))
    wait_for(lambda: len(gate.requests) >= before + 2)
    gate.mode = "open"
    wait_for(lambda: read_delivery(run.folder).last_step == 120)
    run.close()
    assert history(server, mlflow_run(server, run.folder).info.run_id) == expected(range(1, 121))
    lines = said(capfd)
    turns = ["not reachable" in line for line in lines]
    assert turns == [True, False] * (len(turns) // 2), lines
    assert len(turns) == 4 or (mode == "hang" and len(turns) >= 4)  # a busy machine may take its 2 seconds too


def test_a_lost_answer_leaves_no_second_run_and_no_second_point(gate, server, tmp_path):
    gate.lose = {"runs/create", "runs/log-batch"}  # each is stored by the server, which the sender cannot know
    run = Run(tmp_path / "lost answers")
    run.record([1, 2, 3])
    wait_for(lambda: read_delivery(run.folder).last_step == 3)
    run.close()
    assert sum("runs/create" in path for path in gate.requests) == 1
    assert not gate.lose
    assert history(server, mlflow_run(server, run.folder).info.run_id) == expected([1, 2, 3])


def test_a_resumed_run_continues_its_mlflow_run_and_sends_no_step_twice(gate, server, tmp_path):
    first = Run(tmp_path / "resumed")
    first.record(range(1, 8))
    wait_for(lambda: read_delivery(first.folder).last_step == 7)
    first.close(KeyboardInterrupt)
    run_id = mlflow_run(server, first.folder).info.run_id
    assert mlflow_run(server, first.folder).info.status == "FAILED"
    # The checkpoint was after step 5: 6 and 7 are done again. The address is known from the first part.
    del os.environ["MLFLOW_TRACKING_URI"]
    second = Run(first.folder, step=5)
    second.record(range(6, 11))
    wait_for(lambda: read_delivery(first.folder).last_step == 10)
    wait_for(lambda: mlflow_run(server, first.folder).info.status == "RUNNING")
    second.close()
    logged = mlflow_run(server, first.folder)
    assert (logged.info.run_id, logged.info.status) == (run_id, "FINISHED")
    assert history(server, run_id) == expected(range(1, 11))


def test_a_run_that_was_asked_to_stop_goes_on_with_the_id_in_its_checkpoint(gate, server, tmp_path):
    """Its folder may be another one, on another machine."""
    first = Run(tmp_path / "stopped")
    first.record(range(1, 6))
    wait_for(lambda: read_delivery(first.folder).last_step == 5)
    first.close(StoppedError)
    run_id = first.recorder.mlflow_run
    assert mlflow_run(server, first.folder).info.status == "KILLED"
    (first.folder / "mlflow.json").unlink()
    second = Run(first.folder, step=5, mlflow_run=run_id)
    second.record(range(6, 8))
    wait_for(lambda: read_delivery(first.folder).last_step == 7)
    second.close()
    logged = mlflow_run(server, first.folder)
    assert (logged.info.run_id, logged.info.status) == (run_id, "FINISHED")
    assert history(server, run_id) == expected(range(1, 8))


def test_a_finished_run_that_is_started_again_asks_the_server_nothing(gate, server, tmp_path):
    run = Run(tmp_path / "finished", steps=2)
    run.record([1, 2])
    run.close()
    ended = mlflow_run(server, run.folder).info.end_time
    before = len(gate.requests)
    Run(run.folder, step=2, steps=2).close()
    assert len(gate.requests) == before
    assert mlflow_run(server, run.folder).info.end_time == ended


def test_steps_done_again_from_the_beginning_are_another_mlflow_run(gate, server, tmp_path):
    first = Run(tmp_path / "again")
    first.record([1, 2])
    first.close(ValueError)
    old = mlflow_run(server, first.folder).info.run_id
    second = Run(first.folder)
    second.record([1])
    second.close()
    new = read_delivery(first.folder).run_id
    assert mlflow.MlflowClient(server.uri).get_run(new).data.tags["continues"] == old
    assert history(server, new) == expected([1])
    assert history(server, old) == expected([1, 2])


@pytest.mark.parametrize("how", ["deleted in the middle", "unknown on resume"])
def test_a_run_that_the_server_lost_is_sent_again_as_a_whole(how, gate, server, tmp_path, capfd):
    client = mlflow.MlflowClient(server.uri)
    run = Run(tmp_path / how)
    run.record([1, 2])
    wait_for(lambda: read_delivery(run.folder).last_step == 2)
    old = read_delivery(run.folder).run_id
    if how == "deleted in the middle":
        client.delete_run(old)
    else:
        run.close()
        client.delete_run(old)
        change_record(run.folder, run_id="0" * 32)
        run = Run(run.folder, step=2)
    run.record([3])
    run.close()
    new = mlflow_run(server, run.folder)
    assert new.data.tags["continues"] == ("0" * 32 if how == "unknown on resume" else old)
    assert new.data.params["optim.learning_rate"] == "0.001"
    assert history(server, new.info.run_id) == expected([1, 2, 3])
    assert sum("has no run" in line for line in said(capfd)) == 1


def test_what_the_server_refuses_is_named_once_and_holds_nothing_up(gate, server, tmp_path, capfd):
    run = Run(tmp_path / "refused")
    run.record([1])
    with (run.folder / "metrics.jsonl").open("a") as file:
        for step in (2, 3):
            file.write(json.dumps({"step": step, "time": time.time(), "loss": loss_of(step), "bad@name": 1.0}) + "\n")
    run.record([4])
    run.close()
    logged = mlflow_run(server, run.folder)
    assert history(server, logged.info.run_id) == expected(range(1, 5))
    lines = said(capfd)
    assert len(lines) == 1
    assert "refuses bad@name of step 2, which is left out" in lines[0]


def test_parameters_are_flat_cut_when_long_and_never_change(gate, server, tmp_path, capfd):
    folder = tmp_path / "parameters"
    begin_run(load_config(["--run.out", str(folder)]), ranks=1, dataset="molecules", shards=[])
    (folder / "metrics.jsonl").write_text("")
    (folder / "mlflow.json").write_text("{}")
    begun = json.loads((folder / "run.json").read_text())
    begun["config"]["extra"] = {"short": [1, 2], "long": "x" * 7000, "many": {f"p{n}": n for n in range(150)}}
    (folder / "run.json").write_text(json.dumps(begun))
    assert tracking.main([str(folder)]) == 0
    parameters = mlflow_run(server, folder).data.params
    assert parameters["extra.short"] == "[1, 2]"
    assert parameters["extra.long"] == "x" * 6000
    assert parameters["extra.many.p149"] == "149"

    begun["config"]["optim"]["learning_rate"] = 0.5
    (folder / "run.json").write_text(json.dumps(begun))
    change_record(folder, described=False)
    assert tracking.main([str(folder)]) == 0
    assert sum("refuses the parameters" in line for line in said(capfd)) == 1
    assert mlflow_run(server, folder).data.params["optim.learning_rate"] == "0.001"


def test_without_an_artifact_store_one_line_says_so(gate, server, tmp_path, capfd):
    gate.mode = "no artifacts"
    run = Run(tmp_path / "artifacts")
    run.record([1])
    wait_for(lambda: read_delivery(run.folder).config_sent)
    run.record([2])
    run.close()
    assert ["does not take config.yaml as an artifact" in line for line in said(capfd)] == [True]
    assert history(server, mlflow_run(server, run.folder).info.run_id) == expected([1, 2])


def test_system_metrics_are_logged_at_intervals_unless_switched_off(gate, server, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    run = Run(tmp_path / "system")

    def samples():
        run_id = read_delivery(run.folder).run_id
        return history(server, run_id, "system/cpu_utilization_percentage") if run_id else []

    wait_for(lambda: len(samples()) >= 3)
    run.close()
    metrics = mlflow_run(server, run.folder).data.metrics
    assert 0 < metrics["system/system_memory_usage_percentage"] < 100
    assert "system/disk_usage_percentage" in metrics

    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    run = Run(tmp_path / "no system")
    run.record([1])
    run.close()
    assert not [name for name in mlflow_run(server, run.folder).data.metrics if name.startswith("system/")]


def test_a_monitor_that_fails_is_given_up_and_the_steps_arrive(gate, server, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    run = Run(tmp_path / "monitor")
    failures = []

    def fail():
        failures.append("once")
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(psutil, "cpu_percent", fail)
    wait_for(lambda: failures)
    run.record([1])
    run.close()
    assert failures == ["once"]
    assert "system metrics are not logged any more: the driver is gone" in capfd.readouterr().out
    assert history(server, mlflow_run(server, run.folder).info.run_id) == expected([1])


def test_a_run_whose_server_never_came_ends_and_is_sent_by_hand(server, tmp_path, monkeypatch, capfd):
    server.wait()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{free_port()}")
    run = Run(tmp_path / "by hand")
    run.record(range(1, 4))
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # as a killed run leaves it
    run.close()
    lines = said(capfd)
    assert len(lines) == 2
    assert "Connection refused" in lines[0]
    assert "has not got 3 logged steps" in lines[1]
    assert "python -m hmoe_ds.training.recording.tracking" in lines[1]
    assert "secret" not in "".join(lines) + (run.folder / "mlflow.json").read_text()

    assert tracking.main([str(run.folder)]) == 1
    refused = said(capfd)[-1]
    assert "3 steps are left" in refused
    assert "secret" not in refused
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    for count in ("3 steps were sent now", "0 steps were sent now"):
        assert tracking.main([str(run.folder)]) == 0
        assert count in said(capfd)[-1]
    logged = mlflow_run(server, run.folder)
    assert history(server, logged.info.run_id) == expected([1, 2, 3])
    assert logged.info.status == "FINISHED"
    ended = read_delivery(run.folder).ended
    assert logged.info.end_time == int(1000 * ended)


def test_a_process_ends_although_its_server_never_answers(gate, tmp_path):
    gate.mode = "hang"
    begin_run(load_config(["--run.out", str(tmp_path)]), ranks=1, dataset="molecules", shards=[])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "loss": 2.0}\n')
    code = (
        "import sys; from pathlib import Path; from hmoe_ds.training.recording import tracking\n"
        "tracking.CLOSE_SECONDS = 3.0; tracker = tracking.Tracker(Path(sys.argv[1]), step=0)\n"
        "tracker.notify(); tracker.close('FINISHED')"
    )
    endless = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "600"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, env=os.environ | endless)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(gate.requests) == 1
    assert "has not got 1 logged steps" in done.stdout


def test_without_a_server_a_file_in_the_folder_has_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run(tmp_path / "alone")
    run.record([1, 2])
    run.close()
    client = mlflow.MlflowClient(f"sqlite:///{run.folder / 'mlflow.db'}")
    run_id = read_delivery(run.folder).run_id
    assert [(p.step, p.value) for p in client.get_metric_history(run_id, "loss")] == expected([1, 2])
    assert client.get_run(run_id).info.status == "FINISHED"
    assert client.list_artifacts(run_id)[0].path == "config.yaml"
    assert [path.name for path in tmp_path.iterdir()] == ["alone"]


def test_the_command_says_what_is_wrong_with_a_folder(tmp_path, capsys):
    assert tracking.main([str(tmp_path / "missing")]) == 2
    assert "run.json cannot be read" in capsys.readouterr().err
    folder = tmp_path / "untracked"
    config = load_config(["--run.out", str(folder)])
    begin_run(config, ranks=1, dataset="molecules", shards=[])
    assert tracking.main([str(folder)]) == 2
    assert "was trained with run.mlflow false" in capsys.readouterr().err
    (folder / "mlflow.json").write_text('{"run_id":')
    assert tracking.main([str(folder)]) == 2
    assert "mlflow.json cannot be read" in capsys.readouterr().err
