"""An expert that splits is copied with master and moments, bit by bit, and nothing else changes."""

import json

import pytest

from tests.distributed.harness import TIMEOUT_SECONDS, arguments, run_module

SPLITS = {
    "router__groups": 2,
    "router__form": "flat",
    "router__experts_at_start": 4,
    "router__split_every": 1,
}


@pytest.mark.timeout(600)
def test_copies_are_exact_on_all_ranks_that_hold_them(dataset, tmp_path):
    layouts = [
        {},
        {"parallel__zero_stage": 2},
        {"parallel__zero_stage": 2, "parallel__offload_optimizer": "true"},
        {"parallel__precision": "bf16"},
        {"parallel__precision": "bf16", "parallel__zero_stage": 2},
    ]
    lines = [arguments(tmp_path / "unused", dataset, parallel__ep_size=2, **SPLITS | layout) for layout in layouts]
    run_module("tests.distributed.clone_ranks", 4, [json.dumps(lines)], TIMEOUT_SECONDS + 30 * len(lines))
