"""The files that pages speak of, made small: a few hundred molecules, a model of width 16."""

import bz2
import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

from rdkit import Chem

from tests.labelled_tables import has_nitrogen, molecules_of


def lay_out(page: str, folder: Path, fixture: Callable[[str], Path]) -> None:
    """Put into `folder` what `page`, a path below the checkout, takes as given; `fixture` gives one by its name."""
    for name, content in PAGES[page].items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            shutil.copytree(fixture(content), path)
        else:
            content(path)


def _smiles(first: int, last: int, id_first: bool = False) -> Callable[[Path], None]:
    """Lines `SMILES id`, or `id SMILES`, of the NCI molecules that RDKit ships; compressed as the file's name says."""

    def write(path: Path) -> None:
        rows = [(text, str(number)) for number, text in enumerate(molecules_of(first, last), first)]
        lines = "".join("\t".join(row[::-1] if id_first else row) + "\n" for row in rows)
        compress = {".gz": gzip.compress, ".bz2": bz2.compress}.get(path.suffix, bytes)
        path.write_bytes(compress(lines.encode()))

    return write


def _table(first: int, last: int, label: str, smiles: str = "smiles", id: str = "name") -> Callable[[Path], None]:
    """A CSV file with a column of ids, one of SMILES, and a label that a model can learn."""

    def write(path: Path) -> None:
        rows = [f"{id},{smiles},{label}"]
        for number, text in enumerate(molecules_of(first, last), first):
            molecule = Chem.MolFromSmiles(text)
            rows.append(f"nci{number},{text},{0 if molecule is None else has_nitrogen(molecule)}")
        content = "\n".join(rows) + "\n"
        path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())

    return write


def _sdf(path: Path) -> None:
    records = [Chem.MolToMolBlock(Chem.MolFromSmiles(text)) + "$$$$\n" for text in ("CCO", "c1ccccc1", "CC(=O)NC")]
    path.write_bytes(gzip.compress("".join(records).encode()))


_ASSAY, _LIBRARY = _table(0, 80, "active"), _table(200, 240, "x")
# Of each page with marked blocks, what is there before the first one: a copy of a fixture, or what a function writes.
PAGES: dict[str, dict[str, str | Callable[[Path], None]]] = {
    "README.md": {
        "zinc.smi.gz": _smiles(300, 600),
        "more/a.csv.gz": _table(700, 760, "x"),
        "library.csv": _LIBRARY,
        "assay.csv": _ASSAY,
    },
    "docs/pretrain.md": {"zinc.smi.gz": _smiles(300, 600), "moleculenet/bbbp.csv": _table(0, 160, "p_np")},
    "docs/prepare.md": {
        "zinc/a.smi.gz": _smiles(300, 500),
        "zinc/b.smi.gz": _smiles(500, 700),
        "CID-SMILES.gz": _smiles(700, 760, id_first=True),
        "moleculenet/bbbp.csv": _table(0, 160, "p_np"),
    },
    "docs/sources.md": {
        "zinc/a.smi": _smiles(300, 400),
        "zinc/b.smi": _smiles(400, 500),
        "CID-SMILES.gz": _smiles(700, 760, id_first=True),
        "Compound_1.sdf.gz": _sdf,
        "library.csv": _table(200, 260, "x", smiles="structure", id="code"),
    },
    "docs/dataset.md": {"DIR": "dataset"},
    "docs/export.md": {"runs/zinc": "short_run"},
    "docs/embed.md": {"models/zinc": "exported", "library.csv": _LIBRARY, "assay.csv": _ASSAY},
    "docs/finetune.md": {"models/zinc": "exported", "library.csv": _LIBRARY, "assay.csv": _ASSAY},
    "docs/evaluate.md": {
        "models/hmoe": "exported",
        "models/dense": "exported",
        "moleculenet/bbbp.csv": _table(0, 80, "p_np"),
        "moleculenet/bace.csv": _table(80, 160, "Class"),
    },
    "docs/tracking.md": {"runs/zinc": "tracked_run"},
    "docs/presets.md": {},
    "docs/doctor.md": {},
}
