"""The dry run: figures of a run that is not started."""

import json
from pathlib import Path

import pytest

from data_pipeline.errors import UsageError
from data_pipeline.manifest import Manifest
from hmoe_ds.config_parser import load_config, preset_names
from hmoe_ds.training.dry_run import describe_dry_run, dry_run

PRESETS_PAGE = Path(__file__).parents[2] / "docs" / "presets.md"
# What the presets are meant for; `docs/presets.md` shows them so.
RANKS = {"tiny_cpu": 2, "small_1gpu": 1, "base_8gpu": 8, "large_multinode": 32}
GIB = 2**30


def chosen(figures) -> dict:
    (row,) = [row for row in figures["memory_per_rank"] if row["chosen"]]
    return row


@pytest.mark.parametrize("preset", preset_names())
def test_the_page_of_presets_shows_what_the_dry_run_prints(preset):
    figures = dry_run(load_config(["--config", preset]), RANKS[preset])
    page, text = PRESETS_PAGE.read_text(), describe_dry_run(figures)
    assert text in page, f"docs/presets.md shows other figures of {preset}: put in\n{text}"
    row, memory = next(line for line in page.splitlines() if line.startswith(f"| `{preset}`")), chosen(figures)
    _, _, _, ranks, total, active, gib, _ = (cell.strip() for cell in row.split("|"))
    assert f"parameters  {total}; an atom passes {active}\n" in text
    assert int(ranks) == RANKS[preset]
    assert gib == f"{memory['total'] / GIB:.3g} ({memory['activations'] / GIB:.3g})"


@pytest.mark.parametrize(("preset", "device_gib"), [("small_1gpu", 24), ("base_8gpu", 80), ("large_multinode", 80)])
def test_presets_leave_room_on_the_gpus_they_are_meant_for(preset, device_gib):
    figures = dry_run(load_config(["--config", preset]), RANKS[preset])
    row = chosen(figures)
    with_full_slices = row["total"] - row["activations"] + figures["activations_at_full_budgets"]
    assert with_full_slices < 0.9 * device_gib * GIB


def test_means_come_from_the_dataset_that_is_given(dataset):
    figures = dry_run(load_config(["--data.path", str(dataset)]), 1)
    train = Manifest.load(dataset).splits["train"]
    assert figures["molecule"]["atoms"] == train.atoms / train.rows
    assert figures["molecule"]["bonds"] == train.bonds / train.rows
    assert f"mean of {dataset}" in describe_dry_run(figures)


def test_more_ranks_divide_the_work_and_the_shards():
    config = load_config(["--config", "base_8gpu"])
    few, many = dry_run(config, 8), dry_run(config, 32)
    assert many["flops_per_step"] == few["flops_per_step"]
    assert many["molecules_per_rank_and_step"] == few["molecules_per_rank_and_step"] / 4
    assert chosen(many)["optimizer"] == pytest.approx(chosen(few)["optimizer"] / 4)
    assert chosen(many)["parameters"] == chosen(few)["parameters"]
    sent = [figures["all_to_all_bytes_per_step"] for figures in (few, many)]
    assert sent[1]["total"] == sent[0]["total"]


def test_later_stages_need_less_for_states():
    rows = dry_run(load_config(["--config", "large_multinode"]), 32)["memory_per_rank"]
    states = [row["parameters"] + row["gradients"] + row["optimizer"] for row in rows]
    stage1, stage2, offloaded, stage3 = states
    assert stage1 > stage2 > offloaded
    assert stage2 > stage3
    assert [row["host"] > 0 for row in rows] == [False, False, True, False]


def test_recomputing_trades_memory_for_flops():
    plain = dry_run(load_config(["--config", "base_8gpu"]), 8)
    again = dry_run(load_config(["--config", "base_8gpu", "--parallel.activation_checkpointing=true"]), 8)
    assert chosen(again)["activations"] < 0.4 * chosen(plain)["activations"]
    forward, backward = (plain["flops_per_molecule"][name] for name in ("forward", "backward"))
    assert backward + 0.8 * forward < again["flops_per_molecule"]["backward"] < backward + forward


def test_figures_are_plain_data():
    figures = dry_run(load_config([]), 1)
    assert json.loads(json.dumps(figures)) == figures


@pytest.mark.parametrize(
    ("words", "ranks", "message"),
    [
        (["--parallel.ep_size=2"], 3, "does not divide the number of ranks 3"),
        (["--parallel.zero_stage=0"], 1, "parallel.zero_stage is 0"),
        (["--parallel.deepspeed_config=nowhere.json"], 1, r"nowhere\.json cannot be read"),
        (["--data.path={dataset}", "--data.atoms_per_step=50"], 1, "data.atoms_per_step is 50"),
        (["--data.path={dataset}/train"], 1, "no dataset here"),
    ],
)
def test_what_cannot_run_is_refused_as_by_a_run(words, ranks, message, dataset):
    with pytest.raises(UsageError, match=message) as error:
        dry_run(load_config([word.replace("{dataset}", str(dataset)) for word in words]), ranks)
    assert "\n" not in str(error.value)
