"""What a run would be, without running it: sizes, FLOPs, memory per GPU and traffic, from the configuration alone."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from hmoe_ds.config import RunConfig
from hmoe_ds.config_checks import check_topology
from hmoe_ds.model.size import (
    PackedSize,
    activation_bytes,
    count_by_part,
    count_parameters,
    flops_per_molecule,
    moe_layers,
    molecules_per_slice,
)
from hmoe_ds.training.checks.preflight import check_data
from hmoe_ds.training.deepspeed_config import deepspeed_config
from hmoe_ds.training.footprint import all_to_all_bytes, memory_per_rank, rank_batch

# ZeRO stage, and whether the optimizer is in host memory.
LAYOUTS = ((1, False), (2, False), (2, True), (3, False))


class MeanMolecule(NamedTuple):
    """Atoms and bonds of a molecule on average; `source` says of which molecules."""

    atoms: float
    bonds: float
    source: str


DRUG_LIKE = MeanMolecule(25.0, 27.0, "assumed, drug-like; --data.path takes them from a dataset")


def dry_run(config: RunConfig, ranks: int) -> dict[str, Any]:
    """The figures of a run on `ranks` ranks, as plain data; `describe_dry_run` makes text of them.

    Args:
        config: of the run; `data.path` and `run.out` may be empty.
        ranks: number of ranks, whatever this machine has.

    Raises:
        ConfigError: the configuration does not fit the ranks or the dataset.
    """
    check_topology(config, ranks)
    deepspeed_config(config)
    molecule = _mean_molecule(config)
    atoms, bonds = molecule.atoms, molecule.bonds
    in_slice = molecules_per_slice(config, atoms, bonds)
    part, slices = rank_batch(config, ranks, atoms, bonds), config.optim.accumulation
    flops = flops_per_molecule(config, atoms, bonds)
    share = 1 / (slices * ranks)
    fullest = PackedSize(part.molecules, config.data.atoms_per_step * share, config.data.bonds_per_step * share)
    return {
        "ranks": ranks,
        "model": dataclasses.asdict(config.model) | {"moe_layers": moe_layers(config.model)},
        "router": dataclasses.asdict(config.router),
        "parallel": dataclasses.asdict(config.parallel),
        "molecule": molecule._asdict(),
        "parameters": count_by_part(count_parameters(config.model, config.router, config.objective.molecule_heads)),
        "flops_per_molecule": dataclasses.asdict(flops) | {"total": flops.total},
        "flops_per_step": flops.total * in_slice * slices,
        "slices": slices,
        "molecules_per_step": in_slice * slices,
        "molecules_per_rank_and_step": part.molecules * slices,
        "per_rank_and_slice": dataclasses.asdict(part),
        "memory_per_rank": [_memory(config, ranks, *layout, molecule) for layout in LAYOUTS],
        "activations_at_full_budgets": activation_bytes(config, fullest, in_slice).total,
        "all_to_all_bytes_per_step": dataclasses.asdict(all_to_all_bytes(config, ranks, atoms, bonds)),
    }


def _mean_molecule(config: RunConfig) -> MeanMolecule:
    if not config.data.paths:
        return DRUG_LIKE
    atoms, bonds = check_data(config).mean_size()
    return MeanMolecule(atoms, bonds, f"mean of {', '.join(config.data.paths)}")


def _memory(config: RunConfig, ranks: int, stage: int, offload: bool, molecule: MeanMolecule) -> dict[str, Any]:
    memory = memory_per_rank(config, ranks, stage, offload, molecule.atoms, molecule.bonds)
    chosen = (stage, offload) == (config.parallel.zero_stage, config.parallel.offload_optimizer)
    labels = {"zero_stage": stage, "offload_optimizer": offload, "chosen": chosen}
    return labels | dataclasses.asdict(memory) | {"total": memory.total}


def describe_dry_run(figures: dict[str, Any]) -> str:
    """The figures as text, one subject per paragraph."""
    paragraphs = (_model_lines, _batch_lines, _memory_lines)
    return "\n\n".join("\n".join(lines(figures)) for lines in paragraphs)


def _model_lines(figures: dict[str, Any]) -> list[str]:
    model, router, count = figures["model"], figures["router"], figures["parameters"]
    parts = [name for name in count if name not in ("total", "active", "active_experts")]
    return [
        f"blocks      {model['lower_blocks']} lower and {model['upper_blocks']} upper, {model['moe_layers']} of these "
        f"H-MoE; width {model['hidden_size']}",
        f"experts     {_experts(router)} per H-MoE layer in {router['groups']} groups; "
        f"groups per molecule: {router['groups_per_molecule']}, experts per atom: {router['experts_per_atom']}",
        f"parameters  {_count(count['total'])}; an atom passes {_count(count['active'])}",
        *(f"  {name.replace('_', ' '):<16}{_count(count[name]):>9}" for name in parts),
        f"  {'chosen experts':<16}{_count(count['active_experts']):>9}",
    ]


def _experts(router: dict[str, Any]) -> str:
    start = router["experts_at_start"]
    return f"{start} at the start, up to {router['experts']}" if start else str(router["experts"])


def _batch_lines(figures: dict[str, Any]) -> list[str]:
    molecule, part, flops = figures["molecule"], figures["per_rank_and_slice"], figures["flops_per_molecule"]
    step, traffic = figures["flops_per_step"] / 1e12, figures["all_to_all_bytes_per_step"]
    without = " without migration" if figures["parallel"]["migration"] else ""
    return [
        f"molecule    {molecule['atoms']:.1f} atoms, {molecule['bonds']:.1f} bonds ({molecule['source']})",
        f"step        {figures['molecules_per_step']:,.0f} molecules in slices: {figures['slices']}; "
        f"{figures['molecules_per_rank_and_step']:,.0f} molecules per rank, ranks: {figures['ranks']}",
        f"slice       {part['molecules']:,.0f} molecules, {part['atoms']:,.0f} atoms, {part['bonds']:,.0f} bonds "
        "per rank",
        f"compute     {_number(flops['forward'] / 1e9)} GFLOP per molecule forward, {_number(flops['total'] / 1e9)} "
        f"with backward; {_number(step)} TFLOP per step, {_number(step / figures['ranks'])} per rank",
        f"all-to-all  {_gib(traffic['per_rank'])} GiB sent per rank and step, {_gib(traffic['total'])} by all ranks"
        + without,
    ]


def _memory_lines(figures: dict[str, Any]) -> list[str]:
    columns = ("parameters", "gradients", "optimizer", "communication", "activations", "update", "total", "host")
    widths = {name: max(8, len(name)) + 2 for name in columns}
    parallel = figures["parallel"]
    recomputed = "on" if parallel["activation_checkpointing"] else "off"
    rows = [
        f"{'*' if row['chosen'] else ' '} {row['zero_stage']}{' offload' if row['offload_optimizer'] else '':<10}"
        + "".join(f"{_gib(row[name]):>{width}}" for name, width in widths.items())
        for row in figures["memory_per_rank"]
    ]
    return [
        f"memory per rank in GiB, by ZeRO stage; ep_size {parallel['ep_size']}, {parallel['precision']}, activation "
        f"checkpointing {recomputed}",
        f"{'':<13}" + "".join(f"{name:>{width}}" for name, width in widths.items()),
        *rows,
        "* as configured. total = parameters + gradients + optimizer + the larger of (communication + activations) and "
        "update.",
        "Activations are an estimate for balanced routing; "
        f"{_gib(figures['activations_at_full_budgets'])} for a slice that fills the budgets of atoms and bonds.",
        "The CUDA context, NCCL's buffers and fragmentation come on top.",
    ]


def _count(number: int) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.2f}{letter}"
    return str(number)


def _gib(size: float) -> str:
    return _number(size / 2**30)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
