"""Dynamic expert allocation written as its definition says, as a tree with loops: for tests to compare with."""

import math

import torch

from hmoe_ds.moe.allocation import split_direction
from hmoe_ds.moe.slots import pool_of


def children(slot, parent, generation):
    """What was split from a slot, the first one first."""
    found = [child for child, of in enumerate(parent) if of == slot and child != slot]
    return sorted(found, key=lambda child: generation[child])


def tree(slots):
    return slots.parent_E.tolist(), slots.generation_E.tolist()


def slow_slot(slot, key_P, slots):
    """Where an atom ends that comes to `slot`."""
    for child in children(slot, *tree(slots)):
        direction = slots.direction_EP[child].to(key_P.dtype)
        if torch.dot(key_P, direction) / key_P.norm() > slots.threshold_E[child]:
            return slow_slot(child, key_P, slots)
    return slot


def root_of(slot, parent):
    return slot if parent[slot] == slot else root_of(parent[slot], parent)


def descendants(slot, parent, generation):
    """A slot and all that came from it."""
    return [slot] + [s for child in children(slot, parent, generation) for s in descendants(child, parent, generation)]


def sides(child, parent, generation):
    """The slots on both sides of the split that `child` came from: with it, and with what it was split from."""
    siblings = children(parent[child], parent, generation)
    later = siblings[siblings.index(child) + 1 :]
    stayed = [parent[child]] + [s for sibling in later for s in descendants(sibling, parent, generation)]
    return descendants(child, parent, generation), stayed


def mean_load(slots, load):
    return sum(load[slot] for slot in slots) / len(slots)


def sign(x):
    return (x > 0) - (x < 0)


def slow_family_balance(gate, load, router, rate):
    """Move the biases of families and the thresholds of splits."""
    parent, generation = tree(gate.slots)
    live = [slot for slot, of in enumerate(parent) if of >= 0]
    roots = [slot for slot in live if parent[slot] == slot]
    pool = [pool_of(slot, router) for slot in range(router.experts)]
    for root in roots:
        per_slot = mean_load(descendants(root, parent, generation), load)
        mean = mean_load([slot for slot in live if pool[slot] == pool[root]], load)
        gate.route_bias[root] += rate * sign(mean - per_slot)
    for name in set(pool):
        members = [root for root in roots if pool[root] == name]
        gate.route_bias[members] -= gate.route_bias[members].mean()
    for child in set(live) - set(roots):
        new, stayed = sides(child, parent, generation)
        moved = gate.slots.threshold_E[child] + rate * sign(mean_load(new, load) - mean_load(stayed, load))
        gate.slots.threshold_E[child] = moved.clamp(-1, 1)


def slow_plan(load, parent, generation, router):
    """-> (parent, slot, generation) of the split, or None."""
    size = router.experts // router.groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(router.groups)]
    k, c = router.experts_per_atom, router.groups_per_molecule
    pools, needed = {
        "hard": (groups, math.ceil(k / c)),
        "soft": (groups, math.ceil(k / router.groups)),
        "flat": ([list(range(router.experts))], k),
        "additive": ([[slot for group in groups for slot in group[1:]]], k - c),
    }[router.form]
    live = [slot for pool in pools for slot in pool if parent[slot] != -1]
    mean = mean_load(live, load)
    best = None
    for hot in live:
        if load[hot] < router.split_load * mean or (best and (load[hot], -hot) < (load[best[0]], -best[0])):
            continue
        [pool] = [pool for pool in pools if hot in pool]
        places = [(sum(parent[s] >= 0 for s in groups[slot // size]), slot) for slot in pool if parent[slot] == -1]
        if not places:
            roots = [slot for slot in pool if parent[slot] == slot]
            for slot in pool:
                dead = load[slot] < router.reclaim_load * mean and not children(slot, parent, generation)
                if dead and slot != hot and (slot not in roots or len(roots) > needed):
                    places.append((load[slot], slot))
        if places:
            slot = min(places)[1]
            before = [s for s in children(hot, parent, generation) if s != slot]
            born = max([generation[hot]] + [generation[s] for s in before]) + 1
            if born <= router.split_generations:
                best = (hot, slot, born)
    return best


def slow_split(gate, copied, split, direction_P):
    """Let a split (parent, slot, generation) take effect; rows of the tensors `copied` are copied."""
    parent, slot, generation = split
    for tensor in copied:
        tensor.data[slot] = tensor.data[parent]
    gate.slots.parent_E[slot], gate.slots.generation_E[slot] = parent, generation
    gate.slots.direction_EP[slot], gate.slots.threshold_E[slot] = direction_P.to(gate.slots.direction_EP), 0.0
    gate.route_bias[slot] = 0.0


def slow_decision(model, optimizer, loads, config, step):
    """Decide and split in every layer of a model, after a step in which `loads` were counted; -> lines of the log."""
    router, lines = config.router, []
    for number, (layer, load) in enumerate(zip(model.encoder.moe_layers(), loads, strict=True), start=1):
        slots = layer.gate.slots
        slots.load_E += torch.tensor(load, dtype=torch.float64)
        if step % router.split_every:
            continue
        split = slow_plan(slots.load_E.tolist(), *tree(slots), router)
        if split is not None:
            weights = list(layer.executor.experts.parameters())
            states = [optimizer.state[weight][name] for weight in weights for name in ("exp_avg", "exp_avg_sq")]
            lines.append((step, number, *split))
            direction_P = split_direction(config.run.seed, number, split[1], step, router)
            slow_split(layer.gate, weights + states, split, direction_P)
        slots.load_E.zero_()
    return lines
