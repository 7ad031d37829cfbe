"""Tables of users: what is refused and how, and what is kept of the rest."""

import gzip
import math
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from rdkit import Chem

from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.molecules import encode_supervised
from data_pipeline.molecules.encode import encode_rows
from data_pipeline.sources.source import read_chunks, resolve_sources
from hmoe_ds.data.table import Table
from hmoe_ds.downstream.labelled_table import read_labelled_table
from hmoe_ds.downstream.moleculenet import read_set
from tests.endless import CAGE
from tests.labelled_tables import molecules_of

GOOD = "name,smiles,active,logp\na,CCO,1,-0.3\nb,c1ccccc1,0,2.1\nc,CCN,,0.1\nd,nonsense,1,3\ne,,0,1\nf,CCC,nan,\n"


def write(path, text):
    path.write_text(text)
    return str(path)


def test_rows_that_cannot_be_used_are_kept_with_the_reason(tmp_path):
    path = write(tmp_path / "t.csv", GOOD)
    found = read_labelled_table(path, ["active"], "classification")
    assert found.row_n.tolist() == [0, 1]
    assert found.label_nT.tolist() == [[1], [0]]
    assert found.canonical == ["CCO", "c1ccccc1"]
    assert set(found.reasons) == {2, 3, 4, 5}
    assert (found.reasons[2], found.reasons[5]) == ("no label", "no label")
    assert len(found.smiles) == 6


def test_a_row_with_one_of_two_labels_is_kept(tmp_path):
    found = read_labelled_table(write(tmp_path / "t.csv", GOOD), ["active", "logp"], "regression")
    assert found.row_n.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(found.label_nT, [[1, -0.3], [0, 2.1], [np.nan, 0.1]])


@pytest.mark.parametrize("form", ["t.tsv", "semicolons.csv", "quoted.csv", "marked.csv", "windows.csv"])
def test_forms_of_tables(form, tmp_path):
    text = "smiles,y\nCCO,1\nCCN,0\n"
    if form == "t.tsv":
        text = text.replace(",", "\t")
    elif form == "semicolons.csv":
        text = text.replace(",", ";")
    elif form == "quoted.csv":
        text = '"smiles","y","note, with comma"\n"CCO","1","two\nlines"\nCCN,0\n'
    elif form == "marked.csv":
        text = "\ufeff" + text
    elif form == "windows.csv":
        text = text.replace("\n", "\r\n")
    (tmp_path / form).write_bytes(text.encode())
    found = read_labelled_table(str(tmp_path / form), ["y"], "classification")
    assert found.label_nT.tolist() == [[1], [0]]


