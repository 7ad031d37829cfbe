"""The encoder: embedding, lower blocks, scaffold gate, upper blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hmoe_ds.config import ModelConfig, RouterConfig
from hmoe_ds.data.batch import Masks, MolBatch
from hmoe_ds.model.blocks import DenseBlock, HMoEBlock
from hmoe_ds.model.embedding import atom_embedding, bond_embedding
from hmoe_ds.moe.experts import Executor, LocalExecutor
from hmoe_ds.moe.forms import ScaffoldRouting, groups_at_random
from hmoe_ds.moe.gate import FINAL_STAGE, AtomRouting, RoutingStage, ScaffoldGate
from hmoe_ds.moe.layer import HMoELayer
from hmoe_ds.moe.migration import Migration

# Features of the most common atoms and bonds of ZINC, about as often as they occur there.
_COMMON_ATOMS = (
    *4 * [(5, 0, 3, 5, 1, 0, 1, 1, 1)],  # aromatic CH
    *3 * [(5, 0, 3, 5, 0, 0, 1, 1, 1)],  # aromatic C
    *2 * [(5, 0, 4, 5, 2, 0, 2, 0, 1)],  # CH2 in a ring
    *2 * [(5, 0, 4, 5, 2, 0, 2, 0, 0)],  # CH2 in a chain
    (5, 0, 4, 5, 3, 0, 2, 0, 0),  # CH3
    (5, 0, 3, 5, 0, 0, 1, 0, 0),  # C of a carbonyl
    (7, 0, 1, 5, 0, 0, 1, 0, 0),  # its O
    (6, 0, 2, 5, 0, 0, 1, 1, 1),  # aromatic N
    (6, 0, 3, 5, 1, 0, 1, 0, 0),  # NH of an amide
)
_COMMON_BONDS = (*4 * [(3, 0, 1)], *4 * [(0, 0, 0)], (0, 0, 1), (1, 0, 1))  # aromatic, single, in a ring, double


class Encoding(NamedTuple):
    """States of N atoms, and the routing that led to them.

    Attributes:
        batch: the molecules of these atoms: those that were given, unless molecules have migrated.
        masks: what was hidden of them.
        h_ND: the states.
        scaffold: the scaffold gate's decision for the molecules that were given.
        atoms: the atom gates' decisions for these atoms, one for each H-MoE layer.
    """

    batch: MolBatch
    masks: Masks | None
    h_ND: Tensor
    scaffold: ScaffoldRouting
    atoms: tuple[AtomRouting, ...]


class Encoder(nn.Module):
    """Atoms and bonds to atom states.

    Args:
        model: sizes.
        router: gate and experts.
        seed: of the experts and of the routing calibration; the rest takes torch's generator.
        executor: makes what runs the experts of each H-MoE layer.

    Attributes:
        recompute: compute the blocks again in the backward instead of keeping their activations.
        migration: moves molecules to the ranks of their groups, in training; None to leave them where they are.
    """

    recompute = False
    migration: Migration | None = None

    def __init__(self, model: ModelConfig, router: RouterConfig, seed: int, executor: Executor = LocalExecutor) -> None:
        super().__init__()
        width = model.hidden_size
        self._router = router
        self.atom_embedding = atom_embedding(width)
        self.bond_embedding = bond_embedding(width)
        self.lower = nn.ModuleList([DenseBlock(width, model.dense_size) for _ in range(model.lower_blocks)])
        self.scaffold_gate = ScaffoldGate(width, router)
        self.upper = nn.ModuleList()
        for number in range(1, model.upper_blocks + 1):
            if number % model.moe_every == 0:
                layer = HMoELayer(width, router, seed, layer=number, executor=executor)
                self.upper.append(HMoEBlock(width, layer))
            else:
                self.upper.append(DenseBlock(width, model.dense_size))
        self.norm = nn.LayerNorm(width)
        if not self.norm.weight.is_meta:
            self._calibrate(seed)

    def forward(self, batch: MolBatch, masks: Masks | None = None, stage: RoutingStage = FINAL_STAGE) -> Encoding:
        """Encode B molecules; states of hidden atoms and bonds start from the mask vector."""
        h_ND, bond_MD, scaffold = self._route(batch, masks, stage)
        routing = scaffold
        if self.migration is not None and masks is not None and self.training:
            batch, masks, h_ND, routing = self.migration(batch, masks, h_ND, scaffold)
            bond_MD = self._bond_states(batch, masks)
        edges_2M = batch.edge_index_2M
        atom_routings = []
        for block in self.upper:
            if isinstance(block, HMoEBlock):
                h_ND, atom_routing = self._run(block, h_ND, edges_2M, bond_MD, routing, batch.molecule_N, stage)
                atom_routings.append(atom_routing)
            else:
                h_ND = self._run(block, h_ND, edges_2M, bond_MD)
        return Encoding(batch, masks, self.norm(h_ND), scaffold, tuple(atom_routings))

    def route(self, batch: MolBatch, masks: Masks | None = None, stage: RoutingStage = FINAL_STAGE) -> ScaffoldRouting:
        """The scaffold gate's decision for B molecules, without what comes after it."""
        return self._route(batch, masks, stage)[2]

    def _route(
        self, batch: MolBatch, masks: Masks | None, stage: RoutingStage
    ) -> tuple[Tensor, Tensor, ScaffoldRouting]:
        """States of atoms and of bonds below the upper blocks, and the scaffold gate's decision."""
        h_ND = self.atom_embedding(batch.atom_features_N9, masks.atom_N if masks else None)
        bond_MD = self._bond_states(batch, masks)
        for block in self.lower:
            h_ND = self._run(block, h_ND, batch.edge_index_2M, bond_MD)
        # An acyclic molecule has no scaffold and goes by itself.
        key_B = torch.where(batch.scaffold_key_B == 0, batch.mol_key_B2[:, 0], batch.scaffold_key_B)
        return h_ND, bond_MD, self._choose_groups(h_ND, batch.molecule_N, batch.scaffold_mask_N, key_B, stage)

    def _bond_states(self, batch: MolBatch, masks: Masks | None) -> Tensor:
        """States of bonds, [M, D]."""
        return self.bond_embedding(batch.bond_features_M3, masks.bond_M if masks else None)

    def _choose_groups(
        self,
        h_ND: Tensor,
        molecule_N: Tensor,
        scaffold_mask_N: Tensor,
        key_B: Tensor,
        stage: RoutingStage = FINAL_STAGE,
    ) -> ScaffoldRouting:
        routing = self.scaffold_gate(h_ND, molecule_N, scaffold_mask_N, len(key_B), stage)
        return groups_at_random(routing, key_B, self._router) if self._router.group_choice == "random" else routing

    def _run(self, block: nn.Module, *inputs: Any) -> Any:
        if self.recompute and torch.is_grad_enabled():
            # Nothing in a block is random, so there is no generator state to keep.
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    def moe_layers(self) -> list[HMoELayer]:
        """The H-MoE layers, from below."""
        return [block.feed_forward for block in self.upper if isinstance(block, HMoEBlock)]

    def live_experts(self) -> Tensor | None:
        """How many experts of each H-MoE layer live, [L]; None when all live for good."""
        slots = [layer.gate.slots for layer in self.moe_layers()]
        counts = [one.live_E.sum() for one in slots if one is not None]
        return torch.stack(counts) if counts else None

    @torch.no_grad()
    def _calibrate(self, seed: int) -> None:
        """Set every layer's `route_scale` on chains of common atoms, as they pass the blocks without their experts.

        How alike molecules are decides how far their gates are from uniform, so states drawn at random will not do.
        """
        molecules, atoms = 64, 16
        generator = torch.Generator().manual_seed(seed)
        molecule_N = torch.arange(molecules).repeat_interleave(atoms)
        h_ND = self.atom_embedding(_draw(_COMMON_ATOMS, molecules * atoms, generator))
        first_M = torch.arange(molecules * atoms).view(molecules, atoms)[:, :-1].flatten()
        edges_2M = torch.stack([first_M, first_M + 1, first_M + 1, first_M]).view(2, 2, -1).transpose(1, 2).flatten(1)
        bond_MD = self.bond_embedding(_draw(_COMMON_BONDS, len(first_M), generator))
        for block in self.lower:
            h_ND = block(h_ND, edges_2M, bond_MD)
        routing = self._choose_groups(h_ND, molecule_N, torch.ones_like(molecule_N).bool(), torch.arange(molecules))
        for block in self.upper:
            h_ND = block.get_submodule("messages")(h_ND, edges_2M, bond_MD)
            if isinstance(block, HMoEBlock):
                block.feed_forward.calibrate(block.norm(h_ND), routing, molecule_N)


def _draw(table: Sequence[Sequence[int]], rows: int, generator: torch.Generator) -> Tensor:
    return torch.tensor(table)[torch.randint(len(table), (rows,), generator=generator)]
