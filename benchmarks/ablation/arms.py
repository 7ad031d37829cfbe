"""The arms of the table: H-MoE, the plain alternatives, and H-MoE without each of its parts."""

from __future__ import annotations

from benchmarks.ablation.search import BASE, FLAT, NO_CONTRAST, Arms
from benchmarks.ablation.trial import Settings

_RANDOM: Settings = {"router.group_choice": "random", **NO_CONTRAST}
_CURRICULUM = ("curriculum.",)
_ALLOCATION = ("router.experts_at_start", "router.split_")


def curve_arms(arms: Arms) -> dict[str, Settings]:
    """The arms of the scaling curve; beside the best form the hard one with two groups, which migration can serve."""
    hard: Settings = {"router.form": "hard", "router.groups_per_molecule": 2}
    unguided = _without(arms.best, "curriculum.guidance")
    return {"dense": arms.dense, "flat": arms.flat, "H-MoE": arms.best, "H-MoE, hard": {**unguided, **hard}}


def table_arms(arms: Arms) -> dict[str, Settings]:
    """All arms of the table."""
    hmoe = arms.complete
    experts, chosen = ({**BASE, **hmoe}[f"router.{name}"] for name in ("experts", "experts_per_atom"))
    # Each group is one expert, so the scaffold alone decides which experts a molecule's atoms pass.
    one_expert_groups: Settings = {
        "router.form": "hard",
        "router.groups": experts,
        "router.groups_per_molecule": chosen,
    }
    unguided = _without(hmoe, "curriculum.guidance")
    return {
        "dense": arms.dense,
        "flat": arms.flat,
        "H-MoE": hmoe,
        "random groups": {**unguided, **_RANDOM},
        "H-MoE minus contrast": {**hmoe, **NO_CONTRAST},
        "H-MoE minus curriculum": _without(hmoe, *_CURRICULUM),
        "H-MoE minus dynamic allocation": _without(hmoe, *_ALLOCATION),
        "H-MoE minus scaffold level": {**unguided, **FLAT},
        "H-MoE minus atom level": {**_without(unguided, *_ALLOCATION), **one_expert_groups},
    }


def _without(settings: Settings, *beginnings: str) -> Settings:
    """`settings` without the fields that begin so."""
    return {name: value for name, value in settings.items() if not name.startswith(beginnings)}
