"""Everything that can be known to be wrong with a run before it starts, checked in one place."""

from __future__ import annotations

import math
from pathlib import Path

from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.remote import open_filesystem
from hmoe_ds.config import ConfigError, RunConfig
from hmoe_ds.config_checks import check_topology
from hmoe_ds.data.labelled import read_labelled
from hmoe_ds.data.mixture import Mixture
from hmoe_ds.data.plan import BatchPlan
from hmoe_ds.training.checkpoints.checkpoint_model import check_checkpoint_model
from hmoe_ds.training.checks.disk_check import check_disk
from hmoe_ds.training.checks.memory_check import check_memory
from hmoe_ds.training.deepspeed_config import deepspeed_config, monitor_sections
from hmoe_ds.training.machine import ranks_here, this_machine
from hmoe_ds.training.recording.monitors import check_packages
from hmoe_ds.training.recording.spool import read_delivery
from hmoe_ds.training.run_folder import check_resumable, check_run_folder, checkpoint_to_resume, open_datasets


def check_run(config: RunConfig, ranks: int, here: int | None = None) -> None:
    """Raise UsageError, mostly a ConfigError, if `config` cannot run; PipelineError where a later start may.

    Args:
        config: of the run.
        ranks: how many.
        here: of these on this machine; None: as many as a launcher says, or all.
    """
    if not config.run.out:
        raise ConfigError("run.out is not set: give the folder of the run, such as --run.out runs/first")
    if not config.data.paths:
        raise ConfigError("data.path is not set: give a dataset made by `hmoe prepare`, such as --data.path data/zinc")
    check_topology(config, ranks)
    if config.run.mirror:
        open_filesystem(config.run.mirror)
    check_run_folder(config)
    training = check_data(config)
    for table in config.probe.tables:
        read_labelled(table, config.probe.max_molecules, training.standardized)
    deepspeed_config(config)
    check_packages(monitor_sections(config))
    check_resumable(config, training.fingerprint)
    checkpoint = checkpoint_to_resume(config)
    if checkpoint is not None:
        check_checkpoint_model(config, checkpoint)
    if config.run.mlflow:
        read_delivery(Path(config.run.out))
    try:
        check_disk(config)
        if config.run.check_memory:
            check_memory(config, ranks, *training.mean_size(), this_machine(here or ranks_here(ranks)))
    except ConfigError as error:
        if checkpoint is None:
            raise
        # What is full now was not when the run began, so it may pass, and a later start may find room.
        raise PipelineError(str(error)) from error


def check_data(config: RunConfig) -> Mixture:
    """The training data of a run.

    Raises:
        ConfigError: there is none, or it cannot be mixed or does not fit the budgets.
        PipelineError: it is damaged or cannot be read.
    """
    try:
        training, validation = open_datasets(config)
        for mixture in (training, validation):
            mixture.check_files()
    except ConfigError:
        raise
    except UsageError as error:
        raise ConfigError(f"data.path: {error}") from error
    _check_targets(config, training)
    _check_mixable(config, training)
    _check_cache(config, training, validation)
    BatchPlan(training, config.data, config.optim.accumulation, config.run.seed)
    return training


def _check_targets(config: RunConfig, mixture: Mixture) -> None:
    """Raise ConfigError unless all datasets have what molecule-level objectives predict, if any is on."""
    objective = config.objective
    for name in ("fingerprint_weight", "descriptor_weight"):
        for store in mixture.stores:
            if getattr(objective, name) > 0 and not store.has_targets:
                raise ConfigError(
                    f"objective.{name} is {getattr(objective, name)}, but data.path {store.path} was prepared without "
                    f"targets: prepare it again with `hmoe prepare --targets`, or set objective.{name} to 0"
                )


# Options of `hmoe prepare` that datasets of a mixture must have in common, and why.
_COMMON_OPTIONS = {
    "validation_fraction": "scaffolds that one of them holds out for validation are in the training split of the other",
    "standardize": "the same substance would be two molecules",
    "rdkit": "versions of RDKit may write the same molecule and its scaffold in two ways",
}


def _check_mixable(config: RunConfig, mixture: Mixture) -> None:
    options = [{**store.manifest.options, "rdkit": store.manifest.versions["rdkit"]} for store in mixture.stores]
    for name, reason in _COMMON_OPTIONS.items():
        for path, other in zip(config.data.paths, options, strict=True):
            if other.get(name) != options[0].get(name):
                raise ConfigError(
                    f"data.path {config.data.paths[0]} was prepared with {name} {options[0].get(name)}, {path} with "
                    f"{other.get(name)}: {reason}; prepare them alike"
                )
    for number, store in enumerate(mixture.stores):
        for other_store in mixture.stores[:number]:
            if len(store) and store.fingerprint == other_store.fingerprint:
                raise ConfigError(
                    f"data.path {other_store.path} and {store.path} hold the same molecules: name one of them, "
                    "and give it more weight in data.weights"
                )


def _check_cache(config: RunConfig, training: Mixture, validation: Mixture) -> None:
    """Raise ConfigError unless data.cache_gb holds what a step and a validation look at."""
    data, needed = config.data, 0
    # The molecules of a step lie among those that are skipped; any shard is a fair sample of the dataset.
    passed = math.ceil(data.molecules_per_step / config.curriculum.lowest_competence)
    for store in training.stores:
        needed += store.cached_bytes_of(store.shards_of_a_step(passed, data.window_shards))
    counts = validation.first_molecules(data.validation_molecules)
    for store, molecules in zip(validation.stores, counts, strict=True):
        needed += store.cached_bytes_of(store.first_shards(molecules))
    if needed > data.cache_gb * 1e9:
        raise ConfigError(
            f"data.cache_gb is {data.cache_gb}, but a step and a validation look at shards of up to {needed / 1e9:.3g} "
            "x 10^9 bytes: raise data.cache_gb, or in a new run lower data.window_shards"
        )
