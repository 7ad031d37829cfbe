"""`hmoe doctor`: what this machine has for pretraining, what is missing, the mend."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from hmoe_ds.commands.arguments import Command, Result


def add_command(command: Command) -> None:
    """Declare it."""
    doctor = command("doctor", _doctor, "What this machine has for pretraining, what is missing, the mend.")
    doctor.add_argument("--out", type=Path, metavar="DIR", help="also try this folder, to which a run would write")


def _doctor(options: argparse.Namespace, rest: list[str]) -> Result:
    from hmoe_ds.doctor.examine import examine

    findings = []
    for finding in examine(options.out):
        print(finding, flush=True)
        findings.append(finding)
    problems, notes = (sum(finding.level == level for finding in findings) for level in ("problem", "note"))
    verdict = "cannot pretrain" if problems else "can pretrain"
    print(f"this machine {verdict}; problems: {problems}, notes: {notes}")
    return {
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "problems": problems,
        "notes": notes,
        "exit_code": 1 if problems else 0,
    }
