"""Arguments that several subcommands have, and the types of their values."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

from data_pipeline.execution.cores import usable_cores

Result = dict[str, Any]
Run = Callable[[argparse.Namespace, list[str]], Result]
# Makes the parser of a subcommand, from its name, what runs it and its help.
Command = Callable[[str, Run, str], argparse.ArgumentParser]

SOURCES_HELP = "file, URL, pattern, folder, nci5k or synth:N (docs/sources.md)"
MODEL_HELP = "folder made by hmoe export, or owner/name on the Hugging Face hub"


def add_columns(sub: argparse.ArgumentParser) -> None:
    """How a source is read."""
    sub.add_argument("--format", help="of the files, such as sdf (default: each tells its own)")
    sub.add_argument("--smiles-column", help="column with SMILES, in files with a header")
    sub.add_argument("--id-column", help="column with identifiers, in files with a header")


def add_workers(sub: argparse.ArgumentParser) -> None:
    """Processes of a command that works on many molecules."""
    help = "processes (default: one per core that this process may use)"
    sub.add_argument("--workers", type=positive, default=usable_cores(), help=help)


def add_no_standardize(sub: argparse.ArgumentParser, default: bool | None = True) -> None:
    """Whether molecules are brought into their standard form."""
    help = "keep salts, charges and functional groups as they are written"
    sub.add_argument("--no-standardize", dest="standardize", action="store_false", default=default, help=help)


def size_in_bytes(text: str) -> int:
    """Such as 2GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 2GiB or 800MiB")
    number, unit = match.groups()
    return int(float(number) * 1024 ** " KMGT".index(unit.upper() or " "))


def whole(text: str) -> int:
    """0, 1, ..."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def positive(text: str) -> int:
    """1, 2, ..."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)
