"""Whether a run fits into the memory of a machine, from estimates, before any rank has started."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from hmoe_ds.config import ConfigError, RunConfig
from hmoe_ds.config_checks import check_config, check_topology
from hmoe_ds.training.deepspeed_config import deepspeed_config
from hmoe_ds.training.footprint import RankMemory, memory_per_rank
from hmoe_ds.training.machine import Machine

# Activations are estimated too high by up to this factor (tests/unit/test_size.py). What an estimate leaves out, such
# as the libraries themselves, only adds to it; so what is refused would not have run.
_OVERESTIMATE = 1.35
_FACTORS = (2, 4, 8, 16)
_GIB = 2**30


def check_memory(config: RunConfig, ranks: int, atoms: float, bonds: float, machine: Machine) -> None:
    """Raise ConfigError when a run clearly needs more memory than there is.

    Args:
        config: of the run; it has passed the other checks.
        ranks: of the run, on all machines.
        atoms: mean atoms of a molecule.
        bonds: mean bonds of a molecule.
        machine: that has `machine.ranks` of them.
    """
    memory = _estimate(config, ranks, atoms, bonds)
    if _fits(memory, machine, _OVERESTIMATE):
        return
    mends: list[str] = []
    for family in _mends(config, ranks):
        able = (mend for mend in family if _can_run(mend))
        fitting = (mend.name for mend in able if _fits(_estimate(*mend[1:], atoms, bonds), machine, 1))
        mends += itertools.islice(fitting, 1)
    mend = f"set {', or '.join(mends)}" if mends else "no single setting is enough: combine some, or shrink the model"
    states = memory.parameters + memory.gradients
    raise ConfigError(
        f"this run needs about {_gib(memory.total)} GiB per rank (parameters and gradients {_gib(states)}, optimizer "
        f"{_gib(memory.optimizer)}, activations {_gib(memory.activations)}; in host memory {_gib(memory.host)}), but "
        f"{_available(machine)}: {mend} (--dry-run shows the estimate; run.check_memory false starts nevertheless)"
    )


def _estimate(config: RunConfig, ranks: int, atoms: float, bonds: float) -> RankMemory:
    parallel = config.parallel
    return memory_per_rank(config, ranks, parallel.zero_stage, parallel.offload_optimizer, atoms, bonds)


def _fits(memory: RankMemory, machine: Machine, overestimate: float) -> bool:
    """Whether it may fit, if its activations are estimated too high by this factor."""
    states = memory.parameters + memory.gradients + memory.optimizer
    activations = memory.activations / overestimate
    if machine.device is None:
        # A bucket that is larger than the model takes address space, but no memory.
        least = states + max(activations, memory.update) + memory.host
        return machine.ranks * least <= machine.host
    least = states + max(memory.communication + activations, memory.update)
    return least <= machine.device and machine.ranks * memory.host <= machine.host


def _available(machine: Machine) -> str:
    host = f"{_gib(machine.host / machine.ranks)} GiB of host memory free per rank ({machine.ranks} here)"
    if machine.device is None:
        return f"this machine has {host}"
    return f"this machine has {_gib(machine.device)} GiB on its smallest GPU and {host}"


class _Mend(NamedTuple):
    """What a user could set, in words, and the run that it makes."""

    name: str
    config: RunConfig
    ranks: int


def _mends(config: RunConfig, ranks: int) -> Iterator[list[_Mend]]:
    """Families of what helps in one way, from the least to the most of it; first those that leave results alone."""
    parallel, data, slices = config.parallel, config.data, config.optim.accumulation
    yield [_set(config, ranks, "parallel", activation_checkpointing=True)]
    yield [_set(config, ranks, "parallel", zero_stage=stage) for stage in range(parallel.zero_stage + 1, 4)]
    yield [_set(config, ranks, "parallel", zero_stage=2, offload_optimizer=True)]
    yield [_set(config, ranks, "parallel", ep_size=factor * parallel.ep_size) for factor in _FACTORS]
    yield [_Mend(f"more machines, {factor * ranks} ranks in all", config, factor * ranks) for factor in _FACTORS]
    yield [_set(config, ranks, "optim", accumulation=factor * slices) for factor in _FACTORS]
    budgets = {name: getattr(data, name) for name in ("molecules_per_step", "atoms_per_step", "bonds_per_step")}
    yield [
        _set(config, ranks, "data", **{name: budget // factor for name, budget in budgets.items()})
        for factor in _FACTORS
    ]


def _set(config: RunConfig, ranks: int, section: str, **changes: Any) -> _Mend:
    before = getattr(config, section)
    changed = {name: value for name, value in changes.items() if getattr(before, name) != value}
    name = " with ".join(f"{section}.{field} {str(value).lower()}" for field, value in changed.items())
    return _Mend(name, dataclasses.replace(config, **{section: dataclasses.replace(before, **changes)}), ranks)


def _can_run(mend: _Mend) -> bool:
    """Whether it passes the other checks."""
    try:
        check_config(mend.config)
        check_topology(mend.config, mend.ranks)
        deepspeed_config(mend.config)
    except ConfigError:
        return False
    return True


def _gib(size: float) -> str:
    return f"{size / _GIB:.3g}"
