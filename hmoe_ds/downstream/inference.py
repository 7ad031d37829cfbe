"""What a model makes of molecules: embeddings of molecules or atoms, and how they were routed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from hmoe_ds.config import DataConfig, Readout
from hmoe_ds.data.batch import MolBatch, gather
from hmoe_ds.data.plan import within_budgets
from hmoe_ds.data.store import BatchStore, Shard
from hmoe_ds.model.encoder import Encoding
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.model.readout import read_out
from hmoe_ds.model.size import readout_width

# Of one forward: what keeps two cores busy, and a GPU, at some 100 MB of activations for each 256 of width.
_BUDGETS = DataConfig(molecules_per_step=1024, atoms_per_step=8192, bonds_per_step=16384)


def inference_device() -> str:
    """Where models run: on the GPU, if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class Routing(NamedTuple):
    """How n molecules were routed.

    Attributes:
        group_n: the top group of each.
        experts_nL: of each H-MoE layer, the expert with the largest weight over the molecule's atoms.
        novelty_n: how unfamiliar the scaffold is: 1 is usual among molecules of the pretraining, more is less familiar
            (`model/familiar.py`); NaN where the model does not know what it is familiar with.
    """

    group_n: NDArray[np.int32]
    experts_nL: NDArray[np.int32]
    novelty_n: NDArray[np.float32]


class Inferred(NamedTuple):
    """What a model makes of n molecules with N atoms in all; `routing` if it was asked for.

    Attributes:
        embedding_XW: of the n molecules, or of the N atoms, those of the first molecule first.
        routing: of the molecules.
    """

    embedding_XW: NDArray[np.float32]
    routing: Routing | None


@torch.inference_mode()
def infer(
    model: HMoEModel,
    molecules: pa.RecordBatch,
    device: str,
    per_atom: bool = False,
    routing: bool = False,
    readout: Readout = "mean",
) -> Inferred:
    """Run the model on encoded molecules. What it makes of one does not depend on the others, but for rounding.

    Args:
        model: an exported model.
        molecules: as `encode_rows` gives them.
        device: where the model is.
        per_atom: states of atoms instead of readouts of molecules.
        routing: also how molecules were routed.
        readout: of molecules.
    """
    embeddings, routings = [], []
    for batch in batches_of(molecules):
        encoding = model(batch.to(device))
        states = encoding.h_ND if per_atom else read_out(readout, encoding.h_ND, encoding.batch)
        embeddings.append(states.float().cpu().numpy())
        if routing:
            routings.append(_routing(model, encoding))
    hidden_size, layers = model.config.hidden_size, len(model.encoder.moe_layers())
    width = hidden_size if per_atom else readout_width(readout, hidden_size)
    embedding_XW = np.concatenate([np.empty((0, width), np.float32), *embeddings])
    if not routing:
        return Inferred(embedding_XW, None)
    none = Routing(np.empty(0, np.int32), np.empty((0, layers), np.int32), np.empty(0, np.float32))
    return Inferred(embedding_XW, Routing(*map(np.concatenate, zip(none, *routings, strict=True))))


def batches_of(molecules: pa.RecordBatch) -> Iterator[MolBatch]:
    """Encoded molecules in their order, as batches that fit a forward."""
    store = BatchStore(molecules)
    shard: Shard = store.shard(0)
    for span in within_budgets(shard.num_atoms.astype(np.int64), shard.num_bonds.astype(np.int64), _BUDGETS):
        yield gather(store, np.arange(span.start, span.stop))


def _routing(model: HMoEModel, encoding: Encoding) -> Routing:
    readout_BD = encoding.scaffold.readout_BD
    familiar = model.familiar
    novelty_B = readout_BD.new_full((len(readout_BD),), torch.nan) if familiar is None else familiar.novelty(readout_BD)
    batch, experts = encoding.batch, model.router.experts
    tops = []
    for atoms in encoding.atoms:
        # One expert more than there are stands for choices that were not used, which have no weight.
        weight_BE = novelty_B.new_zeros(batch.num_molecules, experts + 1)
        places_NK = batch.molecule_N.unsqueeze(1) * (experts + 1) + atoms.choices_NK
        weight_BE.view(-1).index_add_(0, places_NK.flatten(), atoms.weights_NK.flatten().to(weight_BE.dtype))
        tops.append(weight_BE.argmax(dim=1))
    experts_BL = torch.stack(tops, dim=1) if tops else novelty_B.new_empty(batch.num_molecules, 0)
    return Routing(_ints(encoding.scaffold.groups_BC[:, 0]), _ints(experts_BL), novelty_B.float().cpu().numpy())


def _ints(values: Tensor) -> NDArray[np.int32]:
    return values.to(torch.int32).cpu().numpy()
