"""Predicted and real step times of small runs on this machine."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.scaling_model.machine import Machine, step_seconds
from benchmarks.scaling_model.markdown import markdown_table
from benchmarks.scaling_model.step import StepTime, step_time
from benchmarks.scaling_model.worlds import World
from hmoe_ds.config_parser import load_config
from hmoe_ds.training.dry_run import MeanMolecule
from hmoe_ds.training.footprint import all_to_all_bytes


@dataclass(frozen=True)
class Layout:
    """How a run is spread: ranks, and over how many of them the experts are; with migration or not."""

    ranks: int
    ep_size: int
    migration: bool = False

    @property
    def name(self) -> str:
        return f"{self.ranks} ranks, ep_size {self.ep_size}{', migration' if self.migration else ''}"

    @property
    def words(self) -> list[str]:
        """Overrides of a run."""
        return [f"--parallel.ep_size={self.ep_size}", f"--parallel.migration={str(self.migration).lower()}"]

    def folder(self, out: Path) -> Path:
        """Of the run among those in `out`."""
        return out / self.name.replace(",", "").replace(" ", "_")


LAYOUTS = (
    Layout(1, 1),
    Layout(2, 1),
    Layout(2, 2),
    Layout(2, 2, migration=True),
    Layout(4, 1),
    Layout(4, 2),
    Layout(4, 4),
    Layout(4, 4, migration=True),
)


@dataclass(frozen=True)
class Cell:
    """One layout, predicted and measured.

    Args:
        layout: how the run was spread.
        predicted: seconds of a step, by part.
        measured: seconds of a step.
        sent_predicted: bytes of a step between ranks for experts, without migration.
        sent: those that were measured.
    """

    layout: Layout
    predicted: StepTime
    measured: float
    sent_predicted: float
    sent: float

    @property
    def ratio(self) -> float:
        return self.predicted.total / self.measured

    def figures(self) -> dict[str, Any]:
        """As plain data."""
        parts = dataclasses.asdict(self.predicted)
        return {
            "layout": self.layout.name,
            "predicted_seconds": self.predicted.total,
            "measured_seconds": self.measured,
            "ratio": self.ratio,
            "parts": parts,
            "sent_bytes_predicted_without_migration": self.sent_predicted,
            "sent_bytes": self.sent,
        }


def validation_worlds(base: Sequence[str], out: Path) -> list[list[World]]:
    """The runs of all layouts, those of as many ranks by the same ones."""
    layouts: dict[int, list[Layout]] = {}
    for layout in LAYOUTS:
        layouts.setdefault(layout.ranks, []).append(layout)
    return [
        [World(ranks, {str(layout.folder(out)): [*base, *layout.words] for layout in alike})]
        for ranks, alike in layouts.items()
    ]


def validate(layout: Layout, base: Sequence[str], molecule: MeanMolecule, machine: Machine, out: Path) -> Cell:
    """Compare the run in this layout, one of `validation_worlds`, with what is predicted.

    With migration the prediction takes the share of bytes that the run had: how many molecules find room beside their
    experts is no question of speed.
    """
    folder = layout.folder(out)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    sent = mean(line.get("exchanged_bytes", 0.0) for line in lines)
    config = load_config([*base, *layout.words])
    ordinary = all_to_all_bytes(config, layout.ranks, molecule.atoms, molecule.bonds).total
    share = sent / ordinary if layout.migration else None
    predicted = step_time(
        config, layout.ranks, molecule, machine.core(layout.ranks), machine.fabric(layout.ranks), share
    )
    return Cell(layout, predicted, step_seconds(folder), ordinary, sent)


def worst_ratio(cells: Sequence[Cell]) -> float:
    """Predicted over measured of the cell that is furthest from 1, up or down."""
    return max((cell.ratio for cell in cells), key=lambda ratio: abs(math.log(ratio)))


def validation_table(cells: Sequence[Cell]) -> str:
    """The cells as a Markdown table, milliseconds."""
    names = ["compute", "update", "all_to_all", "zero", "loss"]
    rows = [
        [
            cell.layout.name,
            *(f"{1000 * getattr(cell.predicted, name):.1f}" for name in names),
            f"{1000 * cell.predicted.total:.1f}",
            f"{1000 * cell.measured:.1f}",
            f"{cell.ratio:.2f}",
        ]
        for cell in cells
    ]
    return markdown_table(["layout", *names, "predicted", "measured", "predicted / measured"], rows)
