"""Synthetic library: chains of carbon with one oxygen."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.errors import UsageError

_NAME = re.compile(r"synth:(\d+)(?:\?seed=(\d+))?")


@dataclass(frozen=True)
class SynthSpec:
    """So many molecules, of this seed."""

    count: int
    seed: int

    @property
    def identity(self) -> str:
        """What the molecules follow from, as text."""
        return f"synth:{self.count}?seed={self.seed}"


def is_synth(name: str) -> bool:
    """True for the name of a synthetic library."""
    return name.startswith("synth:")


def parse_synth(name: str) -> SynthSpec:
    """The library of a name. Raises UsageError for another name."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise UsageError(f"{name}: not a synthetic library; expected a name such as synth:1000?seed=1")
    return SynthSpec(int(match[1]), int(match[2] or 0))


def synthesize(spec: SynthSpec) -> Iterator[tuple[str, str]]:
    """(SMILES, id) of each molecule."""
    for row in range(spec.count):
        yield "C" * (row + 1) + "O", f"synth-{spec.seed}-{row}"
