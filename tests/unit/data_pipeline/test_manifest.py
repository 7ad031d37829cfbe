"""The manifest: reading it back, refusing what is not one, and finding damage."""

import json
from pathlib import Path

import pytest

from data_pipeline.build import PrepareResult, prepare
from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.manifest import Manifest, verify


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    (tmp_path / "a.smi").write_text("CC\nc1ccccc1\nC1\n")
    result = prepare([str(tmp_path / "a.smi")], tmp_path / "out")
    assert isinstance(result, PrepareResult)
    assert result.manifest == Manifest.load(tmp_path / "out")
    return tmp_path / "out"


def test_intact_dataset_has_no_problems(prepared: Path) -> None:
    assert verify(prepared) == []


def test_every_flipped_byte_is_found(prepared: Path) -> None:
    for path in sorted(prepared.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            intact = path.read_bytes()
            damaged = bytearray(intact)
            damaged[len(damaged) // 2] ^= 1
            path.write_bytes(damaged)
            (problem,) = verify(prepared)
            assert problem.startswith(str(path.relative_to(prepared)))
            path.write_bytes(intact)


def test_missing_and_shortened_files_are_found(prepared: Path) -> None:
    (prepared / "scaffolds.parquet").unlink()
    rejects = prepared / "rejects.parquet"
    rejects.write_bytes(rejects.read_bytes()[:-1])
    missing, shortened = verify(prepared)
    assert missing == "scaffolds.parquet: missing"
    assert shortened.startswith("rejects.parquet: ")
    assert "expected" in shortened


def test_manifest_tells_of_no_time_and_no_workers(prepared: Path) -> None:
    content = json.loads((prepared / "manifest.json").read_text())
    assert sorted(content) == sorted(
        ["format", "format_version", "versions", "options", "sources", "exclusions", "counts", "splits", "files"]
    )


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, UsageError, "no dataset here.*hmoe prepare SOURCE --out"),
        ("{", PipelineError, "damaged"),
        ("[]", PipelineError, "damaged"),
        ('{"name": "web app"}', UsageError, "not the manifest"),
        ('{"format": "hmoe-molecules", "format_version": 99}', UsageError, "version 99, expected 3"),
        ('{"format": "hmoe-molecules", "format_version": 3}', PipelineError, "damaged"),
    ],
)
def test_not_a_manifest(tmp_path: Path, text: str | None, error: type[Exception], message: str) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(error, match=message):
        Manifest.load(tmp_path)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no dataset here"):
        verify(tmp_path / "nowhere")
