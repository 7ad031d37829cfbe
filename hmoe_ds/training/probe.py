"""The online probe: how well the frozen embeddings of a run in progress predict labels on scaffolds held out."""

from __future__ import annotations

from typing import NamedTuple

import deepspeed
import numpy as np
import torch
from numpy.typing import NDArray

from hmoe_ds.config import DataConfig, RunConfig
from hmoe_ds.data.batch import MolBatch, gather
from hmoe_ds.data.labelled import LabelledMolecules, read_labelled
from hmoe_ds.data.plan import dealt_order, within_budgets
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.objectives.gather import gather_rows
from hmoe_ds.training.linear_probe import r_squared, ridge_predictions, roc_auc


class Probe:
    """The tables of `probe.tables`, featurised once; each rank holds and embeds its share of their molecules.

    Args:
        config: of the run.
        standardize: whether the run trains on standard forms.
        rank: this rank.
        ranks: of the run.

    Attributes:
        every: steps between probes; 0 for one at the end only.
        fingerprint: content hash of all tables.

    Raises:
        ConfigError, PipelineError: as `read_labelled`.
    """

    def __init__(self, config: RunConfig, standardize: bool, rank: int, ranks: int) -> None:
        probe = config.probe
        self.every = probe.every or config.run.validate_every
        self._tables: dict[str, _DealtTable] = {}
        for table in probe.tables:
            molecules = read_labelled(table, probe.max_molecules, standardize)
            self._tables[table.title] = _DealtTable(molecules, config.data, rank, ranks)
            if rank == 0:
                print(
                    f"probe {table.title}: {len(molecules.store)} molecules, {molecules.held_out_B.sum()} of them with "
                    f"held-out scaffolds; unreadable rows left out: {molecules.unreadable}",
                    flush=True,
                )
        self.fingerprint = "".join(table.molecules.fingerprint for table in self._tables.values())

    @torch.no_grad()
    def measure(self, engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
        """`probe_<name>_auc` of tables with two classes, `probe_<name>_r2` of others; the same on every rank.

        All ranks must take part. Parameters, buffers and generators stay as they are.
        """
        engine.eval()
        model: HMoEModel = engine.module.model
        figures = {}
        for name, table in self._tables.items():
            molecules = table.molecules
            metric = "auc" if molecules.is_classification else "r2"
            figures[f"probe_{name}_{metric}"] = score(table.embed(model, engine.device), molecules)
        engine.train()
        return figures


def score(embedding_BD: NDArray[np.float64], molecules: LabelledMolecules) -> float:
    """ROC-AUC or R2 on the held-out scaffolds of a ridge regression fitted to the others; nan after a diverged step."""
    if not np.isfinite(embedding_BD).all():
        return float("nan")
    label_B, held_out_B = molecules.label_B, molecules.held_out_B
    predicted = ridge_predictions(embedding_BD[~held_out_B], label_B[~held_out_B], embedding_BD[held_out_B])
    figure = roc_auc if molecules.is_classification else r_squared
    return figure(predicted, label_B[held_out_B])


class _Part(NamedTuple):
    """This rank's molecules of one forward, and how many each rank has."""

    batch: MolBatch
    counts: list[int]


class _DealtTable:
    """A table, cut to the budgets of one step and dealt over the ranks as a training slice is."""

    def __init__(self, molecules: LabelledMolecules, data: DataConfig, rank: int, ranks: int) -> None:
        self.molecules = molecules
        atoms_B = molecules.molecules.num_atoms.astype(np.int64)
        bonds_B = molecules.molecules.num_bonds.astype(np.int64)
        self._parts: list[_Part] = []
        orders = []
        for span in within_budgets(atoms_B, bonds_B, data):
            order, counts = dealt_order(atoms_B[span], ranks)
            rows = span.start + order
            first = sum(counts[:rank])
            self._parts.append(_Part(gather(molecules.store, rows[first : first + counts[rank]]), counts))
            orders.append(rows)
        self._order_B = np.concatenate(orders)

    def embed(self, model: HMoEModel, device: torch.device) -> NDArray[np.float64]:
        """Embeddings of all molecules, in the order of the table, on every rank; [B, D]"""
        gathered = torch.cat(
            [gather_rows(model.embed(part.batch.to(device)).float(), part.counts) for part in self._parts]
        )
        embedding_BD = np.empty(gathered.shape)
        embedding_BD[self._order_B] = gathered.cpu().numpy()
        return embedding_BD
