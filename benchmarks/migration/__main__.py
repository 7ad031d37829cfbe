"""What migration saves: bytes that ranks send each other for experts, with and without it, and what it costs.

    python -m benchmarks.migration --data data/zinc --out runs/migration

Trains gates of small models with six H-MoE layers, form hard, k = 2, and keeps them in the folder (`gates.py`). Then:
bytes and seconds of steps of 2 and 4 real ranks, with and without migration in turns (`ranks.py`); bytes at 2 to 128
ranks by a replay of recorded routing through the code that decides who goes where (`replay.py`), also between nodes of
8 ranks; the imbalance that common scaffolds cause (`imbalance.py`); and for two groups per molecule the traffic and the
loss with and without `router.block_bonus`. Prints tables and one JSON line, which goes to docs/results/migration.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.migration.gates import MOLECULES_PER_RANK, ONE_GROUP, trained_gate
from benchmarks.migration.measures import (
    RANKS_PER_NODE,
    REPLAYED,
    real,
    replayed,
    two_groups,
)
from benchmarks.result import write_result

TARGET = 0.15


def print_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """One line for each figure, one column for each row."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    print(f"\n{title}")
    for name in ("", *names):
        cells = ((label if not name else _shown(row.get(name, ""))) for label, row in rows.items())
        print(f"{name:<24}" + "".join(f"{cell:>18}" for cell in cells))


def _shown(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) and value < 1e4 else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dataset made by hmoe prepare")
    parser.add_argument("--out", type=Path, required=True, help="folder for the gates, which are kept and used again")
    parser.add_argument("--gate-steps", type=int, default=300, help="steps for which each gate is trained")
    parser.add_argument("--steps", type=int, default=10, help="steps that real ranks do, in each arm")
    parser.add_argument("--seeds", type=int, default=2, help="gates with two groups per molecule, in each arm")
    options = parser.parse_args()
    gate = trained_gate("one_group", ONE_GROUP, options.data, options.out, options.gate_steps, seed=0)
    table = replayed(gate, REPLAYED)
    on_real_ranks = {str(ranks): real(gate, ranks, options.steps) for ranks in (2, 4)}
    preference = two_groups(options.data, options.out, options.gate_steps, options.seeds)
    print_table("ranks, replay", table)
    print_table("ranks, real", on_real_ranks)
    print_table("two groups", preference)
    settled = {
        str(line["step"]): {
            name: line[f"validation_{name}"] for name in ("loss", "consistency", "group_entropy", "chosen_p")
        }
        for line in gate.validations
    }
    print_table("gate, step", settled)
    ratios = [row["ratio"] for row in (*table.values(), *on_real_ranks.values())]
    write_result(
        {
            "name": "migration",
            "ratio": max(ratios),
            "target": TARGET,
            "molecules_per_rank": MOLECULES_PER_RANK,
            "ranks_per_node": RANKS_PER_NODE,
            "real": on_real_ranks,
            "replay": table,
            "two_groups": preference,
            "seeds_of_two_groups": options.seeds,
            "gate": settled,
        }
    )


if __name__ == "__main__":
    main()
