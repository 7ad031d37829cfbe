"""One SMILES text -> a sanitised molecule, or a named reason why not."""

from rdkit import Chem

DEFAULT_MAX_ATOMS = 512
MAX_TEXT_LENGTH = 10_000

# The closed set of reasons a row is rejected for.
REJECT_REASONS = {
    "empty": "no SMILES in the row",
    "not_utf8": "the text is not UTF-8",
    "whitespace": "whitespace inside the SMILES; RDKit would silently read only what precedes it",
    "too_large": f"more atoms than max_atoms, or more than {MAX_TEXT_LENGTH} characters",
    "syntax": "not a SMILES",
    "no_atoms": "a SMILES without atoms",
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


def canonical_molecule(text: str, max_atoms: int) -> tuple[str, Chem.Mol]:
    """Canonical isomeric SMILES of `text`, and the molecule parsed from that SMILES.

    The molecule is the one `Chem.MolFromSmiles(smiles)` gives: sanitised, hydrogens removed, stereo assigned,
    atoms in the order written. RDKit logs what it refuses; hold a `rdBase.BlockLogs` around many calls.

    Raises:
        MoleculeReject: with the reason.
    """
    _check_text(text, max_atoms)
    parsed = Chem.MolFromSmiles(text)
    if parsed is None:
        raise MoleculeReject(_parse_failure(text))
    if parsed.GetNumAtoms() == 0:
        raise MoleculeReject("no_atoms")
    if parsed.GetNumAtoms() > max_atoms:
        raise MoleculeReject("too_large")
    smiles = Chem.MolToSmiles(parsed)
    mol = Chem.MolFromSmiles(smiles)
    if mol is None:
        raise MoleculeReject("unstable_smiles")
    return smiles, mol


def _check_text(text: str, max_atoms: int) -> None:
    """Reject what must not reach RDKit's sanitisation."""
    if not text:
        raise MoleculeReject("empty")
    if len(text) > MAX_TEXT_LENGTH:
        raise MoleculeReject("too_large")
    if not _is_utf8(text):
        raise MoleculeReject("not_utf8")
    if len(text.split()) != 1 or text != text.strip():
        raise MoleculeReject("whitespace")
    if len(text) > max_atoms:
        _check_size(text, max_atoms)


def _is_utf8(text: str) -> bool:
    """False for a text with lone surrogates: bytes that were not UTF-8 when the source was decoded."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_size(text: str, max_atoms: int) -> None:
    """Count heavy atoms before sanitisation, whose ring search can take minutes on a huge cage."""
    mol = Chem.MolFromSmiles(text, sanitize=False)
    if mol is not None and mol.GetNumHeavyAtoms() > max_atoms:
        raise MoleculeReject("too_large")


def _parse_failure(text: str) -> str:
    """The reason why `Chem.MolFromSmiles(text)` is None."""
    mol = Chem.MolFromSmiles(text, sanitize=False)
    if mol is None:
        return "syntax"
    try:
        Chem.SanitizeMol(mol)
    except Chem.AtomValenceException:
        return "valence"
    except Chem.KekulizeException:
        return "kekulize"
    except Chem.MolSanitizeException:
        return "sanitize"
    # Sanitised here, yet refused above: stereo perception or hydrogen removal failed.
    return "sanitize"
