"""Invariant 6: a run that is resumed on another topology goes on as if it had never stopped, but for rounding."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from deepspeed.checkpoint import ds_to_universal
from safetensors.torch import load_file

from hmoe_ds.config import ConfigError
from hmoe_ds.config_parser import load_config
from hmoe_ds.downstream.export import CheckpointError, export_checkpoint
from hmoe_ds.training.checkpoints.topology import convert, same_topology
from hmoe_ds.training.checks.preflight import check_run
from tests.distributed.harness import arguments, read_metrics, run_module, train_all
from tests.distributed.layouts import ZERO3_SPREAD

pytestmark = pytest.mark.timeout(1500)  # of the launches in the fixture together
LAST, STOPPED = 4, 2
COMMON = {
    "run__steps": LAST,
    "run__checkpoint_every": STOPPED,
    "run__validate_every": LAST,
    "data__molecules_per_step": 48,
    # Vectors do not decay, which must not be lost.
    "optim__weight_decay": 0.5,
}
SPLITS = {"router__form": "flat", "router__groups": 2, "router__experts_at_start": 4, "router__split_every": 1}
MIGRATION = {"parallel__migration": "true"}
OFFLOAD = {"parallel__offload_optimizer": "true"}
TARGETS = {"objective__fingerprint_weight": 0.3, "objective__descriptor_weight": 0.6}
# Every parameter is spread, and a group of them is several of ZeRO 3's.
SPREAD_FILE, SPREAD = "zero3_spread.json", {"parallel__deepspeed_config": "zero3_spread.json"}
SPREAD_SETTINGS = ZERO3_SPREAD | {"zero_optimization": ZERO3_SPREAD["zero_optimization"] | {"sub_group_size": 3000}}
LEARNED = {"objective__contrast_learned_temperature": "true"}


def spread(ranks, ep_size, zero_stage, **changes):
    """-> ranks, overrides."""
    return ranks, {"parallel__ep_size": ep_size, "parallel__zero_stage": zero_stage} | changes


# Name: where the run begins, where it goes on, what is common to both.
MOVES = {
    "zero 1 of 2 to 2 of 1": (spread(2, 2, 1), spread(1, 1, 2), {}),
    "1 rank to 2": (spread(1, 1, 1), spread(2, 2, 1), {}),
    "4 ranks to 2": (spread(4, 2, 2), spread(2, 1, 1), {}),
    "zero 3 to 3": (spread(2, 2, 3), spread(1, 1, 3, **SPREAD), {}),
    "splits": (spread(2, 2, 1), spread(1, 1, 2), SPLITS),
    "without migration": (spread(2, 2, 1, **MIGRATION), spread(2, 2, 1, router__max_received=16), {}),
}
MORE_MOVES = {
    "zero 3 to 1": (spread(2, 2, 3), spread(1, 1, 1), {}),
    "zero 1 to 3": (spread(2, 2, 1), spread(1, 1, 3), {}),
    "zero 3 of 4 to 3 of 2": (spread(4, 2, 3, **SPREAD), spread(2, 1, 3), {}),
    "1 rank to 4": (spread(1, 1, 2), spread(4, 4, 1), TARGETS),
    "zero 3 of 1 to 3 of 4": (spread(1, 1, 3), spread(4, 2, 3, **SPREAD), LEARNED),
    "with offload": (spread(2, 2, 2), spread(4, 2, 2, **OFFLOAD), LEARNED),
    "without offload": (spread(2, 2, 2, **OFFLOAD), spread(2, 1, 1), {}),
    "with migration": (spread(2, 1, 1), spread(4, 4, 1, **MIGRATION), {}),
    "splits on more ranks": (spread(1, 1, 2), spread(4, 2, 1), SPLITS),
    "recomputed": (spread(2, 2, 3), spread(1, 1, 2, parallel__activation_checkpointing="true"), {}),
}
IN_BF16 = {"parallel__precision": "bf16"}
BF16 = {"bf16, zero 1 to 2": (spread(2, 2, 1), spread(1, 1, 2), IN_BF16)}
MORE_BF16 = {
    "bf16, zero 3 to 1": (spread(4, 2, 3), spread(2, 2, 1), IN_BF16),
    "bf16, zero 2 to 3": (spread(2, 2, 2, **OFFLOAD), spread(1, 1, 3), IN_BF16),
    "bf16, splits": (spread(2, 1, 1), spread(2, 2, 2), IN_BF16 | SPLITS),
}


class Moved:
    """Of each move the run that never stopped, and the one that went on elsewhere."""

    def __init__(self, moves, dataset, folder):
        self._folders, begun, resumed = {}, {}, {}
        (folder / SPREAD_FILE).write_text(json.dumps(SPREAD_SETTINGS))
        for number, (name, (before, after, common)) in enumerate(moves.items()):
            start, end = (
                (ranks, COMMON | common | {k: folder / v if v == SPREAD_FILE else v for k, v in changes.items()})
                for ranks, changes in (before, after)
            )
            whole = next((run for run, other in begun.items() if other == start), folder / f"whole {number}")
            moved = folder / f"moved {number}"
            begun[whole], resumed[moved] = start, end
            self._folders[name] = whole, moved
        self._lines = train_on(begun, dataset)
        for whole, moved in self._folders.values():
            stop_early(whole, moved)
        self._lines |= train_on(resumed, dataset)

    def __getitem__(self, name):
        """-> folder and lines of metrics, of one and of the other."""
        return [(folder, self._lines[folder]) for folder in self._folders[name]]


def train_on(runs, dataset):
    """Several runs, {folder: (ranks, overrides)}, -> lines of metrics."""
    lines = {}
    for ranks in {count for count, _ in runs.values()}:
        lines |= train_all({out: changes for out, (count, changes) in runs.items() if count == ranks}, dataset, ranks)
    return lines


def stop_early(run, copy):
    """Copy a run as if it had crashed after `STOPPED` steps."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / f"step{LAST:08d}")
    (copy / "checkpoints" / "latest").write_text(f"step{STOPPED:08d}")


