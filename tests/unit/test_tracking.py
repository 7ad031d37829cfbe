"""MLflow: what is logged, and that no server, however it fails, stops a run or loses a point of it."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
import torch

from hmoe_ds.config import ConfigError, load_config
from hmoe_ds.moe.balance import RouterLoad
from hmoe_ds.objectives.total import Losses, Normalizers
from hmoe_ds.training import tracking
from hmoe_ds.training.checkpoint import TrainState
from hmoe_ds.training.recorder import Recorder
from hmoe_ds.training.run_folder import begin_run
from hmoe_ds.training.spool import read_delivery
from tests.distributed.harness import arguments, free_port
from tests.unit.mlflow_server import Gate, MlflowServer

ROOT = Path(__file__).parents[2]
WAIT_SECONDS = 60
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
    """Failures are noticed and retried within a second, and the environment is that of this test."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 15.0)


class Run:
    """A run whose training is only claimed: `record` is what the training loop calls after a step."""

    def __init__(self, folder: Path, step: int = 0, steps: int = 1000) -> None:
        self.folder = folder
        config = load_config(["--run.out", str(folder), f"--run.steps={steps}", "--run.log_every=1"])
        begin_run(config, ranks=1, dataset="fingerprint of molecules")
        self.recorder = Recorder(config, TrainState(step=step, plan={}), rank=0)

    def record(self, steps) -> None:
        ones = torch.ones(4, dtype=torch.float64)
        load = RouterLoad(ones, ones, torch.ones(2, 8, dtype=torch.float64), torch.tensor(4.0))
        for step in steps:
            losses = Losses(*[torch.tensor(loss_of(step))] * len(Losses._fields))
            self.recorder.record(
                step, losses, load, Normalizers(1, 1, 1, 8, 64), {"validation_consistency": math.nan},
                learning_rate=0.1, grad_norm=2.0, seconds=0.5,
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


def send_rest(folder, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "hmoe_ds.training.tracking", str(folder)],
        capture_output=True, text=True, cwd=ROOT, timeout=120, env=os.environ | environment,
    )  # fmt: skip


