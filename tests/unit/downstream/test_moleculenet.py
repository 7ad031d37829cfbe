"""Which files are sets of MoleculeNet, and what of them is read."""

import gzip

import pytest

from data_pipeline.errors import UsageError
from hmoe_ds.downstream.moleculenet import files_of_sets, read_set
from tests.labelled_tables import molecules_of


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("esol.csv", "esol"),
        ("delaney-processed.csv", "esol"),
        ("SAMPL.csv", "freesolv"),
        ("Lipophilicity.csv", "lipo"),
        ("BBBP.csv", "bbbp"),
        ("toxcast_data.csv.gz", "toxcast"),
        ("HIV.CSV", "hiv"),
    ],
)
def test_names_of_files(file, name, tmp_path):
    for each in (file, "notes.csv", "esol.txt", "esol.csv.bak"):
        (tmp_path / each).touch()
    (tmp_path / "bace.csv").mkdir()
    assert files_of_sets(tmp_path) == {name: tmp_path / file}


def test_a_folder_without_sets_or_with_two_of_one(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UsageError, match=r"has none of the files bbbp\.csv, "):
            files_of_sets(folder)
    for each in ("esol.csv", "bbbp.csv", "delaney-processed.csv"):
        (tmp_path / each).touch()
    with pytest.raises(UsageError, match=r"has delaney-processed\.csv and esol\.csv, both of esol: leave one there"):
        files_of_sets(tmp_path)
    assert files_of_sets(tmp_path, ["BBBP"]) == {"bbbp": tmp_path / "bbbp.csv"}
    with pytest.raises(UsageError, match=r"--sets bace: .* has bbbp, esol"):
        files_of_sets(tmp_path, ["bace", "bbbp"])


@pytest.mark.parametrize(
    ("name", "file", "header", "label"),
    [
        (
            "esol",
            "delaney-processed.csv",
            "Compound ID,ESOL predicted log solubility in mols per litre,Minimum Degree,Molecular Weight,"
            "Number of H-Bond Donors,Number of Rings,Number of Rotatable Bonds,Polar Surface Area,"
            "measured log solubility in mols per litre,smiles",
            8,
        ),
        ("freesolv", "SAMPL.csv", "iupac,smiles,expt,calc", 2),
        ("lipo", "Lipophilicity.csv", "CMPD_CHEMBLID,exp,smiles", 1),
        ("bbbp", "BBBP.csv", "num,name,p_np,smiles", 2),
        ("hiv", "HIV.csv", "smiles,activity,HIV_active", 2),
        ("tox21", "tox21.csv.gz", "NR-AR,mol_id,smiles", 0),
    ],
)
def test_files_as_moleculenet_has_them(name, file, header, label, tmp_path):
    """Columns beside the labels are left alone, numbers among them."""
    columns = header.split(",")
    rows, labels = [], {}
    for number, text in enumerate(molecules_of(0, 40)):
        cells = [f"{number}.5" for _ in columns]
        cells[columns.index("smiles")] = text
        cells[label] = str(number // 2 % 2)
        labels[text] = number // 2 % 2
        rows.append(",".join(cells))
    content = "\n".join([header, *rows]) + "\n"
    path = tmp_path / file
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    found = read_set(name, files_of_sets(tmp_path)[name], standardize=True)
    assert found.targets == [columns[label]]
    assert len(found.smiles) > 30
    assert found.label_nT[:, 0].tolist() == [labels[text] for text in found.smiles]
