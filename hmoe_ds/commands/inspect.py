"""`hmoe inspect`: what a folder is, and what a person wants to know of it first."""

from __future__ import annotations

import argparse

from hmoe_ds.commands.arguments import Command, Result


def add_command(command: Command) -> None:
    """Declare it."""
    about = "What a dataset, a run, a checkpoint, a model or a predictor is, and whether it is whole."
    inspect = command("inspect", _inspect, about)
    inspect.add_argument("path", metavar="PATH", help="folder of one of them, or the URL of a dataset")
    inspect.add_argument("--verify", action="store_true", help="read files that have checksums, and compare them")


def _inspect(options: argparse.Namespace, rest: list[str]) -> Result:
    from hmoe_ds.inspect.examine import examine

    report = examine(options.path, options.verify)
    print(report.text)
    return {"kind": report.kind, **report.figures, "exit_code": 1 if report.problems else 0}
