"""How big a model is, from its configuration alone: parameters, FLOPs of a molecule, bytes of activations.

Closed forms over the layers as they are written in this package; tests hold them against the built model. Letters as in
the shape suffixes: D hidden width, F feed-forward widths, P gate width, E experts, G groups, C chosen groups, K choices
per atom, N atoms, M bonds, B molecules.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import get_args

from data_pipeline.errors import UsageError
from data_pipeline.schema import ATOM_FEATURE_SIZES, BOND_FEATURE_SIZES, DESCRIPTORS, FINGERPRINT_BINS
from hmoe_ds.config import ModelConfig, MoleculeHeads, Readout, RouterConfig, RunConfig

BYTES = {"fp32": 4, "bf16": 2}
# Gates and losses are computed in fp32 whatever the precision of the rest.
_WIDE = 4
_INDEX = 8
_ELEMENTS, _BOND_TYPES = ATOM_FEATURE_SIZES[0], BOND_FEATURE_SIZES[0]


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part.

    Args:
        embedding: of atom and bond features.
        lower: lower blocks.
        scaffold_gate: the gate of molecules.
        upper: message passing, norms and dense feed-forwards of the upper blocks, and the last norm.
        atom_gates: the gates of atoms.
        shared_experts: the experts that every atom passes.
        experts: all experts.
        heads: of the pretraining objectives.
        active_experts: those of the K experts per layer that an atom passes; part of `experts`.
    """

    embedding: int
    lower: int
    scaffold_gate: int
    upper: int
    atom_gates: int
    shared_experts: int
    experts: int
    heads: int
    active_experts: int

    @property
    def dense(self) -> int:
        """All but the experts: what every rank holds."""
        blocks = self.lower + self.upper + self.shared_experts
        return self.embedding + blocks + self.scaffold_gate + self.atom_gates + self.heads

    @property
    def total(self) -> int:
        return self.dense + self.experts

    @property
    def active(self) -> int:
        """What one atom passes: everything, with K of the E experts of each layer."""
        return self.dense + self.active_experts


def moe_layers(model: ModelConfig) -> int:
    """H-MoE layers: every `moe_every`-th of the upper blocks."""
    return model.upper_blocks // model.moe_every


def readout_width(readout: Readout, hidden_size: int) -> int:
    """Width W of what heads of molecules see (`readout.read_out`). Raises UsageError when there is no such readout."""
    if readout not in get_args(Readout):
        raise UsageError(f"readout is {readout!r}: expected one of {', '.join(get_args(Readout))}")
    return sum(1 if part == "size" else hidden_size for part in readout.split("+"))


def count_parameters(model: ModelConfig, router: RouterConfig, heads: MoleculeHeads) -> ParameterCount:
    """Parameters of `HMoEModel(model, router, heads=heads)`, exactly.

    A linear of m inputs and n outputs has m*n (+ n with bias), a layer norm 2D, a gated feed-forward of width F 3DF, a
    GINE convolution two D x D linears with bias and its epsilon.
    """
    width, layers = model.hidden_size, moe_layers(model)
    norm = 2 * width
    messages = norm + 2 * _linear(width, width) + 1
    dense_feed_forward = 3 * width * model.dense_size
    expert = 3 * width * router.expert_size
    atom_head = _linear(width, width) + _linear(width, _ELEMENTS)
    bond_head = _linear(2 * width, width) + _linear(width, _BOND_TYPES)
    seen = readout_width(heads.readout, width)
    molecule_heads = sum(_linear(seen, width) + _linear(width, outputs) for outputs in _molecule_outputs(heads))
    gate_layers = _linear(width, width) + _linear(width, router.gate_size)
    return ParameterCount(
        embedding=(sum(ATOM_FEATURE_SIZES) + 1 + sum(BOND_FEATURE_SIZES) + 1) * width,
        lower=model.lower_blocks * (messages + norm + dense_feed_forward),
        scaffold_gate=norm + gate_layers + router.groups * router.gate_size,
        upper=model.upper_blocks * (messages + norm) + (model.upper_blocks - layers) * dense_feed_forward + norm,
        atom_gates=layers * (width + router.experts) * router.gate_size,
        shared_experts=layers * 3 * width * router.shared_size,
        experts=layers * router.experts * expert,
        heads=atom_head + bond_head + molecule_heads,
        active_experts=layers * router.experts_per_atom * expert,
    )


def _molecule_outputs(heads: MoleculeHeads) -> list[int]:
    """Outputs of each head of molecules that there is."""
    outputs = {"fingerprint": FINGERPRINT_BINS, "descriptors": 2 * len(DESCRIPTORS)}
    return [outputs[name] for name in heads.names]


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


