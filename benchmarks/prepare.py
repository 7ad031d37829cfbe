"""What a molecule costs `hmoe prepare`, and what it costs without: all arms in turns, in one process.

    python -m benchmarks.prepare zinc.smi.gz chembl.tsv.gz

Arms, each from SMILES to the features of Open Graph Benchmark, the canonical SMILES, the SMILES of the Murcko scaffold
and of the generic one, and the hashes of the three:

    users        `ogb.utils.smiles2graph`, then RDKit's documented functions on a second molecule
    parse_once   the same by hand: one molecule, OGB's features by RDKit calls, each generic scaffold worked out once
    ours         `encode_rows`, to the finished Arrow batch, checks included; no scaffold is known before a source
    floor        parsing and canonical SMILES alone

Then once more, with standardisation, for parse_once and ours. Prints one JSON line and writes it to
docs/results/prepare.json. Times are CPU time of this thread.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from ogb.utils import smiles2graph
from rdkit import Chem, rdBase
from rdkit.Chem.Scaffolds import MurckoScaffold

from benchmarks.result import write_result
from data_pipeline.molecules.chemistry import CanonicalMolecule
from data_pipeline.molecules.encode import encode_rows
from data_pipeline.molecules.featurize import featurize
from data_pipeline.molecules.scaffold_fast import clear_scaffold_memos
from data_pipeline.molecules.standardize import standardizer
from data_pipeline.sources.source import SourceChunk, read_chunks, resolve_sources

CHUNK_ROWS = 1000
# How many times faster than the arms of these names.
TARGETS = {"users": 2.5, "parse_once": 1.8}

# Encodes the texts of a chunk, and returns how many scaffolds it worked out.
Arm = Callable[[SourceChunk], int]


def digest(smiles: str) -> bytes:
    return hashlib.blake2b(smiles.encode(), digest_size=16).digest()


def users(chunk: SourceChunk) -> int:
    for text in chunk.texts:
        smiles2graph(text)
        mol = Chem.MolFromSmiles(text)
        scaffold = MurckoScaffold.MurckoScaffoldSmiles(mol=mol)
        generic = Chem.MolToSmiles(MurckoScaffold.MakeScaffoldGeneric(MurckoScaffold.GetScaffoldForMol(mol)))
        for smiles in (Chem.MolToSmiles(mol), scaffold, generic):
            digest(smiles)
    return len(chunk.texts)


class ParseOnce:
    """The arm of this name, and its memo of generic scaffolds."""

    def __init__(self, standardize: bool) -> None:
        self._standardize = standardize
        self._generic_digests: dict[str, bytes] = {}

    def __call__(self, chunk: SourceChunk) -> int:
        for text in chunk.texts:
            mol = Chem.MolFromSmiles(text)
            smiles = Chem.MolToSmiles(mol)
            if self._standardize:
                smiles, mol, _ = standardizer().standardize(CanonicalMolecule(smiles, mol, is_reread=False))
            featurize(mol)
            scaffold = Chem.MurckoDecompose(mol)
            scaffold_smiles = Chem.MolToSmiles(scaffold, isomericSmiles=False)
            digest(smiles), digest(scaffold_smiles)
            if scaffold_smiles not in self._generic_digests:
                generic = Chem.MolToSmiles(MurckoScaffold.MakeScaffoldGeneric(scaffold))
                self._generic_digests[scaffold_smiles] = digest(generic)
        return len(chunk.texts)


def floor(chunk: SourceChunk) -> int:
    for text in chunk.texts:
        Chem.MolToSmiles(Chem.MolFromSmiles(text))
    return 0


def ours(chunk: SourceChunk) -> int:
    return encode_rows(chunk.texts, chunk.ids, standardize=False).new_scaffolds


def ours_standardized(chunk: SourceChunk) -> int:
    return encode_rows(chunk.texts, chunk.ids, standardize=True).new_scaffolds


def measure(path: str, rows: int, arms: dict[str, Arm]) -> tuple[dict[str, float], float]:
    """One source: microseconds per row of each arm, and the share of rows whose scaffold the last arm had to work out.

    Rows that some arm could not do (no molecule, no generic scaffold) are left out of all of them.
    """
    (source,) = resolve_sources([path])
    seconds = dict.fromkeys(arms, 0.0)
    scaffolds = dict.fromkeys(arms, 0)
    count = 0
    clear_scaffold_memos()
    for number, chunk in enumerate(islice(read_chunks(source, chunk_rows=CHUNK_ROWS), -(-rows // CHUNK_ROWS))):
        chunk = usable(chunk)
        turns = list(arms)
        for name in turns[number % len(turns) :] + turns[: number % len(turns)]:
            before = time.thread_time()
            scaffolds[name] += arms[name](chunk)
            seconds[name] += time.thread_time() - before
        count += len(chunk.texts)
    return {name: 1e6 * spent / count for name, spent in seconds.items()}, scaffolds[turns[-1]] / count


def usable(chunk: SourceChunk) -> SourceChunk:
    """The rows of a chunk that all arms can do."""
    keep = []
    for row, text in enumerate(chunk.texts):
        mol = Chem.MolFromSmiles(text)
        try:
            if mol is not None and mol.GetNumAtoms():
                MurckoScaffold.MakeScaffoldGeneric(Chem.MurckoDecompose(mol))
                keep.append(row)
        except Chem.MolSanitizeException:
            continue
    return SourceChunk(chunk.first_row, [chunk.texts[row] for row in keep], [chunk.ids[row] for row in keep])


def figures(path: str, rows: int) -> dict[str, Any]:
    plain, new = measure(path, rows, {"users": users, "parse_once": ParseOnce(False), "floor": floor, "ours": ours})
    standardized, _ = measure(path, rows, {"parse_once": ParseOnce(True), "ours": ours_standardized})
    return {
        "us_per_row": plain,
        "us_per_row_standardized": standardized,
        "ratio": {name: plain[name] / plain["ours"] for name in TARGETS},
        "ratio_standardized": standardized["parse_once"] / standardized["ours"],
        "over_floor": plain["ours"] / plain["floor"],
        "new_scaffolds": new,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="molecule files")
    parser.add_argument("--rows", type=int, default=20_000, help="rows of each source")
    options = parser.parse_args()
    before = time.perf_counter()
    encode_rows(["c1ccccc1"], ["warm"])
    first_call = time.perf_counter() - before
    with rdBase.BlockLogs():
        sources = {Path(path).name: figures(path, options.rows) for path in options.sources}
    worst = {name: min(source["ratio"][name] for source in sources.values()) for name in TARGETS}
    result: dict[str, Any] = {
        "name": "prepare",
        "ratio": worst["users"],
        "target": TARGETS["users"],
        "ratio_parse_once": worst["parse_once"],
        "target_parse_once": TARGETS["parse_once"],
        "first_call_seconds": first_call,
        "sources": sources,
    }
    write_result(result)


if __name__ == "__main__":
    main()
