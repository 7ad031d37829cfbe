"""How big a model is, and of what shape, in a line each."""

from __future__ import annotations

from hmoe_ds.config import ModelConfig, MoleculeHeads, RouterConfig
from hmoe_ds.inspect.report import fact, plural
from hmoe_ds.model.size import count_parameters, moe_layers


def parameters(model: ModelConfig, router: RouterConfig, heads: MoleculeHeads | None) -> dict[str, int]:
    """Parameters in all (`total`), and those that one atom passes (`active`); without `heads` those of the encoder."""
    count = count_parameters(model, router, heads or MoleculeHeads())
    without = count.heads if heads is None else 0
    return {"total": count.total - without, "active": count.active - without}


def parameters_fact(count: dict[str, int]) -> str:
    """The line about them."""
    active = "all of them for each atom"
    if count["active"] < count["total"]:
        active = f"of which an atom passes {count['active']:,} ({count['active'] / count['total']:.0%})"
    return fact("parameters", f"{count['total']:,}", active)


def architecture(model: ModelConfig, router: RouterConfig) -> str:
    """The shape of a model in one line."""
    blocks = f"width {model.hidden_size}; {model.lower_blocks} lower and {model.upper_blocks} upper blocks"
    if router.experts == 1:
        return f"{blocks}; dense (one expert)"
    start = f" ({router.experts_at_start} at the start)" if router.experts_at_start else ""
    experts = f"{router.experts}{start} in {plural(router.groups, 'group')}"
    chosen = plural(router.groups_per_molecule, "group") + " per molecule, "
    chosen += plural(router.experts_per_atom, "expert") + " per atom"
    return f"{blocks}; experts in {moe_layers(model)} of them: {experts}, {chosen}; {router.form} gate"
