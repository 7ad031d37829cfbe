"""A dataset behind a URL: the same manifest and the same verdicts as on local disk, and errors of one line."""

import sys
from pathlib import Path

import fsspec
import pytest

from data_pipeline.build import prepare
from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.execution.watch import Watch
from data_pipeline.manifest import Manifest, verify
from data_pipeline.remote import is_url, open_filesystem
from data_pipeline.sources.source import resolve_sources
from data_pipeline.stages.read_stage import ReadTask

URL = "memory://store/zinc"


@pytest.fixture
def memory():
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


@pytest.fixture
def uploaded(tmp_path: Path, memory) -> Path:
    """A small dataset on local disk that also lies at `URL`."""
    (tmp_path / "a.smi").write_text("CC\nc1ccccc1\nC1\n")
    prepare([str(tmp_path / "a.smi")], tmp_path / "out")
    memory.put(f"{tmp_path}/out/", "/store/zinc/", recursive=True)
    return tmp_path / "out"


def test_a_url_has_a_protocol():
    assert is_url("s3://bucket/zinc")
    assert is_url("file:///data/zinc")
    assert not is_url("data/zinc")
    assert not is_url("C:/data")
    assert not is_url(Path("s3://bucket/zinc"))


@pytest.mark.parametrize("url", [URL, URL + "/"])
def test_the_manifest_is_the_same_as_on_local_disk(uploaded: Path, url: str):
    assert Manifest.load(url) == Manifest.load(uploaded) == Manifest.load(f"file://{uploaded}")


def test_verify_reads_every_object(uploaded: Path, memory):
    assert verify(URL) == verify(uploaded) == []
    shard = Manifest.load(uploaded).splits["train"].shards[0]
    path, intact = f"/store/zinc/{shard.file}", (uploaded / shard.file).read_bytes()
    memory.pipe_file(path, bytes([intact[0] ^ 1]) + intact[1:])
    assert verify(URL) == [f"{shard.file}: the content is not what was written (checksum differs)"]
    assert verify(URL, read=False) == []
    memory.pipe_file(path, intact[:-1])
    assert verify(URL) == verify(URL, read=False) == [f"{shard.file}: {len(intact) - 1} bytes, expected {len(intact)}"]
    memory.rm_file(path)
    assert verify(URL) == [f"{shard.file}: missing"]


def test_no_dataset_there(memory):
    with pytest.raises(UsageError, match=r"^memory://store/zinc: no dataset here \(no manifest.json\); upload one"):
        Manifest.load(URL)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"{", PipelineError, r"^memory://store/zinc/manifest.json: .* damaged .*; upload the dataset again$"),
        (b"\xff", PipelineError, r"damaged .*; upload the dataset again$"),
        (b'{"name": "web app"}', UsageError, r"^memory://store/zinc/manifest.json: not the manifest"),
        (b'{"format": "hmoe-molecules", "format_version": 99}', UsageError, "version 99, expected 3"),
    ],
)
def test_not_a_manifest(memory, content: bytes, error: type[Exception], message: str):
    memory.pipe_file("/store/zinc/manifest.json", content)
    with pytest.raises(error, match=message):
        Manifest.load(URL)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (PermissionError("Forbidden"), r"access denied \(Forbidden\); give credentials that may read it"),
        (ConnectionError("no\nroute"), r"cannot be read \(no route\); check the network and the endpoint"),
        (TimeoutError(), r"cannot be read \(TimeoutError\)"),
    ],
)
def test_what_the_storage_raises_is_told_in_one_line(memory, monkeypatch, raised: Exception, message: str):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr(memory, "open", fail)
    for read in (Manifest.load, verify):
        with pytest.raises(PipelineError, match=f"^memory://store/zinc/manifest.json: {message}") as caught:
            read(URL)
        assert "\n" not in str(caught.value)
        assert not isinstance(caught.value, UsageError)


def test_a_protocol_without_its_package(monkeypatch):
    for protocol, module in (("s3", "s3fs"), ("s3a", "s3fs"), ("gs", "gcsfs")):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
        monkeypatch.setitem(sys.modules, module, None)
    for protocol in ("s3", "s3a"):
        with pytest.raises(UsageError, match=rf'{protocol}:// needs a package .* `pip install "hmoe-ds\[s3\]"`'):
            open_filesystem(f"{protocol}://bucket/zinc")
    with pytest.raises(UsageError, match=r"gs:// needs a package that is not installed: .*gcsfs"):
        Manifest.load("gs://bucket/zinc")


def test_an_unknown_protocol():
    with pytest.raises(UsageError, match=r"^s4://bucket/zinc\S*: Protocol not known: s4; expected a URL such as s3://"):
        Manifest.load("s4://bucket/zinc")


def test_an_object_that_changes_while_it_is_read_is_an_error(memory, tmp_path: Path):
    memory.pipe("/store/a.smi", b"CC\n")
    (source,) = resolve_sources(["memory://store/a.smi"])
    task = ReadTask(str(tmp_path), source, None, None, 10)
    assert task.run(Watch()) == [1]
    memory.rm("/store/a.smi")
    memory.pipe("/store/a.smi", b"CN\nCO\n")
    with pytest.raises(PipelineError, match=r"memory://store/a\.smi: changed while it was read"):
        task.run(Watch())
