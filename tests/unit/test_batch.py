"""MolBatch is what PyG makes of the same molecules."""

import shutil

import numpy as np
import pytest
import torch
from ogb.utils.mol import smiles2graph
from torch_geometric.data import Batch, Data
from torch_geometric.utils import subgraph

from data_pipeline.errors import PipelineError
from hmoe_ds.data.batch import bare_scaffolds, gather, scaffold_keys
from hmoe_ds.data.store import ShardStore


@pytest.fixture(scope="module")
def store(dataset):
    return ShardStore(dataset, "train")


@pytest.fixture(scope="module")
def smiles(dataset):
    import datasets

    return datasets.load_from_disk(str(dataset))["train"]["smiles"]


def pyg_data(text):
    graph = smiles2graph(text)
    return Data(
        x=torch.from_numpy(graph["node_feat"]),
        edge_index=torch.from_numpy(graph["edge_index"]),
        edge_attr=torch.from_numpy(graph["edge_feat"]),
    )


def test_batches_equal_pyg_batches_of_ogb_graphs(store, smiles):
    generator = np.random.default_rng(0)
    for size in (1, 7, 100):
        rows = generator.choice(len(store), size, replace=False)
        batch = gather(store, rows)
        expected = Batch.from_data_list([pyg_data(smiles[int(row)]) for row in rows])
        assert torch.equal(batch.atom_features_N9.long(), expected.x)
        assert torch.equal(batch.edge_index_2M, expected.edge_index)
        assert torch.equal(batch.bond_features_M3.long().repeat_interleave(2, 0), expected.edge_attr)
        assert torch.equal(batch.molecule_N, expected.batch)
        assert torch.equal(batch.ptr_B, expected.ptr)
        converted = batch.to_pyg()
        for name in ("x", "edge_index", "edge_attr", "batch", "ptr"):
            assert torch.equal(converted[name], expected[name])
        assert torch.equal(converted.get_example(size - 1).x, expected.get_example(size - 1).x)


def test_keys_and_masks_come_from_the_right_rows(dataset, store):
    import datasets

    table = datasets.load_from_disk(str(dataset))["train"]
    rows = np.array([len(store) - 1, 0, 350, 350, 3])
    batch = gather(store, rows)
    for place, row in enumerate(rows.tolist()):
        record = table[row]
        assert batch.scaffold_key_B[place].item() % 2**64 == record["scaffold_key"]
        assert batch.generic_key_B[place].item() % 2**64 == record["generic_key"]
        key = batch.mol_key_B2[place].numpy().tobytes()
        assert key == record["mol_key"]
        atoms = slice(batch.ptr_B[place], batch.ptr_B[place + 1])
        assert batch.scaffold_mask_N[atoms].int().tolist() == record["scaffold_mask"]
    assert np.array_equal(scaffold_keys(store, rows)[0], batch.scaffold_key_B.numpy())


@pytest.mark.parametrize("outside", [-1, 1 << 40])
def test_a_row_outside_of_the_dataset_is_refused(store, outside):
    with pytest.raises(IndexError, match="a row outside of the dataset"):
        gather(store, np.array([3, outside, 5]))


def test_an_empty_batch_is_a_batch(store):
    batch = gather(store, np.empty(0, np.int64))
    assert (batch.num_molecules, batch.num_atoms, batch.num_bonds) == (0, 0, 0)
    assert batch.ptr_B.tolist() == [0]


def test_columns_are_views_of_the_mapped_file(store):
    shard = store.shard(0)
    for column in (shard.atom_features_N9, shard.bond_index_M2, shard.scaffold_key, shard.mol_key_n2):
        assert not column.flags.owndata
        assert not column.flags.writeable


def test_a_missing_or_cut_shard_is_named(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "data")
    store = ShardStore(tmp_path / "data", "train")
    store.check_files()
    shard = tmp_path / "data" / "train" / "data-00001.arrow"
    content = shard.read_bytes()
    shard.write_bytes(content[:-8])
    with pytest.raises(PipelineError, match=r"data-00001\.arrow has \d+ bytes, expected"):
        store.check_files()
    shard.unlink()
    with pytest.raises(PipelineError, match=r"data-00001\.arrow is missing"):
        store.check_files()


def test_bare_scaffolds_are_the_scaffold_atoms_of_some_molecules(store):
    batch = gather(store, np.arange(30))
    chosen_B = torch.arange(30) % 3 != 0
    bare = bare_scaffolds(batch, chosen_B)
    graphs, expected = batch.to_pyg().to_data_list(), []
    for m, graph in enumerate(graphs):
        if chosen_B[m]:
            mask = batch.scaffold_mask_N[batch.ptr_B[m] : batch.ptr_B[m + 1]]
            edges, attributes = subgraph(mask, graph.edge_index, graph.edge_attr, relabel_nodes=True)
            expected.append(Data(x=graph.x[mask], edge_index=edges, edge_attr=attributes))
    found = bare.to_pyg()
    for name, value in Batch.from_data_list(expected):
        assert torch.equal(found[name], value), name
    assert torch.equal(bare.ptr_B, found.ptr)
    assert torch.equal(bare.scaffold_key_B, batch.scaffold_key_B[chosen_B])


def test_bare_scaffolds_of_no_molecule_are_an_empty_batch(store):
    bare = bare_scaffolds(gather(store, np.arange(5)), torch.zeros(5, dtype=torch.bool))
    assert (bare.num_molecules, bare.num_atoms, bare.num_bonds) == (0, 0, 0)
