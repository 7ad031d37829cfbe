"""What MLflow loads and serves of an exported model: SMILES to embeddings. MLflow finds `_load_pyfunc` by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hmoe_ds.downstream.transformer import HMoETransformer


class Embedder:
    """SMILES to embeddings, in the form that MLflow asks for.

    Args:
        folder: of an exported model.
    """

    def __init__(self, folder: str) -> None:
        self._transformer = HMoETransformer(folder, unreadable="nan").fit([])

    def predict(self, model_input: Sequence[str], params: Mapping[str, Any] | None = None) -> NDArray[np.float32]:
        """Embeddings of n SMILES, a list or one column of a table, [n, D]; a row of `nan` for what is no molecule."""
        return self._transformer.transform(model_input)


def _load_pyfunc(path: str) -> Embedder:
    return Embedder(path)
