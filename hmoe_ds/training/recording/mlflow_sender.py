"""Requests to MLflow: what of a run it has not got, and system metrics. The only file that imports it."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from typing import Any

from data_pipeline.redact import redacted, without_credentials
from hmoe_ds.run_files import CONFIG
from hmoe_ds.training.recording.spool import RUNNING, Spool
from hmoe_ds.training.run_folder import read_run_record

LINES_PER_BATCH = 50  # some 15 metrics each; MLflow takes 1,000 metrics at once
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
            tracking_uri=without_credentials(uri) if uri else spool.delivery.tracking_uri,
            experiment=experiment or spool.delivery.experiment,
        )
        self.uri = uri or spool.delivery.tracking_uri or f"sqlite:///{self._folder / 'mlflow.db'}"

    def __str__(self) -> str:
        return f"MLflow at {without_credentials(self.uri)}"

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
                f"{self} refuses {points[0].key} of step {points[0].step}, which is left out: {reason(objection)}"
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
            self._say(f"{self} refuses the parameters, which are left out: {reason(objection)}")
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
            self._say(f"{self} refuses the status {status}, which is left out: {reason(objection)}")
        self._spool.update(status_sent=status)

    def _send_config(self) -> None:
        try:
            self._connect().log_artifact(self._run_id, str(self._folder / CONFIG))
        except Exception as error:  # a server may have no artifact store, or one that this machine cannot write to
            self._say(f"{self} does not take config.yaml as an artifact, it has the parameters: {reason(error)}")
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
            self._say(f"system metrics are not logged any more: {reason(error)}")
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


def reason(error: BaseException) -> str:
    """What went wrong in the first place, in one short line: MLflow wraps what requests wraps what the system says."""
    while error.__context__ is not None:
        error = error.__context__
    return redacted(" ".join(str(error).split()) or type(error).__name__)[:200]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat
