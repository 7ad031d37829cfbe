"""Tables of users: what is refused and how, and what is kept of the rest."""

import numpy as np
import pytest

from data_pipeline.errors import PipelineError, UsageError
from hmoe_ds.data.table import Table
from hmoe_ds.downstream.labelled_table import read_labelled_table

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
        ("what,y\nC,1\n", "y", "classification", "no SMILES column among 'what', 'y': name it with --smiles-column"),
        ("smiles,y\nC,1\nCC,high\n", "y", "regression", "the label 'high' in row 2 of column 'y': expected a number"),
        ("smiles,y\nC,1\nCC,inf\n", "y", "regression", "the label 'inf' in row 2"),
        ("smiles,y\nC,1\nCC,2\n", "y", "classification", "label 2 in row 2 of column 'y': .*--task regression"),
        ("smiles,y\nC,1\nCC,1\n", "y", "classification", "only the label 1 in column 'y', over 2 .*both classes"),
        ("smiles,y\nC,3\nCC,3\n", "y", "regression", "only the label 3 in column 'y', .*a quantity that varies"),
        ("smiles,y\nC,\nCC,nan\n", "y", "classification", "has no molecule with a label in 'y'"),
        ("smiles,y\nnonsense,1\n", "y", "classification", "has no molecule with a label in 'y'"),
        ("smiles,y\nC,1,5\nCC,0,3\n", "y", "regression", "has 3 cells in row 1, and 2 columns: .*decimal point"),
        ("smiles,y\nC,1_0\nCC,0\n", "y", "regression", "the label '1_0' in row 1"),
        ("smiles,y\nC,1e200\nCC,-1e200\n", "y", "regression", r"labels up to 1e\+200 in column 'y': scale them down"),
        ("smiles,y,y\nC,1,0\n", "y", "classification", "has more than one column 'y'"),
        ("", "y", "classification", "has no SMILES column"),
    ],
)
def test_a_table_that_cannot_be_learned_from_is_refused(text, target, task, message, tmp_path):
    with pytest.raises(UsageError, match=message) as error:
        read_labelled_table(write(tmp_path / "t.csv", text), [target], task)
    assert "\n" not in str(error.value)


def test_an_open_quote_swallows_no_rows(tmp_path):
    with pytest.raises(PipelineError, match="cannot be read as a table"):
        Table.read(write(tmp_path / "t.csv", 'smiles,y\n"CCO,1\nCCN,0\nCCC,1\n'))


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
