"""How often, and after which endings, a run is started again."""

import json

import pytest

from data_pipeline.errors import PipelineError
from hmoe_ds.training import exit_codes, lock
from hmoe_ds.training.launching import supervise as supervise_module
from hmoe_ds.training.launching.supervise import supervise
from hmoe_ds.training.outcome import OUTCOME, Outcome, note_done, note_failure, read_outcome


class Starts:
    """A run of which each start ends as told: (exit code, steps of a new checkpoint or 0, error or None)."""

    def __init__(self, out, *endings):
        self.out, self.endings, self.pauses, self.stopped = out, list(endings), [], False
        (out / "checkpoints").mkdir(parents=True)

    def attempt(self):
        code, step, error = self.endings.pop(0)
        if step:
            (self.out / "checkpoints" / f"step{step:08d}").mkdir()
        if error == "done":
            note_done(self.out)
        elif error:
            note_failure(self.out, raised(error))
        return code

    def pause(self, seconds):
        self.pauses += [seconds] if seconds else []
        return not self.stopped

    def supervise(self, restarts):
        return supervise(self.attempt, self.pause, self.out, restarts)


def raised(message):
    try:
        raise ValueError(message)
    except ValueError as error:
        return error


@pytest.mark.parametrize(
    "code", [exit_codes.USAGE, exit_codes.DIVERGED, exit_codes.REQUEUE], ids=["usage", "diverged", "requeue"]
)
def test_endings_that_a_new_start_would_not_change(code, tmp_path):
    starts = Starts(tmp_path, (code, 0, None))
    assert starts.supervise(5) == code
    assert not starts.pauses


def test_what_is_refused_after_a_start_that_was_not_may_pass(tmp_path):
    """Such as for a disk that is full now."""
    starts = Starts(tmp_path, (247, 10, None), (exit_codes.USAGE, 0, None), (0, 0, "done"))
    assert starts.supervise(3) == exit_codes.DONE


def test_a_folder_that_cannot_be_read_now_is_a_failed_attempt(tmp_path, monkeypatch):
    starts = Starts(tmp_path, (1, 0, None), (0, 0, "done"))
    troubles = {
        "forget_outcome": [None, OSError(5, "Input/output error"), None],
        "newest_step": [0, OSError(116, "Stale")],
    }
    for name, endings in troubles.items():
        monkeypatch.setattr(supervise_module, name, troubled(getattr(supervise_module, name), endings))
    assert starts.supervise(2) == exit_codes.DONE
    assert len(starts.pauses) == 2  # after the failure, and where no attempt could be made


def troubled(function, endings):
    """`function`, of which the first calls end as told: with an error, or as they do."""

    def call(*arguments):
        if endings and isinstance(ending := endings.pop(0), OSError):
            raise ending
        return function(*arguments)

    return call


def test_another_start_that_still_holds_the_run_may_end(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0)
    with (
        lock.locked_run(tmp_path, 0),
        pytest.raises(PipelineError, match="is being trained by another start") as error,
        lock.locked_run(tmp_path, 0),
    ):
        pass
    note_failure(tmp_path, error.value)
    assert read_outcome(tmp_path).error is None


def test_done_is_what_a_rank_says_not_what_the_launcher_does(tmp_path):
    starts = Starts(tmp_path, (0, 0, None), (0, 0, "done"))
    assert starts.supervise(5) == exit_codes.DONE
    assert len(starts.pauses) == 1


def test_pauses_grow_until_there_is_a_new_checkpoint(tmp_path, capsys):
    failed = (247, 0, None)
    starts = Starts(tmp_path, failed, failed, failed, (247, 10, None), failed, (0, 20, "done"))
    assert starts.supervise(3) == exit_codes.DONE
    assert starts.pauses == [1, 2, 4, 1, 2]
    said = capsys.readouterr().err
    assert "ended with exit code 247; it is started again in 4 s, from step 0 (restart 3 of 3)" in said
    assert "started again in 1 s, from step 10 (restart 1 of 3)" in said


def test_it_gives_up_after_so_many_in_a_row(tmp_path, capsys):
    starts = Starts(tmp_path, (247, 10, None), *[(247, 0, None)] * 3)
    assert starts.supervise(2) == 247
    assert "failed 3 times in a row without a new checkpoint, so it is not started again" in capsys.readouterr().err
    assert Starts(tmp_path / "none", (1, 0, None)).supervise(0) == 1


def test_the_same_error_at_the_same_place_is_not_tried_a_third_time(tmp_path, capsys):
    first, other = "a is broken", "b is broken"
    errors = [(0, first), (10, first), (0, other), (0, first), (0, first)]
    starts = Starts(tmp_path, *((1, step, error) for step, error in errors))
    assert starts.supervise(50) == 1
    assert not starts.endings
    said = capsys.readouterr().err
    assert "twice at the same place with the same error, so it is not started again: ValueError: a is broken" in said


def test_who_was_asked_to_stop_makes_no_other_attempt(tmp_path):
    starts = Starts(tmp_path, (247, 0, None))
    starts.stopped = True
    assert starts.supervise(5) == 247


def test_of_many_errors_the_first_counts(tmp_path):
    assert read_outcome(tmp_path) == Outcome()
    note_failure(tmp_path, raised("first"))
    note_failure(tmp_path, raised("second"))
    note_done(tmp_path)
    assert read_outcome(tmp_path) == Outcome(error="ValueError: first")
    (tmp_path / OUTCOME).write_text(json.dumps({"gone": True}))
    assert read_outcome(tmp_path) == Outcome()


def test_what_may_pass_and_what_is_secret_is_not_kept(tmp_path, monkeypatch):
    try:
        raise PipelineError("a shard cannot be read") from OSError("the server does not answer")
    except PipelineError as error:
        note_failure(tmp_path, error)
    assert read_outcome(tmp_path) == Outcome()
    (tmp_path / OUTCOME).unlink()
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2hunter2")
    note_failure(tmp_path, raised("https://me:hunter2hunter2@host/x"))
    assert "hunter2" not in (tmp_path / OUTCOME).read_text()


def test_a_rank_that_misses_another_one_does_not_count(tmp_path):
    """Its error comes from where ranks talk to each other."""
    import torch.distributed

    try:
        torch.distributed.all_gather_object([], None)
    except ValueError as error:  # there is no process group
        note_failure(tmp_path, error)
    assert not (tmp_path / OUTCOME).exists()
