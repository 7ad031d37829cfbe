"""A dataset folder: what is in it, that nothing is lost, and that workers and partitions leave no trace."""

import dataclasses
import gzip
import hashlib
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rdkit import Chem

from data_pipeline import build, plan
from data_pipeline.build import PrepareOptions, prepare
from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.execution.executor import Resources
from data_pipeline.manifest import Manifest, verify
from data_pipeline.schema import MOLECULE_SCHEMA, REJECT_SCHEMA, SCAFFOLD_SCHEMA, SPLITS
from data_pipeline.sources.source import Source, resolve_sources
from data_pipeline.stages import stages
from data_pipeline.stages.reduce_stage import RUN_LENGTH

OPTIONS = PrepareOptions(validation_fraction=0.2, shard_rows=500)
AS_WRITTEN = dataclasses.replace(OPTIONS, standardize=False)

# 40 benzenes, so that one scaffold has several runs; duplicates in two spellings; and rejects.
BENZENES = [f"{'C' * n}{atom}c1ccccc1" for n in range(20) for atom in "ON"]
BENZENE_KEY = int.from_bytes(hashlib.blake2b(b"c1ccccc1", digest_size=8).digest(), "little")
BAD_ROWS = ["C C", "C1CC", "", "CN(C)(C)(C)C", "c1cccc1", "C" * 600]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The NCI molecules' first 1,800 rows; and a CSV with duplicates of them, benzenes and rejects."""
    folder = tmp_path_factory.mktemp("sources")
    nci = Path(resolve_sources(["nci5k"])[0].path).read_text().splitlines()[:1800]
    (folder / "nci.smi").write_text("\n".join(nci) + "\n")
    respelled = [Chem.MolToSmiles(Chem.MolFromSmiles(line.split()[0])) for line in nci[:200]]
    rows = [*BENZENES, *BAD_ROWS, *respelled, *BENZENES[:7]]
    table = "name,smiles\n" + "".join(f"row{index},{smiles}\n" for index, smiles in enumerate(rows))
    (folder / "more.csv.gz").write_bytes(gzip.compress(table.encode()))
    return [str(folder / "nci.smi"), str(folder / "more.csv.gz")]


