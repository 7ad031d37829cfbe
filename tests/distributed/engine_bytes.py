"""Ranks that measure engines: `python -m tests.distributed.engine_bytes JSON`, a list of {"out", "words"}.

Each engine does two steps; the second is measured. Its file holds `states`, the most bytes of tensors that lived on
rank 0 after a backward, and of all ranks together `rows`, the bytes given to all-to-alls, `elsewhere`, those of them
that were for another rank, and `atoms`.
"""

import gc
import json
import sys
import time
from pathlib import Path

import deepspeed.comm
import torch

from hmoe_ds.config import load_config
from hmoe_ds.data.mixture import open_mixture
from hmoe_ds.data.plan import BatchPlan
from hmoe_ds.objectives.total import count_normalizers
from hmoe_ds.training.engine import build_engine, init_distributed, loss_scale
from hmoe_ds.training.feed import rank_slice


def live_bytes() -> int:
    """Bytes of all tensors made since `gc.freeze`."""
    torch.distributed.barrier()
    time.sleep(0.1)  # gloo's threads let go of what they sent a moment after a collective is done
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and not thing.is_meta]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class CountedRows:
    """Stands in for DeepSpeed's all-to-all and adds up the rows given to it: to all ranks, and to other ranks."""

    def __init__(self, rank: int) -> None:
        self.bytes, self.elsewhere = 0, 0
        self._rank, self._send = rank, deepspeed.comm.all_to_all_single

    def __call__(self, output, rows, output_split_sizes=None, input_split_sizes=None, **keywords):
        if rows.dim() == 2:  # rows of atoms; what says how many there will be is a vector
            own = input_split_sizes[self._rank]
            self.bytes += rows.nbytes
            self.elsewhere += (rows.shape[0] - own) * rows.shape[1] * rows.element_size()
        return self._send(
            output, rows, output_split_sizes=output_split_sizes, input_split_sizes=input_split_sizes, **keywords
        )


def measure(words: list[str], rank: int, ranks: int) -> dict:
    """One engine, two steps."""
    config = load_config(words)
    gc.collect()
    gc.freeze()
    engine = build_engine(config)
    store = open_mixture(config.data, "train")
    plan = BatchPlan(store, config.data, config.optim.accumulation, config.run.seed)
    for _ in range(2):
        counted, states = CountedRows(rank), 0
        slices = [rank_slice(store, whole, config.objective.mask_ratio, 0, rank, ranks) for whole in plan.next_step()]
        norm = count_normalizers(slices, "cpu")
        deepspeed.comm.all_to_all_single = counted
        for part in slices:
            losses, encoding = engine(part, norm)
            engine.backward(losses.total * loss_scale(config))
            del losses, encoding
            states = max(states, live_bytes())
            engine.step()
        deepspeed.comm.all_to_all_single = counted._send
    totals = torch.tensor([counted.bytes, counted.elsewhere, sum(part.batch.num_atoms for part in slices)])
    torch.distributed.all_reduce(totals)
    engine.destroy()
    return {"states": states, **dict(zip(("rows", "elsewhere", "atoms"), totals.tolist(), strict=True))}


if __name__ == "__main__":
    rank, ranks = init_distributed()
    for job in json.loads(sys.argv[1]):
        result = measure(job["words"], rank, ranks)
        if rank == 0:
            Path(job["out"]).write_text(json.dumps(result))
