"""All real molecules at hand, against OGB and RDKit themselves."""

import pytest
from rdkit import Chem
from rdkit.Chem.Scaffolds import MurckoScaffold

from data_pipeline.molecules.encode import encode_rows
from tests.unit.data_pipeline.conftest import COLLECTIONS, collection_texts
from tests.unit.data_pipeline.test_featurize import assert_equal_to_ogb


@pytest.mark.slow
@pytest.mark.skipif(not COLLECTIONS.is_dir(), reason=f"no molecule collections at {COLLECTIONS}")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["zinc.smi.gz", "chembl.tsv.gz", "enamine50k.csv.gz"])
def test_features_are_ogbs_and_scaffolds_are_rdkits(name: str) -> None:
    texts = collection_texts(name)
    murcko_of: dict[int, str] = {}
    for start in range(0, len(texts), 5000):
        part = texts[start : start + 5000]
        encoded = encode_rows(part, part)
        assert len(encoded.rejects) < 0.001 * len(part)
        for row, scaffold in zip(encoded.batch.to_pylist(), encoded.scaffold_smiles, strict=True):
            assert_equal_to_ogb(row)
            murcko = MurckoScaffold.MurckoScaffoldSmiles(mol=Chem.MolFromSmiles(row["smiles"]))
            assert scaffold == murcko, row["smiles"]
            # One key for each class, over the whole collection.
            assert murcko_of.setdefault(row["scaffold_key"], murcko) == murcko
    assert len(set(murcko_of.values())) == len(murcko_of) > 10_000
