"""Small real datasets that many tests share, and nothing that depends on the machine."""

import json
import os
from pathlib import Path

import pytest

# Several ranks share two cores; more threads only get into each other's way.
os.environ["OMP_NUM_THREADS"] = "1"
if os.environ.get("HMOE_TEST_GPU") != "1":
    # All but tests/gpu are of the CPU, also on a machine with GPUs, which may have fewer of them than a test has ranks.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


@pytest.fixture(autouse=True)
def environment():
    """What a command sets for its process ends with the test that ran it here."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """A prepared dataset of real molecules in several shards (the first 1,500 NCI molecules)."""
    return prepare_nci(tmp_path_factory.mktemp("dataset"), 0, 1500)


@pytest.fixture(scope="session")
def second_dataset(tmp_path_factory) -> Path:
    """Another one (the next 700 NCI molecules)."""
    return prepare_nci(tmp_path_factory.mktemp("second"), 1500, 2200)


@pytest.fixture(scope="session")
def dataset_with_targets(tmp_path_factory) -> Path:
    """The molecules of `dataset`, with what molecule-level objectives predict."""
    return prepare_nci(tmp_path_factory.mktemp("targets"), 0, 1500, targets=True)


@pytest.fixture(scope="session")
def second_dataset_with_targets(tmp_path_factory) -> Path:
    """The molecules of `second_dataset`, likewise."""
    return prepare_nci(tmp_path_factory.mktemp("second_targets"), 1500, 2200, targets=True)


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """A small model that was not trained, as exported: for what does not depend on how good it is."""
    from hmoe_ds.model.hmoe import HMoEModel
    from tests.small_model import MODEL, ROUTER

    folder = tmp_path_factory.mktemp("exported") / "model"
    HMoEModel(MODEL, ROUTER, seed=1).save_pretrained(folder, {"step": 5, "standardize": True})
    return folder


@pytest.fixture
def hmoe_here(capsys):
    """`hmoe` within this process, which has imported what takes the command longest: for the many small requests."""
    from hmoe_ds.cli import main

    def run_here(*arguments, expect=0):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            code = end.code
        out, err = capsys.readouterr()
        assert code == expect, f"exit {code}\n{out[-3000:]}\n{err[-3000:]}"
        return json.loads(out.splitlines()[-1]) if "--json" in arguments and expect == 0 else None, out, err

    return run_here


def prepare_nci(folder: Path, first: int, last: int, targets: bool = False) -> Path:
    from rdkit import RDConfig

    from data_pipeline.build import PrepareOptions, prepare

    lines = (Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi").read_text().splitlines()[first:last]
    (folder / "molecules.smi").write_text("\n".join(lines) + "\n")
    options = PrepareOptions(validation_fraction=0.15, shard_rows=300, targets=targets)
    prepare([str(folder / "molecules.smi")], folder / "prepared", options)
    return folder / "prepared"
