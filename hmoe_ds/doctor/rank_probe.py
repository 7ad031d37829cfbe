"""`python -m hmoe_ds.doctor.rank_probe BACKEND RANK RANKS FILE`: one of ranks that try their collectives."""

from __future__ import annotations

import json
import sys
from datetime import timedelta

import torch
from torch import distributed

SECONDS = 20.0


def main(backend: str, rank: int, ranks: int, rendezvous: str) -> None:
    """Sum and exchange numbers with the other ranks, which meet by the file `rendezvous`; raises when that fails."""
    if backend == "nccl":
        torch.cuda.set_device(rank)
    device = torch.device("cuda" if backend == "nccl" else "cpu")
    timeout = timedelta(seconds=SECONDS)
    distributed.init_process_group(backend, f"file://{rendezvous}", timeout, world_size=ranks, rank=rank)
    total_R = torch.full((ranks,), float(rank), device=device)
    distributed.all_reduce(total_R)
    received_R = torch.empty(ranks, device=device)
    distributed.all_to_all_single(received_R, torch.arange(ranks, dtype=torch.float32, device=device) + ranks * rank)
    expected_R = [float(ranks * other + rank) for other in range(ranks)]
    if total_R[0].item() != ranks * (ranks - 1) / 2 or received_R.tolist() != expected_R:
        raise RuntimeError(f"wrong numbers: {total_R.tolist()}, {received_R.tolist()}")
    distributed.destroy_process_group()
    print(json.dumps("ok"))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
