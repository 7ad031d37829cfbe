"""Everything that can be known to be wrong with a run before it starts, checked in one place."""

from __future__ import annotations

from data_pipeline.errors import PipelineError
from hmoe_ds.config import ConfigError, RunConfig, check_topology
from hmoe_ds.data.plan import BatchPlan
from hmoe_ds.data.store import ShardStore
from hmoe_ds.training.deepspeed_config import deepspeed_config
from hmoe_ds.training.run_folder import check_resumable


def check_run(config: RunConfig, ranks: int) -> None:
    """Raise UsageError, mostly a ConfigError, if `config` cannot run on `ranks` ranks."""
    if not config.run.out:
        raise ConfigError("run.out is not set: give the folder of the run, such as --run.out runs/first")
    if not config.data.path:
        raise ConfigError("data.path is not set: give a dataset made by `hmoe prepare`, such as --data.path data/zinc")
    check_topology(config, ranks)
    try:
        store = ShardStore(config.data.path, "train")
        store.check_files()
        ShardStore(config.data.path, "validation").check_files()
    except PipelineError as error:
        raise ConfigError(f"data.path: {error}") from error
    BatchPlan(store, config.data, config.optim.accumulation, config.run.seed)
    deepspeed_config(config)
    check_resumable(config, ranks, store.fingerprint)
