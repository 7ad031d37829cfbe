"""Dispatch over ranks equals one process, whatever is sent where (invariant 5 at the level of one layer)."""

import pytest

from tests.distributed.harness import run_module


@pytest.mark.parametrize(("ranks", "ep_size"), [pytest.param(2, 2, marks=pytest.mark.slow), (4, 2)])
def test_drawn_dispatches_equal_one_process(ranks, ep_size):
    run_module("tests.distributed.dispatch_ranks", ranks, [str(ep_size)])
