"""Appending: the molecules and statistics of one prepare over everything, in a dataset whose old shards stay."""

import contextlib
import dataclasses
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rdkit import RDConfig

from data_pipeline.build import PrepareOptions, prepare
from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.execution.executor import Resources
from data_pipeline.manifest import Manifest, verify
from data_pipeline.molecules.scaffold import ACYCLIC_KEY
from data_pipeline.schema import SPLITS
from data_pipeline.stages import known, stages
from hmoe_ds.data.store import ShardStore

OPTIONS = PrepareOptions(validation_fraction=0.2, shard_rows=150)
BAD_ROWS = ["C1CC", "CN(C)(C)(C)C", "nonsense"]
NCI5K = Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two files that share 100 molecules and many scaffolds; each has duplicates and rejects."""
    folder = tmp_path_factory.mktemp("sources")
    nci = NCI5K.read_text().splitlines()
    parts = {"a.smi": nci[:500], "b.smi": nci[400:900]}
    for name, lines in parts.items():
        (folder / name).write_text("\n".join([*lines, *BAD_ROWS, *lines[:20]]) + "\n")
    return str(folder / "a.smi"), str(folder / "b.smi")


@pytest.fixture(scope="module")
def base(sources: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "out"
    prepare([sources[0]], out, OPTIONS)
    return out


@pytest.fixture(scope="module")
def appended(sources: tuple[str, str], base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` with the second file appended."""
    out = copy(base, tmp_path_factory.mktemp("appended") / "out")
    prepare([sources[1]], out, OPTIONS, append=True)
    return out


