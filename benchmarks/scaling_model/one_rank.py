"""One rank that pretrains several times: `python -m benchmarks.scaling_model.one_rank CORE JSON`.

CORE is the core it keeps to, or -1 for any; JSON a list of command lines of `hmoe pretrain`, without `--num_ranks`.
"""

from __future__ import annotations

import json
import os
import sys

from hmoe_ds.config_parser import load_config
from hmoe_ds.training.engine import init_distributed
from hmoe_ds.training.loop import train

if __name__ == "__main__":
    core = int(sys.argv[1])
    if core >= 0:
        os.sched_setaffinity(0, {core})
    rank, ranks = init_distributed()
    for words in json.loads(sys.argv[2]):
        train(load_config(words), rank, ranks)