@pytest.mark.parametrize(
    ("text", "target", "task", "message"),
    [
        ("smiles,y\nC,1\n", "z", "classification", "has no column 'z': name one of its columns, 'smiles', 'y'"),
        ("what,y\nC,1\n", "y", "classification", "no SMILES column among 'what', 'y'; name it with --smiles-column"),
        ("smiles,y\nC,1\nCC,high\n", "y", "regression", "the label 'high' in row 2 of column 'y': expected a number"),
        ("smiles,y\nC,1\nCC,inf\n", "y", "regression", "the label 'inf' in row 2"),
        ("smiles,y\nC,1\nCC,2\n", "y", "classification", "label 2 in row 2 of column 'y': .*--task regression"),
        ("smiles,y\nC,1\nCC,1\n", "y", "classification", "only the label 1 in column 'y', over 2 .*both classes"),
        ("smiles,y\nC,3\nCC,3\n", "y", "regression", "only the label 3 in column 'y', .*a quantity that varies"),
        ("smiles,y\nC,\nCC,nan\n", "y", "classification", "has no molecule with a label in 'y'"),
        ("smiles,y\nnonsense,1\nC,\n", "y", "classification", "has no molecule with a label in 'y'"),
        (
            *("smiles,y\nnonsense,1\n,0\n", "y", "classification"),
            r"read \(1 syntax \(not a SMILES\), 1 empty \(no .*\)\): name the column .* with --smiles-column",
        ),
        ("smiles,y\nC,1\nCC,>10\n", "y", "regression", "'>10' in row 2 .* empty the cells that only bound a value"),
        ("smiles,y\nC,1\nCC,2.3%\n", "y", "regression", "'2.3%' in row 2 .* write percentages without their sign"),
        ("smiles;y\nC;1\nCC;2,5\n", "y", "regression", "'2,5' in row 2 .* with a decimal point"),
        ("smiles,y\nC,yes\nCC,no\n", "y", "classification", "'yes' in row 1 .* write 1 and 0 for the names of two"),
        ('smiles,"a, b",y\nC,1,2\n', "a", "regression", """one with a comma goes in double quotes: '"a, b"'"""),
        ("smiles,y\nC,1\nC,0\n", "y", "classification", "what to do with --conflicts keep or drop$"),
        ("smiles,y\nC,1\nC,0\n", "y", "regression", "what to do with --conflicts keep, drop or mean$"),
        ("smiles,y\nC,1,5\nCC,0,3\n", "y", "regression", "has 3 cells in row 1, and 2 columns: .*decimal point"),
        ("smiles,y\nC,1_0\nCC,0\n", "y", "regression", "the label '1_0' in row 1"),
        ("smiles,y\nC,1e200\nCC,-1e200\n", "y", "regression", r"labels up to 1e\+200 in column 'y': scale them down"),
        ("smiles,y,y\nC,1,0\n", "y", "classification", "has more than one column 'y'"),
        ("y,,z,\n1,,2,,\n", "y", "classification", "no SMILES column among 'y', '', 'z', ''"),
        ("smiles,y,,\nC,1,,\nCC,0,,,5\n", "y", "classification", "has 5 cells in row 2, and 4 columns"),
    ],
)
def test_a_table_that_cannot_be_learned_from_is_refused(text, target, task, message, tmp_path):
    with pytest.raises(UsageError, match=message) as error:
        read_labelled_table(write(tmp_path / "t.csv", text), [target], task)
    assert "\n" not in str(error.value)


def test_a_table_of_which_conflicts_leave_nothing(tmp_path):
    path = write(tmp_path / "t.csv", "smiles,y\nC,1\nC,0\nnonsense,1\n")
    with pytest.raises(UsageError, match="has no molecule left, as all with labels are in conflict: mend their labels"):
        read_labelled_table(path, ["y"], "classification", conflicts="drop")


def test_an_open_quote_swallows_no_rows(tmp_path):
    text = 'smiles,y,note\nCCO,1,"5 inch\nCCN,0,"5"-HT"\n"CCC,1,x\nCCCC,1,"a, b"\n'
    found = read_labelled_table(write(tmp_path / "t.csv", text), ["y"], "classification")
    assert found.row_n.tolist() == [0, 1, 3]
    assert found.label_nT[:, 0].tolist() == [1, 0, 1]
    assert found.smiles[2] == "CCC,1,x"
    assert found.reasons == {2: "syntax"}


BLOCK = "\n  RDKit\n\n  1  0  0  0  0  0  0  0  0  0999 V2000\n    0.0000    0.0000    0.0000 C   0  0\nM  END\n"


@pytest.mark.parametrize(
    "text",
    [
        f'smiles,id,y\n"{BLOCK}",a,1\n C[C@H](N)O |&1:1|,b,0\nCCO Z1,c,1\n InChI=1S/CH4/h1H4 ,d,1\n,e,0\n',
        'inchi,name,y\n"InChI=1S/CH4/h1H4",a,1\nCCN,b,0\n',
        'smiles;"a,b,c,d";y\nCCO;1;1\nCCN;0;0\n',
        "smiles,y,,\nCCO,1,,\nCCN,0,,\n",
        "smiles,note,note,y\nCCO,1,2,1\nCCN,3,4,0\n",
    ],
)
def test_molecules_are_those_of_other_commands(text, tmp_path):
    path = write(tmp_path / "t.csv", text)
    found = read_labelled_table(path, ["y"], "classification")
    (source,) = resolve_sources([path])
    (chunk,) = read_chunks(source)
    encoded = encode_rows(chunk.texts, chunk.ids)
    of_blocks = {row: "C" for row, text in enumerate(chunk.texts) if "\n" in text}
    assert found.smiles == [of_blocks.get(row, text) for row, text in enumerate(chunk.texts)]
    assert found.row_n.tolist() == encoded.kept.tolist()
    assert found.canonical == encoded.batch.column("smiles").to_pylist()
    assert found.reasons == {reject.index: reject.reason for reject in encoded.rejects}


