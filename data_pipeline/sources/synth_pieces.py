"""The pieces of synthetic molecules: ring systems, linkers and chains, as fragments of SMILES to be written in a row.

A piece is a list of variants, the bare one first: the same part of a scaffold with various substituents. Molecules are
distinct because their pieces can be told from one another, and that rests on rules that these tables keep (the tests
try every variant of every piece):

* The sites of a ring are not equivalent by symmetry once its attachments are fixed.
* Substituents are acyclic and held by a single bond, so they leave the Murcko scaffold as it is.
* No two left rings are the same, and no left ring is also a right one with the same attachment: a chain of rings reads
  one way only.
* A stereo centre has four different neighbours, whatever the pieces beside it are.
* The charged form of a group comes without its neutral form: standardised molecules are distinct, too.
"""

import itertools
import re

Piece = list[str]
Slot = list[Piece]

# Heavy atoms that the substituents of one ring have together, so that molecules stay drug-like.
_MAX_SUBSTITUENT_ATOMS = 4


def _words(*lines: str) -> list[str]:
    return " ".join(lines).split()


def _heavy_atoms(group: str) -> int:
    """Atoms of an acyclic group, hydrogens not counted."""
    return sum(character.isupper() for character in group) - group.count("H")


_ON_AROMATIC = _words(
    "C F Cl Br I O OC SC CC C=C C#N OCC N(C)C C(C)C C(N)=O OC(F)F NC(C)=O [C@H](C)O [C@@H](C)O C(F)(F)F S(C)(=O)=O",
    "[N+](=O)[O-] C(=O)[O-] C[NH3+] [N+](C)(C)C",
)
_ON_SATURATED = _words("C CC CO C#N COC C(C)C C(F)F C(N)=O C(=O)OC")
_ON_NITROGEN = _words("C CC CC=C CCO C(C)C C(C)=O CCOC CC(F)F C(=O)OC S(C)(=O)=O")

# In a template, `*` after an atom is a site, which stays bare or takes a substituent. By element, c: aromatic carbon,
# C: carbon of a saturated ring, a stereo centre when substituted, N: nitrogen of such a ring.
_SITE = re.compile(r"([cCN])(\d?)\*")
# The substituted forms of a site, around the digit of its ring closure, and the atoms of the substituent.
_SITE_FORMS = {
    "c": [(f"c{{}}({group})", _heavy_atoms(group)) for group in _ON_AROMATIC],
    "C": [(f"[C@{at}H]{{}}({group})", _heavy_atoms(group)) for group in _ON_SATURATED for at in ("", "@")],
    "N": [(f"N{{}}({group})", _heavy_atoms(group)) for group in _ON_NITROGEN],
}

# Written up to the attachment, their last atom.
_LEFT_RINGS = _words(
    "c1*c*c*ccc1 c1*nc*c*cc1 c1*nc*ncc1 c1*nnc*c*c1 c1*nc*cnc1",
    "c1*c*c*sc1 c1*c*c*oc1 c1*nc*sc1 c1*nc*oc1 c1*nc*[nH]c1 c1*n[nH]c*c1 c1*noc*c1",
    "c1*cc*c2cc*ccc2c1 c1*cc*c2nc*ccc2c1 c1*cc*c2[nH]c*cc2c1 c1*cc*c2sc*cc2c1 c1*cc*c2oc*cc2c1 c1*cc*c2[nH]nc*c2c1",
    "C1*CCN1 C1*C*CCN1 C1*C*CCCN1 C1*C*CCCCN1 C1*C*OCCN1 C1*C*SCCN1 C1*CN*CCN1 C1*CN*CCCN1",
)
# Written from the attachment, their first atom.
_RIGHT_RINGS = _words(
    "c1c*c*ncc1 c1nc*c*c*c1 c1nnc*c*c1 c1nc*c*cn1 c1nc*nc*c1 c1c*c(=O)[nH]c*c1",
    "c1c*sc*c1 c1c*oc*c1 c1nc*c*s1 c1nc*c*o1 c1nnc*s1 c1nnc*o1 c1nc*no1 c1nc*ns1 c1n[nH]c*n1",
    "c1cc2cnc*cc2c*c1 c1c*c2[nH]cnc2c*c1 c1c*c2ncncc2c*c1 c1c*c2nccnc2c*c1 c1c*c2ncsc2c*c1 c1c*c2ncoc2c*c1",
    "c1c*c2OCOc2c*c1 c1c*c2OCCOc2c*c1 c1c*c2CC(=O)Nc2c*c1 c1c*c2CCCNc2c*c1",
    "C1C*C1 C1C*CC1 C1C*CCC1 C1C*CCCC1 C1C*COCC1 C1CCN*CC1 C1CCN*C1",
)
# Written from one attachment, their first atom, to the other, the atom before the parenthesis.
_MIDDLE_RINGS = _words(
    "c1c*c*c(cc1) c1c*c(c*cc1) c1nc*c(c*c1) c1c*cc(s1) c1c*cc(o1) c1nc(c*s1) c1nc(on1) c1nnc(o1) c1[nH]nc(c1*)",
    "C1CCN(CC1) C1CN(C1) C1CCC(CC1)",
)

