"""Presets made small enough to train here."""

import math

from hmoe_ds.config_parser import load_config


def shrunken(preset: str, ranks: int = 1) -> list[str]:
    """Overrides that make `preset` run in seconds on `ranks` ranks of a CPU.

    Widths, the number of upper blocks, batches and steps shrink. What a preset is stays: lower blocks, groups, experts,
    choices, how often a block is H-MoE, accumulation, ZeRO stage, precision, offload and activation checkpointing, and
    expert parallelism as far as the ranks go.
    """
    config = load_config(["--config", preset])
    slices = config.optim.accumulation
    small = {
        "model.hidden_size": 64,
        "model.upper_blocks": 2 * config.model.moe_every,
        "model.dense_size": 96,
        "router.expert_size": 32,
        "router.shared_size": 32 if config.router.shared_size else 0,
        "router.gate_size": 32,
        "data.molecules_per_step": 24 * slices,
        "data.atoms_per_step": 2048 * slices,
        "data.bonds_per_step": 2048 * slices,
        "data.window_shards": 2,
        "data.validation_molecules": 32,
        "optim.warmup_steps": 1,
        "parallel.ep_size": math.gcd(config.parallel.ep_size, ranks),
        "run.steps": 2,
        "run.log_every": 1,
        "run.validate_every": 0,
        "run.checkpoint_every": 0,
        "run.mlflow": "false",
    }
    return [f"--{name}={value}" for name, value in small.items()]
