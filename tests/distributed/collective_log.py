"""Ranks that log the collectives of one optimizer step: `python -m tests.distributed.collective_log JSON`.

JSON is a list of {"out", "words"}. Each file holds [kind, ranks in the group, bytes that rank 0 sends] of every call in
the second step, for all-to-alls as if they were even.
"""

import inspect
import json
import sys
from pathlib import Path

import torch

from benchmarks.scaling_model.collectives import ring_bytes
from hmoe_ds.config_parser import load_config
from hmoe_ds.data.mixture import open_mixture
from hmoe_ds.data.plan import BatchPlan
from hmoe_ds.moe.balance import measure_load
from hmoe_ds.moe.exchange import Traffic
from hmoe_ds.objectives.total import count_normalizers
from hmoe_ds.training.engine import build_engine, init_distributed, loss_scale
from hmoe_ds.training.feed import rank_slice
from hmoe_ds.training.recording.metrics import StepTotals

# Of each function: the kind of collective, and its argument that tells how much is sent.
FUNCTIONS = {
    "all_reduce": ("all_reduce", "tensor"),
    "all_to_all_single": ("all_to_all", "input"),
    "all_gather": ("all_gather", "tensor"),
    "all_gather_into_tensor": ("all_gather", "input_tensor"),
}
calls: list = []


def log_calls(name: str) -> None:
    """Put a function in the place of `torch.distributed.name` that notes what it is given."""
    original, (kind, argument) = getattr(torch.distributed, name), FUNCTIONS[name]
    signature = inspect.signature(original)

    def logged(*arguments, **keywords):
        given = signature.bind(*arguments, **keywords).arguments
        ranks = torch.distributed.get_world_size(given.get("group"))
        size = given[argument].nbytes * (ranks if kind == "all_gather" else 1)
        calls.append([kind, ranks, ring_bytes(kind, size, ranks)])
        return original(*arguments, **keywords)

    setattr(torch.distributed, name, logged)


def two_steps(words: list[str], rank: int, ranks: int) -> None:
    """Leaves the calls of the second step in `calls`."""
    config, traffic = load_config(words), Traffic()
    engine = build_engine(config, traffic)
    store = open_mixture(config.data, "train")
    plan = BatchPlan(store, config.data, config.optim.accumulation, config.run.seed)
    for _ in range(2):
        calls.clear()
        slices = [rank_slice(store, whole, config.objective.mask_ratio, 0, rank, ranks) for whole in plan.next_step()]
        norm, totals = count_normalizers(slices, "cpu"), StepTotals(traffic)
        for part in slices:
            losses, encoding = engine(part, norm)
            engine.backward(losses.total * loss_scale(config))
            engine.step()
            load = measure_load(encoding.scaffold, encoding.atoms, part.batch.molecule_N, config.router)
            totals.add(losses, load)
        totals.reduce()
    engine.destroy()


if __name__ == "__main__":
    for name in FUNCTIONS:
        log_calls(name)  # before DeepSpeed looks them up
    rank, ranks = init_distributed()
    for job in json.loads(sys.argv[1]):
        two_steps(job["words"], rank, ranks)
        if rank == 0:
            Path(job["out"]).write_text(json.dumps(calls))
