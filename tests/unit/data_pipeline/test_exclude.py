"""Molecules of test sets are left out of a dataset, whatever their spelling."""

from pathlib import Path

import pyarrow as pa
import pytest
from rdkit import Chem, RDConfig

from data_pipeline.build import prepare
from data_pipeline.errors import UsageError
from data_pipeline.manifest import Manifest
from data_pipeline.options import PrepareOptions
from data_pipeline.schema import SPLITS
from data_pipeline.stages import stages

NCI = Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi"


def molecules(folder: Path) -> list[dict]:
    paths = [folder / shard.file for split in SPLITS for shard in Manifest.load(folder).splits[split].shards]
    return [row for path in paths for batch in pa.ipc.open_stream(path.read_bytes()) for row in batch.to_pylist()]


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return NCI.read_text().splitlines()[:400]


@pytest.fixture(scope="module")
def source(lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("source") / "a.smi"
    path.write_text("\n".join([*lines, *lines[:30]]) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def test_set(lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Every tenth molecule in another spelling and as a salt, twice; a molecule that is not there; and garbage."""
    mols = [Chem.MolFromSmiles(line.split()[0]) for line in lines[::10]]
    respelled = [Chem.MolToSmiles(mol, canonical=False, rootedAtAtom=mol.GetNumAtoms() - 1) for mol in mols if mol]
    rows = [*respelled, *respelled, *(f"{smiles}.[Na+].[Cl-]" for smiles in respelled), "C#CC#CC#CC#C", "C1CC", ""]
    path = tmp_path_factory.mktemp("test_set") / "test.csv"
    path.write_text("name,mol,label\n" + "".join(f"m{n},{smiles},1\n" for n, smiles in enumerate(rows)))
    return str(path)


def test_excluded_molecules_are_not_written(source: str, test_set: str, tmp_path: Path, monkeypatch) -> None:
    prepare([source], tmp_path / "all")
    # Partitions and chunks leave no trace here either.
    monkeypatch.setattr(stages, "PARTITION_ROWS", 50)
    monkeypatch.setattr(stages, "CHUNK_ROWS", (64, 64))
    manifest = prepare([source], tmp_path / "some", exclude=[test_set]).manifest
    (tmp_path / "tested.smi").write_text(
        "".join(row.split(",")[1] + "\n" for row in Path(test_set).read_text().splitlines())
    )
    prepare([str(tmp_path / "tested.smi")], tmp_path / "tested")
    tested = {row["mol_key"] for row in molecules(tmp_path / "tested")}
    before, after = ({row["mol_key"]: row for row in molecules(tmp_path / name)} for name in ("all", "some"))
    assert len(before.keys() & tested) >= 35
    assert after == {key: row for key, row in before.items() if key not in tested}
    assert manifest.counts.excluded == len(before.keys() & tested)
    assert manifest.counts.unaccounted == 0
    (record,) = manifest.exclusions
    assert (record.name, record.rows) == ("test.csv", len(Path(test_set).read_text().splitlines()) - 1)
    assert record.rejected >= 2


def test_a_dataset_with_other_exclusions_is_another_dataset(source: str, test_set: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare([source], out, exclude=[test_set])
    assert prepare([source], out, exclude=[test_set]).reused
    with pytest.raises(UsageError, match="other --exclude files"):
        prepare([source], out)


def test_an_append_must_exclude_the_same(source: str, test_set: str, lines: list[str], tmp_path: Path) -> None:
    (tmp_path / "more.smi").write_text("\n".join(NCI.read_text().splitlines()[380:500]) + "\n" + lines[0] + "\n")
    out, both = tmp_path / "out", tmp_path / "both"
    options = PrepareOptions(validation_fraction=0.2)
    prepare([source], out, options, exclude=[test_set])
    with pytest.raises(UsageError, match=r"other --exclude files \(test\.csv\); append to it with the same ones"):
        prepare([str(tmp_path / "more.smi")], out, options, append=True)
    appended = prepare([str(tmp_path / "more.smi")], out, options, append=True, exclude=[test_set]).manifest
    prepare([source, str(tmp_path / "more.smi")], both, options, exclude=[test_set])
    assert {row["mol_key"] for row in molecules(out)} == {row["mol_key"] for row in molecules(both)}
    assert appended.counts.unaccounted == 0


def test_an_unusual_column_of_an_exclusion_has_an_option_of_its_own(tmp_path: Path) -> None:
    source, tested, out = (str(tmp_path / name) for name in ("m.smi", "tox.csv", "out"))
    Path(source).write_text("CCO a\nCCN b\n")
    Path(tested).write_text("structure,y\nOCC,1\n")
    with pytest.raises(UsageError, match=r"tox\.csv: no SMILES column .*; name it with --exclude-smiles-column$"):
        prepare([source], out, exclude=[tested])
    options = PrepareOptions(exclude_smiles_column="structure")
    manifest = prepare([source], out, options, exclude=[tested]).manifest
    assert (manifest.counts.excluded, [row["smiles"] for row in molecules(Path(out))]) == (1, ["CCN"])
    assert prepare([source], out, options, exclude=[tested]).reused
    with pytest.raises(UsageError, match="exclude_smiles_column is 'structure', but no files are excluded"):
        prepare([source], tmp_path / "other", options)


def test_an_exclusion_that_is_not_there(source: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing\.csv: no such file"):
        prepare([source], tmp_path / "out", exclude=[str(tmp_path / "nothing.csv")])
    assert not (tmp_path / "out").exists()
