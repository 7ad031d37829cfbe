"""What a name stands for, and the chunks of its rows."""

import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.build import prepare
from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.sources.source import read_chunks, resolve_sources
from data_pipeline.sources.synth import parse_synth, synthesize
from tests.unit.data_pipeline.reading import check, read, write


def test_chunks_are_consecutive(tmp_path: Path) -> None:
    path = write(tmp_path / "a.smi", "".join(f"{'C' * (i + 1)} {i}\n" for i in range(10)))
    (source,) = resolve_sources([str(path)])
    chunks = list(read_chunks(source, chunk_rows=4))
    assert [(chunk.first_row, len(chunk.texts)) for chunk in chunks] == [(0, 4), (4, 4), (8, 2)]


def test_resolving(tmp_path: Path) -> None:
    for name in ("b.smi", "a.smi", "c[1].smi"):
        write(tmp_path / name, f"C {name}\n")
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "a.smi", "C other\n")
    names = [source.name for source in resolve_sources([str(tmp_path / "[ab].smi"), str(tmp_path / "c[1].smi")])]
    assert names == ["a.smi", "b.smi", "c[1].smi"]
    both = [str(tmp_path / "a.smi"), str(tmp_path / "deep" / "a.smi")]
    assert [source.name for source in resolve_sources(both)] == both
    (source,) = resolve_sources([both[0]])
    assert (source.bytes, len(source.blake2b), source.licence) == (8, 32, None)


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    os.mkdir(folder)
    write(Path(folder, os.fsdecode(b"mol\xe9cules.smi")), "CCO one\nC1 two\n")
    pq.write_table(pa.table({"smiles": ["C"]}), tmp_path / "a.parquet")
    os.rename(tmp_path / "a.parquet", Path(folder, os.fsdecode(b"mol\xe9cules.parquet")))
    sources = resolve_sources([f"{folder}/*"])
    assert [source.name for source in sources] == ["mol\\udce9cules.parquet", "mol\\udce9cules.smi"]
    assert [chunk.texts for source in sources for chunk in read_chunks(source)] == [["C"], ["CCO", "C1"]]
    assert [source.name for source in resolve_sources([sources[1].path] * 2)] == [
        f"{tmp_path}/caf\\udce9/mol\\udce9cules.smi"
    ] * 2
    assert sources[1].renamed({sources[1].name}).name == f"{tmp_path}/caf\\udce9/mol\\udce9cules.smi"
    prepare([sources[1].path], tmp_path / "out")
    (reject,) = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert (reject["source"], reject["text"]) == (sources[1].name, "C1")


@pytest.mark.parametrize("name", ["no-such-file.smi", "no-such-*.smi", "."])
def test_nothing_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"no such file|not a file"):
        resolve_sources([name])


def test_nci5k_comes_with_rdkit() -> None:
    (source,) = resolve_sources(["nci5k"])
    assert source.name == "nci5k"
    assert source.licence is not None
    assert sum(len(chunk.texts) for chunk in read_chunks(source)) == 4999


def test_a_synthetic_library_is_a_source(tmp_path: Path) -> None:
    (source,) = resolve_sources(["synth:20?seed=3"])
    (same, other) = resolve_sources(["synth:20?seed=3", "synth:20?seed=4"])
    assert (source.name, source.path, source.format, source.bytes) == (*["synth:20?seed=3"] * 2, "synth", 0)
    assert source.blake2b == same.blake2b != other.blake2b
    assert [source.name for source in resolve_sources(["synth:20"])] == ["synth:20?seed=0"]
    assert read("synth:20?seed=3") == list(synthesize(parse_synth("synth:20?seed=3")))
    with pytest.raises(UsageError, match="a synthetic library has no columns"):
        check("synth:20?seed=3", smiles_column="smiles")


def test_folders_of_datasets(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"smiles": ["C" * n for n in range(1, 8)], "id": list(range(7))})
    two = datasets.Dataset.from_dict({"smiles": ["O", "N"], "id": [10, 11]})
    one.save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "one" / "cache-1.arrow").write_bytes(b"left over")
    sources = resolve_sources([str(tmp_path / "one")])
    files = [f"one/data-0000{shard}-of-00002.arrow" for shard in (0, 1)]
    assert [(source.name, source.path) for source in sources] == [(file, str(tmp_path / file)) for file in files]
    assert read(tmp_path / "one") == [("C" * n, str(n - 1)) for n in range(1, 8)]
    datasets.DatasetDict({"train": one, "a test": two}).save_to_disk(tmp_path / "both")
    assert read(tmp_path / "both") == [*read(tmp_path / "one"), ("O", "10"), ("N", "11")]
    assert read(str(tmp_path / "o*")) == read(f"{tmp_path}/one/") == read(f"file://{tmp_path}/one")


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"{}", b'{"_data_files": 3}', b'{"_data_files": ["a.arrow"]}', b"\xff"]
)
def test_a_damaged_folder_of_datasets(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(PipelineError, match=rf"^{tmp_path}: state.json is damaged \(.*\); save the dataset again$"):
        resolve_sources([str(tmp_path)])


def test_a_folder_of_datasets_without_its_files(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(PipelineError, match=r"state.json is damaged"):
        resolve_sources([str(tmp_path)])
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    with pytest.raises(UsageError, match=r"train/data\.arrow: cannot open the file: No such file"):
        resolve_sources([str(tmp_path)])


def test_a_prepared_dataset_is_a_source(dataset: Path) -> None:
    splits = datasets.load_from_disk(dataset)
    expected = [(row["smiles"], row["source_id"]) for split in ("train", "validation") for row in splits[split]]
    assert read(dataset) == expected


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.smi", "C\n")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UsageError, match=rf"^{path}: cannot open the file: Permission denied$"):
        resolve_sources([str(path)])


def test_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.smi")
    with pytest.raises(UsageError, match=rf"^{tmp_path}/a.smi: not a file that can be read twice; write its content"):
        resolve_sources([str(tmp_path / "a.smi")])


def test_a_long_id_is_cut_in_whole_characters(tmp_path: Path) -> None:
    (tmp_path / "a.smi").write_text(f"CC x{'é' * 300}\nCN {'y' * 300}\n")
    (source,) = resolve_sources([str(tmp_path / "a.smi")])
    (chunk,) = read_chunks(source)
    assert chunk.ids == ["x" + "é" * 127, "y" * 256]
