"""Which experts the atoms of real molecules choose: recorded once, kept beside this file, replayed by benchmarks.

    python -m benchmarks.recorded_routing --data data/zinc --out runs/recorded_routing

Pretrains `tiny_cpu` for a few hundred steps with 8, 32 and 64 experts in 4 groups, two per atom, and records what 8,192
atoms of the validation molecules choose in the last layer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hmoe_ds.config import DataConfig
from hmoe_ds.data.batch import gather
from hmoe_ds.data.mixture import open_mixture
from hmoe_ds.data.plan import sequential_slices
from hmoe_ds.downstream.export import export_checkpoint
from hmoe_ds.model.hmoe import HMoEModel

GROUPS, ATOMS, STEPS = 4, 8192, 200
EXPERTS = (8, 32, 64)
_FOLDER = Path(__file__).parent / "routing"


class Routing(NamedTuple):
    """Where N atoms of B molecules go.

    Attributes:
        molecule_N: molecule of each atom, ascending from 0.
        group_B: group of each molecule.
        choices_NK: experts of each atom, all of its molecule's group.
        experts: E.
        groups: G.
    """

    molecule_N: Tensor
    group_B: Tensor
    choices_NK: Tensor
    experts: int
    groups: int = GROUPS

    @property
    def imbalance(self) -> float:
        """Load of the fullest expert over the mean load."""
        load_E = torch.bincount(self.choices_NK.flatten(), minlength=self.experts)
        return float(load_E.max() / load_E.double().mean())


def balanced_routing(experts: int, atoms: int = ATOMS, seed: int = 0) -> Routing:
    """Molecules of 32 atoms with groups in turn; atoms take two experts of their group by lot, all equally often."""
    generator = torch.Generator().manual_seed(seed)
    per_group, molecules = experts // GROUPS, atoms // 32
    molecule_N = torch.arange(molecules).repeat_interleave(32)
    group_B = torch.arange(molecules) % GROUPS
    first_N = torch.empty(atoms, dtype=torch.long)
    for group in range(GROUPS):
        here = group_B[molecule_N] == group
        count = int(here.sum())
        first_N[here] = (torch.randperm(count, generator=generator) % per_group) + group * per_group
    start_N = group_B[molecule_N] * per_group
    second_N = start_N + (first_N - start_N + 1) % per_group
    return Routing(molecule_N, group_B, torch.stack([first_N, second_N], 1), experts)


def recorded_routing(experts: int) -> Routing:
    """What was recorded with so many experts."""
    with np.load(_FOLDER / f"{experts}_experts.npz") as saved:
        molecule_N, group_B, choices_NK = (
            torch.from_numpy(saved[name].astype(np.int64)) for name in ("molecule_N", "group_B", "choices_NK")
        )
    return Routing(molecule_N, group_B, choices_NK, experts)


def record(model: HMoEModel, data: DataConfig, atoms: int) -> Routing:
    """The choices of the first `atoms` atoms of the validation molecules in the last layer."""
    mixture = open_mixture(data, "validation")
    whole = sequential_slices(mixture, data, data.validation_molecules)[0]
    batch = gather(mixture, whole.rows_B)
    with torch.no_grad():
        encoding = model.encoder(batch)
    molecule_N = batch.molecule_N[:atoms]
    group_B = encoding.scaffold.groups_BC[: int(molecule_N[-1]) + 1, 0]
    return Routing(molecule_N, group_B, encoding.atoms[-1].choices_NK[:atoms], model.router.experts)


def _train(experts: int, data: str, out: Path) -> HMoEModel:
    folder = out / f"{experts}_experts_{STEPS}_steps"
    command = [sys.executable, "-m", "hmoe_ds.cli", "pretrain", "--config=tiny_cpu", f"--data.path={data}"]
    command += [f"--run.out={folder}", f"--run.steps={STEPS}", "--run.mlflow=false", "--router.form=hard"]
    command += [f"--router.groups={GROUPS}", f"--router.experts={experts}"]
    subprocess.run(command, check=True)
    if not (folder / "model").exists():
        export_checkpoint(folder, folder / "model")
    return HMoEModel.from_pretrained(folder / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dataset made by hmoe prepare")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    options = parser.parse_args()
    data = DataConfig(path=options.data, molecules_per_step=1024, atoms_per_step=1 << 20, bonds_per_step=1 << 20)
    _FOLDER.mkdir(exist_ok=True)
    for experts in EXPERTS:
        routing = record(_train(experts, options.data, options.out), data, ATOMS)
        np.savez_compressed(
            _FOLDER / f"{experts}_experts.npz",
            molecule_N=routing.molecule_N.numpy().astype(np.uint16),
            group_B=routing.group_B.numpy().astype(np.uint8),
            choices_NK=routing.choices_NK.numpy().astype(np.uint8),
        )
        print(f"{experts} experts: load max/mean {routing.imbalance:.2f}")


if __name__ == "__main__":
    main()
