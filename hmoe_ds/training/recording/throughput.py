"""How fast a run is and how full its steps are, from the molecules that were really in them."""

from __future__ import annotations

import torch
from torch import Tensor

from hmoe_ds.config import RunConfig
from hmoe_ds.model.size import Work, training_flops
from hmoe_ds.moe.balance import RouterLoad
from hmoe_ds.moe.exchange import Traffic
from hmoe_ds.objectives.total import Normalizers


class Throughput:
    """What was done since the last report, and in what time. Adding a step does not wait for the device.

    Args:
        config: of the run.
        traffic: of this rank.
    """

    def __init__(self, config: RunConfig, traffic: Traffic) -> None:
        self._config, self._traffic = config, traffic
        self._done: Tensor | None = None
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0

    def add(self, norm: Normalizers, load: RouterLoad, seconds: float, waited: float) -> None:
        """Add an optimizer step.

        Args:
            norm: what was in the global batch.
            load: where it was routed.
            seconds: duration of the step; over all steps until a report, with the device's work that they queued.
            waited: seconds of it that were spent waiting for molecules.
        """
        done = torch.stack([*norm, load.atoms_LE.sum()]).double()
        self._done = done if self._done is None else self._done + done
        self._steps, self._seconds, self._waited = self._steps + 1, self._seconds + seconds, self._waited + waited

    def report(self) -> dict[str, float]:
        """The figures of the steps since the last report, of which there must be one; waits for the device."""
        assert self._done is not None
        *counts, routed = self._done.cpu().unbind()
        steps, seconds, waited = self._steps, self._seconds, self._waited
        self._done, self._steps, self._seconds, self._waited = None, 0, 0.0, 0.0
        norm, data = Normalizers(*counts), self._config.data
        fill = {
            "molecules": norm.molecules.item() / (steps * data.molecules_per_step),
            "atoms": norm.atoms.item() / (steps * data.atoms_per_step),
            "bonds": norm.bonds.item() / (steps * data.bonds_per_step),
        }
        work = step_work(norm, routed.item(), self._config)
        return {
            "molecules_per_second": work.molecules / seconds,
            "flops_per_second": training_flops(self._config, work).total / seconds,
            "data_wait": waited / seconds,
            **({"exchange_share": self._traffic.seconds() / seconds} if self._config.parallel.ep_size > 1 else {}),
            "atom_fill": fill["atoms"],
            "budget_fill": max(fill.values()),
        }


def step_work(norm: Normalizers, routed: float, config: RunConfig) -> Work:
    """What costs FLOPs in steps of these counts; `routed` rows went through experts."""
    views = config.objective.contrast_bare_scaffold
    return Work(
        molecules=norm.molecules.item(),
        atoms=norm.atoms.item(),
        atoms_hidden=norm.atoms_hidden.item(),
        bonds_hidden=norm.bonds_hidden.item(),
        pairs=norm.pairs.item(),
        routed=routed,
        view_molecules=norm.view_molecules.item() if views else 0.0,
        view_atoms=norm.view_atoms.item() if views else 0.0,
    )
