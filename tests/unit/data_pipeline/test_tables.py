"""Each text table, and each way a file can be broken."""

import csv
import gzip
from pathlib import Path

import pytest

from data_pipeline.errors import PipelineError, UsageError
from tests.unit.data_pipeline.conftest import COLLECTIONS
from tests.unit.data_pipeline.reading import check, read, write


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
        ("a.tsv", "smiles,id\nCC,one\n", [("CC", "one")]),
        ("a.tsv", "name, in full, and long\tsmiles\none\tCC\n", [("CC", "0")]),
        ("a.tsv", "smiles\nCC\n", [("CC", "0")]),
        ("a.csv", "smiles\tid\nCC\tone\n", [("CC", "one")]),
        ("a.csv", "sep=;\r\nid;smiles\r\n1,5;CC\r\n", [("CC", "1,5")]),
        ("a.csv", '"sep=\t"\nid\tsmiles\none\tCC\n', [("CC", "one")]),
        ("a.csv", "mol,smiles\nA-17,CC\n", [("CC", "0")]),
        ("a.TSV.GZ".lower(), "smiles\tid\nCC\tone\n", [("CC", "one")]),
        ("a.smi.zst", "CC one\n", [("CC", "one")]),
        ("a.csv.bz2", "smiles\nCC\n", [("CC", "0")]),
        ("a.txt", "smiles\tzinc_id\nCC\tZINC1\n", [("CC", "ZINC1")]),
        ("a.txt", "chembl_id\tcanonical_smiles\tstandard_inchi\nCHEMBL1\tCC\tInChI=\n", [("CC", "CHEMBL1")]),
        ("a.txt", "chembl_id\tcanonical_smiles\nCHEMBL1\t\nCHEMBL2\tC\n", [("", "CHEMBL1"), ("C", "CHEMBL2")]),
        ("a.smi", "id smiles\none CC\n", [("CC", "one")]),
        ("a.smi", "CC id\nC smiles\n", [("CC", "id"), ("C", "smiles")]),
        ("a.smi", "CC same\nCCC same\n", [("CC", "same"), ("CCC", "same")]),
        ("a.smi", "CC one\nInChI=1S/CH4/h1H4 two\n", [("CC", "one"), ("InChI=1S/CH4/h1H4", "two")]),
        ("CID-SMILES.gz", "1\tCC(=O)OC\n2\tCC(=O)O\n3\t\n", [("CC(=O)OC", "1"), ("CC(=O)O", "2"), ("", "3")]),
        ("a.smi", "ZINC01 CC\nZINC02 C\n", [("CC", "ZINC01"), ("C", "ZINC02")]),
        (
            "a.cxsmiles",
            "smiles\tidnumber\tMW\nC[C@H](N)O |&1:1|\tZ1\t9.1\nCC\tZ2\t\n",
            [("C[C@H](N)O", "Z1"), ("CC", "Z2")],
        ),
        ("a.cxsmiles", "smiles\tMW\tid\nCC |(0,0;1,1)|\t9.1\tZ 1\n", [("CC", "Z 1")]),
        ("a.smi", "C[C@H](N)O |&1:1| ID\nCC |$a b;c$|\tI2\nC |r|\n", [("C[C@H](N)O", "ID"), ("CC", "I2"), ("C", "2")]),
        ("a.smi", "CC |name|\nCC\t|x y|\nC |one| |o1:1|\n", [("CC", "|name|"), ("CC", "|x"), ("C", "|one|")]),
        ("a.txt", "smiles\tcxext\tid\nCC\t|o1:1|\tZ1\nC |r|\t\tZ2\n", [("CC", "Z1"), ("C", "Z2")]),
        ("a.txt", "id\tcxext\tsmiles\nZ1\t|o1:1|\tCC\nZ2\t\tC |&1:0|\n", [("CC", "Z1"), ("C", "Z2")]),
        ("a.txt", "smiles\tid\nCC\t|$1$|\n", [("CC", "|$1$|")]),
        ("a.smi", "CC one|two|\nC |open\n", [("CC", "one|two|"), ("C", "|open")]),
        ("a.csv", "smiles,id\nCC |&1:0|,one\n", [("CC", "one")]),
        ("a.csv", '"ChEMBL ID";"Smiles"\n"CHEMBL1";"CC"\n', [("CC", "CHEMBL1")]),
        ("a.csv", "name,InChI\none,InChI=1S/CH4/h1H4\n", [("InChI=1S/CH4/h1H4", "one")]),
        ("a.csv", 'id,molblock\none,"\n  RDKit\n\nM  END\n"\n', [("\n  RDKit\n\nM  END\n", "one")]),
        ("a.csv", 'smiles,id\n"CC\n",one\n', [("CC", "one")]),
        ("a.csv", "cid,inchi,canonicalsmiles,isosmiles\n1,InChI=,CC(N)O,C[C@H](N)O\n", [("C[C@H](N)O", "1")]),
        ("a.csv", "CID,CanonicalSMILES,IsomericSMILES\n1,CC(N)O,C[C@H](N)O\n", [("C[C@H](N)O", "1")]),
        ("a.csv", "cid,canonicalsmiles\n1,CC\n", [("CC", "1")]),
        ("a.csv", "smiles,notes\tfree\nCC,one\n", [("CC", "0")]),
        ("a.csv", "inchi,smiles\nInChI=1S/CH4/h1H4,C\n", [("C", "0")]),
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
        ("a.txt", "id,smiles\none,CC\n", {}, "header of a csv file; name that format with --format csv"),
        ("a.txt", "code;structure\none;CC\n", {"smiles_column": "structure"}, "with --format csv"),
        ("a.csv", "smiles,id,smiles\nCC,one,C\n", {}, "more than one column 'smiles': rename one of them"),
        ("a.csv", "id,smiles,id\none,C,1\n", {"id_column": "id"}, "more than one column 'id'"),
        ("a.smi", "CC one\n", {"smiles_column": "s"}, "no column 's': the file has no header line"),
        ("a.smi", "smiles id\nCC one\n", {"smiles_column": "s"}, "no column 's'; the file's columns are"),
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
    ((text, _),) = read(write(tmp_path / "a.smi", huge))
    assert len(text) == 1 << 20
    rows = read(write(tmp_path / "a.csv", f'smiles,note\nCC,"{huge}"\n{huge},x\nC,y\n'))
    assert [text[:3] for text, _ in rows] == ["CC", "CCC", "C"]


def test_a_line_of_blanks_is_read_at_once(tmp_path: Path) -> None:
    """In time that grows with its length, not with the square of it: this would take an hour."""
    blanks = " " * 1_000_000
    assert read(write(tmp_path / "a.smi", f"CC{blanks}|{blanks}\nC\n")) == [("CC", "|"), ("C", "1")]
    for text in (":" * 1_000_000, " |:" * 300_000):
        assert read(write(tmp_path / "a.smi", f"CC |{text}\n"))[0][0] == "CC"


@pytest.mark.parametrize(
    ("file", "delimiter"), [("zinc.smi.gz", " "), ("chembl.tsv.gz", "\t"), ("enamine50k.csv.gz", ",")]
)
def test_real_files_are_read_as_the_csv_module_does(file: str, delimiter: str) -> None:
    if not COLLECTIONS.is_dir():
        pytest.skip(f"no molecule collections at {COLLECTIONS}")
    with gzip.open(COLLECTIONS / file, "rt", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter=delimiter))
    expected = [(row["smiles"], row.get("zinc_row") or str(number)) for number, row in enumerate(rows)]
    assert read(COLLECTIONS / file) == expected
