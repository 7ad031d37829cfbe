"""Appending to a dataset: whether it may be done, which of the sources are new, and what is carried over."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import rdkit

from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.manifest import Manifest, ShardRecord, file_path
from data_pipeline.output import REJECTS_FILE, SCAFFOLDS_FILE
from data_pipeline.schema import REJECT_SCHEMA, SCAFFOLD_SCHEMA, SPLITS
from data_pipeline.sources.source import Source

# They tell how to read a source, so each append has its own.
_SOURCE_OPTIONS = ("format", "smiles_column", "id_column")


@dataclass(frozen=True)
class Existing:
    """A dataset that is appended to: its folder and its manifest."""

    folder: Path
    manifest: Manifest

    @classmethod
    def load(cls, folder: Path, options: dict[str, Any]) -> "Existing":
        """The dataset in `folder`, if it was prepared with `options`.

        Raises:
            UsageError: no dataset there, other options, or another RDKit.
            PipelineError: a shard is missing or has another size than it was written with; a table has other columns.
        """
        manifest = Manifest.load(folder)
        for name, value in options.items():
            recorded = manifest.options.get(name)
            if name not in _SOURCE_OPTIONS and recorded != value:
                raise UsageError(
                    f"{folder}: was prepared with {name} {recorded}, not {value}; append to it with the same options"
                )
        version = manifest.versions["rdkit"]
        if version != rdkit.__version__:
            raise UsageError(
                f"{folder}: was prepared with rdkit {version}, this is {rdkit.__version__}, which may write the same "
                f"molecule differently; append with rdkit {version}, or prepare all sources again"
            )
        existing = cls(folder, manifest)
        existing._check_files()
        return existing

    @property
    def shards(self) -> list[tuple[str, ShardRecord]]:
        """All shards, with their splits."""
        return [(split, shard) for split in SPLITS for shard in self.manifest.splits[split].shards]

    @property
    def rows(self) -> int:
        return sum(shard.rows for _, shard in self.shards)

    @property
    def scaffolds_file(self) -> Path:
        return self.folder / SCAFFOLDS_FILE

    def rejects(self) -> Iterator[pa.RecordBatch]:
        """The rejects that the manifest counts.

        A killed append may have left the file with its own behind them.
        """
        left = sum(self.manifest.counts.rejected.values())
        with pq.ParquetFile(self.folder / REJECTS_FILE) as file:
            for batch in file.iter_batches():
                yield batch.slice(0, left).cast(REJECT_SCHEMA)
                left -= min(left, batch.num_rows)

    def new_sources(self, sources: list[Source], smiles_column: str | None, id_column: str | None) -> list[Source]:
        """The sources that were not read before, renamed where a source of the dataset has the same name."""
        records = self.manifest.sources
        new = [s for s in sources if not any(r.has_content_of(s, smiles_column, id_column) for r in records)]
        taken = {record.name for record in records}
        return [source.renamed(taken) for source in new]

    def check_exclusions(self, exclude: list[Source]) -> None:
        """Raise UsageError unless the molecules of the same files were left out of the dataset."""
        if [source.blake2b for source in exclude] != [record.blake2b for record in self.manifest.exclusions]:
            names = ", ".join(record.name for record in self.manifest.exclusions) or "none"
            raise UsageError(
                f"{self.folder}: was prepared with other --exclude files ({names}); append to it with the same ones, "
                "or prepare all sources again"
            )

    def _check_files(self) -> None:
        for file in self.manifest.files:
            file_path(self.folder, file)
        for name, schema in ((SCAFFOLDS_FILE, SCAFFOLD_SCHEMA), (REJECTS_FILE, REJECT_SCHEMA)):
            if not pq.read_schema(self.folder / name).equals(schema):
                raise PipelineError(f"{self.folder / name}: has other columns than a dataset's; copy it again")
        for _, shard in self.shards:
            path = file_path(self.folder, shard)
            size = os.path.getsize(path) if path.is_file() else None
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size} bytes, expected {shard.bytes}"
                raise PipelineError(f"{path}: {found}; copy the dataset again, or run `hmoe prepare` again")
