"""Lines are those of Python's text files, wherever the blocks that are read end."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.sources import lines
from data_pipeline.sources.lines import read_lines

PIECES = [b"C", b"\n", b"\r", b"\r\n", b"\xff", "\u00e9".encode(), "\u2028".encode(), b"\x0b", b"\x85", b" "]


def lines_of(data: bytes, block: int) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_BLOCK_BYTES", block)
        return list(read_lines("a.smi", io.BytesIO(data)))


@given(st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join), st.integers(1, 9), st.booleans())
def test_lines_are_those_of_a_text_file(data: bytes, block: int, mark: bool) -> None:
    data = b"\xef\xbb\xbf" + data if mark else b"C" + data
    expected = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", errors="surrogateescape")
    assert lines_of(data, block) == [line.removesuffix("\n") for line in expected]


@pytest.mark.parametrize("block", [1, 10, 64])
def test_a_long_line_is_cut(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_LENGTH", max(block, 10))
    limit = max(block, 10)
    data = b"one\n" + b"x" * 500 + b"\ntwo\n" + b"y" * 500
    assert lines_of(data, block) == ["one", "x" * limit, "two", "y" * limit]


def test_a_nul_becomes_what_no_smiles_has() -> None:
    assert lines_of(b"C\0C\n", 64) == ["C\ufffdC"]
