"""A dataset built for a URL is the one built in a folder; interrupted uploads go on; S3 in and out, against moto."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data_pipeline import build, upload
from data_pipeline.build import prepare
from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.manifest import Manifest, verify
from data_pipeline.options import PrepareOptions
from tests.object_storage import s3_client, s3_server

URL = "memory://store/zinc"
OPTIONS = PrepareOptions(validation_fraction=0.3, shard_rows=5)
SMILES = [f"{'C' * n}{atom}c1ccccc1{'C' * (n % 3)}" for n in range(8) for atom in "ONS"]


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    """An S3 server with the bucket `molecules`."""
    with s3_server() as url:
        storage = s3_client(url, monkeypatch)
        storage.mkdir("molecules")
        yield storage


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "a.smi").write_text("".join(f"{smiles} {n}\n" for n, smiles in enumerate(SMILES)))
    return str(tmp_path / "a.smi")


@pytest.fixture
def local(source: str, tmp_path: Path) -> dict[str, bytes]:
    """The files of the dataset, built in a folder."""
    prepare([source], tmp_path / "local", OPTIONS)
    return {
        str(path.relative_to(tmp_path / "local")): path.read_bytes()
        for path in (tmp_path / "local").rglob("*")
        if path.is_file()
    }


def objects(filesystem: fsspec.AbstractFileSystem, folder: str) -> dict[str, bytes]:
    paths = filesystem.find(folder)
    return {path.removeprefix(folder.rstrip("/") + "/"): filesystem.cat_file(path) for path in paths}


def test_the_same_objects_as_files(source: str, local: dict[str, bytes], memory, tmp_path: Path) -> None:
    result = prepare([source], URL, OPTIONS, staging=tmp_path / "staging")
    assert objects(memory, "/store/zinc") == local
    assert result.counts == result.manifest.counts
    assert list((tmp_path / "staging").iterdir()) == []
    assert prepare([source], URL, OPTIONS, staging=tmp_path / "staging").reused


def test_another_dataset_is_replaced_only_when_told_so(source: str, local, memory, tmp_path: Path) -> None:
    prepare([source], URL, PrepareOptions(shard_rows=1), staging=tmp_path / "staging")
    with pytest.raises(UsageError, match=r"memory://store/zinc: holds a dataset prepared from other options"):
        prepare([source], URL, OPTIONS, staging=tmp_path / "staging")
    prepare([source], URL, OPTIONS, staging=tmp_path / "staging", overwrite=True)
    # The many shards of the first one are gone.
    assert objects(memory, "/store/zinc") == local


@pytest.mark.parametrize("after", [0, 1, 4, 9])
def test_an_interrupted_upload_goes_on(
    after: int, source: str, local: dict[str, bytes], memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put: list[str] = []
    put_file = type(memory).put_file

    def failing(self, path: str, target: str, **options: object) -> None:
        if len(put) == after:
            raise ConnectionError("the network\nis gone")
        put.append(target)
        put_file(self, path, target, **options)

    def recording(self, path: str, target: str, **options: object) -> None:
        put.append(target)
        put_file(self, path, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "put_file", failing)
        with pytest.raises(PipelineError, match=r"cannot be written \(the network is gone\); check.*kept"):
            prepare([source], URL, OPTIONS, staging=tmp_path / "staging")
    assert "manifest.json" not in objects(memory, "/store/zinc")
    first = list(put)
    put.clear()
    monkeypatch.setattr(type(memory), "put_file", recording)
    prepare([source], URL, OPTIONS, staging=tmp_path / "staging")
    assert not {*first} & {*put}
    assert objects(memory, "/store/zinc") == local


def test_an_upload_that_another_dataset_came_between_begins_anew(
    source: str, local: dict[str, bytes], memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_file = type(memory).put_file

    def fail_at_the_end(self, path: str, target: str, **options: object) -> None:
        if target.endswith("manifest.json"):
            raise ConnectionError("gone")
        put_file(self, path, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "put_file", fail_at_the_end)
        with pytest.raises(PipelineError, match="gone"):
            prepare([source], URL, OPTIONS, staging=tmp_path / "staging")
    prepare([source], URL, PrepareOptions(validation_fraction=0.5, shard_rows=5), staging=tmp_path / "staging")
    prepare([source], URL, OPTIONS, staging=tmp_path / "staging", overwrite=True)
    assert objects(memory, "/store/zinc") == local
    assert verify(URL) == []


def test_from_s3_to_s3(source: str, local: dict[str, bytes], s3, tmp_path: Path) -> None:
    s3.put_file(source, "molecules/raw/a.smi")
    prepare(["s3://molecules/raw/*.smi"], "s3://molecules/zinc", OPTIONS, staging=tmp_path / "staging")
    assert objects(s3, "molecules/zinc") == local
    assert verify("s3://molecules/zinc") == []
    assert Manifest.load("s3://molecules/zinc").sources[0].name == "a.smi"


def test_what_is_refused(source: str, memory, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--append: memory://store/zinc is a URL"):
        prepare([source], URL, OPTIONS, append=True)
    with pytest.raises(UsageError, match=r"--staging is .* but --out is a folder"):
        prepare([source], tmp_path / "out", OPTIONS, staging=tmp_path / "staging")
    with pytest.raises(UsageError, match="s4://bucket"):
        prepare([source], "s4://bucket/zinc", OPTIONS, staging=tmp_path / "staging")


def test_the_default_staging_folder(source: str, memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "DEFAULT_STAGING", tmp_path / "cache")

    def fail(folder: Path, url: str) -> None:
        raise PipelineError("gone")

    monkeypatch.setattr(build, "upload", fail)
    with pytest.raises(PipelineError, match="gone"):
        prepare([source], URL, OPTIONS)
    (folder,) = (tmp_path / "cache").iterdir()
    assert Manifest.load(folder).counts.read == len(SMILES)
    monkeypatch.setattr(build, "upload", upload.upload)
    assert not prepare([source], URL, OPTIONS).reused
    assert not folder.exists()
