"""The chapters of the report, in words and figures."""

from __future__ import annotations

from collections import Counter

import numpy as np
import yaml
from numpy.typing import NDArray

from data_pipeline.redact import redacted
from hmoe_ds.config import RouterConfig
from hmoe_ds.model.size import count_parameters, moe_layers
from hmoe_ds.moe.agreement import mutual_information
from hmoe_ds.report import figures, html
from hmoe_ds.report.atom_kinds import expert_kinds, kinds_of
from hmoe_ds.report.drawings import draw_molecule
from hmoe_ds.report.palette import OTHER, color_of
from hmoe_ds.report.run_story import RunStory
from hmoe_ds.report.sample import RoutedMolecules, Sample
from hmoe_ds.report.scaffolds import ScaffoldTable, scaffold_table, typical_scaffolds
from hmoe_ds.report.traffic import replayed_traffic

_HEAT_ROWS, _HEAT_COLUMNS = 14, 16
_GROUPS_SHOWN, _SCAFFOLDS_SHOWN = 12, 6
_DRAWN_MOLECULES, _DRAWN_ATOMS = 12, (14, 36)
_EXPERTS_LISTED = 24
_LOSS_TERMS = {
    "loss_atom": "hidden atoms",
    "loss_bond": "hidden bonds",
    "loss_contrast": "contrast",
    "loss_fingerprint": "fingerprint",
    "loss_descriptors": "descriptors",
}


def head(story: RunStory, routed: RoutedMolecules | None) -> list[str]:
    """Name of the run, and what one wants to know first."""
    config, last = story.config, story.lines[-1]
    router = config.router
    count = count_parameters(config.model, router, config.objective.molecule_heads)
    shape = (
        f"{moe_layers(config.model)} H-MoE layers of {router.experts} experts in {router.groups} groups, "
        f"{router.experts_per_atom} for each atom, form {router.form}; width {config.model.hidden_size}"
    )
    validation = story.last("validation_loss")
    speeds, sizes = (story.series(name)[1] for name in ("molecules_per_second", "molecules"))
    facts = [
        ("steps", f"{last['step']:,}", f"of {config.run.steps:,}"),
        ("parameters", _short(count.total), f"{_short(count.active)} for each atom"),
        ("loss", _decimals(last["loss"]), "" if validation is None else f"{validation:.3f} on validation"),
        ("molecules/s", f"{np.median(speeds):,.0f}" if len(speeds) else "-", "median of all lines"),
        ("molecules", _short(last["step"] * sizes.mean()) if len(sizes) else "-", "in all, about"),
    ]
    if routed is not None:
        agreement = _decimals(routed.held_out.consistency, 2)
        facts.append(("consistency", agreement, "held-out scaffolds" if routed.is_of_run else ""))
    return [html.text(f"Routing report: {story.folder.name}", "h1"), html.text(shape, kind="soft"), html.cards(facts)]


def training(story: RunStory) -> str:
    """Losses, speed, health."""
    losses = figures.curves_figure(story, {"loss": "training", "validation_loss": "validation"}, "loss")
    terms = figures.curves_figure(story, _LOSS_TERMS, "unweighted terms", log=True)
    speed = figures.curves_figure(story, {"molecules_per_second": "molecules/s"}, "molecules/s", unit=" ")
    waits = figures.curves_figure(
        story, {"data_wait": "waiting for molecules", "exchange_share": "exchanges between ranks"}, "share of the time"
    )
    health = figures.curves_figure(
        story,
        {
            "group_entropy": "entropy of groups (1: even)",
            "chosen_p": "probability of chosen groups",
            "starved_experts": "experts that starve",
            "validation_consistency": "consistency, validation",
        },
        "health of the routing",
    )
    norm = figures.curves_figure(story, {"grad_norm": "before clipping"}, "norm of the gradient", log=True)
    drawn = [
        (losses, "training and validation loss", "The loss of the global batch, and on held-out scaffolds."),
        (terms, "the terms of the loss", "Its terms before they are weighed, on a logarithmic scale."),
        (speed, "molecules per second", "Speed of all ranks, waiting for data included."),
        (waits, "the share of time spent waiting", "Time that was not spent computing."),
        (health, "the health of the routing", "A gate that collapses loses entropy; one that learns is consistent."),
        (norm, "the norm of the gradient", "Before clipping, on a logarithmic scale."),
    ]
    charts = (html.figure(svg, f"Line chart of {what} over steps.", caption) for svg, what, caption in drawn)
    return html.section("How the training went", html.grid(*charts))


