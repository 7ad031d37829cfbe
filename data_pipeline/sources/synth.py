"""A synthetic library, `synth:1000000?seed=1`: as many molecules as a scale test wants, without a download.

Molecules are drug-like: ring systems in a chain, with substituents, some charged, some with stereo. The frequency of
their scaffolds follows Zipf's law, and 3% are acyclic. They are distinct by construction (`synth_pieces`), and
stay so when they are standardised. A name gives the same molecules in the same order on every machine.

A molecule is two numbers: its scaffold, and which combination of variants of the scaffold's pieces it is. Scaffolds get
their shares first; a permutation then deals all molecules in an order that looks random. Memory is that of the
scaffolds, some 600,000, whatever the number of molecules.
"""

import itertools
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data_pipeline.errors import UsageError
from data_pipeline.keys import digest64
from data_pipeline.sources.synth_pieces import families

_PREFIX = "synth:"
_NAME = re.compile(r"synth:(\d{1,18})(?:\?seed=(\d{1,18}))?", re.ASCII)
_EXPECTED = "expected synth:COUNT or synth:COUNT?seed=SEED, as in synth:1000000?seed=1"

# Part of the source's identity: count it up when `synth_pieces` or anything here gives other molecules.
LIBRARY_VERSION = 1

_ACYCLIC_SHARE = 0.03
_BLOCK_ROWS = 1 << 14
# Prime, and larger than any number of combinations: its multiples visit every combination.
_STRIDE = (1 << 61) - 1


@dataclass(frozen=True)
class SynthSpec:
    """How many molecules, and which: another seed gives other combinations, other frequent scaffolds, another order."""

    count: int
    seed: int = 0

    @property
    def identity(self) -> str:
        """What the molecules follow from, as text."""
        return f"synth:{self.count}?seed={self.seed}&version={LIBRARY_VERSION}"


def is_synth(name: str) -> bool:
    """True if a SOURCE means a synthetic library."""
    return name.startswith(_PREFIX)


