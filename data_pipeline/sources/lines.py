"""A text file as lines: however it is broken, each line is bounded and none is lost."""

from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import BinaryIO

from data_pipeline.errors import PipelineError

# Bytes. What follows in a longer line is dropped; a SMILES of that length would be rejected anyway.
MAX_LINE_LENGTH = 1 << 20

_BLOCK_BYTES = 1 << 20
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def text_blocks(path: str, stream: BinaryIO) -> Iterator[bytes]:
    """The bytes of a text file in blocks of at most 1 MiB, its line ends all made `\\n`, without a byte order mark.

    Raises:
        PipelineError: the file is UTF-16.
    """
    start = stream.read(len(_UTF8_MARK))
    if start.startswith(_UTF16_MARKS):
        raise PipelineError(f"{path}: the file is UTF-16, not UTF-8; convert it with `iconv -f UTF-16 -t UTF-8`")
    held = b""  # the \r at the end of a block, which may belong to a \n
    for block in chain([start.removeprefix(_UTF8_MARK)], iter(partial(stream.read, _BLOCK_BYTES), b"")):
        block = held + block
        held = b"\r" if block.endswith(b"\r") else b""
        if b"\r" in block:
            block = block.removesuffix(held).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        yield block
    if held:
        yield b"\n"


def read_lines(path: str, stream: BinaryIO) -> Iterator[str]:
    """The lines of a text file without their ends, each of at most `MAX_LINE_LENGTH` bytes.

    Raises as `text_blocks`.
    """
    rest = b""  # the beginning of a line whose end has not been read yet
    for block in text_blocks(path, stream):
        first, last = block.find(b"\n"), block.rfind(b"\n")
        if first < 0:
            rest = (rest + block)[:MAX_LINE_LENGTH]
            continue
        yield from decoded((rest + block[:first])[:MAX_LINE_LENGTH] + block[first:last]).split("\n")
        rest = block[last + 1 :]
    if rest:
        yield decoded(rest)


def decoded(data: bytes) -> str:
    """UTF-8 as text. What is not UTF-8 becomes lone surrogates, and NULs, at which C code ends a text, U+FFFD."""
    text = data.decode("utf-8", "surrogateescape")
    return text.replace("\0", "\ufffd") if "\0" in text else text
