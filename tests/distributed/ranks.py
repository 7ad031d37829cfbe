"""Runs modules on several ranks, one job after the other: `python -m tests.distributed.ranks`.

All are forked from this process, which has imported DeepSpeed and made a model (which loads numba's compiled
functions), as both take longer than most of what they do. A job is a line of JSON on standard input, with the fields of
`ranks_job.Job`. What comes back is a line with its process group, and one with its exit code: 0 when all ranks are
done, and 1 + r as soon as rank r has failed; the others are then left to who started this.
"""

import json
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tests.distributed.ranks_job import Job

# A process that has looked at a GPU should not be forked, and some libraries look when they are imported.
if os.environ.get("HMOE_TEST_GPU") != "1":
    import hmoe_ds.training.loop  # noqa: F401
    from hmoe_ds.config import ModelConfig, RouterConfig
    from hmoe_ds.model.hmoe import HMoEModel

    HMoEModel(ModelConfig(hidden_size=8, dense_size=8), RouterConfig(expert_size=8, shared_size=8), seed=0)


def become(log: Path) -> None:
    """From here on, what this process says goes to a log."""
    file = log.open("w")
    os.dup2(file.fileno(), sys.stdout.fileno())
    os.dup2(file.fileno(), sys.stderr.fileno())


def become_rank(rank: int, folder: Path) -> None:
    """Be this rank from here on, with a log of its own."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    become(folder / f"rank{rank}.log")


def end_after(work: Callable[[], None]) -> NoReturn:
    """Do it, and end without clearing up this process, which takes longer than most of what is done."""
    code: object = 1
    try:
        work()
        code = 0
    except SystemExit as ending:
        code = ending.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def run_rank(rank: int, job: Job) -> None:
    become_rank(rank, Path(job.folder))
    sys.argv[1:] = job.arguments
    runpy.run_module(job.module, run_name="__main__", alter_sys=True)


def run(job: Job) -> None:
    """Be the process of a job."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    os.environ.clear()
    os.environ.update(job.environment)
    become(Path(job.folder) / "start.log")
    rank_of = {fork(lambda rank=rank: run_rank(rank, job)): rank for rank in range(job.ranks)}
    for _ in range(job.ranks):
        pid, status = os.wait()
        if status:
            sys.exit(1 + rank_of[pid])


def fork(work: Callable[[], None]) -> int:
    """-> the process that does it."""
    pid = os.fork()
    if pid == 0:
        end_after(work)
    return pid


def main() -> None:
    for line in sys.stdin:
        pid = fork(lambda line=line: run(Job(**json.loads(line))))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
