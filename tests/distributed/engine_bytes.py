"""Ranks that measure engines: `python -m tests.distributed.engine_bytes JSON`, a list of {"out", "words"}.

Each engine does two steps; the second is measured. Its file holds `states`, the most bytes of tensors that lived on
rank 0 after a backward, and of all ranks together `rows`, the bytes of rows given to all-to-alls, `elsewhere`, the
bytes of anything that were for another rank, `counted`, what our own counter says of these, and `atoms`.
"""

import gc
import json
import sys
import time
from pathlib import Path

import torch

from hmoe_ds.config_parser import load_config
from hmoe_ds.data.mixture import open_mixture
from hmoe_ds.data.plan import BatchPlan
from hmoe_ds.moe.exchange import Traffic
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


class Counted:
    """Stands in for torch's all-to-all and all-gather and adds up what is given to them."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rows, self.elsewhere = 0, 0
        self._rank, self._ranks = rank, ranks
        self._all_to_all, self._all_gather = torch.distributed.all_to_all_single, torch.distributed.all_gather

    def __enter__(self):
        torch.distributed.all_to_all_single, torch.distributed.all_gather = self.all_to_all, self.all_gather
        return self

    def __exit__(self, *_) -> None:
        torch.distributed.all_to_all_single, torch.distributed.all_gather = self._all_to_all, self._all_gather

    def all_to_all(self, output, input, output_split_sizes=None, input_split_sizes=None, **keywords):
        sizes = input_split_sizes or [input.shape[0] // self._ranks] * self._ranks
        self.rows += input.nbytes if input.dim() == 2 else 0  # what says how many there will be is a vector
        self.elsewhere += (sum(sizes) - sizes[self._rank]) * input[:1].nbytes
        return self._all_to_all(
            output, input, output_split_sizes=output_split_sizes, input_split_sizes=input_split_sizes, **keywords
        )

    def all_gather(self, outputs, rows, group=None):
        if group is not None:  # those over all ranks are of the loss
            self.elsewhere += (self._ranks - 1) * rows.nbytes
        return self._all_gather(outputs, rows, group=group)


def measure(words: list[str], rank: int, ranks: int) -> dict:
    """One engine, two steps."""
    config = load_config(words)
    gc.collect()
    gc.freeze()
    traffic = Traffic()
    engine = build_engine(config, traffic)
    store = open_mixture(config.data, "train")
    plan = BatchPlan(store, config.data, config.optim.accumulation, config.run.seed)
    for _ in range(2):
        states = 0
        slices = [rank_slice(store, whole, config.objective.mask_ratio, 0, rank, ranks) for whole in plan.next_step()]
        norm = count_normalizers(slices, "cpu")
        traffic.take()
        with Counted(rank, ranks) as counted:
            for part in slices:
                losses, encoding = engine(part, norm)
                engine.backward(losses.total * loss_scale(config))
                del losses, encoding
                states = max(states, live_bytes())
                engine.step()
    sent = [counted.rows, counted.elsewhere, traffic.take()]
    totals = torch.tensor([*sent, sum(part.batch.num_atoms for part in slices)])
    torch.distributed.all_reduce(totals)
    engine.destroy()
    return {
        "states": states,
        **dict(zip(("rows", "elsewhere", "counted", "atoms"), totals.tolist(), strict=True)),
    }


if __name__ == "__main__":
    rank, ranks = init_distributed()
    for job in json.loads(sys.argv[1]):
        result = measure(job["words"], rank, ranks)
        if rank == 0:
            Path(job["out"]).write_text(json.dumps(result))
