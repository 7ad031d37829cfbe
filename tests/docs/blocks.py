"""Code blocks of a page in Markdown that are marked as runnable, and the `hmoe` commands in all others.

A block is marked by `<!-- runnable -->` in the line above it, or by `<!-- runnable slow -->`.
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

MARK = re.compile(r"\s*<!-- runnable(?P<slow> slow)? -->")
COMMAND = re.compile(r"\s*(\$ )?(\.venv/bin/)?hmoe ")
FENCE = re.compile(r"\s*```(?P<language>\w*)")
# How the text of a block is run, by the language that its fence names.
LANGUAGES = {"": "bash", "bash": "bash", "python": "python"}


class Block(NamedTuple):
    """A marked block.

    Attributes:
        language: `bash` or `python`.
        text: its lines.
        line: the number of its first line in the page, from 1.
        slow: whether it is left out of `make test`.
    """

    language: str
    text: str
    line: int
    slow: bool


def marked_blocks(page: Path) -> list[Block]:
    """Blocks that are marked, in the order of the page.

    Raises:
        ValueError: a mark that marks nothing, or a block in a language that nothing runs.
    """
    lines, blocks = page.read_text().splitlines(), []
    for number, line in enumerate(lines):
        if "<!-- runnable" not in line:
            continue
        mark, fence = MARK.fullmatch(line), FENCE.fullmatch(lines[number + 1])
        if mark is None or fence is None or fence["language"] not in LANGUAGES:
            raise ValueError(f"{page}:{number + 1}: {line!r} is above {lines[number + 1]!r}; expected a block of code")
        first = number + 2
        end = next(n for n in range(first, len(lines)) if lines[n].strip() == "```")
        text = "\n".join(lines[first:end]) + "\n"
        blocks.append(Block(LANGUAGES[fence["language"]], text, first + 1, mark["slow"] is not None))
    return blocks


class Command(NamedTuple):
    """An `hmoe` command in a block of a shell's, marked or not: its arguments, and its line in the page, from 1."""

    arguments: list[str]
    line: int


def hmoe_commands(page: Path) -> list[Command]:
    """All that are written out: a command with `...` or with optional parts in brackets is left out."""
    commands, lines = [], page.read_text().splitlines()
    in_shell = fenced = False
    for number, line in enumerate(lines):
        fence = FENCE.match(line)
        if fence is not None:
            fenced = not fenced
            in_shell = fenced and fence["language"] in ("", "bash")
        start = COMMAND.match(line)
        if not in_shell or start is None:
            continue
        text, last = line[start.end() :], number
        while text.endswith("\\"):
            last += 1
            text = text[:-1] + lines[last]
        if not re.search(r"\.\.\.| \[", text):
            commands.append(Command(shlex.split(text, comments=True), number + 1))
    return commands
