"""A scikit-learn transformer from SMILES to embeddings, for pipelines and grid searches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from data_pipeline.errors import UsageError
from data_pipeline.molecules.encode import encode_rows
from hmoe_ds.config import Readout
from hmoe_ds.downstream.inference import infer, inference_device
from hmoe_ds.downstream.worker_model import WorkerModel
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.model.size import readout_width


class HMoETransformer(TransformerMixin, BaseEstimator):
    """SMILES to embeddings, float32 [n, W], by an exported model, whose weights stay as they are.

    Args:
        model: folder made by `hmoe export`, or `owner/name` on the hub.
        standardize: embed the standard form of each molecule; None: as the model was trained.
        unreadable: what becomes of a text that is no molecule: `error`, or a row of `nan`.
        readout: what an embedding has of a molecule's atom states: their `mean`, or more
            (`read_out` in `model/readout.py`).
    """

    def __init__(
        self,
        model: str,
        standardize: bool | None = None,
        unreadable: Literal["error", "nan"] = "error",
        readout: Readout = "mean",
    ) -> None:
        self.model = model
        self.standardize = standardize
        self.unreadable = unreadable
        self.readout = readout

    def fit(self, X: Sequence[str], y: object = None) -> HMoETransformer:
        """Look at the model; there is nothing to learn from `X`.

        Raises:
            UsageError: there is no such readout, or no such `unreadable`.
            ModelFormatError: no exported model there.
        """
        if self.unreadable not in ("error", "nan"):
            raise UsageError(f"unreadable is {self.unreadable!r}: expected error or nan")
        self.described_ = WorkerModel.of(self.model)
        self.n_features_out_ = readout_width(self.readout, self.described_.hidden_size)
        self.readout_ = self.readout
        return self

    def transform(self, X: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings of n SMILES, [n, W].

        Raises:
            UsageError: one of them is no molecule, and `unreadable` is `error`; `X` has more than one column; the model
                is not the one it was fitted with.
        """
        check_is_fitted(self, "described_")
        array = np.asarray(X, dtype=object)
        if array.ndim > 1 and array.shape[1:] != (1,):
            raise UsageError(f"X has the shape {array.shape}: expected one column of SMILES")
        texts = [str(text) for text in array.reshape(-1)]
        standardize = self.described_.standardize if self.standardize is None else self.standardize
        encoded = encode_rows(texts, [""] * len(texts), standardize=standardize)
        if encoded.rejects and self.unreadable == "error":
            first = encoded.rejects[0]
            raise UsageError(
                f"{len(encoded.rejects)} of {len(texts)} texts are no molecules, the first at place {first.index}: "
                f"{first.text[:60]!r} ({first.reason}); leave them out, or set unreadable to 'nan'"
            )
        embedding_nW = np.full((len(texts), self.n_features_out_), np.nan, np.float32)
        inferred = infer(self._loaded(), encoded.batch, inference_device(), readout=self.readout_)
        embedding_nW[encoded.kept] = inferred.embedding_XW
        return embedding_nW

    def get_feature_names_out(self, input_features: object = None) -> NDArray[Any]:
        """Names of the columns of what `transform` gives."""
        return np.array([f"hmoe{number}" for number in range(self.n_features_out_)], dtype=object)

    def _loaded(self) -> HMoEModel:
        files = self.described_.files
        # Where the files were copied to another machine, only what is in them tells.
        if not files.are_unchanged and WorkerModel.of(files.folder).files.contents != files.contents:
            raise UsageError(f"{files.folder} holds another model than when the transformer was fitted: fit it again")
        return _load(files.folder, files.contents, inference_device())


@lru_cache(maxsize=2)
def _load(folder: str, contents: str, device: str) -> HMoEModel:
    """For all copies of a transformer in this process."""
    return HMoEModel.from_pretrained(folder).to(device)