def test_a_server_that_comes_late_is_killed_and_comes_back_has_every_step_once(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    run = Run(tmp_path / "late")
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
    lines = said(capfd)
    assert ["not reachable" in line for line in lines] == [True, False] * (len(lines) // 2)
    assert 1 <= len(lines) // 2 <= 2  # the first time the server may have been quicker than the run


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


@pytest.mark.parametrize("mode", ["hang", 500, 503, 401, 403, 404])
def test_training_goes_on_while_the_server_fails_and_all_arrives_once_when_it_is_back(
    mode, gate, server, tmp_path, capfd
):
    gate.mode = mode
    run = Run(tmp_path / f"start {mode}")
    run.record(range(1, 61))  # all of these return while the server still fails
    wait_for(lambda: gate.requests)
    gate.mode = "open"
    wait_for(lambda: read_delivery(run.folder).last_step == 60)
    gate.mode = mode
    run.record(range(61, 121))
    before = len(gate.requests)
    wait_for(lambda: len(gate.requests) > before + 1)
    gate.mode = "open"
    wait_for(lambda: read_delivery(run.folder).last_step == 120)
    run.close()
    assert history(server, mlflow_run(server, run.folder).info.run_id) == expected(range(1, 121))
    lines = said(capfd)
    assert [line.split(" reachable")[0].split()[-1] for line in lines] == ["not", "is", "not", "is"], lines


def test_lost_answers_leave_no_second_run_and_no_second_point(gate, server, tmp_path):
    gate.mode = "lose"
    run = Run(tmp_path / "lost answers")
    run.record([1])
    wait_for(lambda: any("experiments/create" in path or "get-by-name" in path for path in gate.requests))
    # One request after the other gets its answer only the second time.
    deadline = time.monotonic() + WAIT_SECONDS
    while read_delivery(run.folder).last_step < 1 and time.monotonic() < deadline:
        for mode in ("open", "lose"):
            gate.mode = mode
            before = len(gate.requests)
            wait_for(lambda before=before: len(gate.requests) > before or read_delivery(run.folder).last_step == 1)
    gate.mode = "open"
    run.close()
    assert history(server, mlflow_run(server, run.folder).info.run_id) == expected([1])


def test_a_request_whose_answer_is_lost_is_repeated_without_a_second_point(gate, server, tmp_path):
    run = Run(tmp_path / "lost answer")
    run.record([1])
    wait_for(lambda: read_delivery(run.folder).config_sent)
    gate.mode = "lose"
    before = len(gate.requests)
    run.record([2, 3])
    wait_for(lambda: len(gate.requests) > before + 2)  # stored by the server, which the sender cannot know
    gate.mode = "open"
    run.close()
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


@pytest.mark.parametrize("how", ["deleted in the middle", "deleted before a resume", "unknown to the server"])
def test_a_run_that_the_server_lost_is_sent_again_as_a_whole(how, gate, server, tmp_path, capfd):
    client = mlflow.MlflowClient(server.uri)
    run = Run(tmp_path / how)
    run.record([1, 2])
    wait_for(lambda: read_delivery(run.folder).last_step == 2)
    old = read_delivery(run.folder).run_id
    if how != "deleted in the middle":
        run.close()
    if how == "unknown to the server":
        record = run.folder / "mlflow.json"
        record.write_text(record.read_text().replace(old, "0" * 32))
    client.delete_run(old)
    if how != "deleted in the middle":
        run = Run(run.folder, step=2)
    run.record([3])
    run.close()
    new = mlflow_run(server, run.folder)
    assert new.data.tags["continues"] == (old if "deleted" in how else "0" * 32)
    assert new.data.params["optim.learning_rate"] == "0.001"
    assert history(server, new.info.run_id) == expected([1, 2, 3])
    assert ["has no run" in line for line in said(capfd)] == [True]


def test_what_the_server_refuses_is_named_once_and_holds_nothing_up(gate, server, tmp_path, capfd):
    run = Run(tmp_path / "refused")
    run.record(range(1, 4))
    with (run.folder / "metrics.jsonl").open("a") as file:
        for step in (4, 5):
            file.write(json.dumps({"step": step, "time": time.time(), "loss": loss_of(step), "bad@name": 1.0}) + "\n")
    run.record(range(6, 9))
    run.close()
    logged = mlflow_run(server, run.folder)
    assert history(server, logged.info.run_id) == expected(range(1, 9))
    lines = said(capfd)
    assert len(lines) == 1
    assert "refuses bad@name of step 4, which is left out" in lines[0]


def test_parameters_of_an_earlier_start_are_kept_and_long_values_are_cut(gate, server, tmp_path, capfd):
    folder = tmp_path / "parameters"
    run = Run(folder)
    run.close(ValueError)
    record = folder / "mlflow.json"
    record.write_text(record.read_text().replace('"described": true', '"described": false'))
    begun = json.loads((folder / "run.json").read_text())
    begun["config"]["optim"] |= {"learning_rate": 0.5}
    (folder / "run.json").write_text(json.dumps(begun))
    done = send_rest(folder)
    assert done.returncode == 0, done.stderr
    assert "refuses the parameters" in done.stdout
    assert mlflow_run(server, folder).data.params["optim.learning_rate"] == "0.001"

    long = Run(tmp_path / "long", step=1)  # not begun anew: what is in the folder below is what is sent
    wait_for(lambda: read_delivery(long.folder).described)
    begun["config"]["lists"] = {"short": [1, 2], "long": "x" * 7000, "many": {f"p{n}": n for n in range(150)}}
    long.close()
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "run.json").write_text(json.dumps(begun))
    (fresh / "metrics.jsonl").write_text("")
    (fresh / "mlflow.json").write_text("{}")
    assert send_rest(fresh).returncode == 0
    parameters = mlflow_run(server, fresh).data.params
    assert parameters["lists.short"] == "[1, 2]"
    assert parameters["lists.long"] == "x" * 6000
    assert parameters["lists.many.p149"] == "149"


def test_without_an_artifact_store_one_line_says_so(gate, server, tmp_path, capfd):
    run = Run(tmp_path / "artifacts")
    wait_for(lambda: read_delivery(run.folder).config_sent)
    run.close(ValueError)
    (run.folder / "config.yaml").unlink()
    record = run.folder / "mlflow.json"
    record.write_text(record.read_text().replace('"config_sent": true', '"config_sent": false'))
    done = send_rest(run.folder)
    assert done.returncode == 0
    assert done.stdout.count("does not take config.yaml as an artifact") == 1


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
    import psutil

    run = Run(tmp_path / "monitor")
    wait_for(lambda: read_delivery(run.folder).run_id)
    monkeypatch.setattr(psutil, "cpu_percent", lambda: 1 / 0)
    run.recorder._tracker._system._due = 0.0
    run.record([1])
    wait_for(lambda: read_delivery(run.folder).last_step == 1)
    run.close()
    assert ["system metrics are not logged any more" in line for line in capfd.readouterr().out.splitlines()].count(
        True
    ) == 1


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
    assert "python -m hmoe_ds.training.tracking" in lines[1]
    assert "secret" not in "".join(lines) + (run.folder / "mlflow.json").read_text()

    refused = send_rest(run.folder)
    assert refused.returncode == 1
    assert "3 steps are left" in refused.stderr
    assert "secret" not in refused.stderr
    for count in ("3 steps were sent now", "0 steps were sent now"):
        done = send_rest(run.folder, MLFLOW_TRACKING_URI=server.uri)
        assert done.returncode == 0, done.stderr
        assert count in done.stdout
    logged = mlflow_run(server, run.folder)
    assert history(server, logged.info.run_id) == expected([1, 2, 3])
    assert logged.info.status == "FINISHED"
    ended = read_delivery(run.folder).ended
    assert logged.info.end_time == int(1000 * ended)


def test_a_process_ends_although_its_server_never_answers(gate, tmp_path):
    gate.mode = "hang"
    code = (
        "import sys; from pathlib import Path; from tests.unit.test_tracking import Run, tracking\n"
        "tracking.CLOSE_SECONDS = 0.5\n"
        "run = Run(Path(sys.argv[1])); run.record([1, 2]); run.close(); print('ended')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "hung")],
        capture_output=True, text=True, cwd=ROOT, timeout=120, env=os.environ | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "600"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert gate.requests
    assert done.stdout.splitlines()[-1] == "ended"
    assert "has not got 2 logged steps" in done.stdout


def test_training_without_its_server_finishes_and_is_sent_later(dataset, server, tmp_path):
    server.wait()
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
    assert send_rest(out, MLFLOW_TRACKING_URI=server.uri).returncode == 0
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert history(server, mlflow_run(server, out).info.run_id) == [(1, losses[0]), (2, losses[1])]


def test_without_a_server_a_file_in_the_folder_has_the_run(tmp_path):
    run = Run(tmp_path / "alone")
    run.record([1, 2])
    run.close()
    client = mlflow.MlflowClient(f"sqlite:///{run.folder / 'mlflow.db'}")
    run_id = read_delivery(run.folder).run_id
    assert [(p.step, p.value) for p in client.get_metric_history(run_id, "loss")] == expected([1, 2])
    assert client.get_run(run_id).info.status == "FINISHED"
    assert client.list_artifacts(run_id)[0].path == "config.yaml"
    assert not Path("mlruns").exists()


def test_the_command_says_what_is_wrong_with_a_folder(tmp_path, capsys):
    assert tracking.main([str(tmp_path / "missing")]) == 2
    assert "run.json cannot be read" in capsys.readouterr().err
    folder = tmp_path / "untracked"
    config = load_config(["--run.out", str(folder)])
    begin_run(config, ranks=1, dataset="molecules")
    assert tracking.main([str(folder)]) == 2
    assert "was trained with run.mlflow false" in capsys.readouterr().err
    (folder / "mlflow.json").write_text('{"run_id":')
    assert tracking.main([str(folder)]) == 2
    assert "mlflow.json cannot be read" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"mlflow\.json cannot be read .*: delete it"):
        read_delivery(folder)