def groups(story: RunStory, routed: RoutedMolecules) -> str:
    """Which scaffolds go to which group."""
    held_out, count = routed.held_out, story.config.router.groups
    title = "Where molecules go: scaffolds and groups"
    if not _has_groups(story.config.router):
        words = f"This run has no scaffold level to show: form {story.config.router.form}, groups: {count}."
        return html.section(title, html.text(words, kind="soft"))
    sizes = np.bincount(routed.train.group_B, minlength=count)
    measured = [
        (
            "consistency",
            _decimals(held_out.consistency, 2),
            "1: molecules of one scaffold go to one group; 0: as by chance",
        ),
        (
            "mutual information",
            _decimals(mutual_information(held_out.generic_key_B, held_out.group_B), 2),
            "of groups and skeletons, normalised; above 0 by chance, too",
        ),
        ("largest group", f"{sizes.max() / sizes.sum():.0%}", f"of molecules; even would be {1 / count:.0%}"),
    ]
    table = scaffold_table(routed.train.scaffold_key_B, routed.train.group_B, count)
    order = np.argsort(-sizes, kind="stable")
    columns = order[:_HEAT_COLUMNS]
    rows = []
    for key, count_G in zip(table.key_S[:_HEAT_ROWS].tolist(), table.count_SG, strict=False):
        smiles = routed.scaffold_smiles[key]
        drawing = html.image(draw_molecule(smiles, (120, 66)), f"scaffold {smiles}")
        total = int(count_G.sum())
        rows.append((f"{drawing}{html.text(f'{total:,} molecules', 'small')}", (count_G[columns] / total).tolist()))
    left_out = f"; the largest {len(columns)} of {count} groups" if count > len(columns) else ""
    molecules = len(routed.train.group_B)
    which = (
        "with scaffolds that the training has never seen"
        if routed.is_of_run
        else "of a dataset that is not the one of the run, so it may have been trained on some of them"
    )
    return html.section(
        title,
        html.text(
            f"The scaffold level of the gate sends each molecule to a group of experts. At step {routed.step:,}, for "
            f"{len(held_out.group_B):,} molecules {which}, none of their atoms hidden:"
        ),
        html.cards(measured),
        _shares_over_time(story),
        html.text("Scaffolds by group", "h3"),
        html.text(
            f"The most frequent scaffolds of {molecules:,} training molecules, and the share of their molecules that "
            f"each group gets{left_out}.",
            kind="soft",
        ),
        html.heat_table(["scaffold", *(f"group {group}" for group in columns)], rows),
        html.text("What is typical of a group", "h3"),
        html.text(
            "Scaffolds of which a group has more than its share: how many of these molecules, and how many times as "
            "frequent they are in the group as in all.",
            kind="soft",
        ),
        *(_typical(routed, table, int(group), sizes) for group in order[:_GROUPS_SHOWN] if sizes[group]),
    )


def _shares_over_time(story: RunStory) -> str | None:
    if story.load is None or len(story.load.step_S) < 2:
        return None
    svg = figures.groups_figure(story.load)
    alt = "Stacked chart of the share of molecules of each group over steps."
    return html.grid(html.figure(svg, alt, "Shares of the groups over time."))


def _typical(routed: RoutedMolecules, table: ScaffoldTable, group: int, sizes: NDArray[np.int64]) -> str:
    title = f"Group {group}: {sizes[group] / sizes.sum():.0%} of the molecules"
    found = typical_scaffolds(table, group, _SCAFFOLDS_SHOWN)
    if not found:
        return html.text(title, "h4") + html.text("No scaffold is more frequent here than elsewhere.", kind="soft")
    inner = []
    for scaffold in found:
        smiles = routed.scaffold_smiles[scaffold.key]
        drawing = html.image(draw_molecule(smiles, (156, 104)), f"scaffold {smiles}")
        words = f"{scaffold.here:,} of {scaffold.total:,} molecules, {scaffold.enrichment:.1f} times as frequent"
        inner.append(drawing + html.text(words, "span"))
    return html.text(title, "h4") + html.tiles(inner)


def atoms(story: RunStory, routed: RoutedMolecules) -> str:
    """Which atoms go to which expert."""
    held_out = routed.held_out
    if story.config.router.experts == 1:
        return html.section("What atoms choose: experts", html.text("This run has one expert.", kind="soft"))
    layers = len(held_out.expert_LN)
    expert_N = held_out.expert_LN[-1]
    kinds = expert_kinds(expert_N, kinds_of(held_out.atom_features_N9), _EXPERTS_LISTED)
    router = story.config.router
    per_group, in_groups = router.experts // router.groups, _has_groups(router) and router.form != "additive"
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


def _has_groups(router: RouterConfig) -> bool:
    """Whether the scaffold level has a say."""
    return router.groups > 1 and router.form != "flat"


def embedding_map(routed: RoutedMolecules) -> str:
    """The routing embedding in two dimensions."""
    title, u_BP = "A map of the routing embedding", routed.held_out.u_BP
    if len(u_BP) < 3 or u_BP.shape[1] < 2 or not np.isfinite(u_BP).all():
        words = "No map: it takes three molecules, and routing embeddings that are finite."
        return html.section(title, html.text(words, kind="soft"))
    svg, share = figures.map_figure(u_BP, routed.held_out.group_B, routed.centers_GP)
    caption = (
        f"Held-out molecules in the plane in which their routing embeddings vary most ({share:.0%} of the variance); "
        "numbers mark the centres of the groups."
    )
    alt = "Scatter plot of routing embeddings, coloured by group, with the centres of the groups."
    return html.section(title, html.grid(html.figure(svg, alt, caption)))


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


def settings(story: RunStory) -> str:
    """The whole configuration."""
    content = redacted(yaml.safe_dump(story.config.to_dict(), sort_keys=False))
    return html.section("Configuration", html.folded("config.yaml", content))


def unrouted(reason: str) -> str:
    """Why there is nothing on routing."""
    return html.section("Where molecules go", html.text(reason))


def _short(number: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:,.0f}"


def _decimals(value: float | None, digits: int = 3) -> str:
    return "not finite" if value is None or np.isnan(value) else f"{value:.{digits}f}"
