"""What is measured of a trained gate: bytes by replay and on real ranks, imbalance, and what two groups change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.migration.gates import MOLECULES_PER_RANK, TWO_GROUPS, Gate, Settings, trained_gate
from benchmarks.migration.imbalance import Imbalance, imbalance
from benchmarks.migration.ranks import ARMS, Job, measure
from benchmarks.migration.record import Recording, record
from hmoe_ds.config import RunConfig
from hmoe_ds.moe.replay import Ints, off_node, place, sent_bytes

RANKS_PER_NODE = 8
# Ranks: steps that are recorded, so that there are some thousand molecules.
REPLAYED = {2: 8, 4: 8, 8: 8, 32: 4, 128: 2}
REPLAYED_TWO_GROUPS = {2: 8, 8: 8, 32: 4}
# Bounds on the atoms of a rank that are tried beside the default one.
WIDER_BUDGETS = (1.1, 1.2)
# Of the preset base_8gpu: in bf16 a state is 2 bytes per value, whatever the recorded model has.
WIDE_STATE = 768 * 2
# Arms with two groups per molecule.
PREFERENCES: dict[str, Settings] = {
    "none": {},
    "bonus 0.1": {"router.group_blocks": 8, "router.block_bonus": 0.1},
    "bonus 0.2": {"router.group_blocks": 8, "router.block_bonus": 0.2},
}

Table = dict[str, dict[str, float]]


def replayed(gate: Gate, steps_R: Mapping[int, int]) -> Table:
    """Bytes per step with and without migration and the imbalance, by the number of ranks."""
    model, found = gate.model, {}
    for ranks, steps in steps_R.items():
        config = gate.config(MOLECULES_PER_RANK * ranks, ranks)
        recording = record(model, config, steps)
        wide = recording.rows._replace(state=WIDE_STATE)
        found[str(ranks)] = {
            **_traffic(recording, config),
            "ratio_wide": _traffic(recording._replace(rows=wide), config)["ratio"],
            **{f"ratio_budget_{budget}": _traffic(recording, config, budget)["ratio"] for budget in WIDER_BUDGETS},
            **_imbalance(recording, config),
        }
    return found


def _sent(recording: Recording, config: RunConfig, budget: float | None = None) -> dict[str, list[Ints]]:
    """What ranks send each other for each slice, of each arm; within the configured budget if none is given."""
    router, ranks = config.router, config.parallel.ep_size
    budgets = dict(zip(ARMS, (None, budget or config.parallel.migration_budget), strict=True))
    return {
        arm: [sent_bytes(part, recording.rows, router, ranks, budget) for part in recording.slices]
        for arm, budget in budgets.items()
    }


def _traffic(recording: Recording, config: RunConfig, budget: float | None = None) -> dict[str, float]:
    sent = _sent(recording, config, budget)
    found = {arm: float(np.mean([matrix.sum() for matrix in matrices])) for arm, matrices in sent.items()}
    off = {
        arm: float(np.mean([off_node(matrix, RANKS_PER_NODE) for matrix in matrices])) for arm, matrices in sent.items()
    }
    found["ratio"] = found["with"] / found["without"]
    if not off["without"]:
        return found
    off["ratio"] = off["with"] / off["without"]
    return found | {f"off_node_{name}": value for name, value in off.items()}


def _imbalance(recording: Recording, config: RunConfig) -> dict[str, float]:
    router, ranks, budget = config.router, config.parallel.ep_size, config.parallel.migration_budget
    of_slices = [imbalance(part, place(part, router, ranks, budget), router, ranks) for part in recording.slices]
    return Imbalance(*(float(np.mean(column)) for column in zip(*of_slices, strict=True)))._asdict()


def real(gate: Gate, ranks: int, steps: int) -> dict[str, Any]:
    """Bytes and seconds per step of real ranks, and whether the replay counts the same bytes in every step."""
    words = gate.words(MOLECULES_PER_RANK * ranks, ranks)
    out = gate.folder / f"ranks{ranks}.json"
    found = measure(Job(words, str(gate.model_folder), steps, str(out)), ranks)
    config = gate.config(MOLECULES_PER_RANK * ranks, ranks)
    recording = record(gate.model, config, steps + 1)
    replay = {arm: [int(matrix.sum()) for matrix in matrices[1:]] for arm, matrices in _sent(recording, config).items()}
    sent = {arm: sum(found.sent[arm]) for arm in ARMS}
    return {
        **{arm: sent[arm] / steps for arm in ARMS},
        "ratio": sent["with"] / sent["without"],
        "replay_equal": replay == found.sent,
        **{f"seconds_{arm}": found.seconds[arm] for arm in ARMS},
        **{f"atoms_max_over_mean_{arm}": found.load[arm] for arm in ARMS},
    }


def two_groups(data: str, out: Path, steps: int, seeds: int) -> Table:
    """Traffic and held-out loss with two groups per molecule, without and with a preference; means of the seeds."""
    found: Table = {}
    for name, blocks in PREFERENCES.items():
        gates = [
            trained_gate(f"two_groups_{name.replace(' ', '_')}", {**TWO_GROUPS, **blocks}, data, out, steps, seed)
            for seed in range(seeds)
        ]
        found[name] = _mean([_two_groups(gate) for gate in gates])
        losses = [gate.validations[-1]["validation_loss"] for gate in gates]
        found[name] |= {f"loss_seed{seed}": loss for seed, loss in enumerate(losses)}
    return found


def _two_groups(gate: Gate) -> dict[str, float]:
    last, traffic = gate.validations[-1], replayed(gate, REPLAYED_TWO_GROUPS)
    kept = ("ratio", "ratio_wide", "off_node_ratio", "at_wanted")
    return {
        **{name: last[f"validation_{name}"] for name in ("loss", "consistency", "group_entropy", "chosen_p")},
        **{f"{name}_{ranks}": row[name] for ranks, row in traffic.items() for name in kept if name in row},
    }


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