@pytest.fixture(scope="module")
def dataset(sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dataset") / "out"
    prepare(sources, out, OPTIONS)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def shards(folder: Path, split: str) -> list[pa.RecordBatch]:
    batches = []
    for path in sorted((folder / split).glob("data-*.arrow")):
        (batch,) = pa.ipc.open_stream(path.read_bytes())
        batches.append(batch)
    return batches


def molecules(folder: Path, split: str) -> list[dict]:
    return [row for batch in shards(folder, split) for row in batch.to_pylist()]


def write_smi(path: Path, *lines: str) -> str:
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_partitions_and_chunks_leave_no_trace(
    workers: int, sources: list[str], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "PARTITION_ROWS", 500)
    monkeypatch.setattr(stages, "CHUNK_ROWS", (300, 300))
    monkeypatch.setattr(stages, "_WRITE_TASKS", workers)
    prepare(sources, tmp_path / "out", OPTIONS, Resources(workers))
    assert contents(tmp_path / "out") == contents(dataset)


def test_memory_leaves_no_trace(sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A partition too large for memory is cut into ranges, in the midst of the large scaffolds too."""
    monkeypatch.setattr(stages, "CELL_ROWS", 20)
    prepare(sources, tmp_path / "one", OPTIONS)
    monkeypatch.setattr(stages, "PARTITION_ROWS", 1000)
    monkeypatch.setattr(stages, "CHUNK_ROWS", (300, 300))
    monkeypatch.setattr(Resources, "budget", 10_000)
    monkeypatch.setattr(build, "mapped_bytes", lambda rows, atoms: 1)
    reports = Counter[str]()
    prepare(sources, tmp_path / "many", OPTIONS, report=lambda stage, done, total: reports.update([stage]))
    assert reports["reduce"] > 50
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_runs_stay_in_a_cell_of_a_large_scaffold(
    sources: list[str], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "CELL_ROWS", 40)
    prepare(sources, tmp_path / "out", OPTIONS)
    cells = [{key[0] >> 6 for key in run} for run in benzene_runs(tmp_path / "out")]
    assert len(cells) > 10
    assert all(len(cell) == 1 for cell in cells)
    assert any(len({key[0] >> 6 for key in run}) == 2 for run in benzene_runs(dataset))


def benzene_runs(folder: Path) -> list[list[bytes]]:
    """The mol_keys of each run of molecules whose scaffold is benzene, which has many."""
    runs: list[list[bytes]] = [[]]
    for row in (row for split in SPLITS for row in molecules(folder, split)):
        if row["scaffold_key"] != BENZENE_KEY or (runs[-1] and row["mol_key"] < runs[-1][-1]):
            runs.append([])
        if row["scaffold_key"] == BENZENE_KEY:
            runs[-1].append(row["mol_key"])
    return [run for run in runs if run]


def test_files_and_schemas(dataset: Path) -> None:
    manifest = Manifest.load(dataset)
    listed = [record.file for split in manifest.splits.values() for record in split.shards]
    listed += [record.file for record in manifest.files] + ["manifest.json"]
    assert sorted(contents(dataset)) == sorted(listed)
    for split in SPLITS:
        assert all(batch.schema.equals(MOLECULE_SCHEMA, check_metadata=True) for batch in shards(dataset, split))
    assert pq.read_schema(dataset / "rejects.parquet").equals(REJECT_SCHEMA)
    assert pq.read_schema(dataset / "scaffolds.parquet").equals(SCAFFOLD_SCHEMA)


def test_dedup_equals_a_set(sources: list[str], tmp_path: Path) -> None:
    manifest = prepare(sources, tmp_path / "out", AS_WRITTEN).manifest
    texts = [line.split()[0] for line in Path(sources[0]).read_text().splitlines()]
    texts += [line.split(",")[1] for line in gzip.decompress(Path(sources[1]).read_bytes()).decode().splitlines()[1:]]
    mols = [Chem.MolFromSmiles(text) for text in texts if text not in BAD_ROWS]
    expected = {Chem.MolToSmiles(mol) for mol in mols if mol is not None}
    written = [row["smiles"] for split in SPLITS for row in molecules(tmp_path / "out", split)]
    assert len(written) == len(set(written))
    assert set(written) == expected
    assert manifest.counts.duplicates == sum(mol is not None for mol in mols) - len(expected)


def test_first_duplicate_names_the_molecule(tmp_path: Path) -> None:
    first = write_smi(tmp_path / "first.smi", "OCC a", "C b", "CCO c")
    second = write_smi(tmp_path / "second.smi", "C d", "C(O)C e", "N f")
    prepare([first, second], tmp_path / "out")
    ids = {row["smiles"]: row["source_id"] for row in molecules(tmp_path / "out", "train")}
    assert ids == {"CCO": "a", "C": "b", "N": "f"}


def test_counts_add_up(dataset: Path) -> None:
    manifest = Manifest.load(dataset)
    counts = manifest.counts
    assert counts.unaccounted == 0
    assert counts.read == sum(source.rows for source in manifest.sources) == 1800 + 40 + 6 + 200 + 7
    assert counts.written == {split: len(molecules(dataset, split)) for split in SPLITS}
    rejects = pq.read_table(dataset / "rejects.parquet").to_pylist()
    assert counts.rejected == Counter(reject["reason"] for reject in rejects)
    expected = ["whitespace", "syntax", "empty", "valence", "kekulize", "too_large"]
    assert [(r["source"], r["row"], r["reason"]) for r in rejects if r["source"] == "more.csv.gz"] == [
        ("more.csv.gz", 40 + index, reason) for index, reason in enumerate(expected)
    ]


def test_split_statistics(dataset: Path) -> None:
    for split, record in Manifest.load(dataset).splits.items():
        rows = molecules(dataset, split)
        assert record.rows == len(rows) == sum(shard.rows for shard in record.shards)
        assert record.atoms == sum(row["num_atoms"] for row in rows) == sum(shard.atoms for shard in record.shards)
        assert record.bonds == sum(row["num_bonds"] for row in rows) == sum(shard.bonds for shard in record.shards)
        assert record.max_atoms == max(row["num_atoms"] for row in rows)
        assert record.max_bonds == max(row["num_bonds"] for row in rows)
        assert record.scaffolds == len({row["scaffold_key"] for row in rows} - {0})
        assert record.acyclic == sum(row["scaffold_key"] == 0 for row in rows)
        values = sorted(row["complexity"] for row in rows)
        assert len(record.complexity_percentiles) == 101
        for percent, value in enumerate(record.complexity_percentiles):
            assert value == values[max(-(-percent * len(values) // 100), 1) - 1]


def test_no_scaffold_on_both_sides(dataset: Path) -> None:
    keys = {split: {row["scaffold_key"] for row in molecules(dataset, split)} for split in SPLITS}
    assert not keys["train"] & keys["validation"]
    boundary = int(0.8 * 2**64)
    assert max(keys["train"]) < boundary <= min(keys["validation"])
    assert 0.1 < len(keys["validation"]) / sum(map(len, keys.values())) < 0.3


def test_runs_lie_together_in_the_order_of_their_hashes(dataset: Path) -> None:
    for split in SPLITS:
        by_scaffold = defaultdict(list)
        for row in molecules(dataset, split):
            by_scaffold[row["scaffold_key"]].append(row["mol_key"])
        runs = []
        for scaffold_key, mol_keys in by_scaffold.items():
            length = RUN_LENGTH if scaffold_key else 1
            mol_keys.sort()
            runs += [(scaffold_key, mol_keys[i : i + length]) for i in range(0, len(mol_keys), length)]

        def run_hash(run: tuple[int, list[bytes]]) -> int:
            content = run[0].to_bytes(8, "little") + run[1][0]
            return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")

        runs.sort(key=run_hash)
        expected: list[list[bytes]] = [[] for _ in shards(dataset, split)]
        for run in runs:
            expected[run_hash(run) * len(expected) >> 64] += run[1]
        assert [batch.column("mol_key").to_pylist() for batch in shards(dataset, split)] == expected


def test_scaffold_table(dataset: Path) -> None:
    table = pq.read_table(dataset / "scaffolds.parquet").to_pylist()
    rows = [row for split in SPLITS for row in molecules(dataset, split)]
    counts = Counter(row["scaffold_key"] for row in rows)
    generic = {row["scaffold_key"]: row["generic_key"] for row in rows}
    assert [row["scaffold_key"] for row in table] == sorted(set(counts) - {0})
    for row in table:
        assert row["count"] == counts[row["scaffold_key"]]
        assert row["generic_key"] == generic[row["scaffold_key"]]
        digest = hashlib.blake2b(row["smiles"].encode(), digest_size=8).digest()
        assert row["scaffold_key"] == int.from_bytes(digest, "little")


def test_datasets_opens_it(dataset: Path) -> None:
    datasets = pytest.importorskip("datasets")
    opened, again = datasets.load_from_disk(str(dataset)), datasets.load_from_disk(str(dataset))
    assert list(opened) == list(SPLITS)
    for split in SPLITS:
        assert opened[split].num_rows == len(molecules(dataset, split))
        assert opened[split][0] == molecules(dataset, split)[0]
        assert opened[split]._fingerprint == again[split]._fingerprint
    assert opened["train"]._fingerprint != opened["validation"]._fingerprint


def test_empty_validation_split_has_an_empty_shard(tmp_path: Path) -> None:
    source = write_smi(tmp_path / "a.smi", "CC", "CCC")
    manifest = prepare([source], tmp_path / "out").manifest
    (shard,) = shards(tmp_path / "out", "validation")
    assert (shard.num_rows, shard.schema) == (0, MOLECULE_SCHEMA)
    assert manifest.splits["validation"].complexity_percentiles == []
    assert pq.read_table(tmp_path / "out" / "scaffolds.parquet").num_rows == 0
    assert pytest.importorskip("datasets").load_from_disk(str(tmp_path / "out"))["validation"].num_rows == 0


def test_progress_is_reported(sources: list[str], tmp_path: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    prepare(sources, tmp_path / "out", OPTIONS, report=lambda *report: reports.append(report))
    assert list(dict.fromkeys(stage for stage, _, _ in reports)) == ["read", "map", "reduce", "write"]
    last = {stage: (done, total) for stage, done, total in reports}
    assert last["map"] == (2053, 2053)
    assert all(done == total for done, total in last.values())


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.smi", b"", "no molecule among 0 rows"),
        ("a.smi", bytes(range(256)) * 20, "no molecule among .* syntax"),
        ("a.csv", b"smiles,id\n", "no molecule among 0 rows"),
        ("a.csv", b"x,y\n1,2\n", "no SMILES column"),
        ("a.smi", "CC one\n".encode("utf-16"), "UTF-16"),
        ("a.smi.gz", gzip.compress(os.urandom(5000))[:-100], "truncated"),
    ],
)
def test_bad_input_ends_in_a_clear_error(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PipelineError, match=message) as caught:
        prepare([str(tmp_path / name)], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_that_was_there_stays_when_nothing_is_written(tmp_path: Path, linked: bool) -> None:
    """A mount point, say, or a link to another disk; and the error is the one of the source."""
    (tmp_path / "folder").mkdir()
    out = tmp_path / ("link" if linked else "folder")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with pytest.raises(PipelineError, match="no molecule among 1 rows"):
        prepare([write_smi(tmp_path / "a.smi", "C1")], out)
    assert os.listdir(out) == []
    prepare([write_smi(tmp_path / "a.smi", "CC")], out)
    assert verify(out) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"validation_fraction": 1.0},
        {"validation_fraction": -0.1},
        {"shard_rows": 0},
        {"max_atoms": 0},
        {"shard_rows": 10**7},
        {"molecule_seconds": float("inf")},
        {"molecule_seconds": float("nan")},
        {"molecule_seconds": 1e300},
        {"molecule_seconds": 1e-9},
        {"molecule_seconds": 0.0},
    ],
)
def test_bad_options(wrong: dict) -> None:
    with pytest.raises(UsageError, match="expected"):
        PrepareOptions(**wrong)


def test_same_request_again_is_already_done(tmp_path: Path) -> None:
    source = write_smi(tmp_path / "a.smi", "CC")
    first = prepare([source], tmp_path / "out")
    before = contents(tmp_path / "out")
    again = prepare([source], tmp_path / "out", resources=Resources(workers=2))
    assert (first.reused, again.reused) == (False, True)
    assert again.manifest == first.manifest
    assert contents(tmp_path / "out") == before


def test_other_request_is_refused_unless_told_to_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = write_smi(tmp_path / "a.smi", "CC")
    prepare([source], out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"other options.*--overwrite"):
        prepare([source], out, PrepareOptions(max_atoms=10))
    write_smi(tmp_path / "a.smi", "CCC")
    with pytest.raises(UsageError, match=r"other sources.*--overwrite"):
        prepare([source], out)
    assert not prepare([source], out, overwrite=True).reused
    assert [row["smiles"] for row in molecules(out, "train")] == ["CCC"]
    assert verify(out) == []
    assert (out / "notes.txt").read_text() == "mine"


def test_failed_overwrite_leaves_the_old_dataset(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare([write_smi(tmp_path / "a.smi", "CC")], out)
    before = contents(out)
    with pytest.raises(PipelineError, match="no molecule"):
        prepare([write_smi(tmp_path / "b.smi", "C1")], out, overwrite=True)
    assert contents(out) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_folder_is_refused(tmp_path: Path, overwrite: bool) -> None:
    source = write_smi(tmp_path / "a.smi", "CC")
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="not a dataset"):
        prepare([source], out, overwrite=overwrite)
    (out / "manifest.json").write_text('{"name": "web app"}')
    with pytest.raises(UsageError, match="not a dataset"):
        prepare([source], out, overwrite=overwrite)
    with pytest.raises(UsageError, match="a file"):
        prepare([source], tmp_path / "a.smi", overwrite=overwrite)
    assert sorted(os.listdir(out)) == ["manifest.json", "thesis.tex"]


def test_interrupted_run_starts_again(
    sources: list[str], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    # A run killed while it moved its files into place.
    (out / ".hmoe_prepare" / "dataset" / "train").mkdir(parents=True)
    (out / ".hmoe_prepare" / "mapped-00000000.arrow").write_bytes(b"half")
    (out / "train").mkdir()
    (out / "train" / "data-00000.arrow").write_bytes(b"half")
    prepare(sources, out, OPTIONS)
    assert contents(out) == contents(dataset)


def test_unwritable_output_is_a_clear_error(tmp_path: Path) -> None:
    source = write_smi(tmp_path / "a.smi", "CC")
    with pytest.raises(PipelineError, match="cannot write the dataset"):
        prepare([source], Path(source) / "out")


def test_a_source_that_changes_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_smi(tmp_path / "a.smi", "CC", "CCC")
    resolve = plan.resolve_sources

    def resolve_and_change(names: list[str], *arguments: Any, **options: Any) -> list[Source]:
        resolved = resolve(names, *arguments, **options)
        if names:
            write_smi(tmp_path / "a.smi", "CC", "CCC", "CCCC")
        return resolved

    monkeypatch.setattr(plan, "resolve_sources", resolve_and_change)
    with pytest.raises(PipelineError, match=r"a\.smi: changed while it was read.*run again when it is complete"):
        prepare([source], tmp_path / "out")


def test_write_tasks_hold_as_many_shards_as_fit(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "_WRITE_TASKS", 1)
    tasks = Counter[int]()
    for budget in (1 << 30, 600_000):
        monkeypatch.setattr(Resources, "budget", budget)

        def count(stage: str, done: int, total: int, budget: int = budget) -> None:
            tasks[budget] += stage == "write"

        manifest = prepare(sources, tmp_path / str(budget), OPTIONS, report=count).manifest
    assert tasks[1 << 30] == len(SPLITS)
    shards = len(manifest.splits["train"].shards)
    molecules = sum(manifest.counts.written.values())
    assert tasks[600_000] > molecules * 200 / 600_000
    assert tasks[600_000] < shards
    assert contents(tmp_path / str(1 << 30)) == contents(tmp_path / "600000")


def test_shards_that_no_worker_can_hold(tmp_path: Path) -> None:
    source = write_smi(tmp_path / "a.smi", "CC")
    options = PrepareOptions(shard_rows=1_000_000, max_atoms=100)
    with pytest.raises(UsageError, match=r"shard_rows is 1000000, but with 2048 MiB of memory .* at most .* molecules"):
        prepare([source], tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_a_dataset_that_another_run_has_made_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, one, other = (write_smi(tmp_path / f"{n}.smi", *rows) for n, rows in enumerate((["CC"], ["CCC"], ["CCN"])))
    make = plan.Plan.make.__func__

    def overtaken(*arguments: Any) -> plan.Plan:
        planned = make(plan.Plan, *arguments)
        with monkeypatch.context() as patch:
            patch.setattr(plan.Plan, "make", classmethod(make))
            prepare([one], tmp_path / "out", append=(tmp_path / "out").exists())
        return planned

    for append in (False, True):
        if append:
            prepare([base], tmp_path / "out", overwrite=True)
        monkeypatch.setattr(plan.Plan, "make", overtaken)
        message = "another `hmoe prepare` has changed the dataset there" if append else "from other sources"
        with pytest.raises(UsageError, match=message):
            prepare([other], tmp_path / "out", append=append)
        monkeypatch.undo()
        assert sum(Manifest.load(tmp_path / "out").counts.written.values()) == 1 + append
        assert not verify(tmp_path / "out")
