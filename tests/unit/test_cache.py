"""Shards from object storage: bounded, verified, fetched ahead, shared by processes; against an S3 server (moto)."""

import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from data_pipeline.errors import PipelineError
from data_pipeline.manifest import FileRecord, Manifest, verify
from hmoe_ds.config import ConfigError
from hmoe_ds.data import cache as cache_module
from hmoe_ds.data.cache import ShardCache
from hmoe_ds.data.cache_folder import CacheFolder
from hmoe_ds.data.store import ShardStore, shard_from_batch
from tests.object_storage import forget_clients, s3_server

ROOT = Path(__file__).parents[2]
URL = "s3://bucket/zinc"
SIZE = 40_000


class Bucket:
    """A bucket of the server, with a list of the downloads from it in the order of their requests."""

    def __init__(self) -> None:
        self.downloads: list[str] = []
        self.filesystem = fsspec.filesystem("s3", use_listings_cache=False)  # another client than that of the cache
        self.filesystem.mkdir("bucket")

    def put(self, folder: Path) -> None:
        self.filesystem.put(f"{folder}/", URL + "/", recursive=True)

    def write(self, record: FileRecord, content: bytes) -> None:
        self.filesystem.pipe_file(f"{URL}/{record.file}", content)

    def remove(self, record: FileRecord) -> None:
        self.filesystem.rm_file(f"{URL}/{record.file}")

    def note(self, line: logging.LogRecord) -> bool:
        if found := re.search(r"GET /bucket/zinc/(\S+) HTTP", line.getMessage()):
            self.downloads.append(found[1])
        return False


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path):
    """Credentials of nobody, no file of the user's that could hold others, no long pauses."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(cache_module, "_FIRST_PAUSE_S", 0.01)


@pytest.fixture
def new_clients():
    """Clients that know the environment of this test alone; other tests share theirs."""
    forget_clients()
    yield
    forget_clients()


@pytest.fixture(scope="module")
def server():
    with s3_server() as url:
        yield url


@pytest.fixture
def bucket(server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    bucket = Bucket()
    logger = logging.getLogger("werkzeug")  # the server's access log
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.addFilter(bucket.note)
    yield bucket
    logger.removeFilter(bucket.note)
    bucket.filesystem.rm("bucket", recursive=True)


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def shards(tmp_path) -> list[FileRecord]:
    """Six files of `SIZE` random bytes in tmp_path/zinc."""
    folder = tmp_path / "zinc"
    (folder / "train").mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(6):
        (folder / "train" / f"{index}.arrow").write_bytes(random.bytes(SIZE))
    return [FileRecord.of(folder, f"train/{index}.arrow") for index in range(6)]


@pytest.fixture
def cache(bucket, shards, tmp_path) -> ShardCache:
    """Of the six files behind S3; has room for three of them."""
    bucket.put(tmp_path / "zinc")
    return ShardCache(URL, tmp_path / "cache", 3 * SIZE)


def content(cache: ShardCache, record: FileRecord) -> bytes:
    with cache.open(record) as file:
        return file.read()


def original(tmp_path: Path, record: FileRecord) -> bytes:
    return (tmp_path / "zinc" / record.file).read_bytes()


def held(tmp_path: Path, shards: list[FileRecord]) -> set[int]:
    """Which shards are in the cache."""
    names = {path.name for path in (tmp_path / "cache" / "shards").iterdir()}
    return {index for index, record in enumerate(shards) if record.blake2b in names}


def partial(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "partial").iterdir())


def order(bucket: Bucket) -> list[int]:
    """Which shards were downloaded, in this order."""
    return [int(re.fullmatch(r"train/(\d)\.arrow", file)[1]) for file in bucket.downloads]


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def interrupted_reads(monkeypatch, errors: list[Exception]) -> list[str]:
    """The next reads of an object end with `errors` after their first block, one each; -> the reads, as they happen."""
    read_blocks, reads = cache_module.read_blocks, []

    def read(filesystem, path):
        reads.append(path)
        for block in read_blocks(filesystem, path):
            yield block
            if errors:
                raise errors.pop(0)

    monkeypatch.setattr(cache_module, "read_blocks", read)
    return reads


def test_a_shard_is_downloaded_once_and_kept_for_later_runs(cache, bucket, shards, tmp_path):
    for again in (cache, cache, ShardCache(URL + "/", tmp_path / "cache", 3 * SIZE)):
        assert content(again, shards[0]) == original(tmp_path, shards[0])
    assert order(bucket) == [0]
    assert partial(tmp_path) == []


def test_a_large_shard_arrives_in_several_requests(cache, bucket, shards, tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.remote._BLOCK_BYTES", SIZE // 3)
    assert content(cache, shards[0]) == original(tmp_path, shards[0])
    assert order(bucket) == [0, 0, 0, 0]


def test_a_shard_that_was_evicted_is_downloaded_again(cache, bucket, shards, tmp_path):
    for index in (0, 1, 2, 0, 3, 1):
        assert content(cache, shards[index]) == original(tmp_path, shards[index])
    assert order(bucket) == [0, 1, 2, 3, 1]
    assert held(tmp_path, shards) == {0, 1, 3}


def test_a_window_is_downloaded_in_order_and_then_what_comes_after_it(cache, bucket, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_THREADS", 1)
    cache.window([shards[4], shards[1]], [shards[3]])
    wait_until(lambda: held(tmp_path, shards) == {1, 3, 4})
    assert order(bucket) == [4, 1, 3]
    cache.window([shards[3]], [shards[0], shards[5]])
    wait_until(lambda: held(tmp_path, shards) == {0, 3, 5})
    assert order(bucket) == [4, 1, 3, 0, 5]
    for index in (3, 0, 5):
        content(cache, shards[index])
    assert len(bucket.downloads) == 5


def test_what_comes_after_the_window_never_pushes_it_out(cache, bucket, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_THREADS", 1)
    cache.window(shards[:2], shards[2:5])
    wait_until(lambda: held(tmp_path, shards) == {0, 1, 2} and not cache._threads)
    assert order(bucket) == [0, 1, 2]
    assert content(cache, shards[5]) == original(tmp_path, shards[5])
    assert held(tmp_path, shards) == {0, 1, 5}


def test_a_new_window_forgets_what_was_not_begun(cache, bucket, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_THREADS", 1)
    begun, go_on, read_blocks = threading.Event(), threading.Event(), cache_module.read_blocks

    def read(filesystem, path):
        begun.set()
        assert go_on.wait(20)
        yield from read_blocks(filesystem, path)

    monkeypatch.setattr(cache_module, "read_blocks", read)
    cache.window(shards[:3])
    assert begun.wait(20)
    cache.window(shards[3:4])
    go_on.set()
    wait_until(lambda: held(tmp_path, shards) == {0, 3} and not cache._threads)
    assert order(bucket) == [0, 3]


def test_open_waits_for_a_download_under_way(cache, bucket, shards, tmp_path):
    cache.window(shards[:3])
    for record in shards[:3]:
        assert content(cache, record) == original(tmp_path, record)
    assert sorted(order(bucket)) == [0, 1, 2]


def test_the_bound_holds_for_many_threads(cache, shards, tmp_path, monkeypatch):
    sizes, new_part = [], CacheFolder._new_part

    def measured(self, record):
        part = new_part(self, record)
        sizes.append(sum(path.stat().st_size for name in ("shards", "partial") for path in self_paths(name)))
        return part

    def self_paths(name):
        return (tmp_path / "cache" / name).iterdir()

    def read(first):
        for step in range(12):
            record = shards[(first + step) % 6]
            right.append(content(cache, record) == original(tmp_path, record))

    monkeypatch.setattr(CacheFolder, "_new_part", measured)
    right: list[bool] = []
    readers = [threading.Thread(target=read, args=(first,)) for first in range(6)]
    for thread in readers:
        thread.start()
    for thread in readers:
        thread.join(60)
    assert right == [True] * 72
    assert max(sizes) == 3 * SIZE


def test_a_window_larger_than_the_cache(cache, shards):
    message = (
        "data.cache_gb bounds the shard cache to 120,000 bytes, but the shards that are needed at once have "
        "160,000 bytes: raise data.cache_gb, or in a new run lower data.window_shards"
    )
    with pytest.raises(ConfigError, match=message):
        cache.window(shards[:4])


def test_a_shard_larger_than_the_cache(bucket, shards, tmp_path):
    with pytest.raises(ConfigError, match="39,999 bytes, but the shards that are needed at once have 40,000"):
        ShardCache(URL, tmp_path / "cache", SIZE - 1).open(shards[0])


def test_other_bytes_of_the_same_size(cache, bucket, shards, tmp_path):
    bucket.write(shards[0], bytes(SIZE))
    with pytest.raises(PipelineError, match=r"^s3://bucket/zinc/train/0.arrow: the content is not .*; upload"):
        cache.open(shards[0])
    assert order(bucket) == [0, 0]
    assert held(tmp_path, shards) == set()
    assert partial(tmp_path) == []


@pytest.mark.parametrize(("size", "found"), [(0, "0"), (SIZE - 1, "39,999"), (SIZE + 1, "more than 40,000")])
def test_an_object_of_another_size(cache, bucket, shards, tmp_path, size, found):
    bucket.write(shards[0], (original(tmp_path, shards[0]) + b"x")[:size])
    message = f"^s3://bucket/zinc/train/0.arrow: has {found} bytes, expected 40,000; upload the dataset again"
    with pytest.raises(PipelineError, match=message):
        cache.open(shards[0])
    assert held(tmp_path, shards) == set()
    assert partial(tmp_path) == []


def test_a_transfer_that_went_wrong_once_is_repeated(cache, bucket, shards, tmp_path, monkeypatch):
    read_blocks, damage = cache_module.read_blocks, [1, 0]

    def read(filesystem, path):
        for block in read_blocks(filesystem, path):
            yield bytes([block[0] ^ damage.pop(0)]) + block[1:]

    monkeypatch.setattr(cache_module, "read_blocks", read)
    assert content(cache, shards[0]) == original(tmp_path, shards[0])
    assert order(bucket) == [0, 0]


def test_a_dataset_that_was_replaced_serves_no_stale_bytes(cache, bucket, shards, tmp_path):
    content(cache, shards[0])
    (tmp_path / "zinc" / shards[0].file).write_bytes(bytes(SIZE))
    bucket.put(tmp_path / "zinc")
    assert content(cache, FileRecord.of(tmp_path / "zinc", shards[0].file)) == bytes(SIZE)


def test_a_missing_object_is_not_asked_for_again(cache, bucket, shards, monkeypatch):
    bucket.remove(shards[0])
    reads = interrupted_reads(monkeypatch, [])
    with pytest.raises(PipelineError, match=r"^s3://bucket/zinc/train/0.arrow: no such object; upload the dataset"):
        cache.open(shards[0])
    assert len(reads) == 1


def test_a_failure_in_the_background_is_left_to_open(cache, bucket, shards, tmp_path):
    bucket.remove(shards[0])
    cache.window(shards[:2])
    wait_until(lambda: held(tmp_path, shards) == {1} and not cache._threads)
    with pytest.raises(PipelineError, match="no such object"):
        cache.open(shards[0])
    bucket.put(tmp_path / "zinc")
    assert content(cache, shards[0]) == original(tmp_path, shards[0])


def test_errors_that_pass_are_waited_out(cache, bucket, shards, tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.remote._BLOCK_BYTES", SIZE // 3)
    reads = interrupted_reads(monkeypatch, [ConnectionResetError("reset"), TimeoutError(), OSError(5, "server error")])
    assert content(cache, shards[0]) == original(tmp_path, shards[0])
    assert len(reads) == 4


def test_an_unreachable_server(shards, tmp_path, monkeypatch, unused_port, new_clients):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused_port}")
    reads = interrupted_reads(monkeypatch, [])
    cache = ShardCache(URL, tmp_path / "cache", 3 * SIZE)
    message = r"^s3://bucket/zinc/train/0.arrow: cannot be read \(Could not connect .*\); check the network"
    with pytest.raises(PipelineError, match=message) as caught:
        cache.open(shards[0])
    assert "\n" not in str(caught.value)
    assert len(reads) == cache_module._ATTEMPTS
    with pytest.raises(PipelineError, match=r"^s3://bucket/zinc: cannot be read \(Could not connect"):
        cache.check(shards)


def test_no_credentials(shards, monkeypatch, tmp_path, server, new_clients):
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    reads = interrupted_reads(monkeypatch, [])
    message = r"^s3://bucket/zinc/train/0.arrow: no credentials \(Unable to locate .*\); set them in the environment"
    with pytest.raises(PipelineError, match=message):
        ShardCache(URL, tmp_path / "cache", 3 * SIZE).open(shards[0])
    assert len(reads) == 1


def test_check_finds_what_is_missing_or_of_another_size(cache, bucket, shards, tmp_path):
    cache.check(shards)
    bucket.write(shards[3], b"short")
    with pytest.raises(PipelineError, match=r"^s3://bucket/zinc/train/3.arrow: has 5 bytes, expected 40,000; upload"):
        cache.check(shards)
    bucket.remove(shards[3])
    with pytest.raises(PipelineError, match=r"^s3://bucket/zinc/train/3.arrow: no such object; upload"):
        cache.check(shards)
    bucket.put(tmp_path / "zinc")
    cache.check(shards)
    bucket.write(shards[3], b"short")
    with pytest.raises(PipelineError, match="has 5 bytes, expected 40,000"):  # not what the listing of `check` said
        cache.open(shards[3])


_READER = """
import hashlib, sys
from pathlib import Path
from data_pipeline.manifest import FileRecord
from hmoe_ds.data.cache import ShardCache

