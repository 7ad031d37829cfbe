"""`hmoe inspect`: what a folder is, and what a person wants to know of it first."""

from __future__ import annotations

import argparse

from hmoe_ds.commands.arguments import Command, Result


def add_command(command: Command) -> None:
    """Declare it."""
    inspect = command(
        "inspect", _inspect, "What a dataset, run, checkpoint, model or predictor is, and if it is whole."
    )
    inspect.add_argument("path", metavar="PATH", help="its folder; of a dataset also a URL")
    inspect.add_argument("--verify", action="store_true", help="read all files and compare their checksums")


def _inspect(options: argparse.Namespace, rest: list[str]) -> Result:
    from hmoe_ds.inspect.examine import examine

    report = examine(options.path, options.verify)
    print(report.text)
    return {"kind": report.kind, **report.figures, "exit_code": 1 if report.problems else 0}
