"""The novelty score, against scikit-learn's nearest neighbours; where it comes from and where it goes."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from data_pipeline.errors import PipelineError
from data_pipeline.molecules.encode import encode_rows
from hmoe_ds.data.batch import gather
from hmoe_ds.data.mixture import Mixture
from hmoe_ds.data.store import ShardStore
from hmoe_ds.downstream.familiarize import datasets_of_run, familiarize
from hmoe_ds.downstream.inference import infer
from hmoe_ds.model.description import FAMILIAR, ModelFormatError
from hmoe_ds.model.familiar import NEIGHBOURS, Familiar, write_familiar
from hmoe_ds.model.hmoe import HMoEModel

LIBRARY = ["CCO", "c1ccccc1O", "CC(=O)Nc1ccc(O)cc1", "C1CC2CCC1C2", "OC1CCCCC1"]
STRANGE = ["C12C3C4C1C5C2C3C45", "C1CC12CC23CC3", "C1C2CC3CC1CC(C2)C3CCCCCCCCCCCCCC", "C1CC2(C1)CCC1(CC2)CCCCCCCCCC1"]


@pytest.fixture
def familiar_model(exported, dataset, tmp_path):
    """A model that knows what it is familiar with."""
    folder = tmp_path / "model"
    HMoEModel.from_pretrained(exported).save_pretrained(folder)
    assert familiarize(folder, Mixture([ShardStore(dataset, "train")])) > 1000
    return folder


def novelty_of(model, smiles):
    return infer(model, encode_rows(smiles, smiles).batch, "cpu", routing=True).routing.novelty_n


def test_the_score_is_the_distance_from_the_nearest_beside_what_is_usual():
    generator = torch.Generator().manual_seed(0)
    known, others = torch.randn(700, 6, generator=generator), 3 * torch.randn(30, 6, generator=generator)
    index = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(known.numpy())
    among = index.kneighbors(n_neighbors=NEIGHBOURS)[0].mean(axis=1)  # without each one itself
    familiar = Familiar.of(known)
    # torch's median of an even number is the lower one of the two in the middle.
    assert familiar.usual.item() == pytest.approx(np.sort(among)[len(among) // 2 - 1], rel=1e-5)
    expected = index.kneighbors(others.numpy())[0].mean(axis=1) / familiar.usual.item()
    np.testing.assert_allclose(familiar.novelty(others), expected, rtol=1e-5)


def test_a_score_does_not_depend_on_the_company(familiar_model):
    model = HMoEModel.from_pretrained(familiar_model)
    readouts = torch.randn(600, model.config.hidden_size)
    together = model.familiar.novelty(readouts)
    for part in (slice(0, 1), slice(590, 600)):
        torch.testing.assert_close(together[part], model.familiar.novelty(readouts[part]), rtol=1e-6, atol=0)


def test_what_is_familiar_is_saved_and_loaded(familiar_model, tmp_path):
    model = HMoEModel.from_pretrained(familiar_model)
    model.save_pretrained(tmp_path / "again")
    again = HMoEModel.from_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(novelty_of(again, LIBRARY), novelty_of(model, LIBRARY))
    assert np.isfinite(novelty_of(again, LIBRARY)).all()
    # Another model in the same folder is not familiar with these.
    again.familiar = None
    again.save_pretrained(tmp_path / "again")
    assert np.isnan(novelty_of(HMoEModel.from_pretrained(tmp_path / "again"), LIBRARY)).all()


def test_molecules_of_the_pretraining_are_less_novel(familiar_model, dataset):
    model = HMoEModel.from_pretrained(familiar_model)
    store = ShardStore(dataset, "train")
    with torch.no_grad():
        own = model.encoder.route(gather(store, np.arange(len(store))))
    # Each is among those that it is compared with, so one of its distances is 0.
    assert model.familiar.novelty(own.readout_BD).median() < 1
    assert novelty_of(model, STRANGE).min() > 1


def test_damaged_and_foreign_references(familiar_model):
    path = familiar_model / FAMILIAR
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelFormatError, match=r"familiar.safetensors is damaged"):
        HMoEModel.from_pretrained(familiar_model)
    write_familiar(familiar_model, Familiar(torch.zeros(50, 3), torch.tensor(1.0)))
    with pytest.raises(ModelFormatError, match=r"is of another model: it has readouts \[50, 3\]"):
        HMoEModel.from_pretrained(familiar_model)


def test_embed_tells_it(familiar_model, hmoe_here, tmp_path):
    (tmp_path / "m.smi").write_text("".join(f"{smiles}\n" for smiles in LIBRARY))
    hmoe_here("embed", familiar_model, tmp_path / "m.smi", "--out", tmp_path / "e.parquet", "--routing", "--workers", 1)
    found = pq.read_table(tmp_path / "e.parquet")["novelty"].to_pylist()
    np.testing.assert_allclose(found, novelty_of(HMoEModel.from_pretrained(familiar_model), LIBRARY), rtol=1e-4)


def test_the_benchmark(familiar_model, dataset, tmp_path, monkeypatch):
    benchmark = pytest.importorskip("benchmarks.novelty", reason="an image has no benchmarks")
    (tmp_path / "t.csv").write_text("smiles\n" + "".join(f"{smiles}\n" for smiles in STRANGE))
    results = []
    monkeypatch.setattr(benchmark, "write_result", results.append)
    arguments = ["novelty", familiar_model, dataset, tmp_path / "t.csv", "--reference", 800]
    monkeypatch.setattr("sys.argv", list(map(str, arguments)))
    benchmark.main()
    (result,) = results
    assert (result["reference"], result["unfamiliar"]) == (800, len(STRANGE))
    assert set(result["auc"]) == set(result["auc_20_to_30_atoms"])
    assert 0.5 < result["auc"]["novelty"] <= 1


def test_molecules_that_are_all_alike_are_no_measure():
    with pytest.raises(PipelineError, match="hardly differ"):
        Familiar.of(torch.ones(20, 4))


def test_only_what_the_model_was_trained_on_is_taken_unasked(dataset, second_dataset):
    def noted(*paths, fingerprint):
        return {"config": {"data": {"path": list(map(str, paths)), "weights": None}}, "dataset": fingerprint}

    stores = [ShardStore(path, "train") for path in (dataset, second_dataset)]
    both = Mixture(stores)
    found = datasets_of_run(noted(dataset, second_dataset, fingerprint=both.fingerprint))
    assert len(found) == len(both)
    with pytest.raises(PipelineError, match="has other molecules than those that the model was trained on"):
        datasets_of_run(noted(dataset, fingerprint=stores[1].fingerprint))
    with pytest.raises(PipelineError, match="is not on this machine"):
        datasets_of_run(noted("s3://bucket/zinc", fingerprint="x"))
    with pytest.raises(PipelineError, match="does not say"):
        datasets_of_run({})
