"""What a person sees of a run."""

import contextlib
import io
import os
import pty

import pytest

from hmoe_ds.training.recording import terminal
from hmoe_ds.training.recording.terminal import Terminal


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds, one after the other, as `time.monotonic` gives them."""
    seconds = []
    monkeypatch.setattr(terminal.time, "monotonic", lambda: seconds.pop(0))
    return seconds


def test_a_line_for_each_step_in_a_file(clock):
    clock += [100.0, 130.0]
    stream = io.StringIO()
    out = Terminal(1000, stream)
    out.step(1, 7.5, 12.0)
    out.step(11, 2.25, 1234.5)
    assert stream.getvalue().splitlines() == [
        "step 1/1000  loss 7.5000  12 molecules/s",
        "step 11/1000  loss 2.2500  1,234 molecules/s  49 min left",  # 989 steps of 3 s
    ]


@pytest.mark.parametrize("place", ["full", "gone"])
def test_a_place_that_takes_nothing_more_does_not_end_the_training(place, capsys):
    if place == "full":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        leader, descriptor = pty.openpty()
        os.close(leader)
    stream = os.fdopen(descriptor, "w")
    out = Terminal(100, stream)
    for step in (1, 2):
        out.step(step, 1.0, 10.0)
        out.warn(step, "the gate collapses")
    out.validation(2, {"validation_loss": 1.0}, {})
    out.close()
    with contextlib.suppress(OSError):
        stream.close()
    assert capsys.readouterr().err.count("standard output cannot be written") == 1


def test_one_line_on_a_terminal_that_nothing_else_is_written_into(clock):
    clock += [0.0, 1.0, 2.0]
    screen = Screen()
    out = Terminal(100, screen)
    out.step(1, 1.0, 10.0)
    out.step(2, 1.0, 10.0)
    assert "\n" not in screen.getvalue()
    out.warn(2, "the gate collapses")
    out.step(3, 1.0, 10.0)
    out.close()
    ended = screen.getvalue().split("\n")
    assert [part.split("\r")[-1].removeprefix("\x1b[K").split("  ")[0] for part in ended] == [
        "step 2/100",
        "warning at step 2: the gate collapses",
        "step 3/100",
        "",
    ]


def test_a_table_at_each_validation():
    stream = io.StringIO()
    figures = {"validation_loss": 0.5, "validation_molecules": 4096.0, "validation_consistency": float("nan")}
    Terminal(10, stream).validation(5, figures, {"validation_loss": 0.75, "validation_molecules": 4096.0})
    rows = [line.split() for line in stream.getvalue().splitlines()]
    assert rows == [
        ["validation", "after", "step", "5", "now", "before"],
        ["loss", "0.5000", "0.7500"],
        ["molecules", "4,096", "4,096"],
        ["consistency", "nan"],
    ]
    assert len({len(line) for line in stream.getvalue().splitlines()[:3]}) == 1, "columns lie under each other"


def test_a_probe_is_called_one():
    stream = io.StringIO()
    Terminal(10, stream).validation(5, {"probe_bbbp_roc_auc": 0.7}, {})
    assert stream.getvalue().splitlines()[0].split() == ["probe", "after", "step", "5", "now"]
