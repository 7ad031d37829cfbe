"""The `hmoe` command: each subcommand is a thin call into the package.

Exit codes: 0 when the work is done, 1 when it could not be done, 2 for a usage error, 128 + n after signal n; those of
`pretrain` are in `training/exit_codes.py`.
`--json` makes the last line of standard output one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.execution.compiled import cache_environment
from data_pipeline.redact import redacted
from hmoe_ds.commands import doctor, downstream, inspect, prepare, pretrain, report
from hmoe_ds.commands.arguments import Run


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; -> its exit code."""
    os.environ.update(cache_environment())
    parser, options, rest = _parse(sys.argv[1:] if argv is None else list(argv))
    try:
        exit_code = _run(options, rest)
        sys.stdout.flush()
    except UsageError as error:
        print(f"{parser.prog} {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog} {options.command}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (PipelineError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            return 128 + signal.SIGPIPE
        print(f"{parser.prog} {options.command}: error: {redacted(str(error))}", file=sys.stderr)
        return 1
    return exit_code


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    result = options.run(options, rest)
    exit_code: int = result.pop("exit_code", 0)
    if options.json:
        print(json.dumps(result))
    return exit_code


def _reader_left() -> bool:
    """Whether nobody reads standard output any more (`hmoe inspect ... | head`); if so, send it nowhere from now on."""
    out = sys.stdout.fileno()
    poll = select.poll()
    poll.register(out, 0)
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), out)  # or Python complains of what is left when it ends
    return True


class _Parser(argparse.ArgumentParser):
    """Usage errors quote what was typed, but for credentials."""

    def error(self, message: str) -> NoReturn:
        super().error(redacted(message))


def _parse(argv: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace, list[str]]:
    parser = _Parser(prog="hmoe", description="Pretrain mixture-of-experts models for molecules.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Run, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print a JSON object as the last line")
        return sub

    prepare.add_command(command)
    inspect.add_command(command)
    pretrain_parser = pretrain.add_command(command)
    downstream.add_commands(command)
    report.add_command(command)
    doctor.add_command(command)
    if argv[:1] == ["pretrain"]:
        if {"-h", "--help"} & set(argv):
            options = argparse.Namespace(command="pretrain", run=pretrain.print_help(pretrain_parser), json=False)
            return parser, options, []
        options, rest = parser.parse_known_args(argv)
        return parser, options, rest
    return parser, parser.parse_args(argv), []


if __name__ == "__main__":
    sys.exit(main())
