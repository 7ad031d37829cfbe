"""Everything that can be known to be wrong with a run before it starts, checked in one place."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.errors import PipelineError
from hmoe_ds.config import ConfigError, RunConfig, check_topology
from hmoe_ds.data.mixture import Mixture
from hmoe_ds.data.plan import BatchPlan
from hmoe_ds.training.deepspeed_config import deepspeed_config
from hmoe_ds.training.run_folder import check_resumable, open_datasets
from hmoe_ds.training.spool import read_delivery


def check_run(config: RunConfig, ranks: int) -> None:
    """Raise UsageError, mostly a ConfigError, if `config` cannot run on `ranks` ranks."""
    if not config.run.out:
        raise ConfigError("run.out is not set: give the folder of the run, such as --run.out runs/first")
    if not config.data.paths:
        raise ConfigError("data.path is not set: give a dataset made by `hmoe prepare`, such as --data.path data/zinc")
    check_topology(config, ranks)
    training = check_data(config)
    deepspeed_config(config)
    check_resumable(config, ranks, training.fingerprint)
    if config.run.mlflow:
        read_delivery(Path(config.run.out))


def check_data(config: RunConfig) -> Mixture:
    """The training data of a run; raises ConfigError if it is damaged, cannot be mixed or does not fit the budgets."""
    try:
        training, validation = open_datasets(config)
        training.check_files()
        validation.check_files()
    except PipelineError as error:
        raise ConfigError(f"data.path: {error}") from error
    _check_mixable(config, training)
    BatchPlan(training, config.data, config.optim.accumulation, config.run.seed)
    return training


# Options of `hmoe prepare` that datasets of a mixture must have in common, and why.
_COMMON_OPTIONS = {
    "validation_fraction": "scaffolds that one of them holds out for validation are in the training split of the other",
    "standardize": "the same substance would be two molecules",
}


def _check_mixable(config: RunConfig, mixture: Mixture) -> None:
    options = [store.manifest.options for store in mixture.stores]
    for name, reason in _COMMON_OPTIONS.items():
        for path, other in zip(config.data.paths, options, strict=True):
            if other.get(name) != options[0].get(name):
                raise ConfigError(
                    f"data.path {config.data.paths[0]} was prepared with {name} {options[0].get(name)}, {path} with "
                    f"{other.get(name)}: {reason}; prepare them alike"
                )
