"""Why a text is no molecule that can be stored."""

from collections.abc import Mapping

MAX_TEXT_LENGTH = 10_000
MAX_MOLBLOCK_LENGTH = 1_000_000

# The closed set of reasons a row is rejected for.
REJECT_REASONS = {
    "empty": "no structure in the row",
    "not_utf8": "the text is not UTF-8",
    "whitespace": "whitespace inside the SMILES; RDKit would silently read only what precedes it",
    "too_large": (
        f"more atoms than max_atoms, or more than {MAX_TEXT_LENGTH} characters ({MAX_MOLBLOCK_LENGTH} in a mol block)"
    ),
    "syntax": "not a SMILES",
    "inchi": "not an InChI",
    "molblock": "not a mol block (V2000 or V3000)",
    "no_atoms": "a structure without atoms",
    "valence": "an atom has an impossible valence",
    "kekulize": "an aromatic system has no Kekule form",
    "sanitize": "RDKit refuses to sanitise the molecule for another reason",
    "unstable_smiles": "RDKit cannot read the canonical SMILES it wrote",
    "standardize": "standardisation fails, or gives what is no molecule",
    "unsettled": "standardisation changes its own result again and again",
    "rdkit_error": "RDKit raised an unexpected error",
    "timeout": "RDKit did not finish within the time cap",
    "crash": "RDKit crashed the process",
}


class MoleculeReject(ValueError):  # noqa: N818 - a verdict on a text, no error
    """A text that is not a molecule we can store. `reason` is a key of `REJECT_REASONS`."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}: {REJECT_REASONS[reason]}")
        self.reason = reason


def rejects_in_words(counts: Mapping[str, int]) -> str:
    """Rejects by reason, for a person: such as `2 syntax (not a SMILES), 1 empty (no structure in the row)`."""
    words = {reason: f" ({why})" for reason, why in REJECT_REASONS.items()}
    return ", ".join(f"{count:,} {reason}{words.get(reason, '')}" for reason, count in counts.items())