@dataclass(frozen=True)
class Flops:
    """Floating point operations of matrix products; a multiply-add counts as two.

    Args:
        forward: of the forward.
        backward: of the backward; with activation checkpointing also what it computes again.
    """

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Work:
    """What costs FLOPs in one or several steps; means and expectations may be fractions.

    Args:
        molecules: molecules.
        atoms: their atoms.
        atoms_hidden: those of them that are predicted.
        bonds_hidden: bonds that are predicted.
        pairs: pairs of molecules that the contrastive loss compares, all with all of their slice.
        routed: rows that pass an expert, over all H-MoE layers.
        view_molecules: bare scaffolds, which pass the lower blocks and the scaffold gate only.
        view_atoms: their atoms.
    """

    molecules: float
    atoms: float
    atoms_hidden: float
    bonds_hidden: float
    pairs: float
    routed: float
    view_molecules: float = 0.0
    view_atoms: float = 0.0


def training_flops(config: RunConfig, work: Work) -> Flops:
    """FLOPs of pretraining.

    A linear of m inputs and n outputs costs 2mn per row in the forward and, for the gradients of its input and of its
    weight, twice that in the backward. Messages, norms, softmax and the loss are elementwise and left out: they cost
    time through memory, not through arithmetic. With activation checkpointing the backward computes each block again
    up to its last product, whose result nothing needs.

    Args:
        config: of the run.
        work: what is in the steps.
    """
    model, router, layers = config.model, config.router, moe_layers(config.model)
    width, upper_dense = model.hidden_size, model.upper_blocks - moe_layers(model)
    dense_rows = model.lower_blocks * (work.atoms + work.view_atoms) + upper_dense * work.atoms
    moe_rows = layers * work.atoms
    messages = 4 * width * width
    blocks = (
        dense_rows * (messages + 6 * width * model.dense_size)
        + moe_rows * (messages + 2 * router.gate_size * (width + router.experts) + 6 * width * router.shared_size)
        + work.routed * 6 * width * router.expert_size
    )
    molecule_heads = config.objective.molecule_heads
    seen = readout_width(molecule_heads.readout, width)
    heads = (
        2
        * width
        * (
            work.atoms_hidden * (width + _ELEMENTS)
            + work.bonds_hidden * (2 * width + _BOND_TYPES)
            + work.molecules * sum(seen + size for size in _molecule_outputs(molecule_heads))
        )
    )
    scaffold_gate = 2 * (width * width + router.gate_size * (width + router.groups))
    gates = (work.molecules + work.view_molecules) * scaffold_gate + 2 * router.gate_size * work.pairs
    # Which expert of a family an atom goes to, as far as experts split; without gradient.
    descent = moe_rows * 2 * router.gate_size * router.experts if router.experts_at_start else 0.0
    forward = blocks + heads + gates
    last_products = 2 * width * (dense_rows * model.dense_size + moe_rows * router.shared_size)
    recomputed = blocks + descent - last_products if config.parallel.activation_checkpointing else 0.0
    return Flops(forward + descent, 2 * forward + recomputed)


def flops_per_molecule(config: RunConfig, atoms: float, bonds: float) -> Flops:
    """FLOPs of one molecule in pretraining, as expected from the configuration; without bare scaffolds.

    Args:
        config: of the run; the contrastive loss compares a molecule with all of its slice.
        atoms: atoms of the molecule.
        bonds: bonds of the molecule.
    """
    ratio = config.objective.mask_ratio
    work = Work(
        molecules=1,
        atoms=atoms,
        atoms_hidden=ratio * atoms,
        bonds_hidden=ratio * bonds,
        pairs=molecules_per_slice(config, atoms, bonds),
        routed=atoms * moe_layers(config.model) * config.router.experts_per_atom,
    )
    return training_flops(config, work)


def molecules_per_slice(config: RunConfig, atoms: float, bonds: float) -> float:
    """Molecules of one slice over all ranks: what the tightest of the three budgets allows, without rounding to runs.

    Args:
        config: of the run.
        atoms: mean atoms of a molecule.
        bonds: mean bonds of a molecule.
    """
    data = config.data
    budgets = [float(data.molecules_per_step), data.atoms_per_step / atoms]
    if bonds:
        budgets.append(data.bonds_per_step / bonds)
    return min(budgets) / config.optim.accumulation


@dataclass(frozen=True)
class PackedSize:
    """A packed batch: B molecules with N atoms and M bonds in all; means may be fractions."""

    molecules: float
    atoms: float
    bonds: float


@dataclass(frozen=True)
class ActivationBytes:
    """Estimated bytes of activations.

    Args:
        kept: held for the backward when the forward is done.
        working: on top of that at the worst moment: three tensors as wide as the widest in a block (gradients and what
            an all-to-all sends and receives), with activation checkpointing also the largest block itself; or what
            the contrastive loss computes on the way.
    """

    kept: float
    working: float

    @property
    def total(self) -> float:
        return self.kept + self.working


