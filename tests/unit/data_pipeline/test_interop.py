"""A prepared dataset, read by what others use: datasets, pyarrow, PyTorch Geometric. No code of ours reads here."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ogb.utils import smiles2graph

from data_pipeline.build import PrepareOptions, prepare
from data_pipeline.molecules.encode import encode_rows
from data_pipeline.schema import MOLECULE_SCHEMA

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "dataset.md"
SPLITS = ("train", "validation")


@pytest.fixture(autouse=True)
def _no_network_and_a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def by_pyarrow(dataset: Path, split: str) -> pa.Table:
    """The shards of a split, one after the other."""
    tables = []
    for path in sorted((dataset / split).glob("*.arrow")):
        with pa.ipc.open_stream(path) as reader:
            tables.append(reader.read_all())
    return pa.concat_tables(tables)


def files(dataset: Path) -> dict[str, str]:
    return {split: str(dataset / split / "*.arrow") for split in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_rows_in_the_same_order_everywhere(dataset: Path, tmp_path: Path, split: str) -> None:
    expected = by_pyarrow(dataset, split)
    assert expected.num_rows > 100
    assert expected.schema == MOLECULE_SCHEMA
    rows = expected.to_pylist()
    mapped = datasets.load_from_disk(str(dataset))[split]
    copied = datasets.load_dataset("arrow", data_files=files(dataset), cache_dir=str(tmp_path))[split]
    streamed = datasets.load_dataset("arrow", data_files=files(dataset), streaming=True)[split]
    assert mapped.with_format("arrow")[:].equals(expected)
    assert copied.with_format("arrow")[:].equals(expected)
    assert list(mapped) == rows
    assert list(streamed) == rows


def test_types(dataset: Path) -> None:
    mapped = datasets.load_from_disk(str(dataset))
    streamed = datasets.load_dataset("arrow", data_files=files(dataset), streaming=True)
    for split in SPLITS:
        for found in (mapped[split], streamed[split]):
            assert found.features.arrow_schema.remove_metadata() == MOLECULE_SCHEMA.remove_metadata()


def test_keys_are_exact(dataset: Path) -> None:
    expected = by_pyarrow(dataset, "train")
    keys = expected.column("scaffold_key").to_pylist()
    # Above the signed range and above what a double holds, where a careless conversion shows.
    assert max(keys) >= 1 << 63
    mapped = datasets.load_from_disk(str(dataset))["train"]
    assert mapped["scaffold_key"][:] == keys
    as_numpy = mapped.with_format("numpy", columns=["scaffold_key"])[:]["scaffold_key"]
    # This format of `datasets` makes int64 of all integers; the bits are the key's.
    assert as_numpy.view(np.uint64).tolist() == keys
    assert {len(key) for key in mapped["mol_key"][:]} == {16}


def test_split_names_and_names_of_shards(dataset: Path) -> None:
    mapped = datasets.load_from_disk(str(dataset))
    assert list(mapped) == list(SPLITS)
    assert str(mapped["validation"].split) == "validation"
    assert [Path(file["filename"]).name for file in mapped["train"].cache_files] == sorted(
        path.name for path in (dataset / "train").glob("*.arrow")
    )


def test_an_empty_split_opens(tmp_path: Path) -> None:
    (tmp_path / "a.smi").write_text("CCO one\nc1ccccc1 two\n")
    out = tmp_path / "out"
    prepare([str(tmp_path / "a.smi")], out, PrepareOptions(validation_fraction=0.0))
    assert {split: rows.num_rows for split, rows in datasets.load_from_disk(str(out)).items()} == {
        "train": 2,
        "validation": 0,
    }
    streamed = datasets.load_dataset("arrow", data_files=files(out), streaming=True)
    assert [row["source_id"] for row in streamed["train"]] == [
        row["source_id"] for row in by_pyarrow(out, "train").to_pylist()
    ]
    assert list(streamed["validation"]) == []


def test_an_appended_dataset_opens(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, text in (("a.smi", "CCO one\nc1ccccc1 two\n"), ("b.smi", "CCN three\nc1ccncc1 four\n")):
        (tmp_path / name).write_text(text)
        prepare([str(tmp_path / name)], out, append=(out / "manifest.json").exists())
    mapped = datasets.load_from_disk(str(out))
    assert sorted(row for split in SPLITS for row in mapped[split]["source_id"]) == ["four", "one", "three", "two"]
    assert mapped["train"].with_format("arrow")[:].equals(by_pyarrow(out, "train"))


def test_tables_beside_the_shards_open(dataset: Path) -> None:
    scaffolds = pq.read_table(dataset / "scaffolds.parquet")
    cyclic = [key for split in SPLITS for key in by_pyarrow(dataset, split).column("scaffold_key").to_pylist() if key]
    assert scaffolds.column("scaffold_key").to_pylist() == sorted(set(cyclic))
    rejects = datasets.load_dataset("parquet", data_files=str(dataset / "rejects.parquet"), streaming=True)["train"]
    assert list(rejects) == pq.read_table(dataset / "rejects.parquet").to_pylist()


def documented(section: str) -> Iterator[str]:
    """The Python examples in a section of the page about datasets."""
    (text,) = re.findall(rf"^## {section}\n(.*?)^## ", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    return iter(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


def test_documented_examples(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "DIR").symlink_to(dataset)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in documented("Reading it elsewhere"):
        exec(example, names)
    first_shard = by_pyarrow(dataset, "train").to_pylist()[: names["molecules"].num_rows]
    assert names["first"] == first_shard[0] == names["on_disk"]["train"][0]
    assert names["molecules"].to_pylist() == first_shard
    without_bonds = encode_rows(["C"], ["methane"]).batch.to_pylist()
    for row in [*first_shard, *without_bonds]:
        graph, expected = names["molecule_graph"](row), smiles2graph(row["smiles"])
        graph.validate()
        assert np.array_equal(graph.x.numpy(), expected["node_feat"])
        assert np.array_equal(graph.edge_index.numpy(), expected["edge_index"])
        assert np.array_equal(graph.edge_attr.numpy(), expected["edge_feat"])
