"""What, besides the sources, decides the content of a dataset."""

from dataclasses import dataclass

from data_pipeline.errors import UsageError
from data_pipeline.schema import ATOM_FEATURE_SIZES

DEFAULT_MAX_ATOMS = 512
DEFAULT_MOLECULE_SECONDS = 10.0
# The kernel's timer counts in hundredths of a second, at worst, and takes no number of any size.
_MOLECULE_SECONDS = (0.01, 1e6)

# Options that came later than FORMAT_VERSION 3, and what a dataset was prepared with whose manifest does not tell.
LATER_OPTIONS = {"targets": False, "exclude_smiles_column": None}


@dataclass(frozen=True)
class PrepareOptions:
    """Options of `build.prepare`.

    format: of all sources, found by itself when None; smiles_column, id_column: names in the header of the sources,
    found by themselves when None; validation_fraction: share of the scaffolds, in [0, 1); shard_rows: molecules in a
    shard, about; max_atoms: larger molecules are rejected; standardize: store the standard form of molecules
    (`standardize`); molecule_seconds: CPU time after which a molecule is rejected, from 0.01 to 1e6; targets: store
    what molecule-level objectives predict (`targets`); exclude_smiles_column: name in the header of files to exclude.
    """

    format: str | None = None
    smiles_column: str | None = None
    id_column: str | None = None
    validation_fraction: float = 0.05
    shard_rows: int = 65_536
    max_atoms: int = DEFAULT_MAX_ATOMS
    standardize: bool = True
    molecule_seconds: float = DEFAULT_MOLECULE_SECONDS
    targets: bool = False
    exclude_smiles_column: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise UsageError(f"validation_fraction is {self.validation_fraction}; expected a number in [0, 1)")
        for name in ("shard_rows", "max_atoms"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; expected at least 1")
        least, most = _MOLECULE_SECONDS
        if not least <= self.molecule_seconds <= most:
            raise UsageError(f"molecule_seconds is {self.molecule_seconds}; expected a number in [{least}, {most:.0e}]")
        # Arrow's list columns count their values in 31 bits; shards vary in size, so leave room.
        if 2 * self.shard_rows * self.max_atoms * len(ATOM_FEATURE_SIZES) >= 1 << 31:
            raise UsageError(
                f"shard_rows {self.shard_rows} x max_atoms {self.max_atoms} is too large for an Arrow column; "
                "expected a product below 119 million: lower one of them"
            )
