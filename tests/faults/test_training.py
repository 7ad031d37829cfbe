"""Runs in which something goes wrong: what is saved, what is said, and with which code the ranks end."""

import json
import re
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import pytest

from hmoe_ds.downstream.export import export_checkpoint
from hmoe_ds.training import exit_codes
from hmoe_ds.training.launching.node import free_port
from tests.distributed.harness import arguments, read_metrics, run_module

pytestmark = pytest.mark.timeout(900)  # of the runs in the fixtures together
COMMON = {"run__steps": 6, "run__checkpoint_every": 2, "parallel__ep_size": 2}


class Ending(NamedTuple):
    codes: list[int]
    logs: list[str]


def run_all(scenarios: dict[str, tuple[Path, Path, dict, dict]], folder: Path) -> dict[str, Ending]:
    """Small runs on two ranks, one after the other, since importing DeepSpeed takes longer than a run.

    Args:
        scenarios: run folder, dataset, faults and changes of the configuration, by name.
        folder: for logs.
    """
    listed, ports = [], set()
    for name, (out, dataset, faults, changes) in scenarios.items():
        (folder / name).mkdir(parents=True)
        while (port := free_port()) in ports:
            pass
        ports.add(port)
        words = arguments(out, dataset, **(COMMON | changes))
        listed.append({"ranks": 2, "port": port, "words": words, "faults": faults, "logs": str(folder / name)})
    run_module("tests.faults.faulty_ranks", 1, [json.dumps(listed)], timeout=60 + 30 * len(listed))
    return {
        name: Ending(
            json.loads((folder / name / "codes.json").read_text()),
            [(folder / name / f"rank{rank}.log").read_text() for rank in range(2)],
        )
        for name in scenarios
    }


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out)]


def check_same(out: Path, whole: Path, tmp_path: Path) -> None:
    """The run ended as if nothing had happened."""
    assert losses(out) == losses(whole)
    exported = []
    for number, run in enumerate((out, whole)):
        export_checkpoint(run, tmp_path / f"export{number}")
        exported.append((tmp_path / f"export{number}" / "model.safetensors").read_bytes())
    assert exported[0] == exported[1]


def faulty(how: str, copy: Path) -> dict:
    return {"damaged_shard": {"rank": 0, "step": 1, "how": how, "dataset": str(copy)}}


def not_finite(rank: int, *steps: int) -> dict:
    return {"not_finite": {"rank": rank, "steps": steps}}


def full_disk(rank: int, *saves: int) -> dict:
    return {"full_disk": {"rank": rank, "saves": saves, "bytes": 3000}}


OFFLOADED = {"parallel__zero_stage": 2, "parallel__offload_optimizer": "true", "parallel__precision": "bf16"}
IMPATIENT = {"run__hang_seconds": 8, "run__checkpoint_every": 0}
LONG = {"run__steps": 60, "run__checkpoint_every": 30, "data__window_shards": 1}
VALIDATED = {"run__checkpoint_every": 1, "run__validate_every": 1, "run__keep_checkpoints": 2}
DAMAGES = ("torn", "changed", "lost")


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory) -> Path:
    """Folder of the folders of all runs, by the names of their scenarios."""
    folder = tmp_path_factory.mktemp("runs")
    for how in ("deleted", "changed"):
        shutil.copytree(dataset, folder / f"dataset {how}")
    return folder


@pytest.fixture(scope="module")
def first(runs, dataset, tmp_path_factory) -> dict[str, Ending]:
    """How the first start of each run ended."""
    faults = {
        "whole": ({}, {}),
        "SIGTERM": ({"signalled": {"rank": 0, "step": 3, "signal": "SIGTERM"}}, {}),
        "SIGUSR1": ({"signalled": {"rank": 1, "step": 3, "signal": "SIGUSR1"}}, {}),
        "hangs": ({"hanging": {"rank": 1, "step": 3, "seconds": 100}}, IMPATIENT),
        "rank 0 stopped": ({"stopped": {"rank": 0, "step": 3}}, IMPATIENT),
        "hangs unseen": ({"hanging": {"rank": 1, "step": 3, "seconds": 30}, "blind_watchdog": {}}, IMPATIENT),
        "skips": (not_finite(1, 3, 4), {"run__max_skipped": 3}),
        "skips, offloaded": (not_finite(1, 3), OFFLOADED),
        "skips, zero 3": (not_finite(1, 3), {"parallel__zero_stage": 3, "parallel__precision": "bf16"}),
        "diverges": (not_finite(0, 3, 4, 5, 6), {"run__max_skipped": 3}),
        "disk full on 0": (full_disk(0, 2), {}),
        "disk full on 1": (full_disk(1, 2), {}),
        "disk stays full": (full_disk(1, 2, 3), {}),
        "shard deleted": (faulty("deleted", runs / "dataset deleted"), LONG),
        "shard changed": (faulty("changed", runs / "dataset changed"), LONG),
        "best": ({}, VALIDATED | {"optim__learning_rate": 3}),
    }
    return run_all(
        {name: (runs / name, dataset_of(name, runs, dataset), *rest) for name, rest in faults.items()},
        tmp_path_factory.mktemp("first"),
    )


