"""Sources behind URLs give the rows and checksums of the files on disk; what fails there is told in one line."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.keys import file_checksum
from data_pipeline.sources import lines, streams
from data_pipeline.sources.source import read_chunks, resolve_sources
from tests.object_storage import s3_client, s3_server
from tests.unit.data_pipeline.reading import read, write
from tests.unit.data_pipeline.servers import FORBIDDEN, REPOSITORY, serve

MOL_BLOCK = "\n  RDKit          2D\n\n  0  0  0  0  0  0  0  0  0  0999 V2000\nM  END\n"
FILES = ("a.smi", "b.smi.gz", "c.csv.zst", "d.sdf.bz2", "data/e.parquet", "data/f.arrow", "data/g.feather")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A file of each kind, each larger than one request."""
    (tmp_path / "data").mkdir()
    rows = [("C" * (row % 40 + 1), f"x{row}") for row in range(3000)]
    write(tmp_path / "a.smi", "".join(f"{text} {record_id}\n" for text, record_id in rows))
    write(tmp_path / "b.smi.gz", "".join(f"{text}\n" for text, _ in rows))
    write(tmp_path / "c.csv.zst", "id,smiles\n" + "".join(f"{record_id},{text}\n" for text, record_id in rows))
    write(tmp_path / "d.sdf.bz2", "".join(f"{MOL_BLOCK}> <chembl_id>\n{name}\n\n$$$$\n" for _, name in rows))
    table = pa.table({"smiles": [text for text, _ in rows], "id": [record_id for _, record_id in rows]})
    pq.write_table(table, tmp_path / "data" / "e.parquet", row_group_size=1000)
    for name, create in (("f.arrow", pa.ipc.new_stream), ("g.feather", pa.ipc.new_file)):
        with create(tmp_path / "data" / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
    write(tmp_path / "README.md", "not data")
    write(tmp_path / "requirements.txt", "not data")
    return tmp_path


@pytest.fixture(autouse=True)
def small_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "REQUEST_BYTES", 40_000)
    monkeypatch.setattr(lines, "_BLOCK_BYTES", 4096)


@pytest.fixture
def memory(folder: Path) -> Iterator[str]:
    filesystem = fsspec.filesystem("memory")
    filesystem.put(f"{folder}/", "/store/", recursive=True)
    yield "memory://store"
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


@pytest.fixture
def web(folder: Path) -> Iterator[str]:
    with serve(folder) as url:
        yield url


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[str]:
    with s3_server() as url:
        storage = s3_client(url, monkeypatch)
        storage.mkdir("molecules")
        storage.put(f"{folder}/", "s3://molecules/raw/", recursive=True)
        yield "s3://molecules/raw"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, web: str) -> Iterator[str]:
    """A dataset repository on a server that answers as the Hugging Face Hub does."""
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": web, "token": False})
    fsspec.get_filesystem_class("hf").clear_instance_cache()
    yield f"hf://datasets/{REPOSITORY}"
    fsspec.get_filesystem_class("hf").clear_instance_cache()


def compare(url: str, folder: Path) -> None:
    for file in FILES:
        (source,) = resolve_sources([f"{url}/{file}"])
        (local,) = resolve_sources([str(folder / file)])
        assert (source.name, source.path, source.format) == (local.name, f"{url}/{file}", local.format)
        assert (source.bytes, source.blake2b) == (local.bytes, file_checksum(folder / file))
        assert list(read_chunks(source)) == list(read_chunks(local))


@pytest.mark.parametrize("storage", ["memory", "web", "bucket", "hub"])
def test_rows_and_checksums_are_those_of_the_files(request: pytest.FixtureRequest, folder: Path, storage: str) -> None:
    compare(request.getfixturevalue(storage), folder)


def test_files_behind_a_file_url(folder: Path) -> None:
    compare(f"file://{folder}", folder)


@pytest.mark.parametrize("storage", ["memory", "bucket", "hub"])
def test_patterns(request: pytest.FixtureRequest, folder: Path, storage: str) -> None:
    url = request.getfixturevalue(storage)
    sources = resolve_sources([f"{url}/[ab].smi*", f"{url}/data/*"])
    names = ("a.smi", "b.smi.gz", "data/e.parquet", "data/f.arrow", "data/g.feather")
    assert [source.name for source in sources] == [name.removeprefix("data/") for name in names]
    assert all(source.path.endswith(f"/{name}") for source, name in zip(sources, names, strict=True))
    assert read(f"{url}/data/*.parquet") == read(folder / "data" / "e.parquet")
    with pytest.raises(UsageError, match=r"no such file; expected a path, a URL, a pattern"):
        resolve_sources([f"{url}/*.mol2"])