@pytest.mark.parametrize("name", ["t.sdf", "t.sd", "t.sdf.gz", "without_extension"])
def test_an_sdf_is_read_as_by_other_commands(name, tmp_path):
    """Neither properties nor titles that look like structures or ids are taken for them."""
    records = [
        f"> <y>{Chem.MolToMolBlock(Chem.MolFromSmiles(smiles))}> <smiles>\nC\n\n> <id>\n7\n\n> <y>\n{y}\n\n"
        for smiles, y in (("CCO", 1), ("CN", 0))
    ]
    content = "$$$$\n".join([*records, "CCCC\n\n\n> <y>\n1\n\n"]).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    path = str(tmp_path / name)
    found = read_labelled_table(path, ["y"], "classification")
    (source,) = resolve_sources([path])
    (chunk,) = read_chunks(source)
    encoded = encode_rows(chunk.texts, chunk.ids)
    assert found.canonical == encoded.batch.column("smiles").to_pylist() == ["CCO", "CN"]
    assert found.reasons == {reject.index: reject.reason for reject in encoded.rejects} == {2: "molblock"}
    assert found.smiles == ["CCO", "CN", ""]
    assert found.label_nT[:, 0].tolist() == [1, 0]
    assert found.table.ids(None) == chunk.ids == ["> <y>", "> <y>", "CCCC"]
    assert found.table.ids("id") == ["7", "7", "2"]
    with pytest.raises(UsageError, match="structures of an SDF come from its mol blocks; leave --smiles-column out"):
        read_labelled_table(path, ["y"], "classification", smiles_column="smiles")


@pytest.mark.parametrize("text", ["", "\nsmiles,y\nCCO,1\n"])
def test_a_table_without_a_header_is_refused(text, tmp_path):
    with pytest.raises(PipelineError, match=r"t\.csv: the first line is empty; expected the names of the columns"):
        Table.read(write(tmp_path / "t.csv", text))


TYPED = {
    "smiles": pa.array(["CCO", None, "C1CC1", "CCN"], pa.large_string()),
    "active": [True, None, False, True],
    "logp": pa.array([0.1, 1.5, None, float("nan")], pa.float32()),
    "count": pa.array([3, None, 12345678901, 0], pa.int64()),
    "price": pa.array([None, "1.50", "2.25", "0.00"]).cast(pa.decimal128(6, 2)),
    "kind": pa.array(["1", "0", None, "1"]).dictionary_encode(),
    "vector": [[1.0], [2.0], None, []],
}