_COMMON_LINKERS = [
    _words("-"),
    _words("C [C@H](C) [C@@H](C) [C@H](O) [C@@H](O) C(C)(C) C(F)(F)"),
    _words("CC [C@H](C)C [C@@H](C)C C[C@H](C) C[C@@H](C) C(F)(F)C"),
    _words("C(=O)"),
    _words("C(=O)N C(=O)N(C) C(=O)N(CC)"),
    _words("CN CN(C) [C@H](C)N [C@@H](C)N"),
    _words("CO [C@H](C)O [C@@H](C)O"),
    _words("S(=O)(=O)N S(=O)(=O)N(C)"),
]
_OTHER_LINKERS = [
    _words("C(=O)NC C(=O)N(C)C C(=O)N[C@H](C) C(=O)N[C@@H](C)"),
    _words("CNC(=O) CN(C)C(=O) [C@H](C)NC(=O) [C@@H](C)NC(=O)"),
    _words("C(=O)O"),
    _words("COC"),
    _words("CS [C@H](C)S [C@@H](C)S"),
    _words("CS(=O)(=O)"),
    _words("/C=C/ /C=C\\ /C(C)=C/ /C(C)=C\\"),
    _words("C#C"),
]

_SIDE_CHAINS = _words("C CC CO CS CCC CCO CC=C CC#C C(C)C CCSC CC(C)C C(F)(F)F CCCC[NH3+] [C@H](C)O [C@@H](C)O")
# Amino acids without a ring, and none with a further C=O, so that the backbone is the one chain with all of these.
_RESIDUES = [
    *_words("NCC(=O) N(C)CC(=O) NC(C)(C)C(=O)"),
    *(f"N[C@{at}H]({chain})C(=O)" for chain in _SIDE_CHAINS for at in ("", "@")),
]
_ACYLS = _words("CC(=O) CCC(=O) CC(C)C(=O) C=CC(=O) CCCC(=O) COC(=O) CC(C)(C)OC(=O) FC(F)(F)C(=O) CS(=O)(=O)")
_CHAIN_STARTS = _words("C(=O) CC(=O) CCC(=O) S(=O)(=O)")
_CHAIN_ENDS = _words("OC OCC OC(C)C OCC(F)(F)F N NC NCC N(C)C [O-]")


def families() -> list[list[Slot]]:
    """The kinds of molecules: acyclic ones (one scaffold), then scaffolds of one, two and three ring systems.

    A family is a list of slots, and a slot a list of pieces to choose from. A piece for each slot is a scaffold; a
    variant of each of these pieces, written in a row, is a molecule.
    """
    left = [_ring(template, most_sites=2) for template in _LEFT_RINGS]
    middle = [_ring(template, most_sites=1) for template in _MIDDLE_RINGS]
    right = [_ring(template, most_sites=2) for template in _RIGHT_RINGS]
    pairs = [first + second for first in _RESIDUES for second in _RESIDUES]
    chain: list[Slot] = [[_RESIDUES + pairs], [_CHAIN_ENDS]]
    return [
        [[_ACYLS], [pairs], *chain],
        [left, [_CHAIN_STARTS], *chain],
        [left, _COMMON_LINKERS + _OTHER_LINKERS, right],
        [left, _COMMON_LINKERS, middle, _COMMON_LINKERS, right],
    ]


def _ring(template: str, most_sites: int) -> Piece:
    """The variants of a ring: substituents on some of its sites, not too large together."""
    between = _SITE.split(template)
    texts, elements, digits = between[::3], between[1::3], between[2::3]
    bare = [element + digit for element, digit in zip(elements, digits, strict=True)]
    variants = []
    for number in range(most_sites + 1):
        for places in itertools.combinations(range(len(bare)), number):
            for forms in itertools.product(*(_SITE_FORMS[elements[place]] for place in places)):
                if sum(atoms for _, atoms in forms) <= _MAX_SUBSTITUENT_ATOMS:
                    sites = bare.copy()
                    for place, (form, _) in zip(places, forms, strict=True):
                        sites[place] = form.format(digits[place])
                    variants.append("".join(map("".join, zip(texts, [*sites, ""], strict=True))))
    return variants