def stopped(run):
    """The checkpoint in the middle of a run."""
    return run / "checkpoints" / f"step{STOPPED:08d}"


def test_reports_of_deepspeeds_are_no_other_topology(tmp_path):
    """A checkpoint loads as it is, bit for bit, unless settings differ that decide what its files hold."""
    settings = {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}
    (tmp_path / "ds.json").write_text(json.dumps(settings | {"wall_clock_breakdown": True}))
    config = load_config([f"--parallel.deepspeed_config={tmp_path / 'ds.json'}"])
    record = {"ranks": 2, "config": config.to_dict(), "deepspeed": settings | {"bf16": {"enabled": False}}}
    assert same_topology(record, config, ranks=2)
    for other in ({"zero_optimization": {"stage": 1, "x": 1}}, {"bf16": {"enabled": True}}, {"data_types": {}}):
        assert not same_topology(record | {"deepspeed": record["deepspeed"] | other}, config, ranks=2)
    assert not same_topology(record, config, ranks=4)


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    return Moved(MOVES | BF16, dataset, tmp_path_factory.mktemp("topology"))


@pytest.mark.parametrize("name", MOVES)
def test_a_run_goes_on_on_another_topology(name, runs, tmp_path):
    check_moved(runs[name], tmp_path, loss=1e-6, parameters=1e-6)


@pytest.mark.parametrize("name", BF16)
def test_a_run_in_bf16_goes_on_on_another_topology(name, runs, tmp_path):
    check_bf16(runs[name], tmp_path)


@pytest.mark.slow
def test_more_runs_go_on_on_another_topology(dataset_with_targets, tmp_path):
    runs = Moved(MORE_MOVES | MORE_BF16, dataset_with_targets, tmp_path)
    for number, name in enumerate(MORE_MOVES):
        check_moved(runs[name], tmp_path / f"exports{number}", loss=1e-6, parameters=1e-6)
    for number, name in enumerate(MORE_BF16):
        check_bf16(runs[name], tmp_path / f"bf16 exports{number}")


