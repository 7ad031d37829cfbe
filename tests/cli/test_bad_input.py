"""What people feed `hmoe prepare`: each ends in rejects with a reason or in one clear line, and no good row is lost."""

import gzip
import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from hmoe_ds.cli import main

GOOD = ["CCO", "c1ccccc1C(=O)O", "CC(=O)Nc1ccc(O)cc1"]
INCHI = "InChI=1S/C6H6/c1-2-4-6-5-3-1/h1-6H"
PEPTIDE = "N[C@@H](C)C(=O)" * 500 + "O"


def good(*more: str) -> bytes:
    return "".join(f"{smiles} id{n}\n" for n, smiles in enumerate([*GOOD, *more])).encode()


# name, content, molecules written (with GOOD), reasons of rejects
READABLE = {
    "crlf": ("a.smi", good().replace(b"\n", b"\r\n"), 3, []),
    "duplicate ids": ("a.smi", b"CCO x\nCCN x\nCCC x\n", 3, []),
    "a 10 MB line": ("a.smi", good() + b"C" * 10_000_000 + b"\nCCN z\n", 4, ["too_large"]),
    "a 10 MB line without end": ("a.smi", good() + b"N" * 10_000_000, 3, ["too_large"]),
    "smiles and inchi": ("a.smi", good(INCHI), 4, []),
    "salts": ("a.smi", good("CC(=O)[O-].[Na+]", "[Na+].[Cl-]"), 5, []),
    "isotopes": ("a.smi", good("[2H]C([2H])([2H])O", "[13CH3]C"), 5, []),
    "radicals": ("a.smi", good("C[CH2]", "[O]N=O"), 5, []),
    "metals": ("a.smi", good("C[Hg]C", "[Fe+2]", "Cl[Pt](Cl)(N)N"), 6, []),
    "polymers": ("a.smi", good("*CC*", "[*]c1ccccc1"), 5, []),
    "a peptide of 2,500 atoms": ("a.smi", good(PEPTIDE), 3, ["too_large"]),
    "invalid valence": ("a.smi", good("CN(C)(C)(C)C", "C(C)(C)(C)(C)C"), 3, ["valence", "valence"]),
    "two words": ("a.csv", b'smiles,id\n"C C",1\nCCO,2\n', 1, ["whitespace"]),
    "empty lines": ("a.smi", b"\n\n" + good() + b"\n", 3, ["empty"] * 3),
    "bytes": ("a.smi", good() + b"\xff\xfe\x80 x\n", 3, ["not_utf8"]),
    "html": ("a.smi", good() + b"<html><body>404 Not Found</body></html>\n", 3, ["syntax"]),
}
UNREADABLE = {
    "empty": ("a.smi", b"", 1, "no molecule among 0 rows"),
    "header only": ("a.csv", b"smiles,id\n", 1, "no molecule among 0 rows"),
    "binary": ("a.smi", bytes(range(256)) * 50, 1, "no molecule among"),
    "utf-16": ("a.smi", "CCO one\n".encode("utf-16"), 1, "UTF-16"),
    "no column": ("a.csv", b"x,y\n1,2\n", 2, "no SMILES column among"),
    "truncated": ("a.smi.gz", gzip.compress(os.urandom(9000))[:-200], 1, "truncated"),
    "not gzip": ("a.smi.gz", b"CCO\n", 1, "not a readable gzip file"),
    "unknown type": ("a.docx", b"Dear reader", 2, "unknown file type"),
    "archive": ("a.smi", b"PK\x03\x04garbage", 2, "a zip archive; unpack it"),
}


def prepare(path: Path, out: Path) -> int:
    return main(["prepare", str(path), "--out", str(out), "--workers", "1", "--json"])


@pytest.mark.parametrize("case", READABLE)
def test_good_rows_are_kept_and_bad_ones_have_a_reason(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    name, content, molecules, reasons = READABLE[case]
    (tmp_path / name).write_bytes(content)
    assert prepare(tmp_path / name, tmp_path / "out") == 0
    counts = json.loads(capsys.readouterr().out.splitlines()[-1])["counts"]
    assert sum(counts["written"].values()) == molecules
    assert counts["read"] == molecules + counts["duplicates"] + counts["excluded"] + sum(counts["rejected"].values())
    rejects = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert sorted(reject["reason"] for reject in rejects) == sorted(reasons)


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_one_clear_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    name, content, exit_code, message = UNREADABLE[case]
    (tmp_path / name).write_bytes(content)
    assert prepare(tmp_path / name, tmp_path / "out") == exit_code
    errors = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert len(errors) == 1
    assert message in errors[0]
    assert name in errors[0]
    assert not (tmp_path / "out").exists()
