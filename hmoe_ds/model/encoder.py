"""The encoder: embedding, lower blocks, scaffold gate, upper blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hmoe_ds.config import ModelConfig, RouterConfig
from hmoe_ds.data.batch import MolBatch
from hmoe_ds.model.blocks import DenseBlock, HMoEBlock
from hmoe_ds.model.embedding import atom_embedding, bond_embedding
from hmoe_ds.moe.experts import Executor, LocalExecutor
from hmoe_ds.moe.gate import AtomRouting, ScaffoldGate, ScaffoldRouting
from hmoe_ds.moe.layer import HMoELayer


class Masks(NamedTuple):
    """What is hidden from the model: atoms (bool, N) and bonds (bool, M)."""

    atom_N: Tensor
    bond_M: Tensor


class Encoding(NamedTuple):
    """States of N atoms and the routing that led to them; `atoms` has one entry per H-MoE layer."""

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
    """

    recompute = False

    def __init__(self, model: ModelConfig, router: RouterConfig, seed: int, executor: Executor = LocalExecutor) -> None:
        super().__init__()
        width = model.hidden_size
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

    def forward(self, batch: MolBatch, masks: Masks | None = None) -> Encoding:
        """Encode B molecules; states of hidden atoms and bonds start from the mask vector."""
        h_ND = self.atom_embedding(batch.atom_features_N9, masks.atom_N if masks else None)
        bond_MD = self.bond_embedding(batch.bond_features_M3, masks.bond_M if masks else None)
        edges_2M, edge_MD = batch.edge_index_2M, bond_MD.repeat_interleave(2, dim=0)
        for block in self.lower:
            h_ND = self._run(block, h_ND, edges_2M, edge_MD)
        routing = self.scaffold_gate(h_ND, batch.molecule_N, batch.scaffold_mask_N, batch.num_molecules)
        atom_routings = []
        for block in self.upper:
            if isinstance(block, HMoEBlock):
                h_ND, atom_routing = self._run(block, h_ND, edges_2M, edge_MD, routing, batch.molecule_N)
                atom_routings.append(atom_routing)
            else:
                h_ND = self._run(block, h_ND, edges_2M, edge_MD)
        return Encoding(self.norm(h_ND), routing, tuple(atom_routings))

    def _run(self, block: nn.Module, *inputs: Any) -> Any:
        if self.recompute and torch.is_grad_enabled():
            # Nothing in a block is random, so there is no generator state to keep.
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    def moe_layers(self) -> list[HMoELayer]:
        """The H-MoE layers, from below."""
        return [block.feed_forward for block in self.upper if isinstance(block, HMoEBlock)]

    def _calibrate(self, seed: int) -> None:
        """Set every layer's `route_scale` on random states of unit RMS, as layer norms deliver them."""
        molecules, atoms, width = 64, 16, self.norm.normalized_shape[0]
        generator = torch.Generator().manual_seed(seed)
        routing = self.scaffold_gate.route(torch.randn(molecules, width, generator=generator))
        molecule_N = torch.arange(molecules).repeat_interleave(atoms)
        for layer in self.moe_layers():
            layer.calibrate(torch.randn(molecules * atoms, width, generator=generator), routing, molecule_N)
