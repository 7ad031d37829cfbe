"""Parquet and Arrow files against pyarrow's own reading of them."""

import tracemalloc
from contextlib import suppress
from pathlib import Path
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.molecules.encode import encode_rows
from data_pipeline.schema import ID_LIMIT
from data_pipeline.sources import columnar
from data_pipeline.sources.source import Source, read_chunks, resolve_sources
from tests.unit.data_pipeline.reading import check, read

KEY = UUID("12345678-1234-5678-1234-567812345678")
KINDS = ("parquet", "arrow file", "arrow stream")


def written(folder: Path, kind: str, table: pa.Table, batch_rows: int = 700) -> Path:
    if kind == "parquet":
        pq.write_table(table, folder / "a.parquet", row_group_size=batch_rows)
        return folder / "a.parquet"
    create = pa.ipc.new_file if kind == "arrow file" else pa.ipc.new_stream
    with create(folder / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=batch_rows)
    return folder / "a.arrow"


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_file(tmp_path: Path, kind: str) -> None:
    rows = 5000
    table = pa.table(
        {
            "weight": [float(row) for row in range(rows)],
            "ID": [f"row {row}" for row in range(rows)],
            "SMILES": ["C" * (row % 30) + "O" for row in range(rows)],
        }
    )
    path = written(tmp_path, kind, table)
    assert read(path) == list(zip(table["SMILES"].to_pylist(), table["ID"].to_pylist(), strict=True))
    by_weight = read(path, smiles_column="ID", id_column="weight")
    assert by_weight[:2] == [("row 0", "0"), ("row 1", "1")]
    assert len(by_weight) == rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array([7, None, 2**60]), ["7", "1", str(2**60)]),
        (pa.array([2**64 - 1, 0, 1], pa.uint64()), [str(2**64 - 1), "0", "1"]),
        (pa.array(["a", None, ""], pa.large_string()), ["a", "1", "2"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([b"a", b"\xff", None]), ["a", "\\udcff", "2"]),
        (pa.array([True, False, None]), ["true", "false", "2"]),
        (pa.array([0, 1, 2], pa.date32()), ["1970-01-01", "1970-01-02", "1970-01-03"]),
        (pa.array([KEY.bytes, None, bytes(16)], pa.uuid()), [str(KEY), "1", "00000000-0000-0000-0000-000000000000"]),
        (pa.array([b"abc", None, b"\xff\xfe\xfd"], pa.binary(3)), ["abc", "1", "\\udcff\\udcfe\\udcfd"]),
        (pa.nulls(3), ["0", "1", "2"]),
    ],
)
def test_ids_of_any_scalar_type_become_text(tmp_path: Path, kind: str, ids: pa.Array, expected: list[str]) -> None:
    table = pa.table({"smiles": ["C", None, " CC "], "id": ids})
    assert read(written(tmp_path, kind, table)) == list(zip(["C", "", "CC"], expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "texts",
    [
        pa.array(["CC", None, "C\u00e9"], pa.large_string()),
        pa.array(["CC", None, "C\u00e9"], pa.string_view()),
        pa.array(["CC", None, "C\u00e9"]).dictionary_encode(),
        pa.array([b"CC", None, "C\u00e9".encode()]),
    ],
)
def test_text_of_any_type(tmp_path: Path, kind: str, texts: pa.Array) -> None:
    path = written(tmp_path, kind, pa.table({"smiles": texts}))
    assert [text for text, _ in read(path)] == ["CC", "", "C\u00e9"]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_are_not_utf8_are_passed_on(tmp_path: Path, kind: str) -> None:
    assert read(written(tmp_path, kind, pa.table({"smiles": [b"C\xff", b"C"]}))) == [("C\udcff", "0"), ("C", "1")]


def test_other_structures(tmp_path: Path) -> None:
    block = "\n  RDKit\n\n  0  0  0\nM  END\n"
    table = pa.table({"inchi": ["InChI=1S/CH4/h1H4"], "molblock": [block], "cx": ["C[C@H](N)O |&1:1|"]})
    path = written(tmp_path, "parquet", table)
    assert read(path) == [("InChI=1S/CH4/h1H4", "0")]
    assert read(path, smiles_column="molblock") == [(block, "0")]
    assert read(path, smiles_column="cx") == [("C[C@H](N)O", "0")]


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_columns(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, kind, pa.table({"a": [1], "b": [[1]], "c": ["C"]}))
    for columns, message in (
        ({}, "no SMILES column among 'a', 'b', 'c'; name it with --smiles-column"),
        ({"smiles_column": "s"}, "no column 's'; the file's columns are 'a', 'b', 'c'"),
        ({"smiles_column": "a"}, "column 'a' holds int64, expected text"),
        ({"smiles_column": "c", "id_column": "b"}, "column 'b' holds list<.*>, expected one value"),
    ):
        with pytest.raises(UsageError, match=rf"^{path}: {message}"):
            check(path, **columns)
    assert read(path, smiles_column="c", id_column="c") == [("C", "C")]


@pytest.mark.parametrize("kind", KINDS[1:])  # Parquet has no such type
def test_an_id_that_is_no_text_in_arrow_is_named(tmp_path: Path, kind: str) -> None:
    table = pa.table({"smiles": ["C"], "id": pa.nulls(1, pa.month_day_nano_interval())})
    with pytest.raises(UsageError, match=r"column 'id' holds month_day_nano_interval, .*; name another with --id-col"):
        check(written(tmp_path, kind, table))


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(tmp_path: Path, kind: str) -> None:
    schema = pa.schema([("smiles", pa.string())])
    assert read(written(tmp_path, kind, schema.empty_table())) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_never_looks_whole(tmp_path: Path, kind: str) -> None:
    table = pa.table({"smiles": [f"{'C' * (row % 50)}O" for row in range(3000)]})
    path = written(tmp_path, kind, table)
    whole = path.read_bytes()
    # Also where a batch ends, which nothing but the end mark tells.
    for length in {0, 1, 4, 8, 100, len(whole) // 2, len(whole) - 1, len(whole) - 8, len(whole) - 16}:
        path.write_bytes(whole[:length])
        with pytest.raises(PipelineError, match=rf"^{path}: .*; fetch it again$"):
            read(path)


def test_the_first_version_of_feather_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.feather").write_bytes(b"FEA1" + bytes(40) + b"FEA1")
    with pytest.raises(UsageError, match=rf"^{tmp_path}/a.feather: Feather version 1, expected 2; .* as Parquet$"):
        check(tmp_path / "a.feather")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_an_error_or_other_rows(tmp_path: Path, kind: str) -> None:
    table = pa.table({"smiles": [f"{'C' * (row % 50)}O" for row in range(3000)]})
    path = written(tmp_path, kind, table)
    whole = path.read_bytes()
    for at in range(8, len(whole), len(whole) // 40):
        path.write_bytes(whole[:at] + bytes(255 - byte for byte in whole[at : at + 30]) + whole[at + 30 :])
        with suppress(PipelineError):
            assert len(read(path)) == 3000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [pa.string(), pa.string_view(), pa.binary()])
def test_long_cells_are_cut(tmp_path: Path, kind: str, dtype: pa.DataType) -> None:
    huge = "C" * (3 << 20)
    table = pa.table({"smiles": pa.array([huge, "C", "CC\0C"], dtype), "id": pa.array(["one", huge, None], dtype)})
    (long, first), (text, cut), nul = read(written(tmp_path, kind, table))
    assert (len(long), first, text, cut, nul) == (1 << 20, "one", "C", "C" * ID_LIMIT, ("CC\ufffdC", "2"))
    assert [reject.reason for reject in encode_rows([long], ["one"]).rejects] == ["too_large"]


def peak_bytes(source: Source, rows: int) -> int:
    """The most that reading all `rows` of a source takes, of Python and of Arrow."""
    pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        assert sum(len(chunk.texts) for chunk in read_chunks(source)) == rows
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    return peak + pool.max_memory()


def test_row_groups_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columnar, "REQUEST_BYTES", 1 << 16)
    texts = [f"{row:01000d}" for row in range(50_000)]
    table = pa.table({"smiles": texts, "other": texts})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False, compression="none")
    # A path is mapped into memory, a URL is read into it.
    (source,) = resolve_sources([f"file://{tmp_path}/a.parquet"])
    assert peak_bytes(source, rows=50_000) < 25 << 20 < table["smiles"].nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_file_of_long_cells_takes_little_memory(tmp_path: Path, kind: str) -> None:
    """One cell, stored once, that a thousand rows refer to."""
    indices = pa.array([0] * 1500, pa.int32())
    table = pa.table({"smiles": pa.DictionaryArray.from_arrays(indices, ["C" * 200_000])})
    path = written(tmp_path, kind, table, batch_rows=1500)
    assert path.stat().st_size < 1 << 20
    (source,) = resolve_sources([str(path)])
    assert peak_bytes(source, rows=1500) < 80 << 20 < 1024 * 200_000
