"""Ranks of a module: `python -m tests.distributed.ranks RANKS FOLDER MODULE ARGUMENT...`, one log each in FOLDER.

They are forked from one process that has imported DeepSpeed and made a model (which loads numba's compiled functions),
as both take longer than most of what they do. The exit code is 0 when all are done, and 1 + r as soon as rank r has
failed; the others are then left to who started this.
"""

import os
import runpy
import sys
from pathlib import Path

# A process that has looked at a GPU should not be forked, and some libraries look when they are imported.
if os.environ.get("HMOE_TEST_GPU") != "1":
    import hmoe_ds.training.loop  # noqa: F401
    from hmoe_ds.config import ModelConfig, RouterConfig
    from hmoe_ds.model.hmoe import HMoEModel

    HMoEModel(ModelConfig(hidden_size=8, dense_size=8), RouterConfig(expert_size=8, shared_size=8), seed=0)


def become_rank(rank: int, folder: Path) -> None:
    """Be this rank from here on, with a log of its own."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    log = (folder / f"rank{rank}.log").open("w")
    os.dup2(log.fileno(), sys.stdout.fileno())
    os.dup2(log.fileno(), sys.stderr.fileno())


def wait_for(rank_of: dict[int, int]) -> int:
    """Wait for the processes of these ranks; -> the exit code."""
    for _ in range(len(rank_of)):
        pid, status = os.wait()
        if status:
            return 1 + rank_of[pid]
    return 0


def main() -> None:
    ranks, folder, module, *arguments = sys.argv[1:]
    rank_of = {}
    for rank in range(int(ranks)):
        pid = os.fork()
        if pid == 0:
            become_rank(rank, Path(folder))
            sys.argv[1:] = arguments
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            return
        rank_of[pid] = rank
    sys.exit(wait_for(rank_of))


if __name__ == "__main__":
    main()