def dataset_of(name: str, runs: Path, dataset: Path) -> Path:
    return runs / name.replace("shard", "dataset") if name.startswith("shard") else dataset


@pytest.fixture(scope="module")
def second(first, runs, dataset, tmp_path_factory) -> dict[str, Ending]:
    """How the second start of those that have one ended."""
    shutil.copytree(runs / "diverges", runs / "diverges before")
    again = {
        "SIGTERM": ({}, {}),
        "SIGUSR1": ({}, {}),
        "diverges": (not_finite(0, 1, 2), {"run__max_skipped": 3}),
        "disk stays full": ({}, {}),
        "shard deleted": ({}, LONG),
        "shard changed": ({}, LONG),
    }
    for damage in DAMAGES:
        damage_checkpoint(damage, shutil.copytree(runs / "whole", runs / damage))
        again[damage] = ({}, {})
    for folder in (shutil.copytree(runs / "whole", runs / "none whole") / "checkpoints").glob("step*"):
        (folder / "weights.safetensors").write_bytes(b"")
    (shutil.copytree(runs / "whole", runs / "set back") / "checkpoints" / "latest").write_text("step00000002\n")
    again |= {"none whole": ({}, {"run__steps": 8}), "set back": ({}, {})}
    return run_all(
        {name: (runs / name, dataset_of(name, runs, dataset), *rest) for name, rest in again.items()},
        tmp_path_factory.mktemp("second"),
    )


def damage_checkpoint(damage: str, out: Path) -> None:
    """Make a finished run one that ended after step 4, and damage its last checkpoint."""
    shutil.rmtree(out / "checkpoints" / "step00000006")
    (out / "checkpoints" / "latest").write_text("step00000004")
    file = next((out / "checkpoints" / "step00000004").glob("zero_pp_rank_1*"))
    if damage == "lost":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content[:-100] if damage == "torn" else content)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_rank_that_is_asked_to_stop_has_all_save_and_end(name, first, runs, tmp_path, request):
    assert first[name].codes == [exit_codes.REQUEUE] * 2
    stopped = re.search(r"stopped after step ([34]) of 6, as it was asked to", first[name].logs[0])
    assert stopped
    second = request.getfixturevalue("second")
    assert second[name].codes == [0, 0]
    assert f"step{int(stopped[1]):08d}" in checkpoints(runs / name)
    check_same(runs / name, runs / "whole", tmp_path)


def test_a_rank_that_hangs_is_named_and_the_run_ends(first):
    assert first["hangs"].codes == [exit_codes.HUNG] * 2
    said = first["hangs"].logs[0].splitlines()[-1]
    assert re.fullmatch(
        r"no progress for 8 s at step 3: rank 1 is busy or stuck in \S*\.py:\d+; "
        r"rank 0 waits in all_reduce \(hmoe_ds/objectives/total\.py:\d+\); "
        r"rank 1 has begun \d+ collectives of rank 0, 1, others \d+",
        said,
    ), said


def test_a_stopped_rank_0_through_which_ranks_hear_of_each_other(first):
    assert first["rank 0 stopped"].codes == [-signal.SIGKILL, exit_codes.HUNG]
    assert re.search(
        r"no progress for 8 s at step 3: rank 0, through which ranks hear of each other, does not answer; rank 1 waits "
        r"in all_reduce \(hmoe_ds/objectives/total\.py:\d+\)",
        first["rank 0 stopped"].logs[1],
    )


def test_the_process_group_ends_a_collective_that_a_rank_does_not_join(first):
    """After twice the time, should the watchdog fail."""
    assert first["hangs unseen"].codes[0] == exit_codes.FAILED
    assert re.search(r"objectives/total\.py.*Timed out waiting 16000ms", first["hangs unseen"].logs[0], re.DOTALL)


def test_steps_whose_gradient_is_not_finite_are_skipped(first, runs, tmp_path):
    out, ending = runs / "skips", first["skips"]
    assert ending.codes == [0, 0]
    assert "step 4: the gradient is not finite, the step is skipped (2 in a row)" in ending.logs[0]
    lines = read_metrics(out)
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 2, 2, 2]
    assert [line["grad_norm"] is None for line in lines] == [False, False, True, True, False, False]
    assert losses(out)[:3] == losses(runs / "whole")[:3]  # the third loss is of the parameters before that step
    # Nothing but the position in the data changed in those steps.
    before, after = (exported_weights(out, step, tmp_path) for step in (2, 4))
    assert before == after
    records = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [3, 4]
    assert [len(set(record["mol_keys"])) for record in records] == [line["molecules"] for line in lines[2:4]]
    assert all(re.fullmatch("[0-9a-f]{32}", key) for record in records for key in record["mol_keys"])