def activation_bytes(config: RunConfig, batch: PackedSize, slice_molecules: float) -> ActivationBytes:
    """An estimate of the activations of one forward and backward on one rank.

    Counted is what autograd keeps of each layer, in values of the run's precision unless said otherwise:

    * message passing: 5 D per atom (norm in and out, the two linears' inputs, the SiLU's input); messages are computed
      again in the backward, from states of bonds that all blocks share, D per bond;
    * feed-forward: 2 D + 4 F per atom (norm in and out; both halves, the activated half, their product);
    * H-MoE: 2 D + 4 F of the shared expert per atom, 2 D + 4 F per routed row (the row and its result), K rows per
      atom, as under balanced routing; the atom gate in fp32: its input (a copy, in bf16), P, 2 E, and indices;
    * scaffold gate: D per atom in fp32;
    * losses: the heads on the hidden atoms and bonds, and 6 bytes per pair of this rank's molecules and the slice's.

    Experts that compute in chunks (`router.max_received`) keep less than is counted.

    Args:
        config: of the run.
        batch: this rank's part of a slice.
        slice_molecules: molecules of the slice over all ranks.
    """
    size = BYTES[config.parallel.precision]
    dense_block, moe_block = _block_bytes(config, batch)
    layers = moe_layers(config.model)
    dense_blocks = config.model.lower_blocks + config.model.upper_blocks - layers
    pairs = batch.molecules * slice_molecules
    outside = _bytes_outside_blocks(config, batch) + 6 * pairs
    working = 3 * _widest_tensor_bytes(config, batch)
    if config.parallel.activation_checkpointing:
        inputs = size * config.model.hidden_size * (dense_blocks + layers) * batch.atoms
        return ActivationBytes(outside + inputs, max(max(dense_block, moe_block) + working, 12 * pairs))
    return ActivationBytes(outside + dense_blocks * dense_block + layers * moe_block, max(working, 12 * pairs))


def _block_bytes(config: RunConfig, batch: PackedSize) -> tuple[float, float]:
    """What a dense block and an H-MoE block keep."""
    model, router, size = config.model, config.router, BYTES[config.parallel.precision]
    width, choices = model.hidden_size, router.experts_per_atom
    messages = 5 * size * width * batch.atoms
    dense = size * (2 * width + 4 * model.dense_size)
    shared = size * (2 * width + 4 * router.shared_size)
    rows = choices * (size * (2 * width + 4 * router.expert_size) + 4 * _INDEX)
    wide_input = 0 if size == _WIDE else _WIDE * width
    gate = wide_input + _WIDE * (router.gate_size + 2 * router.experts) + _INDEX * router.candidates
    return messages + dense * batch.atoms, messages + (shared + rows + gate) * batch.atoms


def _widest_tensor_bytes(config: RunConfig, batch: PackedSize) -> float:
    model, router = config.model, config.router
    messages = batch.bonds * model.hidden_size
    routed = batch.atoms * router.experts_per_atom * max(model.hidden_size, router.expert_size)
    feed_forward = batch.atoms * max(model.dense_size, router.shared_size)
    return BYTES[config.parallel.precision] * max(messages, routed, feed_forward)


def _bytes_outside_blocks(config: RunConfig, batch: PackedSize) -> float:
    """Indices, states of bonds, scaffold gate, last norm and heads."""
    width, size, ratio = config.model.hidden_size, BYTES[config.parallel.precision], config.objective.mask_ratio
    # Of the embeddings, two for each feature and three for each row; the two ends of both directions of each bond.
    atom_indices, bond_indices = (2 * len(sizes) + 3 for sizes in (ATOM_FEATURE_SIZES, BOND_FEATURE_SIZES))
    indices = _INDEX * (atom_indices * batch.atoms + (bond_indices + 4) * batch.bonds)
    states = size * width * (batch.atoms + batch.bonds)
    readout = 4 * width + 3 * config.router.gate_size + 3 * config.router.groups
    scaffold_gate = _WIDE * (width * batch.atoms + readout * batch.molecules)
    atom_head = ratio * batch.atoms * (size * 3 * width + _WIDE * _ELEMENTS)
    bond_head = ratio * batch.bonds * (size * 5 * width + _WIDE * _BOND_TYPES)
    return indices + states + scaffold_gate + atom_head + bond_head + _molecule_head_bytes(config, batch)


def _molecule_head_bytes(config: RunConfig, batch: PackedSize) -> float:
    """The readout, shared by the heads; of each 2 D; its outputs and its targets in fp32. For the maximum also what it
    began with, what came out, and the states that it is of."""
    width, size, heads = config.model.hidden_size, BYTES[config.parallel.precision], config.objective.molecule_heads
    if not heads.names:
        return 0.0
    kept = sum(size * 2 * width + _WIDE * 2 * count for count in _molecule_outputs(heads))
    kept += size * readout_width(heads.readout, width)
    maximum = 0.0 if heads.readout == "mean" else size * width * (2 * batch.molecules + batch.atoms)
    return batch.molecules * kept + maximum


def count_by_part(count: ParameterCount) -> dict[str, int]:
    """The parts, the total and what an atom passes, by name."""
    return {**dataclasses.asdict(count), "total": count.total, "active": count.active}
