"""Molecules of a run's dataset, routed by its last checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.manifest import Manifest, file_path
from data_pipeline.remote import is_url
from data_pipeline.schema import RUN_LENGTH
from hmoe_ds.data.batch import Masks, MolBatch
from hmoe_ds.data.shard_file import read_shard
from hmoe_ds.data.spread import spread_rows
from hmoe_ds.data.store import ShardStore
from hmoe_ds.downstream.export import export_checkpoint
from hmoe_ds.downstream.inference import batches_of, inference_device
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.moe.agreement import consistency
from hmoe_ds.moe.replay import Routing, RowBytes, joined
from hmoe_ds.report.recording import routing_of, row_bytes
from hmoe_ds.run_files import RECORD


class Sample(NamedTuple):
    """B molecules with N atoms in all, of one split, and how they were routed.

    Attributes:
        smiles: of the molecules.
        scaffold_key_B: of their scaffolds; 0 = acyclic.
        generic_key_B: of their skeletons.
        group_B: their top groups.
        u_BP: their routing embeddings.
        ptr_B: first atom of each molecule, then N.
        atom_features_N9: of the atoms.
        expert_LN: of each H-MoE layer, the expert with the largest weight for each atom.
        routing: for a replay of what ranks would send.
        rows: bytes of what they would send.
    """

    smiles: list[str]
    scaffold_key_B: NDArray[np.int64]
    generic_key_B: NDArray[np.int64]
    group_B: NDArray[np.int64]
    u_BP: NDArray[np.float32]
    ptr_B: NDArray[np.int64]
    atom_features_N9: NDArray[np.uint8]
    expert_LN: NDArray[np.int64]
    routing: Routing
    rows: RowBytes

    @property
    def consistency(self) -> float:
        """Do molecules with one scaffold go to one group (`agreement.consistency`)?"""
        return consistency(self.scaffold_key_B, self.group_B)


class RoutedMolecules(NamedTuple):
    """What the last checkpoint does with molecules of the dataset.

    Attributes:
        step: of the checkpoint.
        is_of_run: whether the dataset is the one that the run is trained on.
        centers_GP: the unit centres of the groups.
        train: molecules that it was trained on, perhaps.
        held_out: molecules with scaffolds that it was not.
        scaffold_smiles: of the scaffolds of both, by key.
    """

    step: int
    is_of_run: bool
    centers_GP: NDArray[np.float32]
    train: Sample
    held_out: Sample
    scaffold_smiles: dict[int, str]


def route_molecules(run: Path, dataset: str, molecules: int) -> RoutedMolecules:
    """Route `molecules` molecules of each split of `dataset` by the last checkpoint of `run`.

    Raises:
        CheckpointError: no whole checkpoint there.
        PipelineError: no dataset there, or one that holds no molecule in one of its splits.
        OSError: files of it are gone.
    """
    if is_url(dataset):
        raise UsageError(f"{dataset} is not on this machine: copy it, and give the copy with --data")
    with TemporaryDirectory() as folder:
        step = export_checkpoint(run, folder)["step"]
        model = HMoEModel.from_pretrained(folder).to(inference_device())
    manifest = Manifest.load(dataset)
    # Of what was trained on, scaffolds as they come; of what was not, several molecules of each, to compare.
    records = _first_molecules(dataset, manifest, "train", RUN_LENGTH * molecules)
    train = _route(model, records.take(pa.array(spread_rows(len(records), molecules))))
    held_out = _route(model, _first_molecules(dataset, manifest, "validation", molecules))
    keys = np.union1d(train.scaffold_key_B, held_out.scaffold_key_B)
    centers_GP = torch.nn.functional.normalize(model.encoder.scaffold_gate.centers.detach().float(), dim=-1)
    return RoutedMolecules(
        step=step,
        is_of_run=_is_of_run(run, dataset),
        centers_GP=centers_GP.cpu().numpy(),
        train=train,
        held_out=held_out,
        scaffold_smiles=_scaffold_smiles(dataset, keys),
    )


def _route(model: HMoEModel, molecules: pa.Table) -> Sample:
    records = molecules.combine_chunks().to_batches()[0]
    parts = [_routed(model, batch) for batch in batches_of(records)]
    of_molecules, of_atoms, routings, rows = zip(*parts, strict=True)
    group_B, u_BP, scaffold_B, generic_B = map(np.concatenate, zip(*of_molecules, strict=True))
    features, experts = zip(*of_atoms, strict=True)
    routing = joined(routings)
    return Sample(
        smiles=records.column("smiles").to_pylist(),
        scaffold_key_B=scaffold_B,
        generic_key_B=generic_B,
        group_B=group_B,
        u_BP=u_BP,
        ptr_B=np.concatenate([[0], np.cumsum(routing.atoms_B)]),
        atom_features_N9=np.concatenate(features),
        expert_LN=np.concatenate(experts, axis=1),
        routing=routing,
        rows=rows[0],
    )


class _Routed(NamedTuple):
    """Of a batch."""

    of_molecules: tuple[NDArray[Any], ...]
    of_atoms: tuple[NDArray[np.uint8], NDArray[np.int64]]
    routing: Routing
    rows: RowBytes


@torch.inference_mode()
def _routed(model: HMoEModel, batch: MolBatch) -> _Routed:
    encoding = model(batch.to(inference_device()))
    tops = [
        atoms.choices_NK.gather(1, atoms.weights_NK.argmax(dim=1, keepdim=True)).squeeze(1) for atoms in encoding.atoms
    ]
    scaffold, batch = encoding.scaffold, encoding.batch
    of_molecules = (scaffold.groups_BC[:, 0], scaffold.u_BP.float(), batch.scaffold_key_B, batch.generic_key_B)
    return _Routed(
        of_molecules=tuple(values.cpu().numpy() for values in of_molecules),
        of_atoms=(batch.atom_features_N9.cpu().numpy(), torch.stack(tops).cpu().numpy()),
        routing=routing_of(batch, encoding),
        rows=row_bytes(batch, _nothing_hidden(batch), encoding),
    )


def _nothing_hidden(batch: MolBatch) -> Masks:
    sizes, device = (batch.num_atoms, batch.num_bonds), batch.ptr_B.device
    return Masks(*(torch.zeros(size, dtype=torch.bool, device=device) for size in sizes))


def _first_molecules(dataset: str, manifest: Manifest, split: str, molecules: int) -> pa.Table:
    """Up to `molecules` of a split, as they are stored."""
    parts: list[pa.RecordBatch] = []
    missing = molecules
    for record in manifest.splits[split].shards:
        if missing <= 0:
            break
        path = file_path(dataset, record)
        with pa.memory_map(str(path)) as file:
            shard = read_shard(file, str(path), record, bool(manifest.options["targets"]))
        parts.append(shard.slice(0, missing))
        missing -= len(parts[-1])
    if not parts:
        raise PipelineError(f"{dataset} has no molecules in its {split} split: report on a larger dataset with --data")
    return pa.Table.from_batches(parts)


def _is_of_run(run: Path, dataset: str) -> bool:
    """Whether the run's record names this dataset, alone, with the shards that it had when the run began."""
    record = json.loads((run / RECORD).read_text())
    extents = record["shards"]
    return len(extents) == 1 and ShardStore(dataset, "train", extents[0]).fingerprint == record["dataset"]


def _scaffold_smiles(dataset: str, keys: NDArray[np.int64]) -> dict[int, str]:
    """SMILES of scaffolds, by the key as it is in a batch: the bits of an unsigned number in a signed one."""
    table = pq.read_table(f"{dataset}/scaffolds.parquet", columns=["scaffold_key", "smiles"])
    key = table["scaffold_key"].to_numpy().view(np.int64)
    wanted = np.isin(key, keys)
    return dict(zip(key[wanted].tolist(), table["smiles"].filter(pa.array(wanted)).to_pylist(), strict=True))
