"""How often a run has the host wait for all that a device must do: `python -m tests.distributed.device_waits WORDS`."""

import sys
from pathlib import Path

import deepspeed

from hmoe_ds.config_parser import load_config
from hmoe_ds.run_files import METRICS
from hmoe_ds.training import loop


def main(words: list[str]) -> None:
    accelerator, waits = deepspeed.get_accelerator(), []
    accelerator.synchronize = lambda *_: waits.append(None)
    loop.main(words)
    lines = (Path(load_config(words).run.out) / METRICS).read_text().splitlines()
    assert len(waits) <= len(lines), f"{len(waits)} times, for {len(lines)} lines of figures"


if __name__ == "__main__":
    main(sys.argv[1:])