def check_bf16(pair, tmp_path):
    """A weight may be rounded the other way, to the next of 2^8 numbers, if its master differs in the last bit."""
    check_moved(pair, tmp_path, loss=2e-4, parameters=2**-7)


def check_moved(pair, tmp_path, loss, parameters):
    (whole, lines), (moved, moved_lines) = pair
    assert [line["step"] for line in moved_lines] == list(range(1, LAST + 1))
    assert moved_lines[:STOPPED] == lines[:STOPPED]
    for line, other in zip(lines[STOPPED:], moved_lines[STOPPED:], strict=True):
        assert other["molecules"] == line["molecules"]
        assert other["learning_rate"] == line["learning_rate"]
        assert other["loss"] == pytest.approx(line["loss"], rel=loss)
        assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=10 * loss)
    assert end_of_plan(whole) == end_of_plan(moved)
    export_checkpoint(whole, tmp_path / "whole")
    export_checkpoint(moved, tmp_path / "moved")
    export_checkpoint(stopped(whole), tmp_path / "before")
    one, other, before = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "moved", "before"))
    assert max((one[name] - before[name]).abs().max() for name in one) > 1e-2
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=parameters, atol=parameters, msg=name)
    assert [child.name for child in (moved / "checkpoints").iterdir() if "universal" in child.name] == []


def end_of_plan(run):
    """Where a run was in its data when it ended."""
    return json.loads((run / "checkpoints" / f"step{LAST:08d}" / "checkpoint.json").read_text())["plan"]


def test_splits_are_decided_as_they_would_have_been(runs):
    (whole, _), (moved, _) = runs["splits"]
    splits = (whole / "allocation.jsonl").read_text()
    assert {json.loads(line)["step"] for line in splits.splitlines()} == {1, 2, 3, 4}
    assert (moved / "allocation.jsonl").read_text() == splits


# Of which run, and how it is spread over one rank.
RELOADS = [
    ("zero 1 of 2 to 2 of 1", {"zero_stage": 3}),
    ("zero 3 to 3", {"zero_stage": 1}),
    ("4 ranks to 2", {"zero_stage": 2, "offload_optimizer": "true"}),
    ("bf16, zero 1 to 2", {"zero_stage": 3}),
    ("bf16, zero 1 to 2", {"zero_stage": 2}),
]


@pytest.fixture(scope="module")
def reloaded(runs, dataset, tmp_path_factory):
    """Checkpoints of `RELOADS` that were loaded and saved again, and the run that goes on without what Adam knew."""
    folder, jobs = tmp_path_factory.mktemp("reloaded"), []
    for number, (name, layout) in enumerate(RELOADS):
        stop_early(runs[name][0][0], folder / f"run{number}")
        changes = {"parallel__precision": name[:4]} if name in BF16 else {}
        changes |= {f"parallel__{field}": value for field, value in layout.items()}
        words = arguments(folder / f"run{number}", dataset, **COMMON | changes)
        jobs.append(["save_again", words, str(folder / f"again{number}" / "checkpoint")])
    stop_early(runs["zero 1 of 2 to 2 of 1"][0][0], folder / "forgetful")
    jobs.append(["forget", arguments(folder / "forgetful", dataset, **COMMON, parallel__zero_stage=2)])
    run_module("tests.distributed.topology_ranks", 1, [json.dumps(jobs)])
    return folder


def test_what_adam_knew_matters(runs, reloaded):
    """Without it, the loss is far outside of what the other tests tolerate."""
    _, lines = runs["zero 1 of 2 to 2 of 1"][0]
    forgetful = read_metrics(reloaded / "forgetful")
    assert forgetful[STOPPED]["loss"] == pytest.approx(lines[STOPPED]["loss"], rel=1e-6)
    assert abs(forgetful[-1]["loss"] - lines[-1]["loss"]) > 1e-3 * lines[-1]["loss"]


