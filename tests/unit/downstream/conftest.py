"""A small model that was not trained, as exported: what is tested here does not depend on how good it is."""

from pathlib import Path

import pytest

from hmoe_ds.config import ModelConfig, RouterConfig
from hmoe_ds.model.hmoe import HMoEModel

MODEL = ModelConfig(hidden_size=16, lower_blocks=1, upper_blocks=2, dense_size=24)
ROUTER = RouterConfig(groups=4, experts=8, experts_per_atom=2, expert_size=16, shared_size=16, gate_size=8)


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    HMoEModel(MODEL, ROUTER, seed=1).save_pretrained(folder, {"step": 5, "standardize": True})
    return folder