def parse_synth(name: str) -> SynthSpec:
    """The spec behind a name such as `synth:1000000?seed=1`; the seed is 0 when it is not named.

    Raises:
        UsageError: not of this form, or a count that is 0 or above what exists.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise UsageError(f"{name}: not a synthetic library; {_EXPECTED}")
    spec = SynthSpec(int(match[1]), int(match[2] or 0))
    largest = int(_library().combinations[1:].sum())
    if not 1 <= spec.count <= largest:
        raise UsageError(f"{name}: the count is {spec.count}; expected 1 to {largest} molecules")
    return spec


def synthesize(spec: SynthSpec) -> Iterator[tuple[str, str]]:
    """The molecules: (SMILES, id). The SMILES are valid, not canonical, and no two are of one molecule.

    The id is `SYN<scaffold>-<combination>`; all acyclic molecules have scaffold 0.
    """
    library = _library()
    scaffolds, counts = _shares(spec, library)
    combinations = library.combinations[scaffolds]
    ends = np.cumsum(counts)
    offsets = _hashed(scaffolds, f"{spec.seed}/combination")
    for numbers in _shuffled(spec.count, f"{spec.seed}/order"):
        chosen = np.searchsorted(ends, numbers, side="right")
        position = (numbers - (ends - counts)[chosen]).astype(np.uint64)
        modulus = combinations[chosen].astype(np.uint64)
        # Below 2^64: there are fewer than 2^32 combinations.
        combination = (offsets[chosen] % modulus + position * (_STRIDE % modulus)) % modulus
        smiles = library.smiles(scaffolds[chosen], combination.astype(np.int64))
        ids = [f"SYN{s}-{c}" for s, c in zip(scaffolds[chosen].tolist(), combination.tolist(), strict=True)]
        yield from zip(smiles, ids, strict=True)


@dataclass(frozen=True)
class _Slot:
    """The pieces of a slot: where the variants of each begin in `_Library.variants`, and how many there are."""

    begins: np.ndarray
    sizes: np.ndarray


@dataclass(frozen=True)
class _Family:
    """Scaffolds `begin` to `end - 1`: a piece of each slot."""

    begin: int
    end: int
    slots: list[_Slot]


@dataclass(frozen=True)
class _Library:
    """All that can be enumerated. `variants`: SMILES fragments; `combinations`: molecules per scaffold, int64."""

    variants: np.ndarray
    families: list[_Family]
    combinations: np.ndarray

    def smiles(self, scaffolds: np.ndarray, combinations: np.ndarray) -> list[str]:
        """The molecules with these numbers, int64 [n] each."""
        smiles = np.full(len(scaffolds), "", dtype=object)
        for family in self.families:
            rows = np.flatnonzero((family.begin <= scaffolds) & (scaffolds < family.end))
            scaffold, combination = scaffolds[rows] - family.begin, combinations[rows]
            for slot in family.slots:
                scaffold, piece = np.divmod(scaffold, len(slot.sizes))
                combination, variant = np.divmod(combination, slot.sizes[piece])
                smiles[rows] += self.variants[slot.begins[piece] + variant]
        return smiles.tolist()


@lru_cache(maxsize=1)
def _library() -> _Library:
    variants: list[str] = []
    numbered: list[_Family] = []
    combinations = []
    begin = 0
    for pieces_of_slots in families():
        slots = []
        of_scaffold = np.ones(1, dtype=np.int64)
        for pieces in pieces_of_slots:
            sizes = np.array([len(piece) for piece in pieces])
            slots.append(_Slot(len(variants) + np.cumsum(sizes) - sizes, sizes))
            variants += itertools.chain.from_iterable(pieces)
            # A scaffold's number has the piece of the first slot as its lowest digit.
            of_scaffold = np.outer(sizes, of_scaffold).reshape(-1)
        numbered.append(_Family(begin, begin + len(of_scaffold), slots))
        combinations.append(of_scaffold)
        begin += len(of_scaffold)
    return _Library(np.array(variants, dtype=object), numbered, np.concatenate(combinations))


def _shares(spec: SynthSpec, library: _Library) -> tuple[np.ndarray, np.ndarray]:
    """The scaffolds, the acyclic one and then the most frequent first, and how many molecules each has: int64 [n] each.

    Fewer ring systems come first; among scaffolds with as many, the seed decides.
    """
    acyclic = min(int(_ACYCLIC_SHARE * spec.count), int(library.combinations[0]))
    ranked = [np.arange(family.begin, family.end) for family in library.families]
    ranked = [numbers[np.argsort(_hashed(numbers, f"{spec.seed}/rank"), kind="stable")] for numbers in ranked]
    scaffolds = np.concatenate(ranked)
    return scaffolds, np.append(acyclic, zipf_shares(spec.count - acyclic, library.combinations[scaffolds[1:]]))


def zipf_shares(total: int, bounds: np.ndarray) -> np.ndarray:
    """`total` shared out by rank r = 1, 2, ... as 1/r, never above the rank's bound: int64 [ranks]."""
    ranks = np.arange(1, len(bounds) + 1)

    def shares(first: int) -> np.ndarray:
        return np.minimum(first // ranks, bounds)

    # The largest first share for which all shares together are not above the total.
    first = bisect_right(range(int((bounds * ranks).max()) + 1), total, key=lambda share: int(shares(share).sum())) - 1
    least = shares(first)
    one_more = np.flatnonzero(shares(first + 1) > least)
    least[one_more[: total - int(least.sum())]] += 1
    return least


def _hashed(numbers: np.ndarray, salt: str) -> np.ndarray:
    """A 64-bit hash of each number: uint64 [n]. The finaliser of SplitMix64 (Steele et al., 2014)."""
    state = numbers.astype(np.uint64) + np.uint64(digest64(salt.encode()))
    state = (state ^ (state >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> 27)) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> 31)


def _shuffled(count: int, salt: str) -> Iterator[np.ndarray]:
    """The numbers 0 to `count - 1` in an order that looks random, in blocks: int64 [at most `_BLOCK_ROWS`].

    Every number below the next power of two is scrambled by steps that each can be undone, an addition, odd
    multiplications and shifted exclusive-ors; what then is not below `count` is left out.
    """
    bits = (count - 1).bit_length()
    mask = np.uint64((1 << bits) - 1)
    half = np.uint64(bits // 2 + 1)
    keys = _hashed(np.arange(3), salt)
    for begin in range(0, 1 << bits, _BLOCK_ROWS):
        state = np.arange(begin, min(begin + _BLOCK_ROWS, 1 << bits)).astype(np.uint64)
        for key in keys:
            state = (state + key) * (key | np.uint64(1)) & mask
            state ^= state >> half
        yield state[state < count].astype(np.int64)
