"""Slots of experts: which of them live, and which slot of a family an atom goes to.

A layer has E slots, rows of its experts' weights; some are free until an expert splits into them (`allocation.py`). A
family is what one expert of the start has become: its slots share the logit, the weight and the bias of the first of
them, the root, so the gate chooses among families. Inside a family an atom i descends from the root through the splits
in the order of their generations: where the slot that it has reached split, at a unit direction r and a threshold c, it
goes to the new slot if cos(W h_i, r) > c. A slot splits after all splits that led to it and from it, so a split parts
only the atoms of one slot; and as the new slot starts as a copy, it changes no output. An atom never gets two slots of
one family.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmoe_ds.config import RouterConfig

# Logit of slots that are no roots. Finite, so that 0 times it is 0: their weight is exactly 0, and so is its gradient.
_NEVER = -1e30


def pool_of(slot: int, router: RouterConfig) -> int | None:
    """The pool of a slot: slots that share the load, and among which experts split; None where experts never split.

    Where groups choose, it is the slot's group: experts of a group are to share a rank, and groups have biases of their
    own. The scaffolds' experts of the form `additive` never split.
    """
    group, place = divmod(slot, router.experts // router.groups)
    match router.form:
        case "hard" | "soft":
            return group
        case "additive":
            return 0 if place else None
        case "flat":
            return 0


class FamilyLoad(NamedTuple):
    """Loads by families.

    Attributes:
        per_slot_E: at each root the load of its family over the family's slots; 0 elsewhere.
        mean_E: the same for all families of its pool together.
        excess_E: at each slot that came from a split, how much more load per slot lies on its side of it, among the
            slot and those that came from it, than on the other side; 0 elsewhere.
    """

    per_slot_E: Tensor
    mean_E: Tensor
    excess_E: Tensor


class ExpertSlots(nn.Module):
    """The slots of one layer. All buffers: they change by decisions that are the same on all ranks, not by gradients.

    At the start the first `experts_at_start / groups` slots of each group live, each the root of its own family.

    Args:
        router: sizes.

    Attributes:
        parent_E: the slot that a slot was split from; itself for a root, -1 for a free slot.
        generation_E: 0 for a root or a free slot; else above that of its parent and of its parent's earlier children.
        direction_EP: the unit direction of the split that a slot came from.
        threshold_E: its threshold, of a cosine.
        load_E: atoms since the last decision, over the global batches.
        pool_E: the pool of each slot; G where it has none.
    """

    parent_E: Tensor
    generation_E: Tensor
    direction_EP: Tensor
    threshold_E: Tensor
    load_E: Tensor
    pool_E: Tensor

    def __init__(self, router: RouterConfig) -> None:
        super().__init__()
        slot_E = torch.arange(router.experts)
        lives_E = slot_E % (router.experts // router.groups) < router.experts_at_start // router.groups
        self.register_buffer("parent_E", slot_E.where(lives_E, -1))
        self.register_buffer("generation_E", torch.zeros_like(slot_E))
        self.register_buffer("direction_EP", torch.zeros(router.experts, router.gate_size))
        self.register_buffer("threshold_E", torch.zeros(router.experts))
        self.register_buffer("load_E", torch.zeros(router.experts, dtype=torch.float64))
        pools = [pool_of(slot, router) for slot in range(router.experts)]
        pool_E = torch.tensor([router.groups if pool is None else pool for pool in pools], device="cpu")
        self.register_buffer("pool_E", pool_E, persistent=False)
        self._generations = router.split_generations

    @property
    def live_E(self) -> Tensor:
        """Which slots are not free; bool."""
        return self.parent_E >= 0

    @property
    def root_E(self) -> Tensor:
        """Which slots are roots; bool."""
        return self.live_E & (self.generation_E == 0)

    def families_only(self, logits_NE: Tensor) -> Tensor:
        """The logits with those of slots that are no roots so low that these have no weight and are never chosen."""
        return logits_NE.masked_fill(~self.root_E, _NEVER)

    @torch.no_grad()
    def descend(self, roots_NK: Tensor, key_NP: Tensor) -> Tensor:
        """The slots of K families that N atoms go to; [N, K] -> [N, K].

        Args:
            roots_NK: roots of the families; E, the number of slots, where there is none.
            key_NP: what the gate compares, W h.
        """
        slots = len(self.parent_E)
        score_NE = F.normalize(key_NP, dim=-1) @ self.direction_EP.to(key_NP.dtype).t()
        chosen_NK = roots_NK
        for generation in range(1, self._generations + 1):
            child_NK = self._children(generation)[chosen_NK]
            index_NK = child_NK.clamp(max=slots - 1)
            crosses_NK = score_NE.gather(1, index_NK) > self.threshold_E[index_NK]
            chosen_NK = child_NK.where((child_NK < slots) & crosses_NK, chosen_NK)
        return chosen_NK

    def _children(self, generation: int) -> Tensor:
        """The slot that each slot, or none (E), split into in a generation; E where it did not; -> [E + 1]."""
        slots = len(self.parent_E)
        parent_E = self.parent_E.where(self.generation_E == generation, slots)
        slot_E = torch.arange(slots, device=parent_E.device)
        child = torch.full((slots + 1,), slots, device=parent_E.device).scatter(0, parent_E, slot_E)
        child[slots] = slots  # where slots that came from no such split have been written
        return child

    def family_load(self, load_E: Tensor) -> FamilyLoad:
        """Loads of slots, whole numbers, as loads of families, and of the two sides of each split; float64."""
        load_E, size_E = load_E.double(), self.live_E.double()
        mean_E = self.pool_mean(load_E, self.live_E)
        excess_E = torch.zeros_like(load_E)
        # From the last split to the first: when a slot's turn comes, it has the load of all that came from it, and its
        # parent that of all that stayed there.
        for generation in range(self._generations, 0, -1):
            born_E = self.generation_E == generation
            parent_E = self.parent_E.where(born_E, 0)
            per_slot_E = load_E / size_E.clamp(min=1)
            excess_E = torch.where(born_E, per_slot_E - per_slot_E[parent_E], excess_E)
            load_E = load_E.index_add(0, parent_E, load_E * born_E)
            size_E = size_E.index_add(0, parent_E, size_E * born_E)
        per_slot_E = load_E / size_E.clamp(min=1) * self.root_E
        return FamilyLoad(per_slot_E, mean_E, excess_E)

    def pool_mean(self, value_E: Tensor, counted_E: Tensor) -> Tensor:
        """Mean over those slots of each slot's pool that are counted; -> [E]."""
        # Not by index_add, whose order of summation is nobody's on CUDA: ranks must agree to the last bit.
        same_EE = (self.pool_E.unsqueeze(1) == self.pool_E) & counted_E
        return (same_EE * value_E).sum(dim=1) / same_EE.sum(dim=1).clamp(min=1)
