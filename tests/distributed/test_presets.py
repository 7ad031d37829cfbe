"""Every preset trains, made small: same structure, same ZeRO stage, same precision."""

import json
import math

import pytest

from hmoe_ds.config_parser import preset_names
from tests.distributed.harness import read_metrics, run_module
from tests.presets import shrunken


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    out = {preset: tmp_path_factory.mktemp("presets") / preset for preset in preset_names()}
    command_lines = [
        [f"--config={preset}", *shrunken(preset, ranks=2), f"--data.path={dataset}", f"--run.out={folder}"]
        for preset, folder in out.items()
    ]
    run_module("tests.distributed.run_all", 2, [json.dumps(command_lines)])
    return {preset: read_metrics(folder) for preset, folder in out.items()}


@pytest.mark.parametrize("preset", preset_names())
def test_a_shrunken_preset_trains(preset, runs):
    lines = runs[preset]
    assert [line["step"] for line in lines] == [1, 2]
    # null stands for what is not finite.
    assert all(value is not None and math.isfinite(value) for line in lines for value in line.values())
