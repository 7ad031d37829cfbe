"""One small run, with experts that split, and its report."""

from pathlib import Path

import pytest

from hmoe_ds.report.build import write_report
from tests.distributed.harness import train


@pytest.fixture(scope="session")
def run(tmp_path_factory, dataset) -> Path:
    """A run that was trained for some steps; its name has what a careless page would take for HTML."""
    out = tmp_path_factory.mktemp("runs") / "a <b>run & more"
    train(out, dataset, run__steps=12, run__validate_every=6, router__experts_at_start=4, router__groups=2,
          router__split_every=2, router__split_load=1.0, data__molecules_per_step=64)  # fmt: skip
    return out


@pytest.fixture(scope="session")
def report(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "report.html"
    write_report(run, out, molecules=300)
    return out
