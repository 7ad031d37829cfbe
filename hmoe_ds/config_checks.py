"""What no run can be configured to: ranges of single fields, and fields that do not go together.

`load_config` calls `check_config`; `check_topology` waits until the number of ranks is known.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from data_pipeline.redact import has_credentials, without_credentials
from hmoe_ds.config import (
    SECTIONS,
    ConfigError,
    DataConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    ProbeConfig,
    ProbeTable,
    RouterConfig,
    RunConfig,
    config_from_dict,
)

# Bound on t of the contrastive loss when it is learnt.
LEAST_LEARNED_TEMPERATURE = 0.01
# Above these no value makes sense on any machine: a width, a number of layers, experts, any other count.
_WIDTH, _DEPTH, _EXPERTS, _COUNT = 1 << 17, 1 << 10, 1 << 16, 2**31 - 1
# Section, field, least and greatest value. Every number of the tree is here, or has a check of its own below.
_RANGES: tuple[tuple[str, str, float, float], ...] = (
    ("model", "hidden_size", 1, _WIDTH),
    ("model", "lower_blocks", 1, _DEPTH),
    ("model", "upper_blocks", 1, _DEPTH),
    ("model", "moe_every", 1, _DEPTH),
    ("model", "dense_size", 1, _WIDTH),
    ("router", "groups", 1, _EXPERTS),
    ("router", "experts", 1, _EXPERTS),
    ("router", "groups_per_molecule", 1, _EXPERTS),
    ("router", "group_blocks", 1, _EXPERTS),
    ("router", "block_bonus", 0, 1e3),
    ("router", "experts_per_atom", 1, _EXPERTS),
    ("router", "guidance", 1e-6, 1e3),
    ("router", "top_p", 1e-6, 1),
    ("router", "expert_size", 1, _WIDTH),
    ("router", "shared_size", 0, _WIDTH),
    ("router", "gate_size", 1, _WIDTH),
    ("router", "temperature", 1e-3, 1e3),
    ("router", "group_balance_rate", 0, 1),
    ("router", "expert_balance_rate", 0, 1),
    ("router", "max_received", 1, _COUNT),
    ("router", "experts_at_start", 0, _EXPERTS),
    ("router", "split_every", 1, _COUNT),
    ("router", "split_load", 1, 1e6),
    ("router", "reclaim_load", 0, 1),
    ("router", "split_generations", 1, 16),
    ("data", "molecules_per_step", 1, _COUNT),
    ("data", "atoms_per_step", 1, _COUNT),
    ("data", "bonds_per_step", 1, _COUNT),
    ("data", "scaffold_run", 1, _COUNT),
    ("data", "window_shards", 1, _COUNT),
    ("data", "validation_molecules", 1, _COUNT),
    ("data", "cache_gb", 1e-6, 1e9),
    ("objective", "mask_ratio", 1e-3, 0.999),
    ("objective", "bond_weight", 0, 1e6),
    ("objective", "contrast_weight", 0, 1e6),
    ("objective", "contrast_temperature", 1e-3, 1e3),
    ("objective", "z_weight", 0, 1e6),
    ("objective", "balance_weight", 0, 1e6),
    ("objective", "entropy_weight", 0, 1e6),
    ("objective", "fingerprint_weight", 0, 1e6),
    ("objective", "descriptor_weight", 0, 1e6),
    ("curriculum", "competence_start", 0.01, 1),
    ("curriculum", "competence_steps", 0, _COUNT),
    ("curriculum", "atom_fade_steps", 0, _COUNT),
    ("curriculum", "temperature_start", 1e-3, 1e3),
    ("curriculum", "temperature_steps", 0, _COUNT),
    ("curriculum", "guidance_start", 0, 1e3),
    ("curriculum", "guidance_steps", 0, _COUNT),
    ("curriculum", "mask_start", 1e-3, 0.999),
    ("curriculum", "mask_steps", 0, _COUNT),
    ("optim", "learning_rate", 0, 1e3),
    ("optim", "min_ratio", 0, 1),
    ("optim", "warmup_steps", 0, _COUNT),
    ("optim", "decay_steps", 0, _COUNT),
    ("optim", "weight_decay", 0, 1e3),
    ("optim", "beta1", 0, 0.999999),
    ("optim", "beta2", 0, 0.999999),
    ("optim", "epsilon", 1e-30, 1),  # with 0 a parameter without a gradient becomes 0 / 0
    ("optim", "clip_norm", 0, 1e6),
    ("optim", "accumulation", 1, _COUNT),
    ("parallel", "ep_size", 1, _EXPERTS),
    ("parallel", "migration_budget", 1, 1e3),
    ("run", "steps", 1, _COUNT),
    ("run", "seed", 0, 2**31 - 1),
    ("run", "log_every", 1, _COUNT),
    ("run", "validate_every", 0, _COUNT),
    ("run", "checkpoint_every", 0, _COUNT),
    ("run", "keep_checkpoints", 0, _COUNT),
    ("run", "max_skipped", 1, _COUNT),
    ("run", "hang_seconds", 1, 1e6),
    ("probe", "every", 0, _COUNT),
    ("probe", "max_molecules", 10, _COUNT),
)

_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}

# Types of DeepSpeed's schedules, and what their schedule_config holds.
_DEEPSPEED_SCHEDULES = {
    "fixed_linear": {"total_curriculum_step", "difficulty_step"},
    "fixed_root": {"total_curriculum_step", "difficulty_step", "root_degree"},
    "fixed_discrete": {"difficulty", "max_step"},
}


def check_config(config: RunConfig) -> None:
    """Raise ConfigError for the first value that no run can have."""
    _check_types(config)
    _check_ranges(config)
    _check_layers(config)
    _check_choices(config.router)
    _check_blocks(config.router)
    _check_mixture(config.data)
    _check_credentials(config)
    _check_curriculum(config)
    _check_probe(config.probe)
    _check_folders(config)
    _check_slices(config.data, config.optim)
    _check_parallel(config.parallel, config.router)
    _check_allocation(config.router, config.parallel)
    _check_migration(config.router, config.parallel)
    _check_learned_temperature(config.objective)


def checked_config(content: Any, path: Path) -> RunConfig:
    """A configuration as it was noted in the file `path`. Raises ConfigError for one that no run can have."""
    try:
        config = config_from_dict(content)
        check_config(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config


def check_topology(config: RunConfig, ranks: int) -> None:
    """Raise ConfigError when `config` cannot be spread over `ranks` ranks."""
    ep_size = config.parallel.ep_size
    if ranks % ep_size:
        raise ConfigError(
            f"parallel.ep_size is {ep_size}, which does not divide the number of ranks {ranks}: "
            f"start a multiple of {ep_size} ranks or set parallel.ep_size to a divisor of {ranks}"
        )


def _check_types(config: RunConfig) -> None:
    """What a command line is asked for by its parser, for a tree that a file of others holds."""
    for section, kind in SECTIONS.items():
        _check_fields(getattr(config, section), kind, section)
    for table in config.probe.tables:
        _check_fields(table, ProbeTable, "probe.tables")


def _check_fields(values: object, kind: type, section: str) -> None:
    for name, hint in get_type_hints(kind).items():
        value = getattr(values, name)
        if not _is_of(value, hint):
            expected = (
                f"one of {', '.join(get_args(hint))}" if get_origin(hint) is Literal else _TYPES.get(hint, str(hint))
            )
            raise ConfigError(f"{section}.{name} is {value!r}: set it to {expected}")


def _is_of(value: object, hint: Any) -> bool:
    """Whether a value is of the type of a field; a switch is no number."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is UnionType:
        return any(_is_of(value, argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(_is_of(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    is_switch = isinstance(value, bool)
    return is_switch if hint is bool else not is_switch and isinstance(value, (int, float) if hint is float else hint)


def _check_ranges(config: RunConfig) -> None:
    for section, name, low, high in _RANGES:
        value = getattr(getattr(config, section), name)
        if not math.isfinite(value):
            raise ConfigError(f"{section}.{name} is {value}: set it to a finite number")
        if not low <= value <= high:
            allowed = f"at least {low}" if value < low and high == _COUNT else f"a value from {low} to {high}"
            raise ConfigError(f"{section}.{name} is {value}: set it to {allowed}")


def _check_layers(config: RunConfig) -> None:
    model, router = config.model, config.router
    if model.moe_every > model.upper_blocks:
        raise ConfigError(
            f"model.moe_every is {model.moe_every} with model.upper_blocks {model.upper_blocks}: "
            f"no H-MoE layer is left; set model.moe_every to at most {model.upper_blocks}"
        )
    if router.experts % router.groups:
        raise ConfigError(
            f"router.experts is {router.experts}, not divisible by router.groups {router.groups}: "
            f"set router.experts to a multiple of {router.groups}"
        )
    if router.groups_per_molecule > router.groups:
        raise ConfigError(
            f"router.groups_per_molecule is {router.groups_per_molecule} with router.groups {router.groups}: "
            f"set it to at most {router.groups}"
        )


def _check_choices(router: RouterConfig) -> None:
    per_atom = router.experts_per_atom
    if router.form == "additive":
        least, most = router.groups_per_molecule + 1, router.groups_per_molecule + router.candidates
        if not least <= per_atom <= most:
            raise ConfigError(
                f"router.experts_per_atom is {per_atom} with router.form additive, where the molecule chooses "
                f"{least - 1} of them and the atom the others from a pool of {router.candidates} experts: set it to a "
                f"value from {least} to {most}, or raise router.experts"
            )
    elif per_atom > router.candidates:
        where = "the chosen groups hold" if router.candidates < router.experts else "a layer has"
        raise ConfigError(
            f"router.experts_per_atom is {per_atom} but {where} {router.candidates} experts: "
            f"set it to at most {router.candidates}, or raise router.experts or router.groups_per_molecule"
        )


def _check_blocks(router: RouterConfig) -> None:
    blocks, per_molecule = router.group_blocks, router.groups_per_molecule
    if (blocks > 1) != (router.block_bonus > 0):
        raise ConfigError(
            f"router.group_blocks is {blocks} and router.block_bonus is {router.block_bonus}: set router.group_blocks "
            "above 1 and router.block_bonus above 0, or leave both out"
        )
    if blocks == 1:
        return
    if router.form != "hard" or router.group_choice != "learned" or per_molecule == 1:
        raise ConfigError(
            f"router.block_bonus is {router.block_bonus} with router.form {router.form}, router.group_choice "
            f"{router.group_choice} and router.groups_per_molecule {per_molecule}, where it changes nothing: set them "
            "to hard, learned and at least 2, or leave router.block_bonus and router.group_blocks out"
        )
    if router.groups % blocks or router.groups // blocks < per_molecule:
        raise ConfigError(
            f"router.group_blocks is {blocks} with router.groups {router.groups} and router.groups_per_molecule "
            f"{per_molecule}: set it to a divisor of {router.groups}, at most {router.groups // per_molecule}, so that "
            "a block has room for a molecule's groups"
        )


def _check_allocation(router: RouterConfig, parallel: ParallelConfig) -> None:
    start = router.experts_at_start
    if not start:
        return
    name = f"router.experts_at_start is {start}"
    if start > router.experts or start % router.groups:
        raise ConfigError(
            f"{name} with router.experts {router.experts} and router.groups {router.groups}: set it to a multiple of "
            f"{router.groups}, at most {router.experts}, or to 0"
        )
    chosen = router.experts_per_atom - (router.groups_per_molecule if router.form == "additive" else 0)
    candidates = dataclasses.replace(router, experts=start).candidates
    if candidates < chosen:
        raise ConfigError(
            f"{name}: an atom would choose {chosen} of {candidates} experts; raise router.experts_at_start, or lower "
            "router.experts_per_atom"
        )
    if not router.expert_balance_rate:
        raise ConfigError(
            f"{name} with router.expert_balance_rate 0, so that nothing would share the atoms of an expert that "
            "splits: set router.expert_balance_rate above 0"
        )
    if parallel.zero_stage == 3:
        raise ConfigError(
            f"{name} with parallel.zero_stage 3, under which experts are spread over ranks in parts and cannot split: "
            "set parallel.zero_stage to 1 or 2, or router.experts_at_start to 0"
        )


def _check_learned_temperature(objective: ObjectiveConfig) -> None:
    if objective.contrast_learned_temperature and objective.contrast_temperature < LEAST_LEARNED_TEMPERATURE:
        raise ConfigError(
            f"objective.contrast_temperature is {objective.contrast_temperature}, but a learned one is held above "
            f"{LEAST_LEARNED_TEMPERATURE}: start from more, or leave objective.contrast_learned_temperature out"
        )


def _check_migration(router: RouterConfig, parallel: ParallelConfig) -> None:
    if not parallel.migration:
        return
    if router.form != "hard":
        raise ConfigError(
            f"parallel.migration is set with router.form {router.form}, where a molecule's experts are on all ranks: "
            "leave parallel.migration out, or set router.form to hard"
        )
    if parallel.ep_size == 1 or router.groups % parallel.ep_size:
        raise ConfigError(
            f"parallel.migration is set with parallel.ep_size {parallel.ep_size} and router.groups {router.groups}: "
            "set parallel.ep_size to a divisor of router.groups above 1, so that a group is on one rank of several, or "
            "leave parallel.migration out"
        )


def _check_mixture(data: DataConfig) -> None:
    if isinstance(data.path, str) and data.path.startswith("["):
        raise ConfigError(
            f"data.path is {data.path!r}, which is no list of texts: write --data.path '[data/one, \"2024\"]', with "
            "quotes around what YAML takes for a number"
        )
    if isinstance(data.path, list) and not all(data.path):
        raise ConfigError(f"data.path is {data.path}, with an empty entry: leave it out")
    twice = [path for path in data.paths if data.paths.count(path) > 1]
    if twice:
        raise ConfigError(f"data.path names {twice[0]} twice: name it once, and give it more weight in data.weights")
    if data.weights is None:
        return
    if len(data.weights) != len(data.paths):
        raise ConfigError(
            f"data.weights has {len(data.weights)} numbers for {len(data.paths)} datasets in data.path: give one each, "
            "or set data.weights to null"
        )
    for path, weight in zip(data.paths, data.weights, strict=True):
        if not 0 < weight < float("inf"):
            raise ConfigError(
                f"data.weights gives {path} the weight {weight}: set it to a positive number, or leave the dataset out"
            )


def _check_credentials(config: RunConfig) -> None:
    """What a run is configured to is written into its folder and its checkpoints, and logged."""
    paths = [("data.path", path) for path in config.data.paths]
    paths.append(("run.mirror", config.run.mirror))
    for name, path in (*paths, *(("probe.tables", table.path) for table in config.probe.tables)):
        if has_credentials(path):
            raise ConfigError(
                f"{name} {without_credentials(path)} is given with credentials, which would be stored with the run: "
                "leave them out of the URL, and set them in the environment (docs/object_storage.md)"
            )


def _check_curriculum(config: RunConfig) -> None:
    curriculum = config.curriculum
    if curriculum.competence in ("linear", "root") and not curriculum.competence_steps:
        raise ConfigError(
            f"curriculum.competence is {curriculum.competence} with curriculum.competence_steps 0: set "
            "curriculum.competence_steps to the steps until all molecules are admitted"
        )
    if (curriculum.competence == "deepspeed") != (curriculum.deepspeed_schedule is not None):
        raise ConfigError(
            f"curriculum.competence is {curriculum.competence} and curriculum.deepspeed_schedule is "
            f"{curriculum.deepspeed_schedule}: set both, or leave curriculum.deepspeed_schedule out"
        )
    if curriculum.deepspeed_schedule is not None:
        _check_deepspeed_schedule(curriculum.deepspeed_schedule)
    if curriculum.temperature_steps and curriculum.temperature_start < config.router.temperature:
        raise ConfigError(
            f"curriculum.temperature_start is {curriculum.temperature_start}, but the temperature falls to "
            f"router.temperature {config.router.temperature}: set it to at least that"
        )
    if curriculum.guidance_steps and (config.router.form != "soft" or config.router.group_choice == "random"):
        raise ConfigError(
            f"curriculum.guidance_steps is {curriculum.guidance_steps} with router.form {config.router.form} and "
            f"router.group_choice {config.router.group_choice}, where lambda changes nothing: set them to soft and "
            "learned, or leave curriculum.guidance_steps out"
        )
    if curriculum.mask_steps and curriculum.mask_start > config.objective.mask_ratio:
        raise ConfigError(
            f"curriculum.mask_start is {curriculum.mask_start}, but the share of what is hidden grows to "
            f"objective.mask_ratio {config.objective.mask_ratio}: set it to at most that"
        )


def _check_deepspeed_schedule(schedule: dict[str, Any]) -> None:
    """Raise ConfigError unless it is a schedule whose difficulty rises to 100 percent."""
    name = "curriculum.deepspeed_schedule"
    keys = {"min_difficulty", "max_difficulty", "schedule_type", "schedule_config"}
    kind, settings = str(schedule.get("schedule_type")), schedule.get("schedule_config")
    if schedule.keys() != keys or kind not in _DEEPSPEED_SCHEDULES:
        raise ConfigError(
            f"{name} is {schedule}: give it {', '.join(sorted(keys))}; schedule_type is one of "
            f"{', '.join(_DEEPSPEED_SCHEDULES)}"
        )
    needed, listed = _DEEPSPEED_SCHEDULES[kind], kind == "fixed_discrete"
    if (
        not isinstance(settings, dict)
        or settings.keys() != needed
        or any(isinstance(value, list) != listed for value in settings.values())
    ):
        raise ConfigError(
            f"{name} has schedule_config {settings}: for {kind} give it the {'lists' if listed else 'numbers'} "
            f"{', '.join(sorted(needed))}"
        )
    lowest, highest = schedule["min_difficulty"], schedule["max_difficulty"]
    numbers = itertools.chain(*settings.values()) if listed else settings.values()
    for number in (lowest, highest, *numbers):
        if type(number) is not int or number < 1:
            raise ConfigError(f"{name} holds {number!r}: set it to a whole number of at least 1")
    if lowest > highest or highest != 100:
        raise ConfigError(
            f"{name} goes from min_difficulty {lowest} to max_difficulty {highest}: let it end at 100 percent, when "
            "all molecules are admitted"
        )
    if listed:
        _check_stairs(settings["difficulty"], settings["max_step"], lowest)


def _check_stairs(difficulty: list[int], last_steps: list[int], lowest: int) -> None:
    rising = all(values == sorted(set(values)) for values in (difficulty, last_steps))
    if not last_steps or len(difficulty) != len(last_steps) + 1 or not rising:
        raise ConfigError(
            f"curriculum.deepspeed_schedule has difficulty {difficulty} and max_step {last_steps}: give it rising "
            "numbers, one more of difficulty than of max_step"
        )
    if difficulty[0] < lowest or difficulty[-1] != 100:
        raise ConfigError(
            f"curriculum.deepspeed_schedule has difficulty {difficulty}: let it rise from min_difficulty {lowest} or "
            "more to 100 percent"
        )


def _check_probe(probe: ProbeConfig) -> None:
    titles = [table.title for table in probe.tables]
    for title in titles:
        if not re.fullmatch(r"[\w-]+", title, re.ASCII):
            raise ConfigError(
                f"probe.tables has the name {title!r}, which cannot be part of a metric's name: give the table a name "
                "of letters, digits, _ and -"
            )
        if titles.count(title) > 1:
            raise ConfigError(f"probe.tables has two tables of the name {title}: give each a name of its own")


def _check_folders(config: RunConfig) -> None:
    for name, folder in (("run.out", config.run.out), ("data.cache_dir", config.data.cache_dir)):
        if "://" in folder:
            raise ConfigError(
                f"{name} is the URL {folder}: give a folder of this machine, or one that is mounted on it"
            )


def _check_slices(data: DataConfig, optim: OptimConfig) -> None:
    least = optim.accumulation * data.scaffold_run
    if data.molecules_per_step < least:
        raise ConfigError(
            f"data.molecules_per_step is {data.molecules_per_step}, too few for optim.accumulation "
            f"{optim.accumulation} slices of data.scaffold_run {data.scaffold_run} molecules: "
            f"set it to at least {least}"
        )


def _check_parallel(parallel: ParallelConfig, router: RouterConfig) -> None:
    if router.experts % parallel.ep_size:
        raise ConfigError(
            f"parallel.ep_size is {parallel.ep_size}, which does not divide router.experts "
            f"{router.experts}: set parallel.ep_size to a divisor of {router.experts}"
        )
    if parallel.zero_stage not in (1, 2, 3):
        raise ConfigError(
            f"parallel.zero_stage is {parallel.zero_stage}: expected 1, 2 or 3 (stage 0 computes a wrong clip "
            "norm with expert parallelism, and stage 1 does all that it can); set parallel.zero_stage to 1, 2 or 3"
        )
    if parallel.offload_optimizer and parallel.zero_stage != 2:
        raise ConfigError(
            f"parallel.offload_optimizer is set with parallel.zero_stage {parallel.zero_stage}: "
            "it is supported with stage 2 only; set parallel.zero_stage to 2 or leave parallel.offload_optimizer out"
        )