@pytest.mark.parametrize("number", range(len(RELOADS)))
def test_masters_moments_and_steps_come_over_bit_by_bit(number, runs, reloaded, tmp_path):
    before = universal(stopped(runs[RELOADS[number][0]][0][0]), tmp_path / "before")
    after = universal(reloaded / f"again{number}" / "checkpoint", tmp_path / "after")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.shape == after[name].shape
        assert (value == after[name]).all(), name
        assert (value == STOPPED).all() if name.endswith("step") else value.any(), name


@pytest.mark.parametrize("name", ["4 ranks to 2", "zero 3 to 3", "bf16, zero 1 to 2", "splits"])
def test_a_universal_checkpoint_is_what_deepspeeds_converter_writes(name, runs, tmp_path):
    checkpoint = stopped(runs[name][0][0])
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    paths = {"input_folder": str(checkpoint), "output_folder": str(tmp_path / "theirs")}
    ds_to_universal.main(SimpleNamespace(**paths, **options, inject_missing_state=False))
    ours, theirs = universal(checkpoint, tmp_path / "ours"), read_universal(tmp_path / "theirs")
    for key, value in ours.items():
        if "zero 3" in name and key.endswith("step"):
            assert key not in theirs
        else:
            assert (value.view(-1) == theirs[key].view(-1)).all(), key


def universal(checkpoint, out):
    """What a checkpoint becomes; -> its tensors by parameter and state."""
    convert(checkpoint, out, part=1, parts=2)
    convert(checkpoint, out, part=0, parts=2)
    return read_universal(out)


def read_universal(folder):
    tensors = {}
    for path in (folder / "zero").glob("*/*.pt"):
        content = torch.load(path, weights_only=True)
        tensors[f"{path.parent.name} {path.stem}"] = content["param"] if isinstance(content, dict) else content
    return tensors


@pytest.mark.slow
def test_a_rank_with_nothing_but_padding(tmp_path):
    jobs = [["more_ranks_than_pieces", str(tmp_path / precision), precision] for precision in ("fp32", "bf16")]
    run_module("tests.distributed.topology_ranks", 2, [json.dumps(jobs)])


def test_a_run_tells_on_what_it_was_trained(runs):
    _, (moved, _) = runs["4 ranks to 2"]
    starts = json.loads((moved / "run.json").read_text())["starts"]
    told = [[start[name] for name in ("step", "ranks", "ep_size", "zero_stage")] for start in starts]
    assert told == [[0, 4, 2, 2], [STOPPED, 2, 1, 1]]


def test_a_damaged_checkpoint_is_named(runs, tmp_path):
    folder = tmp_path / "step00000002"
    shutil.copytree(stopped(runs["4 ranks to 2"][0][0]), folder)

    def refused(message):
        with pytest.raises(CheckpointError, match=message):
            convert(folder, tmp_path / "out")

    file = folder / "zero_pp_rank_3_mp_rank_00_optim_states.pt"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    refused("zero_pp_rank_3_mp_rank_00_optim_states.pt is damaged .*: copy it again")
    file.unlink()
    refused("step00000002 lacks zero_pp_rank_3_mp_rank_00_optim_states.pt: copy the whole checkpoint")
    record = json.loads((folder / "checkpoint.json").read_text())
    del record["ranks"]
    (folder / "checkpoint.json").write_text(json.dumps(record))
    refused("step00000002 is of an older version of hmoe_ds: resume it as it was spread over ranks")


def test_another_precision_is_refused(runs, dataset):
    folder = runs["1 rank to 2"][0][0]
    with pytest.raises(ConfigError, match=r"parallel\.precision is 'bf16', but the run in .* has 'fp32'"):
        check_run(load_config(arguments(folder, dataset, **COMMON, **IN_BF16)), ranks=1)