@pytest.fixture(scope="module")
def whole(sources: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both files prepared at once."""
    out = tmp_path_factory.mktemp("whole") / "out"
    prepare(sources, out, OPTIONS)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def copy(folder: Path, to: Path) -> Path:
    for name, content in contents(folder).items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes(content)
    return to


def molecules(folder: Path, split: str) -> list[dict]:
    rows = []
    for shard in Manifest.load(folder).splits[split].shards:
        (batch,) = pa.ipc.open_stream((folder / shard.file).read_bytes())
        rows += batch.to_pylist()
    return rows


def test_same_molecules_as_prepared_at_once(appended: Path, whole: Path) -> None:
    for split in SPLITS:
        one, other = (sorted(molecules(folder, split), key=lambda row: row["mol_key"]) for folder in (appended, whole))
        assert one == other


def test_same_statistics_as_prepared_at_once(appended: Path, whole: Path) -> None:
    one, other = Manifest.load(appended), Manifest.load(whole)
    for split in SPLITS:
        assert dataclasses.replace(one.splits[split], shards=[]) == dataclasses.replace(other.splits[split], shards=[])
    assert (one.counts, one.sources, one.options) == (other.counts, other.sources, other.options)
    assert one.counts.unaccounted == 0
    for file in ("scaffolds.parquet", "rejects.parquet"):
        assert (appended / file).read_bytes() == (whole / file).read_bytes()


def test_old_shards_stay_and_new_ones_follow(base: Path, appended: Path) -> None:
    before, after = contents(base), contents(appended)
    old, new = Manifest.load(base), Manifest.load(appended)
    for split in SPLITS:
        count = len(old.splits[split].shards)
        assert new.splits[split].shards[:count] == old.splits[split].shards
        assert all(after[shard.file] == before[shard.file] for shard in old.splits[split].shards)
        files = [shard.file for shard in new.splits[split].shards]
        assert files == [f"{split}/data-{number:05d}.arrow" for number in range(len(files))]
        assert len(files) > count
    assert verify(appended) == []
    listed = [shard.file for split in new.splits.values() for shard in split.shards] + [r.file for r in new.files]
    assert sorted([*listed, "manifest.json"]) == sorted(after)


def test_shard_records_have_their_maxima(appended: Path) -> None:
    for split in SPLITS:
        for shard in Manifest.load(appended).splits[split].shards:
            (batch,) = pa.ipc.open_stream((appended / shard.file).read_bytes())
            assert shard.max_atoms == max(batch.column("num_atoms").to_pylist())
            assert shard.max_bonds == max(batch.column("num_bonds").to_pylist())


def test_scaffolds_stay_on_their_side(appended: Path) -> None:
    keys = {split: {row["scaffold_key"] for row in molecules(appended, split)} for split in SPLITS}
    assert keys["validation"]
    assert not keys["train"] & keys["validation"]


def test_scaffold_table_counts_all_molecules(appended: Path) -> None:
    rows = [row["scaffold_key"] for split in SPLITS for row in molecules(appended, split)]
    table = pq.read_table(appended / "scaffolds.parquet").to_pylist()
    assert {row["scaffold_key"]: row["count"] for row in table} == Counter(key for key in rows if key)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_partitions_and_chunks_leave_no_trace(
    workers: int, sources: tuple[str, str], base: Path, appended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "PARTITION_KNOWN_ROWS", 100)
    monkeypatch.setattr(stages, "CHUNK_ROWS", (200, 200))
    out = copy(base, tmp_path / "out")
    prepare([sources[1]], out, OPTIONS, Resources(workers), append=True)
    assert contents(out) == contents(appended)


def test_opened_by_datasets_and_by_the_store(appended: Path) -> None:
    opened = pytest.importorskip("datasets").load_from_disk(str(appended))
    for split in SPLITS:
        assert opened[split]["smiles"][:] == [row["smiles"] for row in molecules(appended, split)]
        assert len(ShardStore(appended, split)) == opened[split].num_rows
        ShardStore(appended, split).check_files()


class Killed(BaseException):
    pass


def append_killed(source: str, out: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Append, and be killed when `after` files are in place (no kill if that is all). -> their names."""
    moved: list[str] = []

    def replace(path: Path | str, target: Path | str) -> None:
        if ".hmoe_prepare" not in Path(target).parts:
            if len(moved) == after:
                raise Killed
            moved.append(Path(target).name)
        os.rename(path, target)

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(os, "replace", replace)
        prepare([source], out, OPTIONS, append=True)
    return moved


def test_a_killed_append_is_mended_by_the_same_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nci = NCI5K.read_text().splitlines()
    for name, lines in {"a.smi": nci[:60], "b.smi": nci[40:100]}.items():
        (tmp_path / name).write_text("\n".join([*lines, *BAD_ROWS]) + "\n")
    source, base = str(tmp_path / "b.smi"), tmp_path / "base"
    prepare([str(tmp_path / "a.smi")], base, OPTIONS)
    whole = copy(base, tmp_path / "whole")
    moves = append_killed(source, whole, 100, monkeypatch)
    assert moves[-1] == "manifest.json"
    assert {"data-00001.arrow", "state.json", "scaffolds.parquet", "rejects.parquet"} < set(moves)
    for after in range(len(moves)):
        out = copy(base, tmp_path / f"after{after}")
        assert append_killed(source, out, after, monkeypatch) == moves[:after]
        assert Manifest.load(out) == Manifest.load(base)
        assert [molecules(out, split) for split in SPLITS] == [molecules(base, split) for split in SPLITS]
        assert verify(out) == [] or "state.json" in moves[:after]
        assert (out / ".hmoe_prepare").exists() == (after < len(moves))
        prepare([source], out, OPTIONS, append=True)
        assert contents(out) == contents(whole)
    assert prepare([source], whole, OPTIONS, append=True).reused


def test_other_append_after_a_killed_one(
    sources: tuple[str, str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards and rows that the killed one left are not taken for the dataset's."""
    (tmp_path / "c.smi").write_text("CCCCCCCCCCCCCCCCCC\nC1\n")
    clean, out = copy(base, tmp_path / "clean"), copy(base, tmp_path / "out")
    moves = append_killed(sources[1], copy(base, tmp_path / "count"), 100, monkeypatch)
    append_killed(sources[1], out, len(moves) - 1, monkeypatch)
    assert len(contents(out)) > len(contents(base))
    for folder in (clean, out):
        prepare([str(tmp_path / "c.smi")], folder, OPTIONS, append=True)
    assert contents(out) == contents(clean)


def test_sources_read_before_are_left_out(sources: tuple[str, str], appended: Path, tmp_path: Path) -> None:
    out = copy(appended, tmp_path / "out")
    again = prepare([sources[1], sources[0]], out, OPTIONS, append=True)
    assert again.reused
    assert again.manifest == Manifest.load(appended)
    assert contents(out) == contents(appended)
    (tmp_path / "c.smi").write_text("CCCCCCCCCCCCCCCCCC\n")
    third = prepare([*sources, str(tmp_path / "c.smi")], out, OPTIONS, append=True)
    assert third.counts is not None
    assert (third.counts.read, third.counts.written["train"]) == (1, 1)
    assert [source.name for source in third.manifest.sources] == ["a.smi", "b.smi", "c.smi"]


def test_duplicates_alone_add_no_shard(sources: tuple[str, str], base: Path, tmp_path: Path) -> None:
    out = copy(base, tmp_path / "out")
    lines = Path(sources[0]).read_text().splitlines()[:100]
    (tmp_path / "a.smi").write_text("\n".join(lines) + "\n")
    result = prepare([str(tmp_path / "a.smi")], out, OPTIONS, append=True)
    assert result.counts is not None
    assert sum(result.counts.written.values()) == 0
    assert result.counts.duplicates + sum(result.counts.rejected.values()) == 100
    old, new = Manifest.load(base), result.manifest
    assert new.splits == old.splits
    assert new.counts.read == old.counts.read + 100
    # The name of the file was taken, so rejects name it by its path.
    assert [source.name for source in new.sources] == ["a.smi", str(tmp_path / "a.smi")]
    assert verify(out) == []


def test_no_empty_shard_between_new_ones(tmp_path: Path) -> None:
    options = PrepareOptions(validation_fraction=0, shard_rows=1)
    (tmp_path / "a.smi").write_text("C\n")
    (tmp_path / "b.smi").write_text("".join("C" * length + "\n" for length in range(1, 13)))
    prepare([str(tmp_path / "a.smi")], tmp_path / "out", options)
    train = prepare([str(tmp_path / "b.smi")], tmp_path / "out", options, append=True).manifest.splits["train"]
    # Twelve ranges of hashes for eleven molecules would all hold one only by a miracle.
    assert 1 < len(train.shards) < 12
    assert all(shard.rows for shard in train.shards)
    assert [shard.file for shard in train.shards] == [f"train/data-{n:05d}.arrow" for n in range(len(train.shards))]
    assert verify(tmp_path / "out") == []


def test_a_source_has_its_own_columns(base: Path, tmp_path: Path) -> None:
    out = copy(base, tmp_path / "out")
    (tmp_path / "t.csv").write_text("structure,smiles,code\nCCCCCCCCCCCCCCCCCCCCC,CC,x7\n")
    columns = dataclasses.replace(OPTIONS, smiles_column="structure", id_column="code")
    manifest = prepare([str(tmp_path / "t.csv")], out, columns, append=True).manifest
    assert (manifest.sources[-1].smiles_column, manifest.sources[-1].id_column) == ("structure", "code")
    assert manifest.options["smiles_column"] is None
    assert {"CCCCCCCCCCCCCCCCCCCCC": "x7"}.items() <= {
        r["smiles"]: r["source_id"] for r in molecules(out, "train")
    }.items()
    # The same file read by another column is another source.
    assert not prepare([str(tmp_path / "t.csv")], out, OPTIONS, append=True).reused


@pytest.mark.parametrize(
    "other", [{"validation_fraction": 0.3}, {"shard_rows": 50}, {"max_atoms": 20}, {"standardize": False}]
)
def test_other_options_are_refused(other: dict, sources: tuple[str, str], base: Path) -> None:
    (name,) = other
    with pytest.raises(UsageError, match=f"was prepared with {name} .*append to it with the same options"):
        prepare([sources[1]], base, dataclasses.replace(OPTIONS, **other), append=True)


def test_another_rdkit_is_refused(sources: tuple[str, str], base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rdkit.__version__", "1999.09.1")
    with pytest.raises(UsageError, match=r"this is 1999\.09\.1"):
        prepare([sources[1]], base, OPTIONS, append=True)


def test_no_dataset_to_append_to(sources: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no dataset here"):
        prepare([sources[1]], tmp_path / "out", OPTIONS, append=True)
    with pytest.raises(UsageError, match="overwrite and append"):
        prepare([sources[1]], tmp_path / "out", OPTIONS, append=True, overwrite=True)
    assert not (tmp_path / "out").exists()


def test_nothing_but_rejects_is_an_error(base: Path, tmp_path: Path) -> None:
    out = copy(base, tmp_path / "out")
    (tmp_path / "c.smi").write_text("C1\nC2\n")
    with pytest.raises(PipelineError, match="no molecule among 2 rows"):
        prepare([str(tmp_path / "c.smi")], out, OPTIONS, append=True)
    assert contents(out) == contents(base)


def test_damaged_dataset_is_refused(sources: tuple[str, str], base: Path, tmp_path: Path) -> None:
    out = copy(base, tmp_path / "out")
    shard = out / "train" / "data-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(PipelineError, match=r"data-00000\.arrow: has \d+ bytes, expected"):
        prepare([sources[1]], out, OPTIONS, append=True)
    shard.unlink()
    with pytest.raises(PipelineError, match=r"data-00000\.arrow: is missing"):
        prepare([sources[1]], out, OPTIONS, append=True)


def test_scaffolds_of_another_dataset_are_refused(sources: tuple[str, str], base: Path, tmp_path: Path) -> None:
    out = copy(base, tmp_path / "out")
    table = pq.read_table(out / "scaffolds.parquet")
    pq.write_table(table.slice(1), out / "scaffolds.parquet")
    with pytest.raises(PipelineError, match="does not list the scaffolds"):
        prepare([sources[1]], out, OPTIONS, append=True)


def test_two_scaffolds_under_one_key_are_an_error() -> None:
    rows = [{"scaffold_key": 7, "smiles": smiles, "generic_key": 1, "count": 1} for smiles in ("C1CC1", "C1CCC1")]
    one, other = (pa.RecordBatch.from_pylist([row], schema=known.SCAFFOLD_SCHEMA) for row in rows)
    assert known.merge_scaffolds(one, one).to_pylist() == [{**rows[0], "count": 2}]
    with pytest.raises(PipelineError, match="same 64-bit key 7"):
        known.merge_scaffolds(one, other)


@pytest.mark.parametrize("file", ["rejects.parquet", "scaffolds.parquet", "train/data-00000.arrow"])
def test_a_damaged_file_of_the_dataset_is_an_error_with_the_mend(file, tmp_path):
    (tmp_path / "old.smi").write_text("c1ccccc1C\nCCO\nnonsense\n")
    (tmp_path / "new.smi").write_text("c1ccccc1CC\nCCN\n")
    prepare([str(tmp_path / "old.smi")], tmp_path / "data", PrepareOptions(validation_fraction=0))
    path = tmp_path / "data" / file
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(
        PipelineError,
        match=r"damaged.*`hmoe inspect --verify .*` names it; prepare|arrow: the content is not what was written",
    ):
        prepare([str(tmp_path / "new.smi")], tmp_path / "data", PrepareOptions(validation_fraction=0), append=True)


def test_known_molecules_are_looked_through_a_piece_at_a_time(monkeypatch):
    generator = np.random.default_rng(0)
    rows = [
        {"mol_key": int(number).to_bytes(16, "big"), "scaffold_key": int(scaffold)}
        for number, scaffold in zip(generator.permutation(100), generator.integers(0, 7, 100), strict=True)
    ]
    batches = [pa.RecordBatch.from_pylist(rows[at : at + 9], schema=known.KNOWN_SCHEMA) for at in range(0, 100, 9)]
    wanted = [int(number).to_bytes(16, "big") for number in generator.integers(0, 200, 50)]
    mol_keys = pa.array(wanted, known.KNOWN_SCHEMA.field("mol_key").type)
    held = {row["mol_key"] for row in rows}
    counts = Counter(row["scaffold_key"] for row in rows if row["scaffold_key"] != ACYCLIC_KEY)
    for keys_at_a_time in (1, 20, 1000):
        monkeypatch.setattr(known, "_KEYS_AT_A_TIME", keys_at_a_time)
        result = known.Known.look_up(mol_keys, iter(batches))
        assert result.found.tolist() == [key in held for key in wanted]
        assert list(zip(result.scaffold_keys, result.scaffold_counts, strict=True)) == sorted(counts.items())
    assert not known.Known.look_up(mol_keys, []).found.any()
