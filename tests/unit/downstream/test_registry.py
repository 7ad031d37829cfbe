"""MLflow's model registry, a real one in a file: what is registered, and what it gives when it is loaded elsewhere."""

import json
import socket
import subprocess
import sys

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest

from hmoe_ds.cli import main
from hmoe_ds.downstream import registry
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.training.launching.node import free_port
from tests.small_model import MODEL, ROUTER
from tests.unit.downstream.test_splits import nci

SMILES = [*nci(20), "CC(=O)[O-].[Na+]"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A registry in a file; the folder is not the current one."""
    with pytest.MonkeyPatch.context() as patch:
        uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.delenv("MLFLOW_REGISTRY_URI", raising=False)
        patch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
        yield mlflow.MlflowClient(uri)


def run(capsys, *words, expect=0):
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert code == expect, f"exit {code}\n{out[-2000:]}\n{err[-2000:]}"
    return out, err


def saved(folder, **training):
    HMoEModel(MODEL, ROUTER, seed=3).save_pretrained(folder, training)
    return folder


def test_a_registered_model_embeds_in_another_process_as_hmoe_embed_does(store, tmp_path, capsys):
    model = saved(tmp_path / "model", step=7, dataset="a fingerprint", standardize=True, mlflow_run=None)
    (model / "notes.txt").write_text("not of the model\n")
    out, _ = run(capsys, "register", model, "zinc encoder", "--json")
    result = json.loads(out.splitlines()[-1])
    assert (result["name"], result["version"], result["mlflow_run"]) == ("zinc encoder", 1, None)
    version = store.get_model_version("zinc encoder", "1")
    card = (model / "README.md").read_text()
    assert version.description.startswith("# A pretrained encoder")
    assert card.endswith(version.description)
    parameters = sum(value.numel() for value in HMoEModel(MODEL, ROUTER).parameters())
    assert version.tags == {"step": "7", "dataset_fingerprint": "a fingerprint", "parameters": str(parameters)}

    # Elsewhere: without this folder and this process.
    (tmp_path / "model").rename(tmp_path / "moved")
    texts = [*SMILES, "nonsense", None]
    code = """
import json, sys
import mlflow, numpy as np, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
texts = json.loads(sys.argv[2])
given = {"list": texts, "column": pd.DataFrame({"anything": texts}), "series": pd.Series(texts), "one": ["CCO"]}
given["example"] = model.input_example
np.savez(sys.argv[3], **{name: model.predict(value) for name, value in given.items()})
assert [column.type.name for column in model.metadata.signature.inputs] == ["string"]
"""
    command = [sys.executable, "-c", code, result["uri"], json.dumps(texts), str(tmp_path / "given.npz")]
    subprocess.run(command, check=True, timeout=300)
    given = np.load(tmp_path / "given.npz")
    (tmp_path / "m.smi").write_text("\n".join(SMILES) + "\n")
    run(capsys, "embed", tmp_path / "moved", tmp_path / "m.smi", "--out", tmp_path / "e.parquet", "--workers", 1)
    embedded = np.array(pq.read_table(tmp_path / "e.parquet").column("embedding").to_pylist())
    assert embedded.shape == (len(SMILES), MODEL.hidden_size)
    np.testing.assert_allclose(given["list"][:-2], embedded, rtol=1e-4, atol=1e-5)
    assert np.isnan(given["list"][-2:]).all()
    np.testing.assert_array_equal(given["column"], given["list"])
    np.testing.assert_array_equal(given["series"], given["list"])
    assert given["one"].shape == (1, MODEL.hidden_size)
    assert np.isfinite(given["example"]).all()
    files = store.list_logged_model_artifacts(version.source.removeprefix("models:/"), "data/content")
    assert {file.path.rpartition("/")[2] for file in files} == {"README.md", "config.json", "model.safetensors"}


def test_a_version_is_linked_to_the_run_that_trained_it(store, tmp_path, capsys):
    experiment = store.create_experiment("trained here", artifact_location=str(tmp_path / "artifacts"))
    trained = store.create_run(experiment)
    model = saved(tmp_path / "model", step=7, mlflow_run=trained.info.run_id)
    for number in (1, 2):
        out, _ = run(capsys, "register", model, "linked")
        assert f"version {number} of linked, trained by MLflow's run {trained.info.run_id}" in out
        assert store.get_model_version("linked", str(number)).run_id == trained.info.run_id
    assert store.get_run(trained.info.run_id).info.status == "RUNNING"
    stranger = saved(tmp_path / "stranger", step=7, mlflow_run="0123456789abcdef0123456789abcdef")
    out, _ = run(capsys, "register", stranger, "linked")
    assert "version 3 of linked, linked to no run" in out
    assert store.get_model_version("linked", "3").tags["mlflow_run"] == "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "..", "a\nb"])
def test_names_that_cannot_be(name, store, exported, capsys):
    _, err = run(capsys, "register", exported, name, expect=2)
    assert "cannot be the name of a registered model: expected letters" in err


def test_what_is_missing_is_named_before_anything_is_exported(tmp_path, capsys, monkeypatch):
    words = ("export", tmp_path / "nothing", tmp_path / "out", "--register", "zinc")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    _, err = run(capsys, *words, expect=2)
    assert "needs MLFLOW_TRACKING_URI: set it to a server" in err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://somebody:secret123@127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    _, err = run(capsys, *words, expect=1)
    assert "cannot be reached" in err
    assert "refused" in err
    assert "secret123" not in err
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    _, err = run(capsys, *words, expect=2)
    assert "pip install 'hmoe-ds[train]'" in err
    assert not (tmp_path / "out").exists()


def test_a_server_that_does_not_answer_is_given_up(exported, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(registry, "ANSWER_SECONDS", 0.5)
        _, err = run(capsys, "register", exported, "zinc", expect=1)
    assert "no answer within" in err


def test_a_damaged_model_is_not_registered(store, tmp_path, capsys):
    model = saved(tmp_path / "model")
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-100])
    _, err = run(capsys, "register", model, "damaged", expect=2)
    assert "damaged model" in err
    assert not store.search_registered_models("name = 'damaged'")
