"""MLflow, on rank 0 only; the only file that imports it. `python -m hmoe_ds.training.tracking RUN` sends what is left.

The training loop writes `metrics.jsonl` and goes on; a thread of its own sends those lines to the server, now or when
the server is there again. A point that is sent twice, because the answer to the first time was lost, is stored
once: MLflow's database keeps one of points that agree in name, step, time and value.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.errors import PipelineError, UsageError
from hmoe_ds.training.run_folder import read_run_record
from hmoe_ds.training.spool import DELIVERY, METRICS, RUNNING, Delivery, Spool, read_delivery

LINES_PER_BATCH = 50  # some 15 metrics each; MLflow takes 1,000 metrics at once
PAUSE_SECONDS = 0.2  # between two batches, at least
PROCESSOR_SHARE = 0.1  # of one core, that sending a long backlog takes from the training, at most
RETRY_SECONDS = 15.0  # between two attempts while the server is not there
CLOSE_SECONDS = 60.0  # that the end of a run waits for the rest to go out, at most
LONGEST_PARAMETER = 6000
SYSTEM_SECONDS = 10.0  # between two samples of system metrics
KEY_TAG = "hmoe_ds_key"

# Not what the user has set. The sender tries again by itself, later.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # it has threads of its own, which ask servers on the internet
}


class Tracker:
    """Sends a run to MLflow while it goes on. No method waits for the server, but `close`, for a bounded time.

    Args:
        folder: of the run.
        step: steps done at this start. From 0 on a new MLflow run begins; else that of the folder is continued.
    """

    def __init__(self, folder: Path, step: int) -> None:
        delivery = read_delivery(folder) or Delivery()
        if step == 0:  # whatever the folder holds, its steps are done again
            delivery = Delivery(continues=delivery.run_id)
        self._spool = Spool(folder, delivery)
        self._sender = Sender(self._spool, self._say)
        self._system = SystemMetrics(self._say)
        self._news, self._closing, self._given_up = threading.Event(), threading.Event(), threading.Event()
        # A daemon, so that a request without an answer does not keep the process.
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """`metrics.jsonl` has a new line."""
        if self._spool.delivery.status != RUNNING:
            self._spool.update(status=RUNNING)
        self._news.set()

    def close(self, status: str) -> None:
        """The run has come to FINISHED or FAILED: wait a while for the rest to go out, and say what did not."""
        if self._spool.delivery.status != status:
            self._spool.update(status=status, ended=time.time())
        self._closing.set()
        self._news.set()
        self._thread.join(CLOSE_SECONDS)
        if not self._sender.is_done():
            self._say(
                f"MLflow has not got {self._spool.unsent()} logged steps and the end of this run; when its server is "
                f"back, send them with: python -m hmoe_ds.training.tracking {shlex.quote(str(self._spool.folder))}"
            )
        self._given_up.set()

    def _say(self, message: str) -> None:
        # Python ends a process hard when it finds that a daemon is printing.
        if not self._given_up.is_set():
            print(message, flush=True)

    def _work(self) -> None:
        lost = False
        while not self._given_up.is_set():
            before = time.thread_time()
            closing = self._closing.is_set()  # asked first: what was logged before it must still go out
            try:
                training = not closing and self._spool.delivery.status == RUNNING
                more = self._sender.send_some(self._system.sample_if_due() if training else {})
                if lost:
                    self._say(
                        f"{self._sender} is reachable again, {self._spool.unsent()} logged steps are left to send"
                    )
                lost = False
            except Exception as error:  # whatever it is, the training goes on
                if not lost:
                    self._say(
                        f"{self._sender} is not reachable ({_reason(error)}): training goes on, {METRICS} keeps what "
                        "is logged, and it is sent later"
                    )
                lost = True
                if closing:
                    return
                self._closing.wait(RETRY_SECONDS)
                continue
            if more:
                self._closing.wait(max(PAUSE_SECONDS, (time.thread_time() - before) * (1 / PROCESSOR_SHARE - 1)))
            elif closing:
                return
            else:
                self._news.wait(self._system.interval)
                self._news.clear()


class Sender:
    """Brings MLflow up to what a run's folder holds, one request after the other; used by one thread.

    Args:
        spool: of the run.
        say: takes one-line messages.
    """

    def __init__(self, spool: Spool, say: Callable[[str], None]) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import mlflow  # noqa: F401  takes seconds; here and not in the middle of the training

        logging.getLogger("urllib3").setLevel(logging.ERROR)
        self._spool = spool
        self._say = say
        self._folder = spool.folder.resolve()
        self._client: Any = None
        self._refused: set[str] = set()
        uri, experiment = os.environ.get("MLFLOW_TRACKING_URI"), os.environ.get("MLFLOW_EXPERIMENT_NAME")
        spool.update(
            tracking_uri=_without_password(uri) if uri else spool.delivery.tracking_uri,
            experiment=experiment or spool.delivery.experiment,
        )
        self.uri = uri or spool.delivery.tracking_uri or f"sqlite:///{self._folder / 'mlflow.db'}"

    def __str__(self) -> str:
        return f"MLflow at {_without_password(self.uri)}"

    def is_done(self) -> bool:
        """Whether MLflow has everything."""
        delivery = self._spool.delivery
        return delivery.described and delivery.status == delivery.status_sent and not self._spool.unsent()

    def send_some(self, system: dict[str, float]) -> bool:
        """Send what MLflow does not know of the run, at most one batch of steps; -> whether there may be more.

        Raises whatever MLflow raises when the server is not there, does not answer, or does not let us in.

        Args:
            system: a sample of system metrics of now; lost when it cannot be sent.
        """
        delivery = self._spool.delivery
        try:
            if delivery.run_id is None:
                self._begin_run()
            if not delivery.described:
                self._describe()
            self._send_metrics(self._system_points(system))
            lines, position = self._spool.next_lines(LINES_PER_BATCH)
            if lines:
                self._send_metrics([point for line in lines for point in self._points(line)])
                self._spool.mark_sent(lines, position)
                return True
            self._send_status()
            if not delivery.config_sent:
                self._send_config()
        except _RunLostError:
            self._say(f"{self} has no run {delivery.run_id} any more; a new one gets all its steps")
            self._spool.begin_anew()
            return True
        return False

    def _send_metrics(self, points: list[Any]) -> None:
        """Send `mlflow.entities.Metric`s; those that the server refuses are left out, one line for each name."""
        if not points:
            return
        objection = self._objection(lambda: self._connect().log_batch(self._run_id, metrics=points, synchronous=True))
        if objection is None:
            return
        if len(points) > 1:  # look for the one that it does not take
            self._send_metrics(points[: len(points) // 2])
            self._send_metrics(points[len(points) // 2 :])
        elif points[0].key not in self._refused:
            self._refused.add(points[0].key)
            self._say(
                f"{self} refuses {points[0].key} of step {points[0].step}, which is left out: {_reason(objection)}"
            )

    @property
    def _run_id(self) -> str | None:
        return self._spool.delivery.run_id

    def _connect(self) -> Any:
        if self._client is None:
            from mlflow import MlflowClient

            self._client = MlflowClient(self.uri)  # creates the tables of a new sqlite file
        return self._client

    def _begin_run(self) -> None:
        from mlflow.tracking.context.registry import resolve_tags

        delivery = self._spool.delivery
        client = self._connect()
        experiment = client.get_experiment_by_name(delivery.experiment)
        if experiment is None:
            # MLflow would put the artifacts of a sqlite file into the current directory.
            local = None if delivery.tracking_uri else str(self._folder / "mlflow_artifacts")
            experiment_id = client.create_experiment(delivery.experiment, artifact_location=local)
        else:
            experiment_id = experiment.experiment_id
        created = client.search_runs([experiment_id], f"tags.{KEY_TAG} = '{delivery.key}'", max_results=1)
        if not created:
            tags = {KEY_TAG: delivery.key, "dataset_fingerprint": read_run_record(self._spool.folder)["dataset"]}
            if delivery.continues:
                tags["continues"] = delivery.continues
            started = int(1000 * delivery.started)
            created = [client.create_run(experiment_id, started, resolve_tags(tags), self._folder.name)]
        self._spool.update(run_id=created[0].info.run_id)

    def _describe(self) -> None:
        """Log the configuration as parameters."""
        from mlflow.entities import Param

        record = read_run_record(self._spool.folder)
        values = {"ranks": record["ranks"], **_flatten(record["config"])}
        parameters = [Param(name, str(value)[:LONGEST_PARAMETER]) for name, value in values.items()]
        objection = self._objection(lambda: self._connect().log_batch(self._run_id, params=parameters))
        if objection is not None:
            self._say(f"{self} refuses the parameters, which are left out: {_reason(objection)}")
        self._spool.update(described=True)

    def _points(self, line: dict[str, Any]) -> list[Any]:
        """One `mlflow.entities.Metric` for each finite number of a line of `metrics.jsonl`, where others are null."""
        from mlflow.entities import Metric

        # Lines had no time in older versions.
        milliseconds = int(1000 * line.get("time", self._spool.delivery.started))
        return [
            Metric(name, float(value), milliseconds, line["step"])
            for name, value in line.items()
            if name not in ("step", "time") and isinstance(value, (int, float))
        ]

    def _system_points(self, system: dict[str, float]) -> list[Any]:
        """Their steps are seconds since the run began."""
        from mlflow.entities import Metric

        now = time.time()
        step = int(now - self._spool.delivery.started)
        return [Metric(name, value, int(1000 * now), step) for name, value in system.items()]

    def _send_status(self) -> None:
        delivery = self._spool.delivery
        status, ended = delivery.status, delivery.ended
        if status == delivery.status_sent:
            return
        client = self._connect()
        if status == RUNNING:
            objection = self._objection(lambda: client.update_run(self._run_id, status))
        else:
            milliseconds = int(1000 * (ended or time.time()))
            objection = self._objection(lambda: client.set_terminated(self._run_id, status, milliseconds))
        if objection is not None:
            self._say(f"{self} refuses the status {status}, which is left out: {_reason(objection)}")
        self._spool.update(status_sent=status)

    def _send_config(self) -> None:
        try:
            self._connect().log_artifact(self._run_id, str(self._folder / "config.yaml"))
        except Exception as error:  # a server may have no artifact store, or one that this machine cannot write to
            self._say(f"{self} does not take config.yaml as an artifact, it has the parameters: {_reason(error)}")
        self._spool.update(config_sent=True)

    def _objection(self, request: Callable[[], object]) -> Exception | None:
        """Make a request; -> None, or why the server refuses just this content.

        Raises _RunLostError when the run is gone; whatever MLflow raises when the request may succeed later.
        """
        from mlflow import MlflowException

        try:
            request()
            return None
        except MlflowException as error:
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST"):
                raise
            objection = error
        self._check_run()
        return objection

    def _check_run(self) -> None:
        from mlflow import MlflowException

        try:
            run = self._connect().get_run(self._run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise _RunLostError from error
            raise
        if run.info.lifecycle_stage == "deleted":
            raise _RunLostError


class _RunLostError(Exception):
    """The server has no such run: it was deleted, or the server is another one."""


class SystemMetrics:
    """CPU, memory, disk, network and NVIDIA GPUs of this node, as MLflow measures and names them.

    Not `mlflow.system_metrics.SystemMetricsMonitor` itself: its thread ends at the first request that fails, and it
    asks the server at the start and waits for it at the end.

    Args:
        say: takes one-line messages.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.interval = SYSTEM_SECONDS
        self._say = say
        self._enabled = True
        self._monitors: list[Any] = []
        self._prefix = "system/"
        self._due = 0.0

    def sample_if_due(self) -> dict[str, float]:
        """-> a sample if the last one is `interval` seconds old, or nothing; values by name, `system/...`."""
        if not self._enabled or time.monotonic() < self._due:
            return {}
        try:
            if not self._monitors:
                self._begin()
                self._measure()  # the first value of a processor's load means nothing
                return {}
            self._due = time.monotonic() + self.interval
            return self._measure()
        except Exception as error:  # a driver may fail, a container may have no network; the training goes on
            self._say(f"system metrics are not logged any more: {_reason(error)}")
            self._enabled = False
            return {}

    def _begin(self) -> None:
        from mlflow import environment_variables as env
        from mlflow.system_metrics.metrics import cpu_monitor, disk_monitor, gpu_monitor, network_monitor

        self._enabled = env.MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get()
        self.interval = env.MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or SYSTEM_SECONDS
        node = env.MLFLOW_SYSTEM_METRICS_NODE_ID.get()
        self._prefix = f"system/{node}/" if node else "system/"
        self._monitors = [cpu_monitor.CPUMonitor(), disk_monitor.DiskMonitor(), network_monitor.NetworkMonitor()]
        with contextlib.suppress(ImportError, RuntimeError):  # without nvidia-ml-py, or without a GPU
            self._monitors.append(gpu_monitor.GPUMonitor())

    def _measure(self) -> dict[str, float]:
        sample: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            sample |= {self._prefix + name: float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return sample


def send_rest(folder: Path) -> tuple[str, int]:
    """Send what MLflow has not got of the run in `folder`; -> (the MLflow run, how many steps were sent).

    Raises UsageError when there is no such run, PipelineError when MLflow cannot be reached.
    """
    read_run_record(folder)
    delivery = read_delivery(folder)
    if delivery is None:
        raise UsageError(f"{folder} has no {DELIVERY}, it was trained with run.mlflow false: give another run")
    spool = Spool(folder, delivery)
    with tqdm(total=spool.unsent(), unit="step", disable=not sys.stderr.isatty()) as bar:
        sender = Sender(spool, bar.write)
        try:
            while sender.send_some({}):
                bar.update(spool.sent - bar.n)
        except Exception as error:
            raise PipelineError(
                f"{sender} is not reachable ({_reason(error)}), {spool.unsent()} steps are left: start it or set "
                "MLFLOW_TRACKING_URI, and repeat this command"
            ) from error
    return f"{sender}, run {delivery.run_id}", spool.sent


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command; -> its exit code: 0 when MLflow has everything, 1 when not, 2 for a usage error."""
    parser = argparse.ArgumentParser(
        prog="python -m hmoe_ds.training.tracking",
        description="Send to MLflow what it has not got of a run: its server was down, or the run was killed.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run")
    options = parser.parse_args(argv)
    try:
        target, steps = send_rest(options.run)
    except PipelineError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print(f"{target} has all of {options.run}; {steps} steps were sent now")
    return 0


def _without_password(text: str) -> str:
    return re.sub(r"(?<=\w://)[^/\s]*@", "", text)


def _reason(error: BaseException) -> str:
    """What went wrong in the first place, in one short line: MLflow wraps what requests wraps what the system says."""
    while error.__context__ is not None:
        error = error.__context__
    return _without_password(" ".join(str(error).split()) or type(error).__name__)[:200]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


if __name__ == "__main__":
    sys.exit(main())
