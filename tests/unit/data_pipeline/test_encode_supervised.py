"""Encoding in a child process gives what encoding here gives."""

import pytest

from data_pipeline.molecules import encode_supervised as module
from data_pipeline.molecules.encode import encode_rows
from data_pipeline.molecules.encode_supervised import encode_supervised
from tests.labelled_tables import molecules_of


@pytest.mark.parametrize("standardize", [True, False])
def test_it_is_what_encode_rows_gives(standardize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEFAULT_CHUNK_ROWS", 50)
    texts = [*molecules_of(0, 180), "", "no SMILES", "C\udcff", "CCO.Cl", "\n\n\n"]
    expected = encode_rows(texts, [""] * len(texts), standardize=standardize)
    found = encode_supervised("table.csv", texts, standardize)
    assert found.batch.equals(expected.batch)
    assert found.kept.tolist() == expected.kept.tolist()
    assert found.rejects == expected.rejects


def test_no_rows() -> None:
    found = encode_supervised("table.csv", [], standardize=True)
    assert (found.batch.num_rows, found.kept.tolist(), found.rejects) == (0, [], [])
