"""Records of SDF against RDKit's reader, and every way in which one can be broken."""

import os
import tracemalloc
from pathlib import Path

import pytest
from rdkit import Chem, RDConfig, rdBase
from rdkit.Chem import AllChem

from data_pipeline.errors import UsageError
from data_pipeline.molecules.encode import encode_rows
from data_pipeline.sources import lines, sdf
from data_pipeline.sources.sdf import open_sdf, read_sdf_table
from tests.unit.data_pipeline.reading import check, read, write

NCI = Path(RDConfig.RDDataDir) / "NCI" / "first_200.props.sdf"
SMILES = ["C[C@H](N)C(=O)O", "c1ccccc1O", "C/C=C/C", "[Na+].[Cl-]", "CC(C)C[C@@H](O)CN"]
BLOCK = Chem.MolToMolBlock(Chem.MolFromSmiles("CCO"))


def written(path: Path, v3000: bool) -> list[Chem.Mol]:
    """Molecules with 3D coordinates and properties, in the SDF `path`."""
    molecules = []
    with Chem.SDWriter(str(path)) as writer:
        writer.SetForceV3000(v3000)
        for number, smiles in enumerate(SMILES):
            molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
            AllChem.EmbedMolecule(molecule, randomSeed=1)
            molecule.SetProp("_Name", f"title {number}")
            molecule.SetProp("code", f"x{number}")
            molecule.SetProp("note", "$5 > 3\nsecond line")
            molecules.append(molecule)
            writer.write(molecule)
    return molecules


def smiles_of(mol_block: str) -> str:
    return Chem.MolToSmiles(Chem.MolFromMolBlock(mol_block))


@pytest.mark.parametrize("v3000", [False, True])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("extension", [".sdf", ".sd", ".sdf.gz"])
def test_records_are_those_of_rdkit(tmp_path: Path, v3000: bool, line_end: bytes, extension: str) -> None:
    molecules = written(tmp_path / "rdkit.sdf", v3000)
    content = (tmp_path / "rdkit.sdf").read_bytes().replace(b"\n", line_end)
    path = write(tmp_path / f"a{extension}", content)
    rows = read(path)
    assert [record_id for _, record_id in rows] == [molecule.GetProp("_Name") for molecule in molecules]
    assert [smiles_of(text) for text, _ in rows] == [
        Chem.MolToSmiles(Chem.RemoveHs(molecule)) for molecule in molecules
    ]
    assert all(text.endswith("M  END\n") and "\r" not in text for text, _ in rows)
    assert [record_id for _, record_id in read(path, id_column="code")] == [f"x{number}" for number in range(5)]


