"""What is wrong with the data of a run is said before it starts, in one line with the mend."""

import dataclasses
import json

import pytest

from data_pipeline.build import PrepareOptions, prepare
from hmoe_ds.config import ConfigError, load_config
from hmoe_ds.training.preflight import check_run
from tests.distributed.harness import arguments

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
    refuse("format version 1, expected 2; run `hmoe prepare` again", tmp_path, tmp_path)
