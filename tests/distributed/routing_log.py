"""What each molecule of a run was routed to, written down by every rank of it."""

from contextlib import contextmanager
from pathlib import Path

import torch

from hmoe_ds.objectives.total import PretrainingTask


def molecule_choices(batch, encoding):
    """-> {molecule: (its groups, the experts of its atoms in every layer)}; what is chosen together is sorted."""
    groups, experts = _group_choices(batch, encoding), _expert_choices(encoding)
    return {key: (groups[key], experts[key]) for key in groups}


def _group_choices(batch, encoding):
    groups = [sorted(chosen) for chosen in encoding.scaffold.groups_BC.tolist()]
    return dict(zip(_keys(batch), groups, strict=True))


def _expert_choices(encoding):
    sizes = encoding.batch.ptr_B.diff().tolist()
    layers = [routing.choices_NK.sort(dim=1).values.cpu().split(sizes) for routing in encoding.atoms]
    return {key: [layer[m].tolist() for layer in layers] for m, key in enumerate(_keys(encoding.batch))}


def _keys(batch):
    return [tuple(key) for key in batch.mol_key_B2.tolist()]


@contextmanager
def routing_log(out: Path, rank: int, accumulation: int):
    """Write `out/routing-RANK.pt`: groups of the molecules that this rank was dealt in training, and experts of those
    that it computed, each as {(step, slice, molecule): choices}."""
    groups, experts, calls = {}, {}, []
    forward = PretrainingTask.forward

    def logged(task, part, norm, *stage):
        losses, encoding = forward(task, part, norm, *stage)
        if task.training:
            step, number = divmod(len(calls), accumulation)
            calls.append(None)
            of_molecules = (_group_choices(part.batch, encoding), _expert_choices(encoding))
            for log, found in zip((groups, experts), of_molecules, strict=True):
                log |= {(step, number, key): chosen for key, chosen in found.items()}
        return losses, encoding

    PretrainingTask.forward = logged
    try:
        yield
    finally:
        PretrainingTask.forward = forward
    torch.save((groups, experts), out / f"routing-{rank}.pt")


def read_routing(out: Path, ranks: int):
    """The choices of all ranks together; no molecule is on two ranks."""
    merged = {}, {}
    for rank in range(ranks):
        for log, found in zip(merged, torch.load(out / f"routing-{rank}.pt", weights_only=False), strict=True):
            assert not log.keys() & found.keys()
            log |= found
    groups, experts = merged
    assert groups.keys() == experts.keys()
    return {key: (groups[key], experts[key]) for key in groups}
