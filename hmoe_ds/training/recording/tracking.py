"""A run's way to MLflow, on rank 0 only. `python -m hmoe_ds.training.recording.tracking RUN` sends what is left.

The training loop writes `metrics.jsonl` and goes on; a thread of its own sends those lines to the server, now or when
the server is there again. A point that is sent twice, because the answer to the first time was lost, is stored
once: MLflow's database keeps one of points that agree in name, step, time and value.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from data_pipeline.errors import PipelineError, UsageError
from hmoe_ds.run_files import METRICS
from hmoe_ds.training.best_effort import say
from hmoe_ds.training.recording.mlflow_sender import Sender, SystemMetrics, reason
from hmoe_ds.training.recording.spool import DELIVERY, RUNNING, Delivery, Spool, read_delivery
from hmoe_ds.training.run_folder import read_run_record

PAUSE_SECONDS = 0.2  # between two batches, at least
PROCESSOR_SHARE = 0.1  # of one core, that sending a long backlog takes from the training, at most
GATHER_SECONDS = 5.0  # that news wait for more, as a request costs more than the lines in it
RETRY_SECONDS = 15.0  # between two attempts while the server is not there
CLOSE_SECONDS = 60.0  # that the end of a run waits for the rest to go out, at most


class Tracker:
    """Sends a run to MLflow while it goes on. No method waits for the server, but `close`, for a bounded time.

    Args:
        folder: of the run.
        step: steps done at this start. From 0 on a new MLflow run begins; else that of the folder is continued.
        run_id: of the MLflow run that a checkpoint tells of, for a folder that does not.
    """

    def __init__(self, folder: Path, step: int, run_id: str | None = None) -> None:
        delivery = read_delivery(folder) or _delivery_of(run_id, step)
        if step == 0:  # whatever the folder holds, its steps are done again
            delivery = Delivery(continues=delivery.run_id)
        self._spool = Spool(folder, delivery)
        self._sender = Sender(self._spool, self._say)
        self._system = SystemMetrics(self._say)
        self._news, self._closing, self._given_up = threading.Event(), threading.Event(), threading.Event()
        # A daemon, so that a request without an answer does not keep the process.
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """Of the MLflow run, as soon as there is one."""
        return self._spool.delivery.run_id

    def notify(self) -> None:
        """`metrics.jsonl` has a new line."""
        self._note_status(RUNNING)
        self._news.set()

    def close(self, status: str) -> None:
        """The run has come to its end, with `status`: wait a while for the rest to go out, and say what did not."""
        self._note_status(status, ended=time.time())
        self._closing.set()
        self._news.set()
        self._thread.join(CLOSE_SECONDS)
        if not self._sender.is_done():
            self._say(
                f"MLflow has not got {self._spool.unsent()} logged steps and the end of this run; when its server is "
                "back, send them with: python -m hmoe_ds.training.recording.tracking "
                f"{shlex.quote(str(self._spool.folder))}"
            )
        self._given_up.set()

    def _note_status(self, status: str, **changes: float) -> None:
        if self._spool.delivery.status == status:
            return
        try:
            self._spool.update(status=status, **changes)
        except OSError as error:  # the training, or what ended it, is more important
            self._say(f"{DELIVERY} cannot be written ({reason(error)}): MLflow may not learn that the run is {status}")

    def _say(self, message: str) -> None:
        # Python ends a process hard when it finds that a daemon is printing.
        if not self._given_up.is_set():
            say(message, sys.stdout)

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
                        f"{self._sender} is not reachable ({reason(error)}): training goes on, {METRICS} keeps what "
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
                if self._news.wait(self._system.interval):
                    self._closing.wait(GATHER_SECONDS)
                self._news.clear()


def _delivery_of(run_id: str | None, step: int) -> Delivery:
    """What is known of an MLflow run that was described, and has got the first `step` steps."""
    known = run_id is not None
    return Delivery(run_id=run_id, described=known, config_sent=known, last_step=step if known else 0)


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
                f"{sender} is not reachable ({reason(error)}), {spool.unsent()} steps are left: start it or set "
                "MLFLOW_TRACKING_URI, and repeat this command"
            ) from error
    return f"{sender}, run {delivery.run_id}", spool.sent


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command; -> its exit code: 0 when MLflow has everything, 1 when not, 2 for a usage error."""
    parser = argparse.ArgumentParser(
        prog="python -m hmoe_ds.training.recording.tracking",
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


if __name__ == "__main__":
    sys.exit(main())
