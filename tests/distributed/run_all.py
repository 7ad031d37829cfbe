"""Ranks of several runs: `python -m tests.distributed.run_all JSON`, a list of command lines."""

import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch

from hmoe_ds.config_parser import load_config
from hmoe_ds.training.checks.preflight import check_run
from hmoe_ds.training.engine import init_distributed
from hmoe_ds.training.loop import train
from tests.distributed.routing_log import routing_log


def seed_global_generators() -> None:
    """Anyhow: nothing in a run draws from them, so a checkpoint need not hold them."""
    seed = int.from_bytes(os.urandom(4), "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


if __name__ == "__main__":
    rank, ranks = init_distributed()
    for command_line in json.loads(sys.argv[1]):
        config = load_config(command_line)
        check_run(config, ranks)
        seed_global_generators()
        torch.distributed.barrier()  # no rank begins to write the run that another still checks
        with routing_log(Path(config.run.out), rank, config.optim.accumulation):
            train(config, rank, ranks)
