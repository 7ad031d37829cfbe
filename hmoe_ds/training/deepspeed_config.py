"""DeepSpeed's settings: the ZeRO file, and what RunConfig decides. Imports no DeepSpeed, so that checks are quick."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from hmoe_ds.config import ConfigError, RunConfig

# What RunConfig decides and a DeepSpeed JSON must therefore leave out.
_OWNED_KEYS = {
    "train_batch_size": "data.molecules_per_step",
    "train_micro_batch_size_per_gpu": "data.molecules_per_step",
    "gradient_accumulation_steps": "optim.accumulation",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim.learning_rate and its neighbours",
    "scheduler": "optim.warmup_steps and optim.min_ratio",
    "bf16": "parallel.precision",
    "fp16": "parallel.precision",
    "amp": "parallel.precision",
    "torch_autocast": "parallel.precision",
    "expert_parallel": "parallel.ep_size",
    "data_efficiency": "data section",
    "curriculum_learning": "data section",
}


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """The DeepSpeed settings of a run: the ZeRO file, and what RunConfig decides.

    Raises:
        ConfigError: the file cannot be read, or sets something that RunConfig decides.
    """
    parallel = config.parallel
    if parallel.deepspeed_config is None:
        text = (resources.files("ds_configs") / f"zero{parallel.zero_stage}.json").read_text()
        settings = json.loads(text)
    else:
        settings = _read_json(Path(parallel.deepspeed_config))
    name = parallel.deepspeed_config or f"ds_configs/zero{parallel.zero_stage}.json"
    for key, owner in _OWNED_KEYS.items():
        if key in settings:
            raise ConfigError(f"{name} sets {key!r}, which the run's {owner} decides: remove {key!r} from {name}")
    zero = settings.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage != parallel.zero_stage:
        raise ConfigError(
            f"{name} has zero_optimization.stage {stage} but parallel.zero_stage is {parallel.zero_stage}: "
            "make the two equal"
        )
    return {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 40,
        **settings,
        # The plan cuts batches, so DeepSpeed's own batch size is only a label.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.optim.accumulation,
        "gradient_clipping": config.optim.clip_norm,
        "bf16": {"enabled": parallel.precision == "bf16"},
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"parallel.deepspeed_config {path} cannot be read: {error}; give the path of a DeepSpeed JSON file"
        ) from error
    if not isinstance(settings, dict):
        raise ConfigError(f"parallel.deepspeed_config {path} holds no JSON object: give a DeepSpeed JSON file")
    return settings
