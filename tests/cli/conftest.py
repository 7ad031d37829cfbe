"""Commands in this process, which has imported what takes them longest."""

import json

import pytest

from hmoe_ds.cli import main


@pytest.fixture
def hmoe_here(capsys):
    """`hmoe` within this process, which has imported what takes the command longest: for the many small requests."""

    def run_here(*arguments, expect=0):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            code = end.code
        out, err = capsys.readouterr()
        assert code == expect, f"exit {code}\n{out[-3000:]}\n{err[-3000:]}"
        return json.loads(out.splitlines()[-1]) if "--json" in arguments and expect == 0 else None, out, err

    return run_here
