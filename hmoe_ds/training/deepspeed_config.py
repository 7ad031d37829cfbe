"""DeepSpeed's settings: the ZeRO file, and what RunConfig decides. Imports no DeepSpeed, so that checks are quick."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from importlib import resources
from pathlib import Path
from typing import Any

from hmoe_ds.config import ConfigError, ParallelConfig, RunConfig
from hmoe_ds.training.recording import monitors

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
    "activation_checkpointing": "parallel.activation_checkpointing",
    "data_efficiency": "data section",
    "curriculum_learning": "data section",
}

# What a DeepSpeed JSON may set: ZeRO's buckets, communication and DeepSpeed's own reports. All else either changes what
# is computed, or does nothing here.
_FREE_KEYS = {
    "zero_optimization",
    "data_types",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "steps_per_print",
    "wall_clock_breakdown",
    "dump_state",
    "memory_breakdown",
    "comms_logger",
    "flops_profiler",
    *monitors.SECTIONS,
}
_ACCUMULATION_DTYPES = ("fp32", "bf16", "fp16")
# Not round_robin_gradients: with it, DeepSpeed 0.19.8 takes another parameter's master and moments for those of a
# parameter, when an expert splits and when a checkpoint moves to another topology.
_FREE_ZERO_KEYS = {
    "stage",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "use_multi_rank_bucket_allreduce",
    "allgather_partitions",
    "allgather_bucket_size",
    "overlap_comm",
    "offload_optimizer",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "log_trace_cache_warnings",
}


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """The settings of a run's engine: the ZeRO file without monitors (`monitors.py`), and what RunConfig decides.

    Raises:
        ConfigError: the file cannot be read, sets something that RunConfig decides, or something that cannot
            be had here.
    """
    settings = _read_settings(config.parallel)
    return {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 40,
        # DeepSpeed's would wait for the GPU twice in each slice; the recorder measures molecules/s without.
        "timers": {"throughput": {"enabled": False}},
        **{key: value for key, value in settings.items() if key not in monitors.SECTIONS},
        # The plan cuts batches, so DeepSpeed's own batch size is only a label.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.optim.accumulation,
        "gradient_clipping": config.optim.clip_norm,
        "bf16": {"enabled": config.parallel.precision == "bf16"},
    }


def monitor_sections(config: RunConfig) -> dict[str, Any]:
    """The sections of monitors in the settings of a run, by name. Raises ConfigError as `deepspeed_config`."""
    settings = _read_settings(config.parallel)
    return {key: value for key, value in settings.items() if key in monitors.SECTIONS}


def _read_settings(parallel: ParallelConfig) -> dict[str, Any]:
    """The content of the DeepSpeed JSON of a run, checked."""
    if parallel.deepspeed_config is None:
        name = f"zero{parallel.zero_stage}{'_offload' if parallel.offload_optimizer else ''}.json"
        settings = json.loads((resources.files("ds_configs") / name).read_text())
    else:
        name = parallel.deepspeed_config
        settings = _read_json(Path(name))
    _check_settings(settings, name, parallel)
    return settings


def _read_json(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"parallel.deepspeed_config {path} cannot be read: {error}; give the path of a DeepSpeed JSON file"
        ) from error
    if not isinstance(settings, dict):
        raise ConfigError(f"parallel.deepspeed_config {path} holds no JSON object: give a DeepSpeed JSON file")
    return settings


def _check_settings(settings: dict[str, Any], name: str, parallel: ParallelConfig) -> None:
    """Raise ConfigError for the first setting that conflicts with RunConfig, or that cannot be had here."""
    for key, owner in _OWNED_KEYS.items():
        if key in settings:
            raise ConfigError(f"{name} sets {key!r}, which the run's {owner} decides: remove {key!r} from {name}")
    _check_known(settings, _FREE_KEYS, name, "")
    monitors.check_sections(settings, name)
    zero = settings.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if not isinstance(zero, dict) or stage != parallel.zero_stage:
        raise ConfigError(
            f"{name} has zero_optimization.stage {stage} but parallel.zero_stage is {parallel.zero_stage}: "
            "make the two equal"
        )
    _check_known(zero, _FREE_ZERO_KEYS, name, "zero_optimization.")
    for key, value in zero.items():
        if key != "offload_optimizer" and not isinstance(value, (bool, int, float)):
            raise ConfigError(
                f"{name} has zero_optimization.{key} {value!r}: expected a number, true or false; leave it out for "
                "DeepSpeed's default (nothing fills in 'auto' here)"
            )
    dtypes = settings.get("data_types", {})
    if not isinstance(dtypes, dict) or dtypes.get("grad_accum_dtype", "fp32") not in _ACCUMULATION_DTYPES:
        raise ConfigError(
            f"{name} has data_types {dtypes!r}: expected an object with a grad_accum_dtype of "
            f"{', '.join(_ACCUMULATION_DTYPES)}"
        )
    offload = zero.get("offload_optimizer")
    device = offload.get("device") if isinstance(offload, dict) else offload
    if device not in (None, "none", "cpu"):
        raise ConfigError(
            f"{name} has zero_optimization.offload_optimizer.device {device!r}: expected 'cpu' or 'none'; "
            "offloading elsewhere is not supported"
        )
    if (device == "cpu") != parallel.offload_optimizer:
        raise ConfigError(
            f"{name} has zero_optimization.offload_optimizer.device {device!r} but parallel.offload_optimizer is "
            f"{parallel.offload_optimizer}: make the two agree"
        )


def _check_known(settings: dict[str, Any], known: Collection[str], name: str, prefix: str) -> None:
    for key in settings:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {prefix + close[0]!r}? " if close else ""
            raise ConfigError(
                f"{name} sets {prefix + key!r}, which is not supported here: {hint}remove it from {name} "
                f"(supported: {', '.join(sorted(known))})"
            )
