"""`hmoe inspect`: what a folder is, and what is said of it, on folders of which only the records are there."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import PipelineError, UsageError
from hmoe_ds.config import MoleculeHeads, RunConfig, config_from_dict
from hmoe_ds.downstream.fitting import Fit
from hmoe_ds.downstream.label_scale import LabelScale
from hmoe_ds.downstream.predictor import save_predictor
from hmoe_ds.downstream.property_model import PropertyModel
from hmoe_ds.inspect.examine import examine
from hmoe_ds.inspect.kind import kind_of
from hmoe_ds.inspect.run_state import state_of
from hmoe_ds.model.checkpoint_record import CheckpointError
from hmoe_ds.model.description import Description
from hmoe_ds.model.hmoe import HMoEModel, weights_of
from hmoe_ds.model.pretrained import write_pretrained
from hmoe_ds.training.lock import locked_command, locked_run
from hmoe_ds.training.outcome import note_done, note_failure, note_stopped
from hmoe_ds.training.run_folder import begin_run
from tests.made_up import make_up_checkpoint
from tests.small_model import MODEL, ROUTER

ROOT = Path(__file__).parents[2]
KINDS = ["dataset", "run", "checkpoint", "model", "predictor"]
NOTES = {
    "molecules": 1000,
    "standardize": True,
    "sources": [
        {"name": "zinc.smi", "rows": 900, "licence": "ZINC: free to use"},
        {"name": "own.csv", "rows": 200, "licence": None},
    ],
    "validation": {"validation_loss": 1.5, "validation_loss_atom": 0.5},
    "ranks": 2,
}
RESULT = {
    "rows": {"all": 21, "train": 16, "validation": 2, "test": 2},
    "left_out": {"no label": 1},
    "test": {"roc_auc": 0.81, "roc_auc_95": [0.7, 0.9], "molecules": 2, "targets": 2, "targets_counted": 1,
             "roc_auc_of_members": [0.8]},
}  # fmt: skip
BEGUN = time.time()


def config_of(out: Path, **run) -> RunConfig:
    tree = RunConfig(model=MODEL, router=ROUTER).to_dict()
    tree["data"]["path"] = "data/zinc"
    tree["run"] |= {"out": str(out), "steps": 400} | run
    tree["parallel"] |= {"ep_size": 2, "zero_stage": 2}
    return config_from_dict(tree)


def make_run(out: Path, steps=(100, 200), **run) -> Path:
    """A run on two ranks that logged every tenth step, ten seconds each, up to the last of its checkpoints."""
    config = config_of(out, **run)
    begin_run(config, 2, "x", [{"train": 1, "validation": 1}])
    for step in steps:
        make_up_checkpoint(out, step, config.to_dict(), **NOTES, validation_loss=1.0 + step / 1000)
    lines = [line(step) for step in range(10, max(steps) + 1, 10)]
    lines[2] |= {"validation_loss": 3.5, "validation_loss_atom": 2.5, "validation_consistency": 0.25}
    write_lines(out, lines)
    return out


def line(step: int) -> dict:
    health = {"chosen_p": 0.9, "routed_over_dense_rms": 1.0, "group_entropy": 0.9}
    speed = {"molecules_per_second": 50.0, "skipped_steps": 0}
    return {"step": step, "time": BEGUN + step, "loss": 2.0, "loss_atom": 1.25} | health | speed


def write_lines(out: Path, lines: list[dict], end="") -> None:
    (out / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines) + end)


def make_predictor(out: Path) -> Path:
    encoder = HMoEModel(MODEL, ROUTER, heads=None)
    models = [PropertyModel(encoder, 2, "mean", 0.0, seed) for seed in range(2)]
    fits = [Fit(model, LabelScale([0.0] * 2, [1.0] * 2), 3, []) for model in models]
    options = {"split": "scaffold", "fit": {"mode": "frozen"}}
    description = {"task": "classification", "targets": ["a", "b"], "standardize": True,
                   "model": "models/zinc", "table": "assay.csv", "options": options, "result": RESULT}  # fmt: skip
    out.mkdir()
    save_predictor(out, fits, description, {"step": 7, **NOTES}, frozen=True)
    return out


@pytest.fixture(scope="module")
def originals(dataset, tmp_path_factory) -> dict[str, Path]:
    """A folder of each kind."""
    folder = tmp_path_factory.mktemp("inspect")
    HMoEModel(MODEL, ROUTER).save_pretrained(folder / "model", {"step": 7, **NOTES})
    run = make_run(folder / "run")
    checkpoint = run / "checkpoints" / "step00000100"
    return {
        "dataset": dataset,
        "run": run,
        "checkpoint": checkpoint,
        "model": folder / "model",
        "predictor": make_predictor(folder / "predictor"),
    }


@pytest.fixture
def copies(originals, tmp_path) -> dict[str, Path]:
    """Copies of all but the dataset, to be damaged; the checkpoint is not that in the run."""
    copied = {kind: tmp_path / path.name for kind, path in originals.items() if kind != "dataset"}
    for kind, path in copied.items():
        shutil.copytree(originals[kind], path)
    return copied


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_told_by_itself(kind, originals):
    assert kind_of(originals[kind]) == kind
    report = examine(str(originals[kind]), verify=True)
    assert (report.kind, report.problems) == (kind, [])
    assert json.loads(json.dumps(report.figures)) == report.figures
    assert report.text.startswith(f"{kind:<12}{originals[kind]}")
    assert max(len(each.split()[0]) for each in report.text.splitlines()) < 12


def test_nothing_of_it_needs_torch(originals):
    """It would take longer to import than all the rest."""
    paths = [str(path) for path in originals.values()]
    code = "import sys\nfor name in ('torch', 'deepspeed', 'sklearn', 'rdkit'): sys.modules[name] = None\n"
    code += f"from hmoe_ds.cli import main\nfor path in {paths}: assert main(['inspect', path, '--verify']) == 0"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is an empty folder"),
        (lambda path: path.write_text("{}"), "is a file"),
        (lambda path: [path.mkdir(), *((path / f"{n}.txt").write_text("") for n in range(9))], "and 3 more"),
    ],
)
def test_what_is_none_of_them(make, found, tmp_path):
    make(tmp_path / "thing")
    with pytest.raises(UsageError) as error:
        examine(str(tmp_path / "thing"), verify=False)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'thing'} ")
    assert found in message
    for command in ("prepare", "pretrain", "export", "finetune"):
        assert f"`hmoe {command}`" in message
    assert "\n" not in message


def test_a_folder_above_and_a_file_inside_lead_to_the_right_one(originals):
    with pytest.raises(UsageError, match=r"holds model \(a model of `hmoe export`\), predictor .*, run \(a run"):
        kind_of(originals["run"].parent)
    with pytest.raises(UsageError, match=r"is a file in a run of .*: give its folder, .*/run$"):
        kind_of(originals["run"] / "metrics.jsonl")


# States of a run.


def test_the_state_of_a_run(tmp_path):
    assert state_of(tmp_path).name == "interrupted"
    with locked_command(tmp_path):
        assert state_of(tmp_path).name == "starting"
        with locked_run(tmp_path, 0):
            state = state_of(tmp_path)
            assert state.name == "going on"
            assert state.detail.startswith("process ")
    assert state_of(tmp_path).name == "interrupted"


@pytest.mark.parametrize(
    ("note", "state", "detail"),
    [
        (note_done, "done", ""),
        (note_stopped, "stopped", "has saved"),
        (lambda out: note_failure(out, raised(ValueError("a is\nbroken"))), "failed", "ValueError: a is broken"),
        (lambda out: note_failure(out, raised(OSError("no room"))), "failed", "may have passed"),
    ],
)
def test_how_a_run_ended(note, state, detail, tmp_path):
    note(tmp_path)
    assert state_of(tmp_path).name == state
    assert detail in state_of(tmp_path).detail
    with locked_run(tmp_path, 0):
        assert state_of(tmp_path).name == "going on"


def raised(error: Exception) -> Exception:
    try:
        raise error
    except type(error) as caught:
        return caught


# A run.


def test_a_run_that_was_interrupted(tmp_path):
    out = make_run(tmp_path / "it's a run")
    report = examine(str(out), verify=False)
    figures = report.figures
    assert (figures["state"], figures["step"], figures["steps"]) == ("interrupted", 200, 400)
    assert figures["seconds_left"] == pytest.approx(200)
    assert figures["molecules_per_second"] == 50
    assert figures["ranks"] == 2
    assert figures["losses"] == {"loss": 2.0, "loss_atom": 1.25}
    assert figures["validation"]["step"] == 30
    assert figures["validation"]["validation_loss"] == 3.5
    assert figures["trained"]["molecules"] == 1000
    assert [each["name"] for each in figures["checkpoints"]] == ["step00000100", "step00000200"]
    layout = {"ranks": 2, "ep_size": 2, "zero_stage": 2, "offload_optimizer": False, "precision": "fp32"}
    assert figures["checkpoints"][0]["topology"] == layout
    assert (figures["latest"], figures["best"]) == ("step00000200", "step00000100")
    assert figures["warnings"] == []
    assert figures["continue"] == f"hmoe pretrain --config '{shell(out)}/config.yaml' --num_ranks 2"
    assert figures["export"] == f"hmoe export '{shell(out)}' OUT"
    assert figures["stop"] is None
    assert "200 of 400 (50%)" in report.text
    assert "2 ranks, ep_size 2, ZeRO 2, fp32" in report.text


def shell(path: Path) -> str:
    return str(path).replace("'", "'\"'\"'")


def test_a_run_that_was_moved_goes_on_where_it_is(tmp_path):
    make_run(tmp_path / "before").rename(tmp_path / "after")
    command = examine(str(tmp_path / "after"), verify=False).figures["continue"]
    assert command.endswith(f"--run.out {tmp_path / 'after'}")


def test_a_run_that_is_going_on_and_one_that_is_done(tmp_path):
    out = make_run(tmp_path / "run")
    with locked_run(out, 0):
        figures = examine(str(out), verify=False).figures
    assert figures["state"] == "going on"
    assert figures["continue"] is None
    assert figures["stop"] == f"touch {out}/stop"
    note_done(out)
    figures = examine(str(out), verify=False).figures
    assert (figures["state"], figures["step"], figures["seconds_left"]) == ("done", 400, 0)
    assert figures["continue"] is figures["stop"] is None


def test_a_run_that_has_only_begun(tmp_path):
    out = tmp_path / "run"
    begin_run(config_of(out), 1, "x", [])
    report = examine(str(out), verify=False)
    assert (report.figures["step"], report.figures["seconds_left"], report.figures["checkpoints"]) == (0, None, [])
    assert report.figures["validation"] is report.figures["export"] is None
    assert "no step logged yet" in report.text


def test_time_left_is_told_from_the_last_start_alone(tmp_path):
    """Between two starts there may lie a night."""
    out = make_run(tmp_path / "run")
    record = json.loads((out / "run.json").read_text())
    edit(out / "run.json", starts=[*record["starts"], {"step": 150}])
    lines = [json.loads(each) for each in (out / "metrics.jsonl").read_text().splitlines()]
    for each in lines:
        each["time"] = each["step"] * 2.0 + (0 if each["step"] <= 150 else 50_000)
    write_lines(out, lines)
    assert examine(str(out), verify=False).figures["seconds_left"] == pytest.approx(400)


def test_what_a_person_should_look_at(tmp_path):
    out = make_run(tmp_path / "run")
    write_lines(
        out,
        [
            line(390)
            | {"skipped_steps": 3, "loss": None, "group_entropy": 0.1, "starved_experts": 0.0, "data_wait": 0.0}
        ],
    )
    (out / "checkpoints" / "step00000050.damaged").mkdir()
    skipped, loss, entropy, damaged = examine(str(out), verify=False).figures["warnings"]
    assert "3 of the steps" in skipped
    assert "skipped.jsonl" in skipped
    assert "not finite at step 390" in loss
    assert "the gate collapses" in entropy
    assert "step00000050.damaged" in damaged


def test_a_line_that_is_being_written_is_none_yet(tmp_path):
    out = make_run(tmp_path / "run")
    write_lines(out, [line(10)], end='{"step": 20, "lo')
    assert examine(str(out), verify=False).figures["step"] == 10


@pytest.mark.parametrize("content", ["nonsense\n", "[]\n", '{"step": "ten"}\n', '{"step": 1, "loss": "x"}\n', "\xff\n"])
def test_metrics_that_make_no_sense_are_named(content, copies):
    (copies["run"] / "metrics.jsonl").write_text(content, encoding="latin-1")
    with pytest.raises(PipelineError, match=r"metrics\.jsonl"):
        examine(str(copies["run"]), verify=False)


# A checkpoint.


def test_a_checkpoint(originals):
    report = examine(str(originals["checkpoint"]), verify=True)
    figures = report.figures
    assert (figures["name"], figures["steps"], figures["validation_loss"]) == ("step00000100", 400, 1.1)
    model = HMoEModel(MODEL, ROUTER)
    assert figures["parameters"]["total"] == sum(each.numel() for each in model.parameters())
    assert figures["trained"]["sources"] == NOTES["sources"]
    assert "step 100 of 400" in report.text
    assert "own.csv: 200 rows (terms not known)" in report.text
    assert "all 1 have the content they were written with" in report.text


def test_the_latest_checkpoint_of_a_folder_of_them(originals):
    report = examine(str(originals["run"] / "checkpoints"), verify=False)
    assert (report.kind, report.figures["name"]) == ("checkpoint", "step00000200")


def test_a_latest_checkpoint_that_is_gone(copies):
    shutil.rmtree(copies["run"] / "checkpoints" / "step00000200")
    with pytest.raises(CheckpointError, match="names step00000200, which is not there"):
        examine(str(copies["run"] / "checkpoints"), verify=False)


def test_a_checkpoint_with_a_file_that_is_damaged(copies):
    for folder in (copies["checkpoint"], copies["run"] / "checkpoints" / "step00000100"):
        path = folder / "checkpoint.json"
        content = path.read_text()
        path.write_text(content.replace("zinc.smi", "zink.smi"))
    for kind in ("checkpoint", "run"):
        assert examine(str(copies[kind]), verify=False).problems == []
        (problem,) = examine(str(copies[kind]), verify=True).problems
        assert "checkpoint.json is damaged: its checksum" in problem
    path.write_text(content + "\n")
    (problem,) = examine(str(copies["run"]), verify=False).problems
    assert "were written" in problem


@pytest.mark.parametrize("lost", [["checkpoint.json"], ["files.json"], ["checkpoint.json", "files.json"]])
def test_a_checkpoint_that_lacks_its_records_is_one_that_is_damaged(lost, copies):
    for name in lost:
        (copies["checkpoint"] / name).unlink()
    (problem,) = examine(str(copies["checkpoint"]), verify=False).problems
    assert f"lacks {lost[0]}" in problem


def test_a_checkpoint_of_another_version_is_refused_alone_and_named_in_a_run(copies):
    for folder in (copies["checkpoint"], copies["run"] / "checkpoints" / "step00000100"):
        edit(folder / "checkpoint.json", format_version=99)
    with pytest.raises(CheckpointError, match="format_version 99"):
        examine(str(copies["checkpoint"]), verify=False)
    report = examine(str(copies["run"]), verify=False)
    assert "format_version 99" in report.problems[0]
    assert report.figures["best"] == "step00000200"


# A model.


@pytest.mark.parametrize(
    "heads", [None, MoleculeHeads(), MoleculeHeads(True, True), MoleculeHeads(True, True, "mean+max+size")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model(heads, dtype, tmp_path):
    model = HMoEModel(MODEL, ROUTER, heads=heads)
    names = {name for name, _ in model.named_parameters()}
    weights = {name: value.to(dtype) if name in names else value for name, value in model.state_dict().items()}
    write_pretrained(tmp_path / "m", weights, Description(MODEL, ROUTER, heads, {"step": 7, **NOTES}))
    report = examine(str(tmp_path / "m"), verify=False)
    figures, total = report.figures, sum(each.numel() for each in model.parameters())
    of_experts = sum(each.numel() for name, each in model.named_parameters() if ".executor.experts." in name)
    idle = of_experts * (ROUTER.experts - ROUTER.experts_per_atom) // ROUTER.experts
    assert figures["parameters"] == {"total": total, "active": total - idle}
    assert figures["dtype"] == str(dtype).removeprefix("torch.")
    assert figures["format_version"] == 2
    assert figures["heads"] == ([] if heads is None else ["atoms", "bonds", *heads.names])
    assert figures["readout"] == (heads.readout if heads and heads.names else None)
    assert ("those of molecules see mean" in report.text) == bool(heads and heads.names)
    assert figures["problems"] == []
    assert "zinc.smi: 900 rows (ZINC: free to use)" in report.text
    assert "loss 1.50" in report.text
    assert f"hmoe embed {tmp_path / 'm'} molecules.csv" in report.text


def test_a_model_whose_weights_are_cut_or_of_another_model(copies):
    weights = copies["model"] / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    (problem,) = examine(str(copies["model"]), verify=False).problems
    assert "is damaged" in problem
    weights.write_bytes(whole)
    encoder = HMoEModel(MODEL, ROUTER, heads=None)
    content = json.loads((copies["model"] / "config.json").read_text())
    for change, wrong in (
        ({"model": content["model"] | {"hidden_size": 32}}, "width"),
        ({"model": content["model"] | {"upper_blocks": 3}}, "experts"),
        ({"router": content["router"] | {"experts": 16}}, "experts"),
        ({"molecule_heads": None}, "heads"),
        ({"molecule_heads": {"fingerprint": True}}, "readouts of molecules"),
    ):
        edit(copies["model"] / "config.json", **content | change)
        (problem,) = examine(str(copies["model"]), verify=False).problems
        assert f"are of different models: {wrong}" in problem
    wide = HMoEModel(MODEL, ROUTER, heads=MoleculeHeads(True, False, "mean+max+size"))
    wide.save_pretrained(copies["model"])
    edit(copies["model"] / "config.json", molecule_heads={"fingerprint": True})
    (problem,) = examine(str(copies["model"]), verify=False).problems
    assert "readouts of molecules [[33]] in one, [[16]] in the other" in problem
    described = Description(MODEL, ROUTER, None, {})
    write_pretrained(copies["model"], weights_of(described, encoder.state_dict()), described)
    report = examine(str(copies["model"]), verify=True)
    assert report.problems == []
    assert "trained     on what is not noted" in report.text
    assert "no checksums" in report.text


# A predictor.


def test_a_predictor(originals):
    report = examine(str(originals["predictor"]), verify=False)
    figures = report.figures
    assert (figures["task"], figures["targets"], figures["split"]) == ("classification", ["a", "b"], "scaffold")
    assert (figures["model"], figures["table"], figures["members"]) == ("models/zinc", "assay.csv", 2)
    assert figures["rows"] == RESULT["rows"]
    assert figures["scores"]["test"]["roc_auc_95"] == [0.7, 0.9]
    assert figures["trained"]["sources"] == NOTES["sources"]
    assert "classification of a, b" in report.text
    assert "test        roc_auc 0.810 (95% 0.700 to 0.900) over 1 of 2 targets; 2 molecules" in report.text
    assert "scaffold: 16 for training, 2 for validation, 2 for test; left out: 1 no label" in report.text
    assert "standard form" in report.text
    assert "the head alone, on a frozen encoder, readout mean; an ensemble of 2" in report.text


def test_a_predictor_that_is_not_whole(copies):
    (copies["predictor"] / "member1" / "head.safetensors").unlink()
    weights = copies["predictor"] / "member0" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    encoder, head = examine(str(copies["predictor"]), verify=False).problems
    assert "model.safetensors is damaged" in encoder
    assert "member1/head.safetensors is missing" in head


# Records that someone else wrote.


@pytest.mark.parametrize(
    ("kind", "file", "changes"),
    [
        ("checkpoint", "checkpoint.json", {"molecules": "many"}),
        ("checkpoint", "checkpoint.json", {"sources": [3]}),
        ("checkpoint", "checkpoint.json", {"sources": [{"name": "a", "rows": "b"}]}),
        ("checkpoint", "checkpoint.json", {"validation": {"validation_loss": []}}),
        ("checkpoint", "checkpoint.json", {"step": "ten"}),
        ("checkpoint", "checkpoint.json", {"ranks": [2]}),
        ("run", "run.json", {"ranks": "two"}),
        ("run", "run.json", {"config": {"run": {"steps": "x"}}}),
        ("run", "run.json", {"starts": 3}),
        ("model", "config.json", {"training": {"molecules": True}}),
        ("model", "config.json", {"training": {"sources": "zinc"}}),
        ("predictor", "predictor.json", {"result": [1]}),
        ("predictor", "predictor.json", {"result": {"test": {"roc_auc": "good"}}}),
        ("predictor", "predictor.json", {"result": {"test": {"roc_auc_95": ["low", 1]}}}),
        ("predictor", "predictor.json", {"options": {"fit": 3}}),
        ("predictor", "predictor.json", {"targets": []}),
    ],
)
def test_a_value_of_another_type_is_named(kind, file, changes, copies):
    edit(copies[kind] / file, **changes)
    with pytest.raises(UsageError) as error:
        examine(str(copies[kind]), verify=False)
    assert file in str(error.value)
    assert "\n" not in str(error.value)