@pytest.mark.parametrize("block", [5, 17, 1000, 1 << 20])
def test_it_does_not_matter_where_blocks_end(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(lines, "_BLOCK_BYTES", block)
    with rdBase.BlockLogs():
        molecules = list(Chem.SDMolSupplier(str(NCI), sanitize=False))[: 200 if block > 100 else 20]
    with open_sdf(str(NCI), None, "AMW") as records:
        rows = list(records)
    assert len(rows) == NCI.read_bytes().count(b"$$$$") == 200
    for molecule, (text, weight) in zip(molecules, rows, strict=False):
        assert Chem.MolToSmiles(molecule) == Chem.MolToSmiles(Chem.MolFromMolBlock(text, sanitize=False))
        assert molecule.GetProp("AMW") == weight


@pytest.mark.parametrize(
    ("properties", "record_id"),
    [
        ("> <PUBCHEM_COMPOUND_CID>\n702\n\n> <PUBCHEM_IUPAC_NAME>\nethanol\n\n", "702"),
        ("> <note>\nx\n\n>  <chembl_id>\nCHEMBL545\n\n", "CHEMBL545"),
        ("> 25 <zinc_id> (ZINC1)\n ZINC01 \n\n", "ZINC01"),
        ("> <note>\nx\n\n", "the title"),
        ("> <chembl_id>\n\n", "0"),
        ("", "the title"),
    ],
)
def test_ids(tmp_path: Path, properties: str, record_id: str) -> None:
    block = BLOCK.replace("\n", "the title\n", 1)
    ((text, found),) = read(write(tmp_path / "a.sdf", f"{block}{properties}$$$$\n"))
    assert (text, found) == (block, record_id)


def test_a_header_that_is_not_utf8_costs_no_molecule(tmp_path: Path) -> None:
    """Neither its text nor its dimension, which decides what its stereo follows from; a bad atom line is rejected."""
    molecule = Chem.AddHs(Chem.MolFromSmiles("C[C@H](N)C(=O)O"))
    AllChem.EmbedMolecule(molecule, randomSeed=1)
    _, program, _, rest = Chem.MolToMolBlock(molecule).split("\n", 3)
    assert program.endswith("3D")
    program = program.replace("RDKit", "M\xf6l\xe9 ")
    block = f"L\xf6we\n{program}\nB\xe4r\n{rest}"
    broken = block.replace(" C ", " \xc4 ", 1)
    path = write(tmp_path / "a.sdf", f"{block}$$$$\n{broken}$$$$\n".encode("latin-1"))
    (text, record_id), (other, _) = read(path)
    encoded = encode_rows([text, other], ["", ""], standardize=False)
    assert record_id == "L\\udcf6we"
    assert encoded.batch.column("smiles").to_pylist() == [Chem.MolToSmiles(Chem.RemoveHs(molecule))]
    assert [reject.reason for reject in encoded.rejects] == ["not_utf8"]


def test_a_record_without_the_property_gets_its_row_number(tmp_path: Path) -> None:
    content = f"{BLOCK}> <code>\nx\n\n$$$$\n" + f"title\n{BLOCK[1:]}$$$$\n"
    assert [record_id for _, record_id in read(write(tmp_path / "a.sdf", content), id_column="code")] == ["x", "1"]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("", []),
        ("\n", []),
        (f"{BLOCK}$$$$\n", [BLOCK]),
        (f"{BLOCK}$$$$", [BLOCK]),
        (BLOCK, [BLOCK]),
        (BLOCK.rstrip("\n"), [BLOCK]),
        (f"{BLOCK}$$$$\n\n\n", [BLOCK]),
        (f"{BLOCK}$$$$  \n{BLOCK}$$$$\n", [BLOCK, BLOCK]),
        ("$$$$\n$$$$\n", ["", ""]),
        (f"{BLOCK}$$$$\n\n$$$$\n{BLOCK}$$$$\n", [BLOCK, "", BLOCK]),
        (f"{BLOCK}$$$$\n{BLOCK[:60]}", [BLOCK, BLOCK[:60] + "\n"]),
        (f"{BLOCK[:60]}\n> <code>\nx\n\n$$$$\n{BLOCK}$$$$\n", [f"{BLOCK[:60]}\n", BLOCK]),
        ("CC\n$$$$\n", ["CC\n"]),
        (f"{BLOCK}> <price>\nmany $$$$\n\n$$$$\n", [BLOCK]),
    ],
)
def test_every_record_is_a_row(tmp_path: Path, content: str, texts: list[str]) -> None:
    for line_end in ("\n", "\r\n", "\r"):
        path = write(tmp_path / "a.sdf", content.replace("\n", line_end))
        assert [text for text, _ in read(path)] == texts


@pytest.mark.parametrize("block", [16, 4096])
def test_a_huge_record_is_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, block: int) -> None:
    monkeypatch.setattr(lines, "_BLOCK_BYTES", block)
    monkeypatch.setattr(sdf, "MAX_RECORD_LENGTH", 2000)
    for length in range(4000, 4016):  # so that the delimiter lies across each place where a block may end
        content = f"{BLOCK}$$$$\nhuge\n{'x' * length}\n$$$$\n{BLOCK}$$$$\n"
        first, (huge, title), last = read(write(tmp_path / "a.sdf", content))
        assert (first[0], title, len(huge), last[0]) == (BLOCK, "huge", 2001, BLOCK)


def test_memory_is_bounded(tmp_path: Path) -> None:
    path = write(tmp_path / "a.sdf.gz", b"x" * (60 << 20))
    tracemalloc.start()
    rows = read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 1
    assert peak < 40 << 20


def test_wrong_columns(tmp_path: Path) -> None:
    written(tmp_path / "a.sdf", v3000=False)
    with pytest.raises(UsageError, match=r"a\.sdf: no property 'cid'; the first records have 'code', 'note'$"):
        check(tmp_path / "a.sdf", id_column="cid")
    with pytest.raises(UsageError, match="no column 's': structures of an SDF come from its mol blocks"):
        check(tmp_path / "a.sdf", smiles_column="s")
    check(tmp_path / "a.sdf", id_column="note")
    check(write(tmp_path / "empty.sdf", ""), id_column="code")


def test_utf16(tmp_path: Path) -> None:
    (tmp_path / "a.sdf").write_bytes(BLOCK.encode("utf-16"))
    with pytest.raises(Exception, match="UTF-16, not UTF-8") as caught:
        read(tmp_path / "a.sdf")
    assert str(tmp_path) + os.sep in str(caught.value)


def with_properties(path: Path) -> Path:
    """An SDF whose records have different properties."""
    values = [
        {"active": "1", "IC50 (nM)": ">10"},
        {"IC50 (nM)": "3.5", "note": "one\ntwo"},
        {},
        {"active": "", "pH": "-1e-3", "chembl_id": "CHEMBL5"},
    ]
    with Chem.SDWriter(str(path)) as writer:
        for number, properties in enumerate(values):
            molecule = Chem.MolFromSmiles(SMILES[number])
            molecule.SetProp("_Name", f"title{number}")
            for name, value in properties.items():
                molecule.SetProp(name, value)
            writer.write(molecule)
    return path