@pytest.mark.parametrize("name", ["skips, offloaded", "skips, zero 3"])
def test_one_step_that_is_skipped_does_not_spoil_the_next(name, first, runs):
    assert first[name].codes == [0, 0]
    assert [line["skipped_steps"] for line in read_metrics(runs / name)] == [0, 0, 1, 1, 1, 1]
    assert losses(runs / name)[-1] < losses(runs / name)[0]


def exported_weights(out: Path, step: int, tmp_path: Path) -> bytes:
    export_checkpoint(out / "checkpoints" / f"step{step:08d}", tmp_path / f"at{step}")
    return (tmp_path / f"at{step}" / "model.safetensors").read_bytes()


def test_too_many_of_them_end_the_run(first, second, runs):
    assert first["diverges"].codes == second["diverges"].codes == [exit_codes.DIVERGED] * 2
    # Two of the three are in the checkpoint after step 4: then it takes one more, not three.
    for ending, out in ((first["diverges"], runs / "diverges before"), (second["diverges"], runs / "diverges")):
        assert "not finite in 3 steps in a row, up to step 5; their molecules are in" in ending.logs[0]
        assert [json.loads(line)["step"] for line in (out / "skipped.jsonl").read_text().splitlines()] == [3, 4, 5]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_leaves_the_checkpoints_before_and_the_run_goes_on(rank, first, runs, tmp_path):
    out, ending = runs / f"disk full on {rank}", first[f"disk full on {rank}"]
    assert ending.codes == [0, 0]
    assert re.search(
        rf"checkpoint .*step00000004.partial cannot be written \(.*File too large.* on rank {rank}\): make room, or "
        r"give another run\.out; the training goes on",
        ending.logs[0],
    )
    assert checkpoints(out) == ["latest", "step00000002", "step00000006"]
    check_same(out, runs / "whole", tmp_path)


def test_a_disk_that_stays_full_ends_the_run_with_what_was_saved(first, second, runs, tmp_path):
    out = runs / "disk stays full"
    assert first["disk stays full"].codes == [exit_codes.FAILED] * 2
    assert "step00000006.partial cannot be written" in first["disk stays full"].logs[0]
    assert second["disk stays full"].codes == [0, 0]
    assert [line["step"] for line in read_metrics(out)] == [1, 2, 3, 4, 5, 6]
    check_same(out, runs / "whole", tmp_path)


@pytest.mark.parametrize(("how", "message"), [("deleted", "cannot be read"), ("changed", "is not what was written")])
def test_a_shard_that_is_lost_under_a_running_job_is_named(how, message, first, second):
    name = f"shard {how}"
    assert exit_codes.FAILED in first[name].codes
    assert re.search(rf"error: .*train\S*\.arrow {message}", "".join(first[name].logs))
    assert set(second[name].codes) <= {exit_codes.USAGE, exit_codes.FAILED}
    assert "copy the dataset again" in "".join(second[name].logs)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(damage, second, runs, tmp_path):
    ending, out = second[damage], runs / damage
    assert ending.codes == [0, 0]
    said = {"torn": r"is damaged: it has \d+ bytes", "changed": "is damaged: its checksum", "lost": "lacks zero_pp"}
    assert re.search(
        r"checkpoint step00000004 is damaged and was renamed to step00000004\.damaged; the run goes on from "
        rf"step00000002: .*{said[damage]}",
        ending.logs[0],
    )
    assert checkpoints(out) == ["latest", "step00000002", "step00000004", "step00000004.damaged", "step00000006"]
    check_same(out, runs / "whole", tmp_path)


def test_a_run_without_a_whole_checkpoint_does_not_begin_anew(second, runs):
    assert second["none whole"].codes == [exit_codes.USAGE] * 2
    said = r"no checkpoint in .* is whole \(.*copy one back, or give another run\.out"
    assert re.search(said, second["none whole"].logs[0])
    assert checkpoints(runs / "none whole") == checkpoints(runs / "whole")


def test_a_run_goes_on_where_latest_says(second, runs, tmp_path):
    """So it can be set back by hand; what it makes again replaces what was there."""
    assert second["set back"].codes == [0, 0]
    assert [line["step"] for line in read_metrics(runs / "set back")] == [1, 2, 3, 4, 5, 6]
    check_same(runs / "set back", runs / "whole", tmp_path)


def test_the_last_checkpoints_and_the_best_are_kept(first, runs):
    assert first["best"].codes == [0, 0]
    # The learning rate makes it worse and worse.
    validation = {line["step"]: line["validation_loss"] for line in read_metrics(runs / "best")}
    best = min(validation, key=validation.__getitem__)
    assert best < 5
    assert checkpoints(runs / "best") == ["latest", *(f"step{step:08d}" for step in (best, 5, 6))]
