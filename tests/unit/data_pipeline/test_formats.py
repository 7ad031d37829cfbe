"""What the format of a file is told by."""

import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import UsageError
from data_pipeline.sources.formats import FORMATS
from data_pipeline.sources.source import resolve_sources
from tests.unit.data_pipeline.reading import read, write

MOL_BLOCK = "\n  RDKit          2D\n\n  0  0  0  0  0  0  0  0  0  0999 V2000\nM  END\n"


def found(path: Path) -> str:
    (source,) = resolve_sources([str(path)])
    return source.format


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.smi", "", "smiles"),
        ("a.SMI", "C one\n", "smiles"),
        ("a.smiles.gz", "C one\n", "smiles"),
        ("a.cxsmiles.bz2", "C one\n", "smiles"),
        ("H20P300.txt", "smiles zinc_id\nC 1\n", "smiles"),
        ("a.txt", "1 C\n2 CC\n", "id-smiles"),
        ("a.txt", "1 C\nCC 2\n", "smiles"),
        ("a.csv", "anything", "csv"),
        ("a.tsv.zst", "anything", "tsv"),
        ("a.sdf", "", "sdf"),
        ("a.sd.gz", "", "sdf"),
        ("CID-SMILES", "1\tC\n2\tCC\n", "id-smiles"),
        ("CID-SMILES.gz", "1\tC\n2\tCC\n", "id-smiles"),
        ("2024.03", "ZINC1 CC\nZINC2 not_this\nZINC3 C\n", "id-smiles"),
        ("a.smi", "CN1 CCO\nC1 CCN\nCNS C\nP CC\nB1 not_this\n", "id-smiles"),
        ("a.smi", "CCO CN1\nCCN C1\nC CNS\nCC P\nnot_this B\n", "smiles"),
        ("a.smi", "CCO CNS\nCCN P\n", "smiles"),
        ("noname", "CC one\nC two\n", "smiles"),
        ("noname", "smiles\tid\nCC\tone\n", "tsv"),
        ("noname", "smiles id\nCC one\n", "smiles"),
        ("noname", "id,smiles\none,CC\n", "csv"),
        ("noname", '"id";"smiles"\none;CC\n', "csv"),
        ("noname", "InChI=1S/CH4/h1H4\nInChI=1S/CH4/h1H4\n", "smiles"),
        ("noname.gz", MOL_BLOCK, "sdf"),
    ],
)
def test_format(tmp_path: Path, name: str, content: str, expected: str) -> None:
    assert found(write(tmp_path / name, content)) == expected


def test_columnar_files_are_told_by_their_first_bytes(tmp_path: Path) -> None:
    table = pa.table({"smiles": ["C", "CC"]})
    for name in ("a.parquet", "a.smi", "noname"):
        pq.write_table(table, tmp_path / name)
        assert found(tmp_path / name) == "parquet"
    for name, create in (("b.arrow", pa.ipc.new_stream), ("b.feather", pa.ipc.new_file), ("noname", pa.ipc.new_file)):
        with create(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
        assert found(tmp_path / name) == "arrow"
        assert read(tmp_path / name) == [("C", "0"), ("CC", "1")]


def test_a_name_overrides(tmp_path: Path) -> None:
    path = write(tmp_path / "data.bin.gz", "1 C\nCC 2\n")
    assert read(path, format="smiles") == [("1", "C"), ("CC", "2")]
    assert read(path, format="id-smiles") == [("C", "1"), ("2", "CC")]
    assert read(write(tmp_path / "a.txt", "id,smiles\none,CC\n"), format="csv") == [("CC", "one")]
    with pytest.raises(UsageError, match=f"^format 'smi': unknown; expected one of {', '.join(FORMATS)}$"):
        resolve_sources([str(path)], format="smi")


def tar_of(form: int) -> bytes:
    with io.BytesIO() as content:
        with tarfile.open(fileobj=content, mode="w", format=form) as archive:
            for name in ("a.smi", "b.smi"):
                member = tarfile.TarInfo(name)
                member.size = len(b"CCO one\n")
                archive.addfile(member, io.BytesIO(b"CCO one\n"))
        return content.getvalue()


def zip_of(names: list[str]) -> bytes:
    with io.BytesIO() as content:
        with zipfile.ZipFile(content, "w") as archive:
            for name in names:
                archive.writestr(name, "CCO one\n")
        return content.getvalue()


@pytest.mark.parametrize("format", [None, "smiles"])
@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("zinc.tar.gz", tar_of(tarfile.USTAR_FORMAT), "tar"),
        ("zinc.tar", tar_of(tarfile.GNU_FORMAT), "tar"),
        ("zinc.smi.gz", tar_of(tarfile.PAX_FORMAT), "tar"),
        ("zinc.smi.tgz", gzip.compress(tar_of(tarfile.GNU_FORMAT)), "tar"),
        ("zinc.smi", zip_of(["a.smi"]), "zip"),
        ("table.csv", zip_of(["xl/workbook.xml"]), "zip"),
        ("noname", zip_of([]), "zip"),
    ],
)
def test_an_archive_is_refused(tmp_path: Path, name: str, content: bytes, kind: str, format: str | None) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UsageError, match=rf"^{path}: a {kind} archive; unpack it and name the files in it"):
        resolve_sources([str(path)], format)


def test_a_text_with_the_mark_of_an_archive_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.smi", f"{'C' * 256} ustar  00\nCC PK\x03\x04\n")
    assert [name for _, name in read(path)] == ["ustar", "PK\x03\x04"]


@pytest.mark.parametrize("content", ["", "Dear reader,\nthis is no molecule.\n", bytes(range(256)) * 300])
def test_unknown_content(tmp_path: Path, content: str | bytes) -> None:
    path = write(tmp_path / "a.xyz", content)
    with pytest.raises(UsageError, match=rf"^{path}: unknown file type; name its format with --format \(smiles, id-"):
        resolve_sources([str(path)])
