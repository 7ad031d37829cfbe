"""One text (SMILES, InChI or mol block) -> a sanitised molecule and its canonical SMILES, or a named reason why not."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rdkit import Chem

from data_pipeline.molecules.rejects import MAX_MOLBLOCK_LENGTH, MAX_TEXT_LENGTH, MoleculeReject

# What RDKit raises for a broken invariant; one molecule must not stop a run.
_RDKIT_ERRORS = (RuntimeError, ValueError, LookupError, OverflowError)

# Lines of a mol block before its counts.
_HEADER_LINES = 3

_INCHI_PREFIX = "InChI="
_CENTRE = re.compile("@+")
_UNUSUAL_CHARGE = re.compile(r"[+-]\d")
_ATOM_MAP = re.compile(r":\d+\]")


@contextmanager
def rdkit_errors() -> Iterator[None]:
    """Turns an error of RDKit into a reject."""
    try:
        yield
    except MoleculeReject:
        raise
    except _RDKIT_ERRORS as error:
        raise MoleculeReject("rdkit_error") from error


class CanonicalMolecule(NamedTuple):
    """A sanitised molecule and its canonical isomeric SMILES.

    is_reread: `mol` was parsed from `smiles`; otherwise it is what `smiles` was just written from, the same molecule
    with its atoms in another order.
    """

    smiles: str
    mol: Chem.Mol
    is_reread: bool


def canonical_molecule(text: str, max_atoms: int) -> CanonicalMolecule:
    """The molecule of a SMILES, an InChI, or a mol block (any text of several lines).

    A SMILES gives the molecule that was parsed from it, if that is surely the one that its canonical SMILES gives. The
    others give the one reread from the canonical SMILES, which cannot say all that they can: bonds of unknown stereo,
    for example. Numbers that map atoms to those of a reaction are no part of a molecule. RDKit logs what it refuses;
    hold a `rdBase.BlockLogs` around many calls.

    Raises:
        MoleculeReject: with the reason.
    """
    if not text:
        raise MoleculeReject("empty")
    is_block = "\n" in text or "\r" in text
    if is_block:
        text = _with_readable_header(text)
    if not _is_utf8(text):
        raise MoleculeReject("not_utf8")
    if is_block:
        return reread(_written(_from_molblock(text, max_atoms)))
    if len(text) > MAX_TEXT_LENGTH:
        raise MoleculeReject("too_large")
    if text.startswith(_INCHI_PREFIX):
        return reread(Chem.MolToSmiles(_from_block(text, max_atoms, Chem.MolFromInchi, "inchi")))
    mol = _from_smiles(text, max_atoms)
    if _ATOM_MAP.search(text):
        return reread(_written(mol))
    smiles = Chem.MolToSmiles(mol)
    if _may_read_otherwise(text, smiles):
        return reread(smiles)
    return CanonicalMolecule(smiles, mol, is_reread=False)


def _written(mol: Chem.Mol) -> str:
    """Canonical SMILES of a molecule without its atom map numbers."""
    for atom in mol.GetAtoms():
        atom.SetAtomMapNum(0)
    return Chem.MolToSmiles(mol)


def _may_read_otherwise(text: str, smiles: str) -> bool:
    """Whether the molecule of `smiles` may not be the one of `text`, which wrote it, or none at all.

    A mark of stereo that turns out to mean nothing is dropped, but the hybridisation of its atom stays that of a
    centre. RDKit may write, but not read, what has unusual charges.
    """
    return ("@" in text and len(_CENTRE.findall(text)) != len(_CENTRE.findall(smiles))) or (
        _UNUSUAL_CHARGE.search(smiles) is not None
    )


def reread(smiles: str) -> CanonicalMolecule:
    """The molecule parsed from a canonical SMILES: its atoms stand in the order written.

    Raises:
        MoleculeReject: `unstable_smiles`.
    """
    mol = Chem.MolFromSmiles(smiles)
    if mol is None:
        raise MoleculeReject("unstable_smiles")
    return CanonicalMolecule(smiles, mol, is_reread=True)


def _with_readable_header(block: str) -> str:
    """A mol block with `?` for each byte of its first three lines that is not UTF-8.

    They are a title, what wrote the block, and a comment: only the second says something of the molecule, in columns
    that stay where they are.
    """
    *header, body = block.split("\n", _HEADER_LINES)
    return "\n".join([*(line.encode("utf-8", "replace").decode() for line in header), body])


def _is_utf8(text: str) -> bool:
    """False for a text with lone surrogates: bytes that were not UTF-8 when the source was decoded."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _from_smiles(text: str, max_atoms: int) -> Chem.Mol:
    if len(text.split()) != 1 or text != text.strip():
        raise MoleculeReject("whitespace")
    # RDKit leaves out, at both ends, what it cannot use: the remains of a damaged row would be another molecule.
    if not (text.isascii() and text.isprintable()):
        raise MoleculeReject("syntax")
    # A shorter text has no more atoms.
    if len(text) > max_atoms:
        _check_size(Chem.MolFromSmiles(text, sanitize=False), max_atoms)
    mol = Chem.MolFromSmiles(text)
    if mol is None:
        raise MoleculeReject(_failure(Chem.MolFromSmiles(text, sanitize=False), "syntax"))
    return _sized(mol, max_atoms)


def _from_molblock(text: str, max_atoms: int) -> Chem.Mol:
    if len(text) > MAX_MOLBLOCK_LENGTH:
        raise MoleculeReject("too_large")
    return _from_block(text, max_atoms, Chem.MolFromMolBlock, "molblock")


def _from_block(text: str, max_atoms: int, parse: Callable[..., Chem.Mol | None], unreadable: str) -> Chem.Mol:
    raw = parse(text, sanitize=False, removeHs=False)
    _check_size(raw, max_atoms)
    mol = parse(text)
    if mol is None:
        raise MoleculeReject(_failure(raw, unreadable))
    return _sized(mol, max_atoms)


def _check_size(raw: Chem.Mol | None, max_atoms: int) -> None:
    """Count heavy atoms before sanitisation, whose ring search can take minutes on a huge cage."""
    if raw is not None and raw.GetNumHeavyAtoms() > max_atoms:
        raise MoleculeReject("too_large")


def _sized(mol: Chem.Mol, max_atoms: int) -> Chem.Mol:
    if mol.GetNumAtoms() == 0:
        raise MoleculeReject("no_atoms")
    if mol.GetNumAtoms() > max_atoms:
        raise MoleculeReject("too_large")
    return mol


def _failure(raw: Chem.Mol | None, unreadable: str) -> str:
    """The reason why a text gives no molecule: `unreadable`, or why RDKit cannot sanitise `raw`."""
    if raw is None:
        return unreadable
    try:
        Chem.SanitizeMol(raw)
    except Chem.AtomValenceException:
        return "valence"
    except Chem.KekulizeException:
        return "kekulize"
    except Chem.MolSanitizeException:
        return "sanitize"
    # Sanitised here, yet refused above: stereo perception or hydrogen removal failed.
    return "sanitize"
