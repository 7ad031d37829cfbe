"""What is wrong with the data of a run is said before it starts, in one line with the mend."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from data_pipeline.build import PrepareOptions, prepare
from data_pipeline.manifest import Manifest
from hmoe_ds.config import ConfigError
from hmoe_ds.config_parser import load_config
from hmoe_ds.model.checkpoint_record import CheckpointError
from hmoe_ds.training import loop
from hmoe_ds.training.checks.preflight import check_run
from hmoe_ds.training.launching import node
from hmoe_ds.training.loop import check_agreement
from hmoe_ds.training.run_folder import checkpoint_to_resume
from tests.distributed.harness import arguments
from tests.made_up import make_up_checkpoint

MOLECULES = ["CCO", "c1ccccc1", "CC(=O)Oc1ccccc1C(=O)O", "C1CCCCC1N", "CN1C=NC2=C1C(=O)N(C(=O)N2C)C"]


def prepared(folder, **options):
    folder.mkdir()
    (folder / "some.smi").write_text("\n".join(MOLECULES) + "\n")
    prepare([str(folder / "some.smi")], folder / "data", PrepareOptions(**options))
    return folder / "data"


def refuse(message, dataset, tmp_path, **overrides):
    config = load_config(arguments(tmp_path / "run", dataset, **overrides))
    with pytest.raises(ConfigError, match=message) as error:
        check_run(config, ranks=1)
    assert "\n" not in str(error.value)


def test_what_is_not_set_is_asked_for(dataset, tmp_path):
    refuse("run.out is not set: give the folder", dataset, tmp_path, run__out="")
    refuse("data.path is not set: give a dataset", "", tmp_path)


def test_a_run_folder_that_is_a_file(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    refuse("run.out .*file is a file: give a folder", dataset, tmp_path, run__out=tmp_path / "file")
    message = r"run.out .*file/run cannot be made, as .*file cannot be written to: give another folder"
    refuse(message, dataset, tmp_path, run__out=tmp_path / "file" / "run")


def test_the_same_molecules_twice(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "copy")
    refuse("hold the same molecules: name one", "", tmp_path, data__path=[str(dataset), str(tmp_path / "copy")])


def test_datasets_of_two_versions_of_rdkit(dataset, second_dataset, tmp_path):
    shutil.copytree(second_dataset, tmp_path / "old")
    manifest = tmp_path / "old" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["versions"]["rdkit"] = "2019.09.1"
    manifest.write_text(json.dumps(content))
    paths = [str(dataset), str(manifest.parent)]
    refuse("with rdkit .*old with 2019.09.1: versions of RDKit", "", tmp_path, data__path=paths)


def test_a_cache_that_is_too_small_for_a_step(dataset, tmp_path):
    sizes = sorted(shard.bytes for shard in Manifest.load(dataset).splits["train"].shards)
    held_out = sum(shard.bytes for shard in Manifest.load(dataset).splits["validation"].shards)
    settings = {"data__path": f"file://{dataset}", "data__window_shards": 1, "data__cache_dir": tmp_path / "cache"}
    enough = sizes[-1] + sizes[-2] + held_out
    refuse(
        "data.cache_gb is .*, but a step and a validation look at shards of up to .* bytes: raise data.cache_gb, or",
        "", tmp_path, **settings, data__cache_gb=0.999 * enough / 1e9,
    )  # fmt: skip
    check_run(load_config(arguments(tmp_path / "run", "", **settings, data__cache_gb=1.001 * enough / 1e9)), ranks=1)
    # Of molecules that are mostly skipped, a step looks at more.
    settings |= {"curriculum__competence": "root", "curriculum__competence_steps": 9}
    settings |= {"curriculum__competence_start": 0.02}
    enough = sum(sizes) + held_out
    refuse("data.cache_gb is", "", tmp_path, **settings, data__cache_gb=0.999 * enough / 1e9)
    check_run(load_config(arguments(tmp_path / "run", "", **settings, data__cache_gb=1.001 * enough / 1e9)), ranks=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"run\.json cannot be read"),
        ("[]", r"run\.json is of another version of hmoe_ds"),
        ('{"format_version": 1}', r"run\.json is of another version of hmoe_ds"),
        ('{"format_version": 2, "ranks": 1, "config": {}}', r"run\.json lacks dataset, shards: give another run.out"),
    ],
)
def test_a_run_with_a_record_that_says_too_little(content, message, dataset, tmp_path):
    make_up_checkpoint(tmp_path / "run", 2, {})
    (tmp_path / "run" / "run.json").write_text(content)
    refuse(message, dataset, tmp_path)


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(dataset, tmp_path):
    folder = make_up_checkpoint(tmp_path / "run", 2, {})
    folder.rename(tmp_path / "elsewhere")
    config = load_config(arguments(tmp_path / "run", dataset))
    with pytest.raises(CheckpointError, match="latest tells of a checkpoint, but there is none up to it: copy it back"):
        check_run(config, ranks=1)


def test_a_run_goes_on_from_the_newest_checkpoint_whose_records_are_whole(tmp_path):
    """`latest` may name an earlier one; what it holds otherwise is of no help."""
    config = load_config(["--run.out", str(tmp_path)])
    assert checkpoint_to_resume(config) is None
    folders = [make_up_checkpoint(tmp_path, step, config.to_dict()) for step in (2, 4, 6)]
    for name, expected in [("step00000006", 2), ("step00000004\n", 1), ("step00000005", 1), ("nonsense", 2), ("", 2)]:
        (tmp_path / "checkpoints" / "latest").write_text(name)
        assert checkpoint_to_resume(config) == folders[expected]
    (tmp_path / "checkpoints" / "latest").unlink()
    (folders[2] / "files.json").write_text("{")
    assert checkpoint_to_resume(config) == folders[1]
    record = folders[1] / "checkpoint.json"
    record.write_text(record.read_text().replace('"step": 4', '"step": 5'))
    assert checkpoint_to_resume(config) == folders[0]
    record = folders[0] / "checkpoint.json"
    record.write_text(record.read_text()[:-5])
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole \(.*step00000006.*copy one back, or give"):
        checkpoint_to_resume(config)


def test_ranks_that_see_different_data(monkeypatch):
    def gather(seen, mine):
        seen[:] = [mine, ("other molecules", 0)]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(ConfigError, match="are not the same on all ranks: put them on a file system"):
        check_agreement(load_config(["--run.out=here", "--data.path=there"]), "molecules")


def test_ranks_look_again_where_one_sees_an_old_list_of_checkpoints(monkeypatch):
    steps = iter([5, 5, 0])

    def gather(seen, mine):
        seen[:] = [mine, ("molecules", next(steps))]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(loop, "AGREEMENT_PAUSE_SECONDS", 0)
    config = load_config(["--run.out=here", "--data.path=there"])
    check_agreement(config, "molecules")
    steps = iter([5, 5])
    with pytest.raises(ConfigError, match="are not the same on all ranks"):
        check_agreement(config, "molecules", looks=2)


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(node, "gpu_count", lambda: 2)
    with pytest.raises(ConfigError, match="--num_ranks is 3, but this machine has 2 GPUs: start at most 2"):
        node.launch_here([], node.Node(ranks=3), out=Path(), restarts=0)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("validation_fraction", 0.3, "scaffolds that one of them holds out"),
        ("standardize", False, "the same substance would be two molecules"),
    ],
)
def test_datasets_that_do_not_mix(name, value, reason, tmp_path):
    paths = [str(prepared(tmp_path / "one")), str(prepared(tmp_path / "two", **{name: value}))]
    known = {field.name: field.default for field in dataclasses.fields(PrepareOptions)}
    message = (
        f"one/data was prepared with {name} {known[name]}, .*two/data with {value}: {reason}.*; prepare them alike"
    )
    refuse(message, "", tmp_path, data__path=paths)


def test_targets_that_are_not_there(dataset, dataset_with_targets, second_dataset, tmp_path):
    mend = "prepare it again with `hmoe prepare --targets`, or set objective"
    message = f"objective.fingerprint_weight is 0.1, but data.path {dataset} was prepared without targets: {mend}"
    refuse(message, dataset, tmp_path, objective__fingerprint_weight=0.1)
    message = f"objective.descriptor_weight is 2.0, but data.path {second_dataset} was prepared without targets: {mend}"
    paths = [str(dataset_with_targets), str(second_dataset)]
    refuse(message, "", tmp_path, data__path=paths, objective__descriptor_weight=2)
    both = {"objective__fingerprint_weight": 0.1, "objective__descriptor_weight": 2}
    check_run(load_config(arguments(tmp_path / "run", dataset_with_targets, **both)), ranks=1)


def test_a_dataset_without_molecules_to_train_on(tmp_path):
    (tmp_path / "some.smi").write_text("c1ccccc1\n")
    options = PrepareOptions(validation_fraction=0.999999)  # benzene is held out
    prepare([str(tmp_path / "some.smi")], tmp_path / "data", options)
    refuse("data has no molecules to train on: prepare more of them", tmp_path / "data", tmp_path)


def test_datasets_that_are_not_there(dataset, tmp_path):
    refuse("data.path: .*nowhere: no dataset here", [str(dataset), str(tmp_path / "nowhere")], tmp_path)
    refuse("data.path: nothing://here: .*expected a URL such as", "nothing://here", tmp_path)


def test_a_dataset_of_another_format(dataset, tmp_path):
    content = json.loads((dataset / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(content | {"format_version": 1}))
    refuse("format version 1, expected 3; run `hmoe prepare` again", tmp_path, tmp_path)
