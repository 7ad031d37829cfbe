"""Estimates from heads of sources, against the whole of them."""

import bz2
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from rdkit import RDConfig

from data_pipeline import estimate as estimate_module
from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.estimate import Estimate, SourceEstimate, describe_estimate, estimate
from data_pipeline.manifest import Manifest
from data_pipeline.options import PrepareOptions
from data_pipeline.sources import row_count
from data_pipeline.sources.row_count import count_rows
from data_pipeline.sources.source import Source, resolve_sources
from data_pipeline.sources.synth import SynthSpec, synthesize
from tests.endless import CAGE
from tests.unit.data_pipeline.conftest import COLLECTIONS

NCI = (Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi").read_bytes()


def source_of(path: Path) -> Source:
    (source,) = resolve_sources([str(path)])
    return source


def run(*names: str | Path, head_rows: int = 1000, **options: Any) -> Estimate:
    sources = resolve_sources([str(name) for name in names])
    return estimate(sources, PrepareOptions(**options), workers=2, head_rows=head_rows)


@pytest.mark.parametrize("file", ["zinc.smi.gz", "chembl.tsv.gz", "enamine50k.csv.gz"])
def test_rows_of_real_collections(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    monkeypatch.setattr(row_count, "SAMPLE_BYTES", 500_000)
    if not COLLECTIONS.is_dir():
        pytest.skip(f"no molecule collections at {COLLECTIONS}")
    with gzip.open(COLLECTIONS / file) as lines:
        expected = sum(1 for _ in lines) - 1
    assert count_rows(source_of(COLLECTIONS / file)) == pytest.approx(expected, rel=0.3)


def bgzip(data: bytes) -> bytes:
    """Many gzip members, one after the other, as `bgzip` writes them."""
    return b"".join(gzip.compress(data[begin : begin + 65_280]) for begin in range(0, len(data), 65_280))


@pytest.mark.parametrize(
    ("extension", "compress"),
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".gz", bgzip),
        (".zst", zstandard.ZstdCompressor().compress),
        (".bz2", lambda data: bz2.compress(data, 1)),
    ],
)
def test_rows_of_compressed_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extension: str, compress: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(row_count, "SAMPLE_BYTES", 100_000)
    path = tmp_path / f"a.smi{extension}"
    path.write_bytes(compress("".join(f"{smiles}\n" for smiles, _ in synthesize(SynthSpec(50_000))).encode()))
    assert path.stat().st_size > 2 * 100_000
    assert count_rows(source_of(path)) == pytest.approx(50_000, rel=0.3)


def test_rows_of_an_sdf(tmp_path: Path) -> None:
    record = "\n  x\n\n  1  0  0  0  0  0            999 V2000\n    0.0 0.0 0.0 C   0  0\nM  END\n> <ID>\n1\n\n$$$$\n"
    (tmp_path / "a.sdf").write_text(record * 40)
    assert count_rows(source_of(tmp_path / "a.sdf")) == 40


def test_rows_of_columnar_files_are_counted(tmp_path: Path) -> None:
    table = pa.table({"smiles": ["CCO", "CCN", "CCC"] * 500})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=400)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=400)
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=400)
    for name in ("a.parquet", "a.arrow", "b.arrow"):
        (source,) = run(tmp_path / name, head_rows=10).sources
        assert (source.rows, source.exact, source.molecules, source.head_rows) == (1500, True, 1500, 10)


def test_a_damaged_columnar_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"smiles": ["CCO"]}), path)
    source = source_of(path)
    path.write_bytes(path.read_bytes()[:-10] + bytes(10))
    with pytest.raises(PipelineError, match=r"a\.parquet: not a readable parquet file"):
        count_rows(source)


def test_a_head_that_is_all_there_is(dataset: Path, tmp_path: Path) -> None:
    path = dataset.parent / "molecules.smi"
    manifest = Manifest.load(dataset)
    (source,) = run(path, head_rows=1500).sources
    assert (source.name, source.format, source.bytes) == ("molecules.smi", "smiles", path.stat().st_size)
    assert (source.rows, source.exact, source.head_rows) == (1500, True, 1500)
    assert source.rejected == manifest.counts.rejected
    assert source.molecules == 1500 - sum(manifest.counts.rejected.values())
    first_line = path.read_text().split("\n")[0].split()
    assert [list(example) for example in source.examples[:1]] == [first_line]
    shards = sum(shard.bytes for split in manifest.splits.values() for shard in split.shards)
    written = sum(manifest.counts.written.values())
    assert source.shard_bytes / source.molecules == pytest.approx(shards / written, rel=0.05)


