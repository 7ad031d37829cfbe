"""A model so small that it costs nothing, with every part that a model has."""

from hmoe_ds.config import ModelConfig, RouterConfig

MODEL = ModelConfig(hidden_size=16, lower_blocks=1, upper_blocks=2, dense_size=24)
ROUTER = RouterConfig(groups=4, experts=8, experts_per_atom=2, expert_size=16, shared_size=16, gate_size=8)
