"""A rank on one of several machines, started there by DeepSpeed's launcher or by mpirun.

`python -m hmoe_ds.training.launching.start_rank WORD`, where WORD names a file of `hosts`.
"""

from __future__ import annotations

import os
import sys

from hmoe_ds.training.launching.environment import network_environment, rank_environment
from hmoe_ds.training.launching.start_file import Start, from_word, read_start
from hmoe_ds.training.machine import has_gpu

# What mpirun says, and what torch and DeepSpeed call it.
_MPI = {
    "OMPI_COMM_WORLD_RANK": "RANK",
    "OMPI_COMM_WORLD_SIZE": "WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK": "LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "LOCAL_SIZE",
}


def main() -> None:
    """Complete the environment before torch is loaded, which reads it then; and train."""
    start = read_start(from_word(sys.argv[-1]))
    os.environ.update(start.environment)
    os.chdir(start.folder)
    if start.launcher == "openmpi":
        _take_over_from_mpi(start)
    os.environ.update(network_environment(os.environ["MASTER_ADDR"], os.environ))
    os.environ.update(rank_environment(int(os.environ["LOCAL_SIZE"]), has_gpu(), os.environ))

    from hmoe_ds.training import loop

    loop.main(start.arguments)


def _take_over_from_mpi(start: Start) -> None:
    os.environ.update({name: os.environ[said] for said, name in _MPI.items()})
    os.environ.update({"MASTER_ADDR": start.master, "MASTER_PORT": str(start.port)})


if __name__ == "__main__":
    main()
