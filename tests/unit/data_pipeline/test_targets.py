"""Fingerprints and descriptors of a dataset, against RDKit's own functions; their statistics, against NumPy."""

import dataclasses
import json
import math
from fractions import Fraction
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from rdkit import Chem, RDConfig
from rdkit.Chem import Descriptors, rdFingerprintGenerator

from data_pipeline.build import PrepareOptions, prepare
from data_pipeline.describe import describe
from data_pipeline.errors import UsageError
from data_pipeline.execution.executor import Resources
from data_pipeline.execution.watch import Watch
from data_pipeline.manifest import Manifest, verify
from data_pipeline.molecules import targets
from data_pipeline.molecules.encode import encode_rows
from data_pipeline.molecules.targets import with_targets
from data_pipeline.schema import DESCRIPTORS, MOLECULE_SCHEMA, SPLITS, TARGET_FIELDS
from data_pipeline.stages import stages
from data_pipeline.stages.statistics import DescriptorSums

OPTIONS = PrepareOptions(validation_fraction=0.2, shard_rows=150, standardize=False, targets=True)
NCI5K = Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi"
SPECIAL = [
    *("C", "[2H]C", "[Na+].[Cl-]", "C[N+](C)(C)CC([O-])=O", "N[C@@H](C)C(=O)O", "N[C@H](C)C(=O)O", "[13CH3]Cl"),
    *("F/C=C/F", "F/C=C\\F", "C[C@]12CC[C@H](O)C[C@@H]1CC[C@@H]2O", "OC(=O)c1ccccc1.NCCO", "C" * 500, "[He]"),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two files that share molecules, in other spellings."""
    folder = tmp_path_factory.mktemp("sources")
    lines = [line.split()[0] for line in NCI5K.read_text().splitlines()]
    respelled = [Chem.MolToSmiles(Chem.MolFromSmiles(text), doRandom=True) for text in lines[:40]]
    (folder / "a.smi").write_text("\n".join([*lines[:400], *SPECIAL]) + "\n")
    (folder / "b.smi").write_text("\n".join([*respelled, *lines[400:700]]) + "\n")
    return str(folder / "a.smi"), str(folder / "b.smi")


@pytest.fixture(scope="module")
def whole(sources: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both files prepared at once."""
    out = tmp_path_factory.mktemp("whole") / "out"
    prepare(sources, out, OPTIONS)
    return out


@pytest.fixture(scope="module")
def appended(sources: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second file appended to the first."""
    out = tmp_path_factory.mktemp("appended") / "out"
    prepare([sources[0]], out, OPTIONS)
    prepare([sources[1]], out, OPTIONS, append=True)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows_of(folder: Path, split: str) -> list[dict]:
    rows = []
    for shard in Manifest.load(folder).splits[split].shards:
        (batch,) = pa.ipc.open_stream((folder / shard.file).read_bytes())
        rows += batch.to_pylist()
    return rows


def dense(row: dict) -> np.ndarray:
    fingerprint = np.zeros(1024, int)
    fingerprint[row["fingerprint_bins"]] = row["fingerprint_counts"]
    return fingerprint


def test_targets_are_those_that_rdkit_computes_from_the_stored_smiles(whole: Path) -> None:
    rows = [row for split in SPLITS for row in rows_of(whole, split)]
    assert len(rows) > 600
    assert {"C" * 500, "F/C=C/F", "F/C=C\\F"} <= {row["smiles"] for row in rows}
    # Unfolded: every environment with its own number.
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2)
    for row in rows:
        mol = Chem.MolFromSmiles(row["smiles"])
        expected = np.zeros(1024, int)
        for number, count in generator.GetSparseCountFingerprint(mol).GetNonzeroElements().items():
            expected[number % 1024] += count
        assert row["fingerprint_bins"] == np.flatnonzero(expected).tolist()
        assert np.array_equal(dense(row), np.minimum(expected, 255))
        descriptors = [getattr(Descriptors, name)(mol) for name in DESCRIPTORS]
        np.testing.assert_allclose(row["descriptors"], descriptors, rtol=1e-6, atol=1e-6, err_msg=row["smiles"])
    assert max(max(row["fingerprint_counts"]) for row in rows) == 255


def test_stereo_does_not_change_a_target() -> None:
    batch = encode_rows(["F/C=C/F", "F/C=C\\F", "N[C@@H](C)C(=O)O", "N[C@H](C)C(=O)O"], list("abcd")).batch
    found = with_targets(batch, Watch()).select([field.name for field in TARGET_FIELDS]).to_pylist()
    assert found[0] == found[1]
    assert found[2] == found[3]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_partitions_and_chunks_leave_no_trace(
    workers: int, sources: tuple[str, str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "PARTITION_ROWS", 200)
    monkeypatch.setattr(stages, "CHUNK_ROWS", (100, 100))
    monkeypatch.setattr(stages, "_WRITE_TASKS", workers)
    prepare(sources, tmp_path / "out", OPTIONS, Resources(workers))
    assert contents(tmp_path / "out") == contents(whole)


def test_the_other_columns_are_as_without_targets(sources: tuple[str, str], whole: Path, tmp_path: Path) -> None:
    prepare(sources, tmp_path / "plain", dataclasses.replace(OPTIONS, targets=False))
    names = MOLECULE_SCHEMA.names
    for split in SPLITS:
        plain = rows_of(tmp_path / "plain", split)
        assert [{name: row[name] for name in names} for row in rows_of(whole, split)] == plain
        assert Manifest.load(tmp_path / "plain").splits[split].descriptors == []
    assert "targets" not in describe(Manifest.load(tmp_path / "plain"))
    assert "fingerprint of 1024 bins, 20 descriptors" in describe(Manifest.load(whole))


@pytest.mark.parametrize("split", SPLITS)
def test_statistics_are_those_of_the_rows(whole: Path, appended: Path, split: str) -> None:
    records = Manifest.load(whole).splits[split].descriptors
    values = np.array([row["descriptors"] for row in rows_of(whole, split)])
    assert [record.name for record in records] == list(DESCRIPTORS)
    assert {record.count for record in records} == {len(values)}
    np.testing.assert_allclose([record.mean for record in records], values.mean(axis=0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(
        [record.standard_deviation for record in records], values.std(axis=0), rtol=1e-7, atol=1e-9
    )
    # To the last bit, although the molecules lie in other shards.
    assert Manifest.load(appended).splits[split].descriptors == records


def test_appended_molecules_have_the_same_targets(whole: Path, appended: Path) -> None:
    for split in SPLITS:
        one, other = (sorted(rows_of(folder, split), key=lambda row: row["mol_key"]) for folder in (appended, whole))
        assert one == other
    assert verify(appended) == []


def column_of(values: np.ndarray) -> pa.RecordBatch:
    """A batch whose first descriptor has these values, and whose others are not there."""
    rows = np.full((len(values), len(DESCRIPTORS)), np.nan, np.float32)
    rows[:, 0] = values
    return pa.record_batch(
        [pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), len(DESCRIPTORS))], ["descriptors"]
    )


def test_sums_are_exact_and_depend_on_no_order() -> None:
    generator = np.random.default_rng(0)
    values = (generator.lognormal(3, 4, 500) * generator.choice([-1, 1], 500)).astype(np.float32)
    values[::50] = np.nan, np.inf, -np.inf, *values[3:10]
    sums = []
    for _ in range(3):
        total = DescriptorSums()
        for part in np.split(generator.permutation(values), [7, 7, 300]):
            total.add(DescriptorSums.of(column_of(part)))
        sums.append(total.records())
    assert sums[0] == sums[1] == sums[2]
    # In steps of 2^-32, as documented.
    exact = [Fraction(round(Fraction(float(x)) * 2**32), 2**32) for x in values if math.isfinite(x)]
    mean = sum(exact) / len(exact)
    variance = sum((x - mean) ** 2 for x in exact) / len(exact)
    record, *others = sums[0]
    assert (record.count, record.mean) == (497, float(mean))
    assert record.standard_deviation == pytest.approx(math.sqrt(variance), rel=1e-15)
    assert {(each.count, each.mean, each.standard_deviation) for each in others} == {(0, 0.0, 0.0)}


def test_a_molecule_that_rdkit_cannot_do_has_no_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = encode_rows(["CC", "CCO", "CCN"], list("abc")).batch
    compute = targets.molecule_targets

    def fail(smiles: str) -> targets.Targets:
        if smiles == "CCO":
            raise RuntimeError("Invariant Violation")
        return compute(smiles)

    expected = with_targets(batch, Watch()).to_pylist()
    monkeypatch.setattr(targets, "molecule_targets", fail)
    rows = with_targets(batch, Watch())
    first, failed, last = rows.to_pylist()
    assert [first, last] == [expected[0], expected[2]]
    assert failed["fingerprint_bins"] == failed["fingerprint_counts"] == []
    assert np.isnan(failed["descriptors"]).all()
    assert DescriptorSums.of(rows).count == [2] * len(DESCRIPTORS)


def test_the_watch_hears_of_each_molecule_and_may_leave_one_out() -> None:
    class Recording(Watch):
        def begin(self, seconds: float) -> None:
            raise AssertionError("the task says how long a molecule may take")

        def rest(self) -> None:
            heard.append("rest")

        def at(self, index: int) -> None:
            heard.append(index)
            super().at(index)

    heard: list[int | str] = []
    batch = encode_rows(["CC", "CCO", "CCN"], list("abc")).batch
    rows = with_targets(batch, Recording(rejected={11: "crash"}), first_row=10).to_pylist()
    assert heard == [10, 11, 12, "rest"]
    assert [len(row["fingerprint_bins"]) > 0 for row in rows] == [True, False, True]


def test_no_molecules() -> None:
    empty = with_targets(encode_rows([], []).batch, Watch())
    assert empty.num_rows == 0
    assert {record.count for record in DescriptorSums.of(empty).records()} == {0}


def test_a_dataset_takes_appends_with_the_same_targets_only(sources: tuple[str, str], tmp_path: Path) -> None:
    for name, has in (("with", True), ("without", False)):
        options = dataclasses.replace(OPTIONS, targets=has)
        prepare([sources[0]], tmp_path / name, options)
        other = dataclasses.replace(OPTIONS, targets=not has)
        with pytest.raises(UsageError, match=f"was prepared with targets {has}, not {not has}; append to it with"):
            prepare([sources[1]], tmp_path / name, other, append=True)
        with pytest.raises(UsageError, match="prepared from other options"):
            prepare([sources[0]], tmp_path / name, other)
        assert prepare([sources[0]], tmp_path / name, options).reused


def test_a_dataset_from_before_the_option_has_none(sources: tuple[str, str], tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, targets=False)
    prepare([sources[0]], tmp_path / "out", options)
    path = tmp_path / "out" / "manifest.json"
    content = json.loads(path.read_text())
    del content["options"]["targets"]
    for split in content["splits"].values():
        del split["descriptors"]
    path.write_text(json.dumps(content))
    assert prepare([sources[0]], tmp_path / "out", options).reused
    grown = prepare([sources[1]], tmp_path / "out", options, append=True).manifest
    assert grown.splits["train"].rows > content["splits"]["train"]["rows"]


@pytest.mark.parametrize("split", SPLITS)
def test_datasets_opens_it(whole: Path, split: str) -> None:
    mapped = datasets.load_from_disk(str(whole))[split]
    assert list(mapped) == rows_of(whole, split)
    assert mapped.with_format("numpy")[0]["descriptors"].shape == (len(DESCRIPTORS),)