@pytest.mark.parametrize("form", ["parquet", "feather", "stream"])
def test_a_table_in_parquet_or_arrow_is_the_one_in_text(form, tmp_path):
    typed, path = pa.table(TYPED), tmp_path / f"t.{form}"
    if form == "parquet":
        pq.write_table(typed, path, row_group_size=3)
    elif form == "feather":
        pyarrow.feather.write_feather(typed, str(path))
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, typed.schema) as stream:
            stream.write_table(typed)
    table = Table.read(str(path))
    assert table.header == ["smiles", "active", "logp", "count", "price", "kind"]
    assert table.structures(None, "--smiles-column") == ["CCO", "", "C1CC1", "CCN"]
    nan = math.nan
    expected = {
        "active": [1, nan, 0, 1],
        "logp": [0.1, 1.5, nan, nan],
        "count": [3, nan, 12345678901, 0],
        "price": [nan, 1.5, 2.25, 0],
        "kind": [1, 0, nan, 1],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(table.labels(name), values, err_msg=name)
    with pytest.raises(UsageError, match="no column 'vector'"):
        table.labels("vector")
    typed.drop_columns("vector").to_pandas().to_csv(tmp_path / "t.csv", index=False)
    text = Table.read(str(tmp_path / "t.csv"))
    for name, values in expected.items():
        np.testing.assert_array_equal(text.labels(name), values, err_msg=name)


def test_an_archive_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "t.xlsx", "w") as file:
        file.writestr("sheet.xml", "<a/>")
    with pytest.raises(UsageError, match=r"t\.xlsx: a zip archive; .*a workbook: save it as CSV"):
        Table.read(str(tmp_path / "t.xlsx"))


def test_a_damaged_parquet_table_is_named(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"smiles": ["C"] * 1000, "y": range(1000)}), path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(PipelineError, match=r"t\.parquet: not a readable Parquet file"):
        Table.read(str(path))


CONFLICT = "smiles,y\nOCC,1\nCCN,0\nCCO,3\nCCC,5\nCCC,5\n"


def test_one_molecule_with_two_labels_is_refused_and_named(tmp_path):
    path = write(tmp_path / "t.csv", CONFLICT)
    with pytest.raises(UsageError, match=r"1 molecules with different labels .*'OCC' has 'y' 1 in row 1, 3 in row 3"):
        read_labelled_table(path, ["y"], "regression")


@pytest.mark.parametrize(
    ("conflicts", "labels"), [("keep", [1, 0, 3, 5, 5]), ("mean", [2, 0, 2, 5, 5]), ("drop", [0, 5, 5])]
)
def test_what_becomes_of_conflicts(conflicts, labels, tmp_path):
    found = read_labelled_table(write(tmp_path / "t.csv", CONFLICT), ["y"], "regression", conflicts=conflicts)
    assert found.label_nT[:, 0].tolist() == labels
    assert len(found.keys) == len(labels) == len(found.row_n)
    assert found.reasons == ({0: "conflicting labels", 2: "conflicting labels"} if conflicts == "drop" else {})


def test_an_empty_line_is_a_row(tmp_path):
    """So rows have the numbers that they have for other commands."""
    found = read_labelled_table(write(tmp_path / "t.csv", "smiles,y\nCCO,1\n\nCCN,0\n"), ["y"], "classification")
    assert found.row_n.tolist() == [0, 2]
    assert len(found.smiles) == 3
    assert found.reasons[1]


def test_salts_conflict_only_in_standard_form(tmp_path):
    path = write(tmp_path / "t.csv", "smiles,y\nCC(=O)O,1\nCC(=O)[O-].[Na+],0\n")
    with pytest.raises(UsageError, match="different labels"):
        read_labelled_table(path, ["y"], "classification")
    assert len(read_labelled_table(path, ["y"], "classification", standardize=False).row_n) == 2


def test_a_molecule_that_hangs_rdkit_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(encode_supervised, "DEFAULT_MOLECULE_SECONDS", 0.5)
    path = write(tmp_path / "esol.csv", f"smiles,logSolubility\nCCO,1\n{CAGE},2\nCCN,3\n")
    found = read_labelled_table(path, ["logSolubility"], "regression")
    assert found.row_n.tolist() == [0, 2]
    assert found.reasons == {1: "timeout"}
    rows = "".join(f"{text},{number}\n" for number, text in enumerate([CAGE, *molecules_of(0, 30)]))
    write(tmp_path / "esol.csv", f"smiles,logSolubility\n{rows}")
    found_set = read_set("esol", tmp_path / "esol.csv", standardize=True)
    assert found_set.unreadable == 1 + sum(Chem.MolFromSmiles(text) is None for text in molecules_of(0, 30))
    assert CAGE not in found_set.smiles
