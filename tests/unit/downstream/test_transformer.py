"""The scikit-learn transformer in pipelines, in copies, with texts that are no molecules."""

import pickle
import shutil

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline

from data_pipeline.errors import UsageError
from data_pipeline.molecules.encode import encode_rows
from hmoe_ds.downstream.embed import embed_batch
from hmoe_ds.downstream.transformer import HMoETransformer
from hmoe_ds.model.description import ModelFormatError
from hmoe_ds.model.hmoe import HMoEModel
from tests.small_model import MODEL, ROUTER
from tests.unit.downstream.test_splits import nci

SMILES = nci(60)


def test_it_gives_the_embeddings_of_the_model(exported):
    found = HMoETransformer(str(exported)).fit_transform(SMILES)
    model = HMoEModel.from_pretrained(exported)
    np.testing.assert_allclose(found, embed_batch(model, encode_rows(SMILES, SMILES).batch, "cpu"), rtol=1e-6)
    assert found.dtype == np.float32


def test_it_gives_more_than_the_mean(exported):
    mean, more = (
        HMoETransformer(str(exported), readout=readout).fit_transform(SMILES) for readout in ("mean", "mean+max+size")
    )
    assert more.shape == (len(SMILES), 2 * MODEL.hidden_size + 1)
    np.testing.assert_allclose(more[:, : MODEL.hidden_size], mean, rtol=1e-6)
    atoms = encode_rows(SMILES, SMILES).batch.column("num_atoms").to_numpy()
    np.testing.assert_allclose(more[:, -1], np.log(atoms / 32), rtol=1e-6)
    with pytest.raises(UsageError, match=r"readout is 'sum': expected one of mean, mean\+max\+size"):
        HMoETransformer(str(exported), readout="sum").fit(SMILES)


def test_it_works_in_a_pipeline_and_in_its_copies(exported):
    label = [len(text) for text in SMILES]
    pipeline = make_pipeline(HMoETransformer(str(exported)), Ridge())
    scores = cross_val_score(pipeline, SMILES, label, cv=3)
    assert np.isfinite(scores).all()
    pipeline.fit(SMILES, label)
    again = pickle.loads(pickle.dumps(pipeline))
    np.testing.assert_allclose(again.predict(SMILES), pipeline.predict(SMILES), rtol=1e-5)
    assert len(pickle.dumps(pipeline)) < 10_000  # no weights
    arguments = {"model": str(exported), "standardize": None, "unreadable": "error", "readout": "mean"}
    assert clone(pipeline[0]).get_params() == arguments
    assert list(pipeline[0].get_feature_names_out()[:2]) == ["hmoe0", "hmoe1"]


def test_texts_that_are_no_molecules(exported):
    texts = ["CCO", "nonsense", "CCN"]
    with pytest.raises(UsageError, match="1 of 3 texts are no molecules, the first at place 1: 'nonsense'"):
        HMoETransformer(str(exported)).fit_transform(texts)
    found = HMoETransformer(str(exported), unreadable="nan").fit_transform(np.array(texts))
    assert np.isnan(found).all(axis=1).tolist() == [False, True, False]


def test_no_model(tmp_path):
    with pytest.raises(ModelFormatError, match="hmoe export"):
        HMoETransformer(str(tmp_path)).fit(SMILES)


def test_what_is_no_column_of_smiles(exported):
    with pytest.raises(UsageError, match=r"X has the shape \(2, 2\): expected one column"):
        HMoETransformer(str(exported)).fit_transform(np.array([["C", "CC"], ["C", "CC"]]))
    assert HMoETransformer(str(exported)).fit_transform(np.array([["C"], ["CC"]])).shape == (2, 16)
    with pytest.raises(NotFittedError):
        HMoETransformer(str(exported)).transform(["C"])


def test_a_model_that_was_replaced_is_noticed(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "model")
    pipeline = pickle.dumps(HMoETransformer(str(tmp_path / "model")).fit(SMILES))
    HMoEModel(MODEL, ROUTER, seed=7).save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match="holds another model than when the transformer was fitted"):
        pickle.loads(pipeline).transform(SMILES)
