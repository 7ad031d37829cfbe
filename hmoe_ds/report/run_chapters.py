"""The chapters on the run itself: what it is, how it went, how it was set up."""

from __future__ import annotations

import numpy as np
import yaml

from data_pipeline.redact import redacted
from hmoe_ds.model.size import count_parameters, moe_layers
from hmoe_ds.report import figures, html
from hmoe_ds.report.numbers import decimals, short
from hmoe_ds.report.run_story import RunStory
from hmoe_ds.report.sample import RoutedMolecules

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
        ("parameters", short(count.total), f"{short(count.active)} for each atom"),
        ("loss", decimals(last["loss"]), "" if validation is None else f"{validation:.3f} on validation"),
        ("molecules/s", f"{np.median(speeds):,.0f}" if len(speeds) else "-", "median of all lines"),
        ("molecules", short(last["step"] * sizes.mean()) if len(sizes) else "-", "in all, about"),
    ]
    if routed is not None:
        agreement = decimals(routed.held_out.consistency, 2)
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


def settings(story: RunStory) -> str:
    """The whole configuration."""
    content = redacted(yaml.safe_dump(story.config.to_dict(), sort_keys=False))
    return html.section("Configuration", html.folded("config.yaml", content))


def unrouted(reason: str) -> str:
    """Why there is nothing on routing."""
    return html.section("Where molecules go", html.text(reason))
