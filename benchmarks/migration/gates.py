"""The gates whose routing is looked at: small models with six H-MoE layers, trained once and kept."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.migration.record import settle
from hmoe_ds.config import RunConfig
from hmoe_ds.config_parser import load_config
from hmoe_ds.downstream.export import export_checkpoint
from hmoe_ds.model.description import CONFIG
from hmoe_ds.model.hmoe import HMoEModel

Settings = Mapping[str, float | int | str]

MOLECULES_PER_RANK = 64
SETTLING_STEPS = 40

_MODEL: Settings = {
    "model.hidden_size": 32,
    "model.lower_blocks": 2,
    "model.upper_blocks": 6,
    "model.dense_size": 64,
    "router.experts_per_atom": 2,
    "router.expert_size": 16,
    "router.shared_size": 64,
    "data.atoms_per_step": 65536,
    "data.bonds_per_step": 65536,
    "optim.learning_rate": 0.004,
    "optim.warmup_steps": 20,
    "run.log_every": 5,
    "run.validate_every": 100,
    "run.mlflow": "false",
}
# A group for each of 128 ranks.
ONE_GROUP: Settings = {
    **_MODEL,
    "router.groups": 128,
    "router.experts": 256,
    "router.group_balance_rate": 0.005,
    "data.molecules_per_step": 1024,
}
# Four neighbouring groups on each of 8 ranks.
TWO_GROUPS: Settings = {
    **_MODEL,
    "router.groups": 32,
    "router.experts": 64,
    "router.groups_per_molecule": 2,
    "data.molecules_per_step": 256,
}


@dataclass(frozen=True)
class Gate:
    """A trained gate in a folder of its own.

    Args:
        folder: of its run; `settled_STEPS` in it is the exported model, balanced on.
        data: dataset that it was trained on.
    """

    folder: Path
    data: str

    @property
    def model(self) -> HMoEModel:
        """The exported model, in evaluation mode."""
        return HMoEModel.from_pretrained(self.model_folder)

    @property
    def model_folder(self) -> Path:
        """Where the exported model is."""
        return self.folder / f"settled_{SETTLING_STEPS}"

    def words(self, molecules: int, ranks: int) -> list[str]:
        """Command line of a run that goes on with it, unchanged, with `molecules` per step, on `ranks` ranks."""
        budget = f"={64 * molecules}"
        return [
            *("--config", str(self.folder / "config.yaml"), f"--data.path={self.data}", "--optim.learning_rate=0"),
            *(f"--data.molecules_per_step={molecules}", f"--data.atoms_per_step{budget}"),
            *(f"--data.bonds_per_step{budget}", f"--parallel.ep_size={ranks}", "--parallel.migration=true"),
        ]

    def config(self, molecules: int, ranks: int) -> RunConfig:
        """The same as a configuration."""
        return load_config(self.words(molecules, ranks))

    @property
    def validations(self) -> list[dict[str, float]]:
        """Step and figures of each validation."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if "validation_loss" in line]


def trained_gate(name: str, settings: Settings, data: str, out: Path, steps: int, seed: int) -> Gate:
    """Train a gate by `hmoe pretrain` in a folder of `out`, unless it is there; what is there in part is resumed.

    Then its groups are balanced on as in a run with a rank for each group.
    """
    words = [f"--{key}={value}" for key, value in settings.items()]
    words += [f"--data.path={data}", f"--run.steps={steps}", f"--run.seed={seed}"]
    digest = hashlib.blake2b(json.dumps(words).encode(), digest_size=4).hexdigest()
    gate = Gate(out / f"{name}_seed{seed}_{digest}", data)
    if not (gate.model_folder / CONFIG).exists():
        command = [sys.executable, "-m", "hmoe_ds.cli", "pretrain", "--config", "tiny_cpu", "--num_ranks", "1"]
        subprocess.run([*command, *words, "--run.checkpoint_every=50", f"--run.out={gate.folder}"], check=True)
        export_checkpoint(gate.folder, gate.folder / "trained")
        model = HMoEModel.from_pretrained(gate.folder / "trained")
        ranks = model.router.groups
        settle(model, gate.config(MOLECULES_PER_RANK * ranks, ranks), SETTLING_STEPS)
        model.save_pretrained(gate.model_folder)
    return gate
