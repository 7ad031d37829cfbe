"""Dynamic expert allocation: at intervals the hottest expert of a layer splits into a free slot, or into a dead one's.

Decided from loads over global batches, which are whole numbers, with ties by index: so alike on all ranks. What a split
means for routing is in `slots.py`; the weights are copied by `training/expert_clones.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hmoe_ds.config import RouterConfig
from hmoe_ds.data.hashing import hash64
from hmoe_ds.moe.gate import AtomGate
from hmoe_ds.moe.slots import ExpertSlots, pool_of


class Split(NamedTuple):
    """An expert that is to split.

    Attributes:
        parent: slot of the expert.
        slot: where its copy goes.
        generation: of the copy.
        reclaimed: whether a dead expert has to leave the slot first; else it is free.
        parent_load: atoms of the parent since the last decision.
        slot_load: atoms of the expert that leaves; 0 for a free slot.
        mean_load: their mean over the experts that may split.
    """

    parent: int
    slot: int
    generation: int
    reclaimed: bool
    parent_load: float
    slot_load: float
    mean_load: float


def plan_split(slots: ExpertSlots, router: RouterConfig) -> Split | None:
    """The split that a layer is due, if any: of the hottest expert that is hot enough and for which there is a slot.

    The copy goes to a slot of the same pool: a free one, in the group with the fewest experts; else that of
    the coldest expert that is cold enough, that no living expert was split from, and that leaves families enough.
    """
    table = _Table(slots, router)
    for parent in sorted(table.live, key=lambda slot: (-table.load[slot], slot)):
        if table.load[parent] < router.split_load * table.mean:
            return None
        slot = table.slot_for(parent)
        if slot is None:
            continue
        generation = table.next_generation(parent, without=slot)
        if generation <= router.split_generations:
            reclaimed = table.parent[slot] >= 0
            return Split(parent, slot, generation, reclaimed, table.load[parent], table.load[slot], table.mean)
    return None


class _Table:
    """The slots of a layer as plain numbers; see `ExpertSlots`.

    Attributes:
        live: slots of experts that may split.
        mean: their mean load.
    """

    def __init__(self, slots: ExpertSlots, router: RouterConfig) -> None:
        self.load: list[float] = slots.load_E.tolist()
        self.parent: list[int] = slots.parent_E.tolist()
        self.generation: list[int] = slots.generation_E.tolist()
        self._router = router
        self._pool = [pool_of(slot, router) for slot in range(router.experts)]
        self.live = [slot for slot, pool in enumerate(self._pool) if pool is not None and self.parent[slot] >= 0]
        self.mean = sum(self.load[slot] for slot in self.live) / len(self.live)

    def next_generation(self, parent: int, without: int) -> int:
        """Generation of the next split of `parent`, after the expert in slot `without` has left it."""
        family = [parent, *(child for child in self._children(parent) if child != without)]
        return 1 + max(self.generation[slot] for slot in family)

    def slot_for(self, parent: int) -> int | None:
        """Where a copy of `parent` would go."""
        pool = [slot for slot, pool in enumerate(self._pool) if pool == self._pool[parent] and slot != parent]
        free = [slot for slot in pool if self.parent[slot] < 0]
        if free:
            return min(free, key=lambda slot: (self._experts_beside(slot), slot))
        dead = [slot for slot in pool if self._is_dead(slot)]
        return min(dead, key=lambda slot: (self.load[slot], slot), default=None)

    def _is_dead(self, slot: int) -> bool:
        if self.load[slot] >= self._router.reclaim_load * self.mean or self._children(slot):
            return False
        roots = [one for one in self.live if self.parent[one] == one and self._pool[one] == self._pool[slot]]
        return slot not in roots or len(roots) > families_needed(self._router)

    def _children(self, slot: int) -> list[int]:
        return [child for child in self.live if self.parent[child] == slot and child != slot]

    def _experts_beside(self, slot: int) -> int:
        """Experts in the group of a slot."""
        size = self._router.experts // self._router.groups
        first = slot - slot % size
        return sum(parent >= 0 for parent in self.parent[first : first + size])


def families_needed(router: RouterConfig) -> int:
    """Families that a pool must keep, so that every atom finds as many as it may choose."""
    match router.form:
        case "hard":
            return math.ceil(router.experts_per_atom / router.groups_per_molecule)
        case "soft":
            return math.ceil(router.experts_per_atom / router.groups)
        case "additive":
            return router.experts_per_atom - router.groups_per_molecule
        case "flat":
            return router.experts_per_atom


def apply_split(gate: AtomGate, split: Split, direction_P: Tensor) -> None:
    """Let the split take effect in the gate; the expert in `split.slot` must be a copy of its parent from now on."""
    slots = gate.slots
    assert slots is not None
    slots.parent_E[split.slot] = split.parent
    slots.generation_E[split.slot] = split.generation
    slots.direction_EP[split.slot] = direction_P
    slots.threshold_E[split.slot] = 0
    gate.route_bias[split.slot] = 0  # of a root that was reclaimed; the other slots of a family have none


def split_direction(seed: int, layer: int, slot: int, step: int, router: RouterConfig) -> Tensor:
    """The unit direction at which the split into `slot` parts atoms, from where and when it is; -> [P], fp32."""
    generator = torch.Generator().manual_seed(int(hash64(seed, layer, slot, step)[0] >> 1))
    return F.normalize(torch.randn(router.gate_size, generator=generator), dim=0)