@pytest.mark.parametrize("real", [False, True])
def test_as_a_table_it_has_what_rdkit_reads(tmp_path: Path, real: bool) -> None:
    path = NCI if real else with_properties(tmp_path / "a.sdf")
    table = read_sdf_table(str(path))
    molecules = list(Chem.SDMolSupplier(str(path)))
    assert table.header == list(dict.fromkeys(name for molecule in molecules for name in molecule.GetPropNames()))
    assert len(molecules) == len(table.structures) == len(table.ids) == len(table.rows)
    for molecule, block, record_id, row in zip(molecules, table.structures, table.ids, table.rows, strict=True):
        assert smiles_of(block) == Chem.MolToSmiles(molecule)
        assert record_id == molecule.GetProp("chembl_id" if molecule.HasProp("chembl_id") else "_Name")
        for name, cell in zip(table.header, row, strict=True):
            assert cell == (molecule.GetProp(name).partition("\n")[0] if molecule.HasProp(name) else "")


@pytest.mark.parametrize("line", [">  <IC50 > 5>", ">  <b<c>", "> <d<e>f>", ">  <pIC50 (>6)>", "> 2 <x> (7)", "><y>"])
def test_names_of_properties_are_those_of_rdkit(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "a.sdf", f"{BLOCK}{line}\n>5 <10\n\n> <last>\n3\n\n$$$$\n")
    (molecule,) = Chem.SDMolSupplier(str(path))
    table = read_sdf_table(str(path))
    assert dict(zip(table.header, table.rows[0], strict=True)) == molecule.GetPropsAsDict(False, False) | {"last": "3"}


def test_properties_that_are_not_written_as_they_should_be(tmp_path: Path) -> None:
    records = [
        f"{BLOCK}>  <a>\n>  <b> (7)\n2\n\n> 3 <a>\n9\n\n",  # no empty line after an empty value; the name again
        f"{BLOCK}>  <b>\r\n 5 \r\n",  # no empty line at all
        f"{BLOCK}>  <b>\n6\n\n>  <b>\n6\n\n>  <b>\n\n\n",
        "\n\nno mol block\n>  <a>\n4\n",
    ]
    table = read_sdf_table(str(write(tmp_path / "a.sdf", "$$$$\n".join(records))))
    assert table.header == ["a", "b"]
    assert table.rows == [["9", "2"], ["", "5"], ["", "6"], ["4", ""]]
    assert [Chem.MolFromMolBlock(text) is not None for text in table.structures] == [True, True, True, False]


def test_a_property_with_two_values_is_there_twice(tmp_path: Path) -> None:
    """So that asking for it is an error, as for a CSV file with two columns of one name."""
    content = f"{BLOCK}>  <a>\n1\n\n>  <a>\n2\n\n$$$$\n{BLOCK}>  <a>\n3\n\n"
    table = read_sdf_table(str(write(tmp_path / "a.sdf", content)))
    assert (table.header, table.rows) == (["a", "a"], [["1", "2"], ["3", ""]])


def test_no_table_without_properties_or_with_half_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content, records in (("", 0), (f"{BLOCK}$$$$\n{BLOCK}", 2), ("smiles,y\nCC,1\n", 1)):
        with pytest.raises(UsageError, match=f"none of its {records} records has a property"):
            read_sdf_table(str(write(tmp_path / "a.sdf", content)))
    monkeypatch.setattr(sdf, "MAX_RECORD_LENGTH", 2000)
    content = f"{BLOCK}>  <a>\n1\n\n$$$$\n{BLOCK}>  <long>\n{'x' * 2000}\n\n>  <a>\n12345\n\n"
    with pytest.raises(UsageError, match="record 2 is longer than"):
        read_sdf_table(str(write(tmp_path / "a.sdf", content)))


@pytest.mark.parametrize("between", ["", ">  <a>\n1\n\n", ">  <a>\r\n1\r\n\r\n"])
@pytest.mark.parametrize("v3000", [False, True])
def test_two_molecules_in_a_record_are_none(tmp_path: Path, between: str, v3000: bool) -> None:
    """The line between them is missing: whose are the properties? A mol block as a value is no second molecule."""
    other = Chem.MolToMolBlock(Chem.MolFromSmiles("CCN"), forceV3000=v3000)
    content = f"{BLOCK}{between}{other}>  <a>\n2\n\n$$$$\n{BLOCK}>  <drawn>\n{other}\n>  <a>\n3\n\n$$$$\n"
    path = write(tmp_path / "a.sdf", content)
    rows = read(path)
    assert [Chem.MolFromMolBlock(text) is not None for text, _ in rows] == [False, True]
    assert rows[1][0] == BLOCK
    assert [text for text, _ in rows] == read_sdf_table(str(path)).structures
