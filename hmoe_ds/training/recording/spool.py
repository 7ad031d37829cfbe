"""What of a run MLflow has got and what it has not: `metrics.jsonl` is the queue, `mlflow.json` how far it was sent."""

from __future__ import annotations

import json
import threading
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.durable import replace_text
from hmoe_ds.config import ConfigError
from hmoe_ds.run_files import METRICS

DELIVERY = "mlflow.json"
RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"


@dataclass
class Delivery:
    """Content of `mlflow.json`.

    Args:
        experiment: name of the MLflow experiment.
        tracking_uri: of the server, without user and password; None for the sqlite file in the run's folder.
        key: tag of the MLflow run by which it is found again when the answer to its creation was lost.
        run_id: of the MLflow run, once there is one.
        continues: id of the MLflow run that this one replaces.
        described: whether parameters and tags were sent.
        config_sent: whether `config.yaml` was sent, or refused.
        last_step: last step that was sent.
        started: when the training began, in Unix seconds.
        status: RUNNING, FINISHED, FAILED, or KILLED for a run that was asked to stop.
        ended: when it came to that status, in Unix seconds.
        status_sent: the status that MLflow knows.
    """

    experiment: str = "hmoe_ds"
    tracking_uri: str | None = None
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    run_id: str | None = None
    continues: str | None = None
    described: bool = False
    config_sent: bool = False
    last_step: int = 0
    started: float = field(default_factory=time.time)
    status: str = RUNNING
    ended: float | None = None
    status_sent: str = RUNNING

    def begin_anew(self) -> None:
        """From now on everything goes to a new MLflow run, from the first step on."""
        self.continues, self.run_id = self.run_id, None
        self.key = uuid.uuid4().hex
        self.described = self.config_sent = False
        self.last_step = 0
        self.status_sent = RUNNING


def read_delivery(folder: Path) -> Delivery | None:
    """How far a run was sent; None when it was never to be sent. Raises ConfigError when the file is damaged."""
    path = folder / DELIVERY
    if not path.exists():
        return None
    try:
        return Delivery(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}): delete it, and the run is sent to a new MLflow run"
        ) from error


class Spool:
    """The logged steps of a run that are still to be sent. Methods may be called from several threads.

    Args:
        folder: of the run; it holds `metrics.jsonl`.
        delivery: how far it was sent.
    """

    def __init__(self, folder: Path, delivery: Delivery) -> None:
        self.folder = folder
        self.delivery = delivery
        self.sent = 0  # lines, through this object
        self._position = 0  # in bytes: every line before it was sent
        self._lock = threading.Lock()
        self.update()

    def update(self, **changes: Any) -> None:
        """Change fields of the delivery and write them down."""
        with self._lock:
            for name, value in changes.items():
                setattr(self.delivery, name, value)
            self._write()

    def begin_anew(self) -> None:
        """Everything is to be sent again, to a new MLflow run."""
        with self._lock:
            self.delivery.begin_anew()
            self._position = 0
            self._write()

    def next_lines(self, limit: int) -> tuple[list[dict[str, Any]], int]:
        """-> the next lines to send, at most `limit`, and the position to give to `mark_sent` when they were sent."""
        lines: list[dict[str, Any]] = []
        position = self._position
        with (self.folder / METRICS).open("rb") as file:
            file.seek(position)
            for raw in file:
                if not raw.endswith(b"\n") or len(lines) == limit:  # no end: it is being written, or never will be
                    break
                position += len(raw)
                line = json.loads(raw)
                if line["step"] > self.delivery.last_step:
                    lines.append(line)
        return lines, position

    def mark_sent(self, lines: list[dict[str, Any]], position: int) -> None:
        """What `next_lines` gave has arrived."""
        self._position = position
        self.sent += len(lines)
        self.update(last_step=lines[-1]["step"])

    def unsent(self) -> int:
        """Logged steps that were not sent."""
        return len(self.next_lines(limit=1 << 60)[0])

    def _write(self) -> None:
        replace_text(self.folder / DELIVERY, json.dumps(asdict(self.delivery), indent=2) + "\n")
