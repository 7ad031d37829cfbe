"""Real molecules: sampled from the project's collections when they lie beside the checkout, skipped otherwise."""

import csv
import gzip
import random
from pathlib import Path

import pytest

from data_pipeline.molecules.encode import EncodedRows, encode_rows

COLLECTIONS = Path(__file__).resolve().parents[4] / "shared" / "data" / "pretrain"


DELIMITERS = {"zinc.smi.gz": " ", "chembl.tsv.gz": "\t", "enamine50k.csv.gz": ","}


def collection_texts(file: str) -> list[str]:
    """All SMILES of one of the collections."""
    with gzip.open(COLLECTIONS / file, "rt", encoding="utf-8") as handle:
        rows = csv.DictReader(handle, delimiter=DELIMITERS[file])
        return [row["smiles"] for row in rows]


@pytest.fixture(scope="session")
def real_smiles() -> list[str]:
    """6,000 texts: 2,000 each of ZINC, ChEMBL and Enamine, shuffled together."""
    if not COLLECTIONS.is_dir():
        pytest.skip(f"no molecule collections at {COLLECTIONS}")
    chosen = random.Random(0)
    texts = [text for file in DELIMITERS for text in chosen.sample(collection_texts(file), 2000)]
    chosen.shuffle(texts)
    return texts


@pytest.fixture(scope="session")
def real_rows(real_smiles: list[str]) -> EncodedRows:
    """The real molecules, encoded."""
    return encode_rows(real_smiles, [str(index) for index in range(len(real_smiles))])
