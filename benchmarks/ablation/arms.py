"""The arms of the table: H-MoE, the plain alternatives, and H-MoE without each of its parts."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.ablation.search import BASE, FLAT, NO_CONTRAST
from benchmarks.ablation.trial import Settings

_RANDOM: Settings = {"router.group_choice": "random", **NO_CONTRAST}


def table_arms(arms: Mapping[str, Settings]) -> dict[str, Settings]:
    """All arms of the table, from the settings of `dense`, `flat` and `H-MoE`."""
    hmoe = arms["H-MoE"]
    experts, chosen = ({**BASE, **hmoe}[f"router.{name}"] for name in ("experts", "experts_per_atom"))
    # Each group is one expert, so the scaffold alone decides which experts a molecule's atoms pass.
    one_expert_groups: Settings = {
        "router.form": "hard",
        "router.groups": experts,
        "router.groups_per_molecule": chosen,
    }
    return {
        **arms,
        "random groups": {**hmoe, **_RANDOM},
        "H-MoE minus contrast": {**hmoe, **NO_CONTRAST},
        "H-MoE minus curriculum": _without(hmoe, "curriculum."),
        "H-MoE minus dynamic allocation": _without(hmoe, "allocation."),
        "H-MoE minus scaffold level": {**hmoe, **FLAT},
        "H-MoE minus atom level": {**_without(hmoe, "allocation."), **one_expert_groups},
    }


def _without(settings: Settings, section: str) -> Settings:
    return {name: value for name, value in settings.items() if not name.startswith(section)}
