"""`hmoe report`: a page on a run."""

from __future__ import annotations

import argparse

from hmoe_ds.commands.arguments import Command, Result, positive


def add_command(command: Command) -> None:
    """Declare it."""
    report = command("report", _report, "A page on a run: curves, scaffolds by group, atoms by expert, traffic.")
    report.add_argument("folder", metavar="RUN", help="folder of a run, finished or not")
    report.add_argument("--out", required=True, help="HTML file to write")
    report.add_argument("--data", metavar="DIR", help="dataset to route (default: the first one of the run)")
    report.add_argument(
        "--molecules", type=positive, default=2048, metavar="N", help="to route, of each split (default: 2048)"
    )


def _report(options: argparse.Namespace, rest: list[str]) -> Result:
    from hmoe_ds.report.build import write_report

    result = write_report(options.folder, options.out, options.data, options.molecules)
    print(f"report on step {result['step']} of {options.folder}: {options.out}")
    if result["missing"]:
        print(f"it has no part on routing. {result['missing']}")
    return result
