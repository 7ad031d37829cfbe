"""Every column of a dataset: its type, its unit and its meaning, in one place.

A stored molecule is a pure function of its canonical isomeric SMILES. The source text is parsed and written
as canonical SMILES; that string is parsed again, and the whole row comes from this second molecule. So

* atom i of `atom_features`, `bond_index` and `scaffold_mask` is the i-th atom written in `smiles`;
* `ogb.utils.smiles2graph(row["smiles"])` equals the stored arrays exactly;
* it does not matter which spelling of a duplicate was read first (only `source_id` tells).

Columns are never null. Those of `TARGET_FIELDS` are there when they were asked for (`hmoe prepare --targets`).
"""

import pyarrow as pa

FORMAT_NAME = "hmoe-molecules"
FORMAT_VERSION = 3

SPLITS = ("train", "validation")
# Molecules with one scaffold lie beside each other in a shard, in runs of up to so many; the order of runs is random.
RUN_LENGTH = 16

# Number of values of each feature, in Open Graph Benchmark's order (ogb.utils.features).
# Atoms: atomic number, chirality, degree, formal charge, hydrogens, radical electrons, hybridisation,
# aromatic, in a ring. Bonds: type, stereo, conjugated.
ATOM_FEATURE_SIZES = (119, 5, 12, 12, 10, 6, 6, 2, 2)
BOND_FEATURE_SIZES = (5, 6, 2)

# What molecule-level objectives predict (`targets`): part of the format, so a change is a new FORMAT_VERSION.
FINGERPRINT_RADIUS = 2
FINGERPRINT_BINS = 1024
MAX_FINGERPRINT_COUNT = 255
# Names of `rdkit.Chem.Descriptors`.
DESCRIPTORS = (
    *("MolWt", "MolLogP", "MolMR", "TPSA", "LabuteASA", "FractionCSP3", "NumHeteroatoms", "NumHDonors"),
    *("NumHAcceptors", "NumRotatableBonds", "NumAmideBonds", "RingCount", "NumAromaticRings", "NumAliphaticRings"),
    *("NumSaturatedRings", "NumHeterocycles", "NumSpiroAtoms", "NumBridgeheadAtoms", "HallKierAlpha", "Kappa1"),
)

# Longest text kept in rejects.parquet, in characters.
REJECT_TEXT_LIMIT = 1000
# Longest source_id, in bytes of UTF-8; the rest is cut off.
ID_LIMIT = 256


def _field(name: str, dtype: pa.DataType, unit: str, meaning: str) -> pa.Field:
    return pa.field(name, dtype, metadata={"unit": unit, "meaning": meaning})


# One row per molecule; n = num_atoms, m = num_bonds.
MOLECULE_SCHEMA = pa.schema(
    [
        _field("smiles", pa.string(), "", "canonical isomeric SMILES; the row is a function of it"),
        _field("source_id", pa.string(), "", "the molecule's id in its source, or its row number there"),
        _field("mol_key", pa.binary(16), "", "128-bit BLAKE2b of smiles: identity, for deduplication"),
        _field("atom_features", pa.list_(pa.uint8()), "index", "[n, 9] OGB atom features, row-major"),
        _field("bond_index", pa.list_(pa.uint16()), "atom", "[m, 2] begin and end atom, each bond once"),
        _field("bond_features", pa.list_(pa.uint8()), "index", "[m, 3] OGB bond features, row-major"),
        _field("scaffold_key", pa.uint64(), "", "64-bit BLAKE2b of the Murcko scaffold SMILES; 0 = acyclic"),
        _field("generic_key", pa.uint64(), "", "64-bit BLAKE2b of the generic scaffold SMILES; 0 = acyclic"),
        _field("scaffold_mask", pa.list_(pa.uint8()), "", "[n] 1 where the atom belongs to the scaffold"),
        _field("num_atoms", pa.uint16(), "atoms", "n"),
        _field("num_bonds", pa.uint16(), "bonds", "m"),
        _field("complexity", pa.float32(), "", "heavy atoms + 2 * independent rings + stereo elements"),
    ]
)

# Behind those of MOLECULE_SCHEMA. The fingerprint is sparse: a list of bins, and a list of their counts.
TARGET_FIELDS = (
    _field(
        "fingerprint_bins",
        pa.list_(pa.uint16()),
        "index",
        f"bins of the Morgan count fingerprint (radius {FINGERPRINT_RADIUS}, folded to {FINGERPRINT_BINS} bins) that "
        "are not 0, ascending; empty = it could not be computed",
    ),
    _field("fingerprint_counts", pa.list_(pa.uint8()), "environments", f"of each, at most {MAX_FINGERPRINT_COUNT}"),
    _field(
        "descriptors",
        pa.list_(pa.float32(), len(DESCRIPTORS)),
        "as in RDKit",
        f"{', '.join(DESCRIPTORS)}; NaN = not a finite number, or could not be computed",
    ),
)

# One row per source row that is not a molecule, in reading order.
REJECT_SCHEMA = pa.schema(
    [
        _field("source", pa.string(), "", "name of the source, as in manifest.json"),
        _field("row", pa.int64(), "row", "0-based data row in the source; a header is not counted"),
        _field("text", pa.string(), "", f"the SMILES text as read, at most {REJECT_TEXT_LIMIT} characters"),
        _field("reason", pa.string(), "", "one of data_pipeline.molecules.rejects.REJECT_REASONS"),
    ]
)

# One row per distinct scaffold, ascending by scaffold_key; acyclic molecules have no scaffold and no row.
SCAFFOLD_SCHEMA = pa.schema(
    [
        _field("scaffold_key", pa.uint64(), "", "64-bit BLAKE2b of smiles"),
        _field("smiles", pa.string(), "", "Murcko scaffold SMILES, without stereo"),
        _field("generic_key", pa.uint64(), "", "64-bit BLAKE2b of the generic scaffold SMILES"),
        _field("count", pa.int64(), "molecules", "molecules of the dataset with this scaffold"),
    ]
)


def shard_schema(targets: bool) -> pa.Schema:
    """The schema of a shard, with or without `TARGET_FIELDS`."""
    return pa.schema([*MOLECULE_SCHEMA, *TARGET_FIELDS]) if targets else MOLECULE_SCHEMA


def storable(text: str) -> str:
    """`text` as a string column can hold it: what was not UTF-8 in the source becomes a backslash escape."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")
