"""What recording costs: training steps with the recorder, `metrics.jsonl` and MLflow, against the same without.

    python -m benchmarks.logging_cost --data data/nci5k

Steps of `tiny_cpu` on one rank, with a run's engine, its `run.log_every` and the same batches in both arms, which take
turns in blocks of some lines. A block with recording has all that the loop calls for it, and MLflow's thread, which
meanwhile writes lines and system metrics to an sqlite file. Not timed are opening and closing, and one line before each
block, with which MLflow is told that the run goes on. Losses and loads of a step are summed in both arms: balancing the
experts needs them anyway.

Three figures, each the share of a step that recording adds, medians over pairs of blocks: by wall-clock and by CPU time
of all threads (a block with over a block without, less 1), and of what is timed directly, `Recorder.record` by
wall-clock and MLflow's thread by CPU time. The first two are differences of large numbers, and on a machine with other
work hardly more than noise; the ratio is the third, as if the thread slowed the training by all that it works.
Prints one JSON line, which goes to docs/results/logging_cost.json.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import deepspeed
import torch

from benchmarks.result import write_result
from hmoe_ds.config import RunConfig
from hmoe_ds.config_parser import load_config
from hmoe_ds.data.mixture import open_mixture
from hmoe_ds.data.plan import BatchPlan
from hmoe_ds.moe.balance import measure_load
from hmoe_ds.moe.exchange import Traffic
from hmoe_ds.objectives.total import Normalizers, count_normalizers
from hmoe_ds.training.checkpoints.checkpoint import TrainState
from hmoe_ds.training.engine import build_engine, init_distributed, loss_scale
from hmoe_ds.training.loop import balance_routers
from hmoe_ds.training.prefetch import Prefetcher, PreparedStep
from hmoe_ds.training.recording.metrics import StepSums, StepTotals
from hmoe_ds.training.recording.recorder import Recorder
from hmoe_ds.training.recording.spool import RUNNING, read_delivery
from hmoe_ds.training.run_folder import begin_run

TARGET = 0.01
AfterStep = Callable[[int, PreparedStep, StepSums, Normalizers, float], None]
SENT_SECONDS = 180.0  # for a line to reach MLflow; the first one waits for its tables


class Cost(NamedTuple):
    """Seconds of a block.

    Attributes:
        wall: by wall-clock.
        cpu: CPU time of all threads.
        calls: in `Recorder.record`, by wall-clock.
        thread: CPU time of MLflow's thread.
    """

    wall: float
    cpu: float
    calls: float = 0.0
    thread: float = 0.0


class Training:
    """Steps as the training loop makes them, over and over with the same batches.

    Args:
        config: of the run.
        steps: how many batches.
    """

    def __init__(self, config: RunConfig, steps: int) -> None:
        self.config, self.steps = config, steps
        self._traffic = Traffic()
        self._engine: deepspeed.DeepSpeedEngine = build_engine(config, self._traffic)
        mixture = open_mixture(config.data, "train")
        plan = BatchPlan(mixture, config.data, config.optim.accumulation, config.run.seed)
        begin_run(config, 1, mixture.fingerprint, [store.extent for store in mixture.stores])
        with Prefetcher(mixture, plan, config, 0, rank=0, ranks=1) as ahead:
            self._batches = [ahead.step() for _ in range(steps)]
        self._recorded = self._last_line = 0

    def block(self, after_step: AfterStep = lambda *_: None) -> Cost:
        """Make all steps; `after_step` gets the number, the batch, its figures and the seconds of each."""
        wall, cpu = time.perf_counter(), time.process_time()
        for number, batch in enumerate(self._batches):
            started = time.perf_counter()
            sums, norm = self._step(batch)
            after_step(number, batch, sums, norm, time.perf_counter() - started)
        return Cost(time.perf_counter() - wall, time.process_time() - cpu)

    def recorded_block(self) -> Cost:
        """The same with recording."""
        every, calls = self.config.run.log_every, 0.0

        def record(number: int, batch: PreparedStep, sums: StepSums, norm: Normalizers, seconds: float) -> None:
            nonlocal calls
            started = time.perf_counter()
            self._recorded += 1
            # In the middle of so many steps, so that it is sent before the block ends.
            due = number % every == every // 2
            self._last_line = self._recorded if due else self._last_line
            recorder.record(
                self._recorded, sums, norm, {}, stage=batch.stage, live_L=None, splits={}, due=due, learning_rate=1e-3,
                grad_norm=self._engine.get_global_grad_norm(), skipped=0, seconds=seconds, waited=0.0,
            )  # fmt: skip
            calls += time.perf_counter() - started

        with Recorder(self.config, TrainState(self._recorded, {}), 0, self._traffic) as recorder:
            sums, norm = self._step(self._batches[0])
            record(every // 2, self._batches[0], sums, norm, 1.0)
            self._wait_until_sent()
            before, calls = _mlflow_seconds(), 0.0
            cost = self.block(record)
            self._wait_until_sent()  # lines that wait for others go out after the block, and count
            return cost._replace(calls=calls, thread=_mlflow_seconds() - before)

    def _step(self, batch: PreparedStep) -> tuple[StepSums, Normalizers]:
        engine, config = self._engine, self.config
        norm, totals = count_normalizers(batch.slices, engine.device), StepTotals(self._traffic)
        for part in batch.slices:
            losses, encoding = engine(part, norm, batch.stage.routing)
            engine.backward(losses.total * loss_scale(config))
            engine.step()
            load = measure_load(encoding.scaffold, encoding.atoms, part.batch.molecule_N, config.router)
            totals.add(losses, load)
        sums = totals.reduce()
        balance_routers(engine.module, sums.load, config)
        return sums, norm

    def _wait_until_sent(self) -> None:
        deadline = time.monotonic() + SENT_SECONDS
        while time.monotonic() < deadline:
            delivery = read_delivery(Path(self.config.run.out))
            if delivery and delivery.last_step == self._last_line and delivery.status_sent == RUNNING:
                return
            time.sleep(0.1)
        raise TimeoutError(f"MLflow's thread has not sent step {self._last_line} in {SENT_SECONDS:.0f} s")


def _mlflow_seconds() -> float:
    """CPU time of MLflow's thread so far."""
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "mlflow"]
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dataset made by hmoe prepare, such as of nci5k")
    parser.add_argument("--lines", type=int, default=12, help="of metrics in a block")
    parser.add_argument("--pairs", type=int, default=5, help="of blocks with and without recording")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # the sqlite file in the run's folder
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(["--config=tiny_cpu", f"--data.path={options.data}", f"--run.out={folder}/run"])
        init_distributed()
        training = Training(config, options.lines * config.run.log_every)
        pairs = []
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            training.block()
            training.recorded_block()  # imports MLflow and makes its tables
            for number in range(options.pairs):
                arms = [training.recorded_block, training.block]
                first, second = (arm() for arm in (arms if number % 2 == 0 else arms[::-1]))
                pairs.append((first, second) if number % 2 == 0 else (second, first))
    torch.distributed.destroy_process_group()
    shares = {
        "wall_clock": [on.wall / off.wall - 1 for on, off in pairs],
        "cpu_time": [on.cpu / off.cpu - 1 for on, off in pairs],
        "direct": [(on.calls + on.thread) / (on.wall - on.calls) for on, off in pairs],
    }
    spreads = {name: {"median": median(each), "low": min(each), "high": max(each)} for name, each in shares.items()}
    steps = training.steps
    write_result(
        {
            "name": "logging_cost",
            "ratio": spreads["direct"]["median"],
            "target": TARGET,
            "shares": spreads,
            "milliseconds_per_step": {
                "without": 1000 * median(off.wall for _, off in pairs) / steps,
                "record": 1000 * median(on.calls for on, _ in pairs) / steps,
                "mlflow_thread": 1000 * median(on.thread for on, _ in pairs) / steps,
            },
            "log_every": config.run.log_every,
            "steps_of_a_block": steps,
            "pairs": options.pairs,
        }
    )


if __name__ == "__main__":
    main()
