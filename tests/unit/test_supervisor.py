import os
import subprocess
import sys

import pytest

from hmoe_ds.training.launching.supervisor import supervisor_environment

ASK = "from hmoe_ds.training.launching.supervisor import supervisor_is_gone; input(); print(supervisor_is_gone())"


def asked(environment: dict[str, str], reads: bool = True, stderr: int | None = None) -> bool:
    """What a process says that was started so. Its standard error is a pipe unless given; the test may read it."""
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", ASK], env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=writer if stderr is None else stderr, text=True,
    )  # fmt: skip
    os.close(writer)
    if not reads:
        os.close(reader)
    said, _ = process.communicate("\n", timeout=120)
    if reads:
        os.close(reader)
    return {"True": True, "False": False}[said.strip()]


@pytest.fixture
def elsewhere() -> dict[str, str]:
    """The environment of a rank whose supervisor is on another machine."""
    ((name, value),) = supervisor_environment().items()
    return {name: value.split()[0] + " another-start pid:[1]"}


@pytest.fixture
def ended() -> dict[str, str]:
    """The environment of a rank whose supervisor was here."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    ((name, value),) = supervisor_environment().items()
    return {name: f"{process.pid} {value.partition(' ')[2]}"}


def test_a_supervisor_here_is_seen():
    assert not asked(supervisor_environment())
    assert not asked(supervisor_environment(), reads=False)


def test_a_supervisor_here_that_has_ended(ended):
    assert asked(ended)


def test_a_supervisor_elsewhere_is_gone_when_the_output_is_not_read_any_more(elsewhere):
    assert not asked(elsewhere)
    assert asked(elsewhere, reads=False)


def test_output_that_goes_to_a_file_says_nothing(elsewhere, tmp_path):
    with (tmp_path / "log").open("w") as log:
        assert not asked(elsewhere, stderr=log.fileno())


def test_who_is_not_supervised_misses_nobody():
    assert not asked({}, reads=False)
