"""The chapters on experts: which atoms they get, how they split, what ranks send each other for them."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from hmoe_ds.model.size import moe_layers
from hmoe_ds.report import figures, html
from hmoe_ds.report.atom_kinds import expert_kinds, kinds_of
from hmoe_ds.report.drawings import draw_molecule
from hmoe_ds.report.palette import OTHER, color_of
from hmoe_ds.report.run_story import RunStory
from hmoe_ds.report.sample import RoutedMolecules, Sample
from hmoe_ds.report.traffic import replayed_traffic

_DRAWN_MOLECULES, _DRAWN_ATOMS = 12, (14, 36)
_EXPERTS_LISTED = 24


def atoms(story: RunStory, routed: RoutedMolecules) -> str:
    """Which atoms go to which expert."""
    held_out = routed.held_out
    if story.config.router.experts == 1:
        return html.section("What atoms choose: experts", html.text("This run has one expert.", kind="soft"))
    layers = len(held_out.expert_LN)
    expert_N = held_out.expert_LN[-1]
    kinds = expert_kinds(expert_N, kinds_of(held_out.atom_features_N9), _EXPERTS_LISTED)
    router = story.config.router
    per_group, in_groups = router.experts // router.groups, story.has_groups and router.form != "additive"
    listed = [
        (
            f"expert {one.expert} (group {one.expert // per_group})" if in_groups else f"expert {one.expert}",
            f"{one.share:.1%}",
            ", ".join(f"{name} {share:.0%}" for name, share in one.kinds),
        )
        for one in kinds
    ]
    load = None
    if story.load is not None and len(story.load.step_S) > 1:
        load = html.grid(
            html.figure(
                figures.load_figure(story.load, per_group),
                "Heat map of the load of each expert over steps, one panel for each layer.",
                "Atoms of each expert over the mean of its layer, at the logged steps. White lines part the groups.",
            )
        )
    return html.section(
        "What atoms choose: experts",
        html.text("Load of the experts over time", "h3") if load else None,
        load,
        html.text("Molecules, coloured by the expert of each atom", "h3"),
        html.text(
            f"The expert with the largest weight for each atom, in H-MoE layer {layers} of {layers}. Molecules with "
            "held-out scaffolds, those of a group beside each other.",
            kind="soft",
        ),
        html.tiles(_drawn_molecules(held_out, expert_N), wide=True),
        html.text("What experts take", "h3"),
        html.text(f"The busiest experts of that layer, and what their atoms are (of {len(expert_N):,}).", kind="soft"),
        html.table(["expert", "atoms", "mostly"], listed, prose=True),
    )


def _drawn_molecules(sample: Sample, expert_N: NDArray[np.int64]) -> list[str]:
    """Some molecules of every group, with legends; in one legend no two experts share a colour."""
    found = []
    for molecule in _some_of_each_group(sample):
        first, end = sample.ptr_B[molecule], sample.ptr_B[molecule + 1]
        experts = expert_N[first:end].tolist()
        ranked = [expert for expert, _ in sorted(Counter(experts).items(), key=lambda one: (-one[1], one[0]))]
        place = {expert: color_of(rank) for rank, expert in enumerate(ranked[:7])}
        colors = {atom: place.get(expert, OTHER) for atom, expert in enumerate(experts)}
        smiles = sample.smiles[molecule]
        words = ", ".join(f"expert {expert}: {experts.count(expert)} atoms" for expert in ranked)
        legend = "".join(
            html.legend(place.get(expert, OTHER), f"expert {expert}: {experts.count(expert)}") for expert in ranked
        )
        title = html.text(f"group {sample.group_B[molecule]}", "b")
        found.append(html.image(draw_molecule(smiles, (284, 190), colors), f"{smiles}; {words}") + title + legend)
    return found


def _some_of_each_group(sample: Sample) -> list[int]:
    """Molecules in turn from the largest groups, with different scaffolds, of a size that can be drawn if there are."""
    least, most = _DRAWN_ATOMS
    atoms_B = np.diff(sample.ptr_B)
    fits_B = (atoms_B >= least) & (atoms_B <= most) & (sample.scaffold_key_B != 0)
    if not fits_B.any():
        fits_B = atoms_B <= max(most, atoms_B.min())
    order = np.argsort(-np.bincount(sample.group_B), kind="stable")
    each = max(1, _DRAWN_MOLECULES // max(1, int((np.bincount(sample.group_B) > 0).sum())))
    chosen: list[int] = []
    for group in order:
        here = np.flatnonzero(fits_B & (sample.group_B == group))
        _, firsts = np.unique(sample.scaffold_key_B[here], return_index=True)
        chosen += here[np.sort(firsts)][:each].tolist()
    return chosen[:_DRAWN_MOLECULES]


def allocation(story: RunStory) -> str:
    """Experts that split."""
    config = story.config
    if not config.router.experts_at_start:
        words = "Dynamic allocation was off: all experts live from the start (router.experts_at_start)."
        return html.section("Experts that split", html.text(words, kind="soft"))
    if not story.splits:
        return html.section("Experts that split", html.text("No expert has split so far.", kind="soft"))
    layers, last = moe_layers(config.model), story.lines[-1]["step"]
    live = figures.curves_figure(story, {"experts_live": "living experts"}, "experts of a layer")
    recent = [
        [
            *(f"{line[name]:,}" for name in ("step", "layer", "parent", "slot")),
            f"{line['parent_load'] / line['mean_load']:.1f}",
        ]
        for line in story.splits[-12:]
    ]
    return html.section(
        "Experts that split",
        html.text(f"{len(story.splits):,} splits; each expert that splits keeps what the model computes as it is."),
        html.grid(
            html.figure(
                figures.splits_figure(story.splits, layers, last),
                "Timeline of the splits of experts, by layer.",
                "When experts split, by layer.",
            ),
            html.figure(live, "Line chart of living experts over steps.", "Experts that live, mean of the layers."),
        ),
        html.table(["step", "layer", "expert", "its new slot", "load over the mean"], recent),
    )


def traffic(story: RunStory, routed: RoutedMolecules) -> str:
    """What ranks send each other."""
    found = replayed_traffic(routed.train.routing, routed.train.rows, story.config)
    if not found:
        words = (
            "No replay: the experts of this run can lie on no two ranks; router.groups and router.experts must be "
            "divisible by them."
        )
        return html.section("Traffic between ranks", html.text(words, kind="soft"))
    saved = ""
    if found[0].migrated is not None:
        parts = [f"{one.migrated / one.without:.0%} at {one.ranks}" for one in found if one.migrated is not None]
        saved = f" With migration (parallel.migration) ranks send {', '.join(parts)} ranks of what they send without."
    else:
        saved = f" The form {story.config.router.form} spreads the experts of a molecule, so there is no migration."
    measured = figures.curves_figure(story, {"exchanged_bytes": "all ranks"}, "bytes of a step", unit="B")
    return html.section(
        "Traffic between ranks",
        html.text(
            f"What ranks would send each other for {found[0].molecules:,} molecules, forward and backward, if the "
            "experts were spread over them: the routing of this checkpoint, replayed by the code that runs there. A "
            f"step has up to {story.config.data.molecules_per_step:,} molecules; the more of them on a rank, the less "
            f"has to stay behind in a migration.{saved}"
        ),
        html.grid(
            html.figure(
                figures.traffic_figure(found),
                "Bar chart of bytes that leave ranks for these molecules, with and without migration.",
                "Replayed: bytes that leave ranks for these molecules.",
            ),
            html.figure(
                measured,
                "Line chart of the measured bytes that left ranks, over steps.",
                "Measured in this run: bytes that left ranks in a step.",
            ),
        ),
    )
