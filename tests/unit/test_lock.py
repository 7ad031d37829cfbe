"""One start at a time in a run's folder."""

import subprocess
import sys

import pytest

from data_pipeline.errors import PipelineError
from hmoe_ds.training import lock
from hmoe_ds.training.lock import locked_run

HOLDER = """
import sys, time
from pathlib import Path
from hmoe_ds.training.lock import locked_run
with locked_run(Path(sys.argv[1]), 0):
    print("locked", flush=True)
    time.sleep(100)
"""


def test_a_second_start_waits_for_the_end_of_the_first_and_gives_up(tmp_path, monkeypatch):
    out = tmp_path / "run"
    first = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "locked\n"
        monkeypatch.setattr(lock, "WAIT_SECONDS", 0.3)
        with (
            pytest.raises(
                PipelineError, match=r"run\.out .* is being trained by another start \(process \d+ on .*\): end that"
            ),
            locked_run(out, 0),
        ):
            raise AssertionError("locked twice")
        with locked_run(out, 1):  # only rank 0 writes
            pass
    finally:
        first.kill()
        first.wait()
    monkeypatch.setattr(lock, "WAIT_SECONDS", 10)
    for _ in range(2):
        with locked_run(out, 0):
            pass