def test_a_repository_stands_for_its_data_files(hub: str, folder: Path) -> None:
    sources = resolve_sources([hub])
    assert [source.name for source in sources] == [f"zinc/{file}" for file in FILES]
    assert [source.path for source in sources] == [f"{hub}/{file}" for file in FILES]
    assert [source.name for source in resolve_sources([f"{hub}/data"])] == [file for file in FILES if "/" in file]
    assert [source.name for source in resolve_sources([hub], format="csv")] == ["zinc/c.csv.zst"]
    with pytest.raises(UsageError, match=rf"^{hub}: no file of format tsv in it; name its files"):
        resolve_sources([hub], format="tsv")


def test_a_repository_that_is_not_there(hub: str) -> None:
    for url in (f"{hub}-250k", f"{hub}-250k/*.parquet", f"{hub}-250k/a.smi"):
        with pytest.raises(
            UsageError, match=rf"^{re.escape(url)}: no such file, or none that your credentials may see"
        ):
            resolve_sources([url])


def test_a_revision(hub: str, folder: Path) -> None:
    assert read(f"{hub}@main/data/*.parquet") == read(f"{hub}@main/a.smi") == read(folder / "a.smi")


def test_a_saved_dataset_behind_a_url(folder: Path, memory: str) -> None:
    storage = fsspec.filesystem("memory")
    storage.pipe_file("/store/data/state.json", b'{"_data_files": [{"filename": "f.arrow"}]}')
    (source,) = resolve_sources([f"{memory}/data"])
    assert (source.name, source.path) == ("data/f.arrow", f"{memory}/data/f.arrow")
    assert read(f"{memory}/data") == read(folder / "data" / "f.arrow")


@pytest.mark.parametrize("storage", ["memory", "web", "bucket", "hub"])
def test_a_url_that_is_not_there(request: pytest.FixtureRequest, storage: str) -> None:
    url = f"{request.getfixturevalue(storage)}/no-such.smi"
    with pytest.raises(
        UsageError, match=rf"^{url}: no such file, or none that your credentials may see; check the URL$"
    ):
        resolve_sources([url])


def test_other_folders(memory: str, bucket: str) -> None:
    for url in (memory, bucket):
        with pytest.raises(UsageError, match=rf"^{url}: not a file but a folder; name the files in it, as in {url}/\*"):
            resolve_sources([url])


def test_the_query_of_a_url_is_no_pattern_and_stays_secret(web: str, folder: Path) -> None:
    url = f"{web}/b.smi.gz?signature=secret"
    (source,) = resolve_sources([url])
    assert (source.name, source.path) == ("b.smi.gz", url)
    with_password = url.replace("http://", "http://user:secret@")
    assert [source.name for source in resolve_sources([url, with_password])] == [f"{web}/b.smi.gz"] * 2
    assert source.renamed({"b.smi.gz"}).name == f"{web}/b.smi.gz"
    assert read(f"{web}/b.smi.gz?signature=secret") == read(folder / "b.smi.gz")


def test_a_web_server_that_refuses(web: str) -> None:
    url = f"{web}/{FORBIDDEN}"
    with pytest.raises(PipelineError, match=rf"^{url}: cannot be read \(403.*Forbidden.*\); check the network"):
        resolve_sources([url])


def test_protocols() -> None:
    with pytest.raises(UsageError, match=r"^s4://bucket/a.smi: Protocol not known: s4"):
        resolve_sources(["s4://bucket/a.smi"])
    with pytest.raises(PipelineError, match=r"^http://127.0.0.1:9/a.smi: cannot be read \(.*\); check the network"):
        resolve_sources(["http://127.0.0.1:9/a.smi"])


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (PermissionError("Forbidden"), r"access denied \(Forbidden\); give credentials that may read it"),
        (ConnectionError("no\nroute"), r"cannot be read \(no route\); check the network"),
    ],
)
@pytest.mark.parametrize("file", ["a.smi", "b.smi.gz", "data/e.parquet", "data/f.arrow"])
def test_what_the_storage_raises_names_the_source(
    memory: str, monkeypatch: pytest.MonkeyPatch, file: str, raised: Exception, message: str
) -> None:
    (source,) = resolve_sources([f"{memory}/{file}"])

    def fail(*_: Any, **__: Any) -> None:
        raise raised

    filesystem = fsspec.filesystem("memory")
    monkeypatch.setattr(filesystem, "open", fail)
    with pytest.raises(PipelineError, match=rf"^{source.path}: {message}[^\n]*$"):
        list(read_chunks(source))
    with pytest.raises(PipelineError, match=rf"^{source.path}: {message}[^\n]*$"):
        resolve_sources([source.path])
    monkeypatch.undo()
    monkeypatch.setattr(type(filesystem.open(f"/store/{file}", "rb")), "read", fail)
    with pytest.raises(PipelineError, match=rf"^{source.path}: {message}[^\n]*$"):
        list(read_chunks(source))