def test_the_rest_is_taken_to_be_like_the_head(dataset: Path) -> None:
    path = dataset.parent / "molecules.smi"
    whole, part = (run(path, head_rows=rows).sources[0] for rows in (1500, 300))
    assert not part.exact
    assert part.head_rows == 300
    for name in ("rows", "molecules", "shard_bytes"):
        assert getattr(part, name) == pytest.approx(getattr(whole, name), rel=0.3)


def test_a_synthetic_library_is_counted() -> None:
    found = run("synth:100000000?seed=2", head_rows=50)
    assert (found.rows, found.exact, found.molecules) == (100_000_000, True, 100_000_000)


def test_sources_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_module, "_MOST_ROWS", 100)
    for name in "abcd":
        (tmp_path / f"{name}.smi").write_bytes(b"".join(NCI.splitlines(keepends=True)[:40]))
    (tmp_path / "empty.smi").write_text("")
    found = run(*(tmp_path / f"{name}.smi" for name in ("a", "b", "c", "d")), tmp_path / "empty.smi")
    # Of many sources fewer rows each are read.
    assert [source.head_rows for source in found.sources] == [20, 20, 20, 20, 0]
    assert [source.exact for source in found.sources] == [False] * 4 + [True]
    assert found.rows == sum(source.rows for source in found.sources) == 160
    assert found.molecules == sum(source.molecules for source in found.sources)
    assert found.shard_bytes == sum(source.shard_bytes for source in found.sources) > 0
    assert 0.5 * found.shard_bytes < found.temporary_bytes < 3 * found.shard_bytes
    assert found.seconds == pytest.approx(sum(source.seconds for source in found.sources) / 2)


def test_targets_are_in_the_shards_alone() -> None:
    (plain,), (full,) = (run("nci5k", head_rows=100, targets=targets).sources for targets in (False, True))
    assert full.temporary_bytes == plain.temporary_bytes
    # 20 descriptors and two list offsets, and 3 bytes for each of some 10 to 60 bins.
    assert 20 * 4 + 2 * 4 + 3 * 10 < (full.shard_bytes - plain.shard_bytes) / full.molecules < 20 * 4 + 2 * 4 + 3 * 60


def test_mistakes_show(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("smiles,id\nCC,1\n")
    with pytest.raises(UsageError, match="no column 'structure'"):
        run(tmp_path / "a.csv", smiles_column="structure")


def test_description() -> None:
    source = SourceEstimate(
        name="zinc.smi.gz",
        format="smiles",
        bytes=1_509_574,
        head_rows=1000,
        examples=[("C" * 100, "Z1"), ("C\udcff\n", "Z2")],
        rejected={"syntax": 3, "valence": 1},
        rows=133_456,
        exact=False,
        molecules=132_922,
        seconds=400.0,
        shard_bytes=70_000_000,
        temporary_bytes=147_000_000,
    )
    text = describe_estimate(
        Estimate([source], 2, 133_456, False, 132_922, 200.0, shard_bytes=70_000_000, temporary_bytes=147_000_000)
    )
    assert text.splitlines() == [
        "source      zinc.smi.gz: smiles, 1.5 MB, about 133,000 rows",
        "head        1,000 rows, rejected: 3 syntax (not a SMILES), 1 valence (an atom has an impossible valence)",
        f"row         '{'C' * 77}...'  id Z1",
        "row         'C\\udcff\\n'  id Z2",
        "total       about 133,000 rows, about 133,000 molecules, duplicates among them included",
        "time        about 3 min with 2 workers, a core for each",
        "disk        about 70.0 MB of shards, and 147.0 MB of temporary files beside them while it works",
    ]


def test_a_molecule_that_hangs_rdkit_is_a_reject(tmp_path: Path) -> None:
    (tmp_path / "a.smi").write_text(f"CCO\n{CAGE}\nCCN\n")
    (head,) = run(tmp_path / "a.smi", molecule_seconds=0.5, targets=True).sources
    assert (head.rows, head.molecules, head.rejected) == (3, 2, {"timeout": 1})
