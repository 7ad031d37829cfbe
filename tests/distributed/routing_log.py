"""What each molecule of a run was routed to, written down by every rank of it."""

from contextlib import contextmanager
from pathlib import Path

import torch

from hmoe_ds.objectives.total import PretrainingTask


def molecule_choices(batch, encoding):
    """-> {molecule: (its groups, the experts of its atoms in every layer)}; what is chosen together is sorted."""
    sizes = batch.ptr_B.diff().tolist()
    groups = [sorted(chosen) for chosen in encoding.scaffold.groups_BC.tolist()]
    layers = [routing.choices_NK.sort(dim=1).values.cpu().split(sizes) for routing in encoding.atoms]
    keys = [tuple(key) for key in batch.mol_key_B2.tolist()]
    return {key: (groups[m], [layer[m].tolist() for layer in layers]) for m, key in enumerate(keys)}


@contextmanager
def routing_log(out: Path, rank: int, accumulation: int):
    """Write `out/routing-RANK.pt`: {(step, slice, molecule): choices} of this rank's molecules in training."""
    choices, calls = {}, []
    forward = PretrainingTask.forward

    def logged(task, part, norm, *stage):
        losses, encoding = forward(task, part, norm, *stage)
        if task.training:
            step, number = divmod(len(calls), accumulation)
            calls.append(None)
            for key, chosen in molecule_choices(part.batch, encoding).items():
                choices[step, number, key] = chosen
        return losses, encoding

    PretrainingTask.forward = logged
    try:
        yield
    finally:
        PretrainingTask.forward = forward
    torch.save(choices, out / f"routing-{rank}.pt")


def read_routing(out: Path, ranks: int):
    """The choices of all ranks together; no molecule is on two ranks."""
    merged = {}
    for rank in range(ranks):
        choices = torch.load(out / f"routing-{rank}.pt", weights_only=False)
        assert not merged.keys() & choices.keys()
        merged |= choices
    return merged
