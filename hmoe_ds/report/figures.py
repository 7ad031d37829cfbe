"""Figures of the report, as SVG. All are about as wide as a phone, so that their letters can be read there, too."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray

from hmoe_ds.report.palette import COLORS, OTHER, color_of, marker_of
from hmoe_ds.report.run_story import ExpertLoad, Line, RunStory
from hmoe_ds.report.traffic import ReplayedTraffic

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "hmoe_ds",  # ids that do not change from one report to the next
}
_MOST_LAYERS = 4
_WIDTH = 4.2  # inches
_styled = matplotlib.rc_context(_STYLE)


@_styled
def curves_figure(story: RunStory, names: dict[str, str], label: str, unit: str = "", log: bool = False) -> str | None:
    """Figures of `metrics.jsonl` over steps; those that the run does not have are left out.

    Args:
        story: the run.
        names: in the file, and what they are called.
        label: of the vertical axis.
        unit: of large numbers, which get a prefix such as k or M.
        log: on a logarithmic axis.

    Returns:
        None when the run has none of them.
    """
    found = {title: story.series(name) for name, title in names.items()}
    found = {title: series for title, series in found.items() if len(series[0])}
    if not found:
        return None
    figure, axes = _figure(label)
    for place, (title, (steps, values)) in enumerate(found.items()):
        marker = marker_of(place) if len(steps) < 12 else ""
        axes.plot(steps, values, color=color_of(place), label=title, linewidth=1.6, marker=marker, markersize=4)
    if log:
        axes.set_yscale("log", nonpositive="mask")
    elif unit:
        axes.yaxis.set_major_formatter(EngFormatter(unit))
    if not log:
        axes.set_ylim(bottom=min(0, *(values.min() for _, values in found.values())))
    if len(found) > 1:
        short = max(map(len, found)) < 22
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2 if short else 1)
    return _svg(figure)


@_styled
def load_figure(load: ExpertLoad, per_group: int) -> str:
    """Load of every expert over time, beside the mean of its layer; layers in the middle are left out if many."""
    layers = load.atoms_SLE.shape[1]
    shown = sorted({round(place) for place in np.linspace(0, layers - 1, min(layers, _MOST_LAYERS))})
    figure = Figure(figsize=(_WIDTH, 0.9 + 1.5 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, layer in zip(panels, shown, strict=True):
        atoms_SE = load.atoms_SLE[:, layer].astype(float)
        relative_SE = atoms_SE / np.maximum(atoms_SE.mean(axis=1, keepdims=True), 1)
        mesh = axes.pcolormesh(
            _edges(load.step_S), np.arange(atoms_SE.shape[1] + 1), relative_SE.T, cmap="cividis", vmin=0, vmax=3,
            rasterized=True,
        )  # fmt: skip
        axes.grid(visible=False)
        axes.set_ylabel(f"layer {layer + 1}\nexpert")
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        for edge in range(per_group, atoms_SE.shape[1], per_group):
            axes.axhline(edge, color="white", linewidth=0.5)
    panels[-1].set_xlabel("step")
    bar = figure.colorbar(mesh, ax=panels, location="top", aspect=40, shrink=0.7)
    bar.set_label("atoms of an expert over the mean")
    bar.set_ticks([0, 1, 2, 3], labels=["0", "1", "2", "3 or more"])
    return _svg(figure)


@_styled
def map_figure(
    u_BP: NDArray[np.float32], group_B: NDArray[np.int64], centers_GP: NDArray[np.float32]
) -> tuple[str, float]:
    """Routing embeddings in the plane in which they vary most (PCA); -> SVG, and the share of the variance in it."""
    mean_P = u_BP.mean(axis=0)
    _, spread, axes_PP = np.linalg.svd(u_BP - mean_P, full_matrices=False)
    plane_P2 = axes_PP[:2].T
    share = float((spread[:2] ** 2).sum() / max((spread**2).sum(), 1e-12))
    points_B2, centers_G2 = ((values - mean_P) @ plane_P2 for values in (u_BP, centers_GP))
    figure, axes = _figure("", height=4.0)
    axes.set_xlabel("")
    axes.set_xticks([])
    axes.set_yticks([])
    order = np.argsort(-np.bincount(group_B, minlength=len(centers_GP)), kind="stable")
    for place, group in enumerate(order):
        here = group_B == group
        if not here.any():
            continue
        named = place < len(COLORS)
        x_B, y_B = points_B2[here].T
        axes.scatter(
            x_B, y_B, s=9, color=color_of(place), marker=marker_of(place) if named else ".", alpha=0.55,
            linewidths=0, label=f"group {group}" if named else None, rasterized=True,
        )  # fmt: skip
        if named:
            axes.annotate(
                str(group), centers_G2[group], ha="center", va="center", fontsize=9, fontweight="bold",
                bbox={"boxstyle": "circle", "facecolor": "white", "edgecolor": color_of(place), "linewidth": 1.6},
            )  # fmt: skip
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3, markerscale=2, handletextpad=0.2)
    return _svg(figure), share


@_styled
def splits_figure(splits: Sequence[Line], layers: int, steps: int) -> str:
    """When experts split, by layer; those that took the slot of a dead one are marked."""
    figure, axes = _figure("H-MoE layer", height=1.4 + 0.3 * layers)
    for place, (reclaimed, title) in enumerate([(False, "into a free slot"), (True, "into the slot of a dead expert")]):
        found = [line for line in splits if line["reclaimed"] == reclaimed]
        step, layer = ([line[name] for line in found] for name in ("step", "layer"))
        if found:
            axes.scatter(step, layer, color=color_of(place), marker=marker_of(place), s=28, label=title)
    axes.set_xlim(0, steps)
    axes.set_yticks(range(1, layers + 1))
    axes.set_ylim(0.5, layers + 0.5)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.45))
    return _svg(figure)


@_styled
def traffic_figure(traffic: Sequence[ReplayedTraffic]) -> str:
    """Bytes of a step that leave ranks, with and without migration."""
    figure, axes = _figure("bytes of a slice")
    arms = {"without migration": [one.without for one in traffic]}
    if traffic[0].migrated is not None:
        arms["with migration"] = [one.migrated or 0.0 for one in traffic]
    places, width = np.arange(len(traffic)), 0.8 / len(arms)
    for place, (title, sent) in enumerate(arms.items()):
        left = places + width * (place - (len(arms) - 1) / 2)
        bars = axes.bar(left, sent, width * 0.94, color=color_of(place), label=title)
        axes.bar_label(bars, [EngFormatter("B", places=1)(value) for value in sent], fontsize=7.5)
    axes.yaxis.set_major_formatter(EngFormatter("B"))
    axes.set_xticks(places, [f"{one.ranks} ranks" for one in traffic])
    axes.set_xlabel("")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    return _svg(figure)


@_styled
def groups_figure(load: ExpertLoad) -> str:
    """Shares of the groups over time, stacked."""
    figure, axes = _figure("share of molecules")
    share_SG = load.molecules_SG / np.maximum(load.molecules_SG.sum(axis=1, keepdims=True), 1)
    order = np.argsort(-load.molecules_SG[-1], kind="stable")
    named, rest = order[: len(COLORS) - 1], order[len(COLORS) - 1 :]
    stacks = [share_SG[:, group] for group in named]
    labels, colors = [f"group {group}" for group in named], [color_of(place) for place in range(len(named))]
    if len(rest):
        stacks.append(share_SG[:, rest].sum(axis=1))
        labels.append(f"{len(rest)} others")
        colors.append(OTHER)
    axes.stackplot(load.step_S, stacks, labels=labels, colors=colors, edgecolor="white", linewidth=0.3)
    axes.set_ylim(0, 1)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    return _svg(figure)


def _figure(label: str, height: float = 2.7) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    return figure, axes


def _edges(step_S: NDArray[np.int64]) -> NDArray[np.float64]:
    """Borders of cells around steps: each reaches back to the one before, the first one as far as the second."""
    first = max(0.0, step_S[0] - float(np.diff(step_S[:2]).sum()))
    return np.concatenate([[first], step_S]).astype(float)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, dpi=150, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
