"""A run that dies while it writes."""

import json

import pytest

from tests.distributed.harness import run_module


@pytest.mark.timeout(400)
def test_a_run_that_dies_while_it_writes_ends_as_if_it_had_not(dataset, tmp_path):
    """At some of its operations on files; `make soak` takes all."""
    run_module("tests.faults.crash_runs", 1, [str(dataset), str(tmp_path), "150", "4"], timeout=380)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["deaths"] == summary["starts"] > 50
    assert set(summary["kinds"]) == {"flush", "make", "open", "remove", "rename", "save", "write"}
