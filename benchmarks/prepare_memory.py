"""Peak memory of single tasks of a build at sizes that no test can have: a billion molecules, the longest texts.

    python -m benchmarks.prepare_memory

A write task sees as many files of reduced molecules as there would be, all of them the same one; a map task encodes one
chunk of the longest molecules that are accepted. Each runs in a process of its own. Prints one JSON line, in MiB
(ru_maxrss), and writes it to docs/results/prepare_memory.json; the ratio is the largest share of what is allowed.
"""

from __future__ import annotations

import math
import multiprocessing
import random
import resource
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pyarrow as pa

from benchmarks.result import write_result
from data_pipeline.execution.executor import Resources
from data_pipeline.execution.watch import Watch
from data_pipeline.molecules.encode import encode_rows
from data_pipeline.sources.source import CHUNK_CHARACTERS
from data_pipeline.stages.partitions import write_listing
from data_pipeline.stages.ranges import mapped_bytes
from data_pipeline.stages.reduce_stage import REDUCED_SCHEMA, write_reduced
from data_pipeline.stages.stages import PARTITION_ROWS, SHARD_ATOMS, shards_at_a_time
from data_pipeline.stages.write_stage import WriteTask

SHARD_ROWS = 65_536
MAX_ATOMS = 512
MAP_MEMORY = 768
# Molecules, atoms of each, MiB that a worker may use.
WRITES = ((300_000_000, 25, 768), (1_000_000_000, 25, 2048), (1_000_000_000, 60, 768))


def reduced(rows: int, atoms: int) -> pa.RecordBatch:
    """Molecules of chains, with random hashes of runs."""

    def lists(length: int, dtype: type) -> pa.Array:
        offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * length)
        return pa.ListArray.from_arrays(offsets, pa.array(np.zeros(rows * length, dtype)))

    hashes = np.random.default_rng(0).integers(0, 2**64, rows, dtype=np.uint64)
    columns = {
        "smiles": pa.array(["C" * (2 * atoms)] * rows),
        "source_id": pa.array(["ZINC000012345678"] * rows),
        "mol_key": pa.array([bytes(16)] * rows, pa.binary(16)),
        "atom_features": lists(9 * atoms, np.uint8),
        "bond_index": lists(2 * atoms, np.uint16),
        "bond_features": lists(3 * atoms, np.uint8),
        "scaffold_mask": lists(atoms, np.uint8),
        "run_hash": pa.array(np.sort(hashes)),
    }
    for field in REDUCED_SCHEMA:
        if field.name not in columns:
            columns[field.name] = pa.array(np.full(rows, atoms)).cast(field.type)
    return pa.RecordBatch.from_arrays([columns[name] for name in REDUCED_SCHEMA.names], schema=REDUCED_SCHEMA)


def prepare_write(path: str, rows: int, atoms: int) -> None:
    batch = reduced(rows, atoms)
    write_reduced(path, [batch, batch.slice(0, 0)])


def write(work: str, molecules: int, atoms: int, memory: int) -> int:
    """MiB of a write task among those of `molecules`."""
    partitions = 1 << (math.ceil(molecules / PARTITION_ROWS) - 1).bit_length()
    path = f"{work}/reduced-x"
    maker = multiprocessing.get_context("spawn").Process(
        target=prepare_write, args=(path, molecules // partitions, atoms)
    )
    maker.start()
    maker.join()
    shards = math.ceil(max(molecules, molecules * atoms / SHARD_ATOMS) / SHARD_ROWS)
    budget = Resources(memory=memory << 20).budget
    count = shards_at_a_time(shards, mapped_bytes(molecules, molecules * atoms), budget)
    WriteTask(work, write_listing(work, [path] * partitions), "train", shards // 2, count, shards, False, 1.0).run(
        Watch()
    )
    return peak()


def encode() -> int:
    """MiB of encoding a chunk of chains of the most atoms."""
    generator = random.Random(0)
    texts = ["".join(generator.choices("CCCCCCNO", k=MAX_ATOMS)) for _ in range(CHUNK_CHARACTERS // MAX_ATOMS)]
    encode_rows(texts, [str(number) for number in range(len(texts))], MAX_ATOMS)
    return peak()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def alone(function: Callable[..., int], *arguments: object) -> int:
    """The result of a function in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    figures, shares = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for molecules, atoms, memory in WRITES:
            found = alone(write, folder, molecules, atoms, memory)
            figures[f"write, {molecules:.0e} molecules of {atoms} atoms, {memory} MiB allowed"] = found
            shares.append(found / memory)
    found = alone(encode)
    figures[f"map, a chunk of the longest molecules, {MAP_MEMORY} MiB allowed"] = found
    shares.append(found / MAP_MEMORY)
    write_result({"name": "prepare_memory", "ratio": max(shares), "target": 1.0, "peak_mib": figures})


if __name__ == "__main__":
    main()
