"""Compressed files: read as what they are, and never taken for whole when they are not."""

import re
import tracemalloc
from pathlib import Path

import pytest

from data_pipeline.errors import PipelineError
from data_pipeline.sources.streams import open_stream, split_compression
from tests.unit.data_pipeline.reading import COMPRESSORS, read

ROWS = [("C" * (row % 40 + 1), str(row * 7919)) for row in range(20_000)]
TEXT = "".join(f"{text} {record_id}\n" for text, record_id in ROWS).encode()


@pytest.fixture(params=COMPRESSORS)
def extension(request: pytest.FixtureRequest) -> str:
    return request.param


def content(path: Path) -> bytes:
    with open_stream(str(path)) as stream:
        return stream.read()


def test_rows_are_those_of_the_plain_file(tmp_path: Path, extension: str) -> None:
    for name in (f"a.smi{extension}", "a.smi", "noname"):
        (tmp_path / name).write_bytes(COMPRESSORS[extension](TEXT))
        assert read(tmp_path / name) == ROWS


def test_several_compressed_files_in_one(tmp_path: Path, extension: str) -> None:
    compress = COMPRESSORS[extension]
    path = tmp_path / f"a.smi{extension}"
    path.write_bytes(b"".join(compress(TEXT[first : first + 10_000]) for first in range(0, len(TEXT), 10_000)))
    assert content(path) == TEXT
    path.write_bytes(compress(b""))
    assert content(path) == b""


def test_a_truncated_file_never_looks_whole(tmp_path: Path, extension: str) -> None:
    whole = COMPRESSORS[extension](TEXT)
    path = tmp_path / f"a.smi{extension}"
    for length in (len(whole) - 1, len(whole) - 5, len(whole) // 2, 30, 12):
        path.write_bytes(whole[:length])
        with pytest.raises(PipelineError, match=rf"^{path}: the \w+ file is truncated; fetch it again$"):
            read(path)


def test_a_damaged_file(tmp_path: Path, extension: str) -> None:
    whole = COMPRESSORS[extension](TEXT)
    path = tmp_path / f"a.smi{extension}"
    for damaged in (whole[:200] + b"junk" * 50, whole[:1000] + b"junk" * 50 + whole[1200:], whole + b"junk" * 50):
        path.write_bytes(damaged)
        with pytest.raises(PipelineError, match=rf"^{path}: (not a readable|the) \w+ file .*fetch it again$"):
            read(path)


@pytest.mark.parametrize("data", [b"", b"CC one\n", b"BZh9 is text\n"])
def test_a_plain_file_with_the_extension(tmp_path: Path, extension: str, data: bytes) -> None:
    path = tmp_path / f"a.smi{extension}"
    path.write_bytes(data)
    begins = re.escape(repr(data[:4]))
    with pytest.raises(PipelineError, match=rf"^{path}: not a readable \w+ file: it begins with {begins}; fetch it"):
        read(path)


def test_text_that_begins_like_bzip2(tmp_path: Path) -> None:
    (tmp_path / "a.smi").write_bytes(b"BZh9 is text\n")
    assert content(tmp_path / "a.smi") == b"BZh9 is text\n"


def test_frames_that_zstd_skips(tmp_path: Path) -> None:
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"note"
    (tmp_path / "a.smi.zst").write_bytes(skipped + COMPRESSORS[".zst"](TEXT))
    assert content(tmp_path / "a.smi.zst") == TEXT


def test_memory_is_bounded(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"a.smi{extension}"
    path.write_bytes(COMPRESSORS[extension](bytes(60 << 20)))
    tracemalloc.start()
    ((text, _),) = read(path, format="smiles")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(text) == 1 << 20
    assert peak < 30 << 20


def test_names() -> None:
    assert split_compression("CID-SMILES.gz") == ("cid-smiles", "gzip")
    assert split_compression("a.SDF.BZ2") == ("a.sdf", "bz2")
    assert split_compression("a.smi.zst") == ("a.smi", "zstd")
    assert split_compression("a.smi") == ("a.smi", None)
