"""The chapters on the scaffold level of the gate: which molecules go to which group."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hmoe_ds.moe.agreement import mutual_information
from hmoe_ds.report import figures, html
from hmoe_ds.report.drawings import draw_molecule
from hmoe_ds.report.numbers import decimals
from hmoe_ds.report.run_story import RunStory
from hmoe_ds.report.sample import RoutedMolecules
from hmoe_ds.report.scaffolds import ScaffoldTable, scaffold_table, typical_scaffolds

_HEAT_ROWS, _HEAT_COLUMNS = 14, 16
_GROUPS_SHOWN, _SCAFFOLDS_SHOWN = 12, 6


def groups(story: RunStory, routed: RoutedMolecules) -> str:
    """Which scaffolds go to which group."""
    held_out, count = routed.held_out, story.config.router.groups
    title = "Where molecules go: scaffolds and groups"
    if not story.has_groups:
        words = f"This run has no scaffold level to show: form {story.config.router.form}, groups: {count}."
        return html.section(title, html.text(words, kind="soft"))
    sizes = np.bincount(routed.train.group_B, minlength=count)
    measured = [
        (
            "consistency",
            decimals(held_out.consistency, 2),
            "1: molecules of one scaffold go to one group; 0: as by chance",
        ),
        (
            "mutual information",
            decimals(mutual_information(held_out.generic_key_B, held_out.group_B), 2),
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
