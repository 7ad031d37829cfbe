"""What a model was trained on, on which terms, and what its validation measured, as lines of text."""

from __future__ import annotations

from collections.abc import Mapping

from hmoe_ds.inspect.noted import Notes
from hmoe_ds.inspect.report import fact, number

_BASELINE, _CONSISTENCY = "validation_atom_entropy", "validation_consistency"


def trained_facts(notes: Notes) -> list[str]:
    """The molecules, and each source with its terms."""
    steps = "" if notes.step is None else f"{notes.step:,} steps"
    form = {True: " in their standard form", False: " as they were written", None: ""}[notes.standardize]
    molecules = "" if notes.molecules is None else f"{notes.molecules:,} molecules{form}"
    if not (steps or molecules):
        return [fact("trained", "on what is not noted")]
    lines = [fact("trained", " on ".join(part for part in (steps, molecules) if part))]
    for source in notes.sources:
        lines.append(fact("source", f"{source.name}: {source.rows:,} rows ({source.licence or 'terms not known'})"))
    return lines if notes.sources else [*lines, fact("source", "not noted")]


def losses(measured: Mapping[str, float | None], total: str) -> str:
    """A loss and what it is made of; `total`: the name of the loss, with which those of its terms begin."""
    terms = {name.removeprefix(f"{total}_"): value for name, value in measured.items() if name.startswith(f"{total}_")}
    inside = ", ".join(f"{name} {number(value)}" for name, value in terms.items())
    return number(measured.get(total)) + (f"; its terms, not weighted: {inside}" if inside else "")


def validation_facts(measured: Mapping[str, float | None], groups: int, step: int | None = None) -> list[str]:
    """What a validation measured.

    Args:
        measured: figures by name; {} when there was no validation.
        groups: of the model; with one group its routing says nothing.
        step: after which, where that is not plain.
    """
    if "validation_loss" not in measured:
        return [fact("validation", "none yet")]
    after = "" if step is None else f"after step {step:,}: "
    lines = [fact("validation", f"{after}loss {losses(measured, 'validation_loss')}")]
    if _BASELINE in measured:
        guess = number(measured[_BASELINE])
        lines.append(fact("", f"atom {guess} would be a guess by how frequent each element is"))
    if _CONSISTENCY in measured and groups > 1:
        agreement = number(measured[_CONSISTENCY])
        lines.append(fact("", f"consistency of groups within scaffolds {agreement} (1: always the same, 0: by chance)"))
    return lines
