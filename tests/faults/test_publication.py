"""A dataset that is moved into place while the process or the machine dies: as a whole, or what was there before."""

import itertools
import shutil
from pathlib import Path

import pytest

from data_pipeline.build import prepare
from data_pipeline.manifest import MANIFEST_FILE, Manifest
from data_pipeline.output import WORK_FOLDER, Publication
from tests.faults.crash_points import CrashPoints

OLD = {
    "manifest.json": "old",
    "train/data-00000.arrow": "old",
    "train/data-00001.arrow": "old",
    "rejects.parquet": "old",
}
NEW = {"train/data-00000.arrow": "new", "train/state.json": "new", "rejects.parquet": "new", "manifest.json": "new"}
REMOVE = ["manifest.json", "train", "rejects.parquet"]
MOVES = [("shard-0", "train/data-00000.arrow")]
MOVES += [(f"dataset/{name}", name) for name in NEW if name != "train/data-00000.arrow"]


def write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def files(folder: Path) -> dict[str, str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in paths}


@pytest.mark.parametrize("power", [False, True], ids=["process", "machine"])
def test_a_death_at_any_operation(power, tmp_path):
    publication = Publication("k", None, REMOVE, MOVES)
    for at in itertools.count(1):
        out, work = tmp_path / f"{at}" / "out", tmp_path / f"{at}" / "work"
        write(out, OLD)
        write(work, {built: NEW[name] for built, name in MOVES})
        with CrashPoints(out.parent, at, power) as points:
            publication.save(work)
            publication.publish(work, out)
            shutil.rmtree(work)
        if not points.dead:
            assert at > 10
            break
        found = files(out)
        assert MANIFEST_FILE not in found or found in (OLD, NEW), points.operations
        if (work / "dataset" / MANIFEST_FILE).exists():  # else it is in place
            if Publication.load(work, "k") is None:
                publication.save(work)
            publication.publish(work, out)
        assert files(out) == NEW, points.operations


def test_what_is_prepared_is_on_the_disk_before_it_counts(tmp_path):
    """The order of the operations; shards and records are written by child processes, through the same helper."""
    (tmp_path / "some.smi").write_text("CCO\nnonsense\nc1ccccc1\n")
    out = tmp_path / "out"
    with CrashPoints(tmp_path) as points:
        prepare([str(tmp_path / "some.smi")], out)
    done = points.operations
    (published,) = (place for place, each in enumerate(done) if each.startswith("rename") and "/publication-" in each)
    (last,) = (
        place for place, each in enumerate(done) if each.startswith("rename") and each.endswith("out/manifest.json")
    )
    built = Path(done[last].split()[1]).parent
    for record in Manifest.load(out).files:
        assert f"flush {built}/{record.file}" in done[:published]
    assert f"flush {built}/{MANIFEST_FILE}.tmp" in done[:published]
    for folder in (built, f"{built}/train", f"{built}/validation", f"{out}/{WORK_FOLDER}"):
        assert f"flush {folder}" in done[:published]
    first = next(place for place, each in enumerate(done) if each.startswith("rename") and f" to {out}/train/" in each)
    (mark,) = (place for place, each in enumerate(done) if each.startswith("flush") and "/removed-" in each)
    assert published < mark < first
    assert done[mark + 1] == f"flush {out}/{WORK_FOLDER}"
    assert {f"flush {folder}" for folder in (out, out / "train", out / "validation")} <= set(done[first:last])
    assert done[last + 1] == f"flush {out}"
