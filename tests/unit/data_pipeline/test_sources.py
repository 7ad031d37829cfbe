"""Each file format, and each way a file can be broken."""

import gzip
from pathlib import Path

import pytest

from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.sources import check_columns, read_chunks, resolve_sources


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path: Path, **columns: str) -> list[tuple[str, str]]:
    (source,) = resolve_sources([str(path)])
    chunks = read_chunks(source, **columns)
    return [row for chunk in chunks for row in zip(chunk.texts, chunk.ids, strict=True)]


def check(path: Path, smiles_column: str | None = None, id_column: str | None = None) -> None:
    (source,) = resolve_sources([str(path)])
    check_columns(source, smiles_column, id_column)


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.smi", "CC one\nCCC two\n", [("CC", "one"), ("CCC", "two")]),
        ("a.smi", "CC\tone more\nCCC", [("CC", "one"), ("CCC", "1")]),
        ("a.txt", "smiles zinc_row\nCC Z1\n", [("CC", "Z1")]),
        ("a.smi", "SMILES\nCC\n", [("CC", "0")]),
        ("a.smi.gz", "CC one\n", [("CC", "one")]),
        ("a.smi", "CC one\r\nCCC two\r\n", [("CC", "one"), ("CCC", "two")]),
        ("a.smi", "CC one\rCCC two\r", [("CC", "one"), ("CCC", "two")]),
        ("a.smi", b"\xef\xbb\xbfsmiles id\nCC one\n", [("CC", "one")]),
        ("a.smi", "CC one\n\nC\n", [("CC", "one"), ("", "1"), ("C", "2")]),
        ("a.smi", "", []),
        ("a.csv", "smiles\nCC\n", [("CC", "0")]),
        ("a.csv", "ID,Smiles\nx,CC\n", [("CC", "x")]),
        ("a.csv", "mol,Class\nCC,1\n", [("CC", "0")]),
        ("a.csv", b"\xef\xbb\xbfsmiles,id\r\nCC,one\r\n", [("CC", "one")]),
        ("a.csv", 'name,smiles\n"one, two\nthree",CC\nfour,C\n', [("CC", "one, two\nthree"), ("C", "four")]),
        ("a.csv", "id,smiles\nonly\nx,\ny,C\n", [("", "only"), ("", "x"), ("C", "y")]),
        ("a.csv", "id,smiles\n", []),
        ("a.csv.gz", "smiles\nCC\n", [("CC", "0")]),
        ("a.tsv", "chembl_row\tsmiles\nCR0\tCC\n", [("CC", "0")]),
        ("a.TSV.GZ".lower(), "smiles\tid\nCC\tone\n", [("CC", "one")]),
    ],
)
def test_formats(tmp_path: Path, name: str, content: str | bytes, rows: list[tuple[str, str]]) -> None:
    assert read(write(tmp_path / name, content)) == rows


def test_named_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,smiles,structure,code\nx,C,CC,c7\n")
    assert read(path, smiles_column="structure", id_column="code") == [("CC", "c7")]
    path = write(tmp_path / "a.smi", "code structure\nc7 CC\n")
    assert read(path, smiles_column="structure") == [("CC", "c7")]
    assert read(path, smiles_column="structure", id_column="code") == [("CC", "c7")]


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("a.csv", "a,b\n1,2\n", {}, "no SMILES column among 'a', 'b'"),
        ("a.csv", "smiles,b\n1,2\n", {"smiles_column": "s"}, "no column 's'; the file's columns are 'smiles', 'b'"),
        ("a.csv", "smiles,b\n1,2\n", {"id_column": "s"}, "no column 's'"),
        ("a.smi", "CC one\n", {"smiles_column": "s"}, "no column 's': the file has no header line"),
        ("a.smi", "smiles id\nCC one\n", {"smiles_column": "s"}, "no column 's'; the file's columns are"),
        ("a.xyz", "", {}, "unknown file type"),
    ],
)
def test_wrong_request(tmp_path: Path, name: str, content: str, columns: dict[str, str], message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UsageError, match=r"^[^\n]*$") as caught:
        check(path, **columns)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.smi", "CC one\n".encode("utf-16"), "UTF-16"),
        ("a.csv", "smiles\nCC\n".encode("utf-16-be").join([b"\xfe\xff", b""]), "UTF-16"),
        ("a.csv", b"", "first line is empty"),
    ],
)
def test_unreadable_text(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        read(write(tmp_path / name, data))


def test_broken_gzip(tmp_path: Path) -> None:
    whole = gzip.compress("".join(f"C{'C' * (i % 40)} {i}\n" for i in range(20_000)).encode())
    path = tmp_path / "a.smi.gz"
    for data, message in (
        (whole[:-500], "truncated"),
        (b"CC one\n", "not a readable gzip"),
        (whole[:200] + b"junk" * 50, "gzip"),
    ):
        path.write_bytes(data)
        with pytest.raises(PipelineError, match=message):
            read(path)


def test_bytes_that_are_not_utf8_are_passed_on(tmp_path: Path) -> None:
    (text, _), good = read(write(tmp_path / "a.smi", b"C\xff one\nCC tw\xf6\n"))
    assert text == "C\udcff"
    assert good == ("CC", "tw\\udcf6")


def test_binary_garbage_is_passed_on(tmp_path: Path) -> None:
    for name in ("a.smi", "a.tsv"):
        rows = read(write(tmp_path / name, b"smiles\n" + bytes(range(256)) * 40))
        assert rows
        assert all(isinstance(text, str) for text, _ in rows)


def test_open_quote_loses_no_row(tmp_path: Path) -> None:
    lines = ["C,plain", 'CC,"never closed', *(f"CCC,row{i}" for i in range(100)), 'N,"quoted"', 'O,5" pipe', 'CO,"']
    rows = read(write(tmp_path / "a.csv", "smiles,name\n" + "\n".join(lines)))
    assert [text for text, _ in rows] == ["C", "CC", *["CCC"] * 100, "N", "O", "CO"]


def test_very_long_lines(tmp_path: Path) -> None:
    huge = "C" * 10_000_000
    rows = read(write(tmp_path / "a.smi", f"CC one\n{huge} big\nC three\n"))
    assert [text[:3] for text, _ in rows] == ["CC", "CCC", "C"]
    rows = read(write(tmp_path / "a.csv", f'smiles,note\nCC,"{huge}"\n{huge},x\nC,y\n'))
    assert [text[:3] for text, _ in rows] == ["CC", "CCC", "C"]


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