_, url, folder, source, bound = sys.argv
shards = [FileRecord.of(Path(source), f"train/{index}.arrow") for index in range(6)]
print("ready", flush=True)
sys.stdin.readline()
cache = ShardCache(url, folder, int(bound))
cache.window(shards)
for record in shards:
    with cache.open(record) as file:
        assert hashlib.blake2b(file.read(), digest_size=16).hexdigest() == record.blake2b
print("done", flush=True)
"""


def test_processes_that_share_a_folder_download_each_shard_once(bucket, server, shards, tmp_path):
    bucket.put(tmp_path / "zinc")
    arguments = [sys.executable, "-c", _READER, URL, tmp_path / "cache", tmp_path / "zinc", str(6 * SIZE)]
    base = {name: value for name, value in os.environ.items() if name != "AWS_ENDPOINT_URL"}
    readers = [
        subprocess.Popen(
            arguments, cwd=ROOT, env=base | {name: server}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in ("AWS_ENDPOINT_URL", "FSSPEC_S3_ENDPOINT_URL")
    ]
    try:
        assert [reader.stdout.readline() for reader in readers] == ["ready\n"] * 2
        for reader in readers:
            reader.stdin.write("go\n")
            reader.stdin.flush()
        assert [reader.communicate(timeout=60)[0] for reader in readers] == ["done\n"] * 2
    finally:
        for reader in readers:
            reader.kill()
    assert sorted(order(bucket)) == [0, 1, 2, 3, 4, 5]
    assert partial(tmp_path) == []


def test_a_killed_download_is_never_trusted(bucket, shards, tmp_path):
    bucket.put(tmp_path / "zinc")
    code = (
        "import data_pipeline.remote, os, time\n"
        "from hmoe_ds.data import cache as module; read = module.read_blocks\n"
        "def stuck(*arguments):\n"
        f"    data_pipeline.remote._BLOCK_BYTES = {SIZE // 4}\n"
        "    blocks = read(*arguments); yield next(blocks); yield next(blocks)\n"
        "    os.write(1, b'half\\n'); time.sleep(60)\n"  # one write: two threads download
        "module.read_blocks = stuck\n"
    )
    arguments = [sys.executable, "-c", code + _READER, URL, tmp_path / "cache", tmp_path / "zinc", str(6 * SIZE)]
    with subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            child.stdin.write("go\n")
            child.stdin.flush()
            assert [child.stdout.readline() for _ in range(2)] == ["ready\n", "half\n"]
        finally:
            child.kill()
    left = partial(tmp_path)
    assert left
    assert all(path.stat().st_size == SIZE for path in left)
    cache = ShardCache(URL, tmp_path / "cache", 3 * SIZE)
    assert partial(tmp_path) == []
    for record in shards:
        assert content(cache, record) == original(tmp_path, record)


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_other_storage(shards, tmp_path, protocol):
    url = f"file://{tmp_path}/zinc" if protocol == "file" else "memory://cache-test/zinc"
    if protocol == "memory":
        fsspec.filesystem("memory").put(f"{tmp_path}/zinc/", url + "/", recursive=True)
    cache = ShardCache(url, tmp_path / "cache", 3 * SIZE)
    cache.check(shards)
    for record in shards:
        assert content(cache, record) == original(tmp_path, record)


def test_a_prepared_dataset_reads_the_same_from_the_bucket(dataset, bucket, tmp_path):
    bucket.put(dataset)
    manifest = Manifest.load(URL)
    assert manifest == Manifest.load(dataset)
    assert verify(URL) == []
    cache = ShardCache(URL, tmp_path / "cache", 1 << 30)
    local = ShardStore(dataset, "train")
    records = manifest.splits["train"].shards
    cache.check(records)
    cache.window(records)
    assert len(records) == local.num_shards > 2
    for index, record in enumerate(records):
        with cache.open(record) as file:
            batch = pa.ipc.open_stream(file).read_next_batch()
        for ours, theirs in zip(shard_from_batch(batch), local.shard(index), strict=True):
            assert np.array_equal(ours, theirs)
