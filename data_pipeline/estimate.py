"""What preparing a dataset would take, told from the heads of its sources: rows, rejects, time, disk space."""

import dataclasses
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.execution.supervise import supervised
from data_pipeline.execution.task import Task
from data_pipeline.execution.watch import Watch
from data_pipeline.molecules.encode import encode_rows
from data_pipeline.molecules.rejects import rejects_in_words
from data_pipeline.molecules.targets import with_targets
from data_pipeline.options import PrepareOptions
from data_pipeline.quantities import byte_size, duration
from data_pipeline.sources.formats import SYNTH
from data_pipeline.sources.row_count import COLUMNAR, count_rows
from data_pipeline.sources.source import Source, SourceChunk, read_chunks
from data_pipeline.stages.read_stage import chunk_file, read_chunk, write_chunk

# Of many sources, fewer rows each are tried: a dry run takes seconds.
_MOST_ROWS = 20_000
_FEWEST_ROWS = 20
_EXAMPLES = 3

# Beside the encoding: reading, the shuffle by scaffold, the writing of shards. Measured on 50,000 molecules of Enamine
# and 40,000 synthetic ones: 33-48 us of CPU time. Temporary files: on 9,000 of ZINC 0.97 of the bytes of the shards.
_OTHER_SECONDS_PER_ROW = 40e-6
_TEMPORARY_PER_SHARD_BYTE = 1.0

# In the names of files: of the one head that a work folder is of.
_HEAD = "head"

# A first call pays for what later calls share: tables are loaded, code is compiled.
_WARM_UP = ["OC(=O)c1ccccc1OC(C)=O", "C[N+](C)(C)C.[Cl-]", "not a SMILES"]


@dataclass(frozen=True)
class SourceEstimate:
    """A source and its head.

    bytes: as stored; head_rows: rows that were read and encoded; examples: the first of them as (text, id);
    rejected: those that are no molecules, by reason; rows: of the whole source, counted when `exact`;
    molecules: about, duplicates included; seconds: of one process; shard_bytes: of the molecules; temporary_bytes: of
    the files between the stages, which hold no targets.
    """

    name: str
    format: str
    bytes: int
    head_rows: int
    examples: list[tuple[str, str]]
    rejected: dict[str, int]
    rows: int
    exact: bool
    molecules: int
    seconds: float
    shard_bytes: int
    temporary_bytes: int


@dataclass(frozen=True)
class Estimate:
    """All sources together. seconds: of `workers` processes, each on a core of its own; bytes: before deduplication."""

    sources: list[SourceEstimate]
    workers: int
    rows: int
    exact: bool
    molecules: int
    seconds: float
    shard_bytes: int
    temporary_bytes: int


def estimate(sources: Sequence[Source], options: PrepareOptions, workers: int, head_rows: int = 1000) -> Estimate:
    """Read and encode the first `head_rows` rows of each source (fewer of more than 20), and scale up.

    It holds as far as the rest of a source is like its head. The number of rows is estimated as `row_count.count_rows`
    says, unless the head is all there is; time as the CPU time of the head on this machine.

    Raises:
        UsageError, PipelineError: as `sources.read_chunks`.
    """
    head_rows = min(head_rows, max(_FEWEST_ROWS, _MOST_ROWS // len(sources)))
    parts = [_estimate(source, options, head_rows) for source in sources]
    return Estimate(
        sources=parts,
        workers=workers,
        rows=sum(part.rows for part in parts),
        exact=all(part.exact for part in parts),
        molecules=sum(part.molecules for part in parts),
        seconds=sum(part.seconds for part in parts) / workers,
        shard_bytes=sum(part.shard_bytes for part in parts),
        temporary_bytes=sum(part.temporary_bytes for part in parts),
    )


def _estimate(source: Source, options: PrepareOptions, head_rows: int) -> SourceEstimate:
    chunks = read_chunks(source, options.smiles_column, options.id_column, chunk_rows=head_rows)
    head = next(chunks, SourceChunk(first_row=0, texts=[], ids=[]))
    is_whole = next(chunks, None) is None
    encoded = _encoded(source.name, head, options)
    read = len(head.texts)
    rows = read if is_whole else max(read + 1, count_rows(source))
    scale = rows / max(1, read)
    return SourceEstimate(
        name=source.name,
        format=source.format,
        bytes=source.bytes,
        head_rows=read,
        examples=list(zip(head.texts, head.ids, strict=True))[:_EXAMPLES],
        rejected=dict(encoded.rejected.most_common()),
        rows=rows,
        exact=is_whole or source.format in (SYNTH, *COLUMNAR),
        molecules=round(scale * encoded.molecules),
        seconds=scale * encoded.seconds + rows * _OTHER_SECONDS_PER_ROW,
        shard_bytes=round(scale * encoded.shard_bytes),
        temporary_bytes=round(scale * _TEMPORARY_PER_SHARD_BYTE * encoded.bytes),
    )


@dataclass(frozen=True)
class EncodedHead:
    """What became of a head.

    rejected: rows by reason; seconds: CPU time; bytes: of the molecules without targets; shard_bytes: as a shard has
    them.
    """

    molecules: int
    rejected: Counter[str]
    seconds: float
    bytes: int
    shard_bytes: int


def _encoded(name: str, head: SourceChunk, options: PrepareOptions) -> EncodedHead:
    with tempfile.TemporaryDirectory(prefix="hmoe_estimate_") as work:
        write_chunk(chunk_file(work, _HEAD, 0), head)
        return supervised(HeadTask(work, name, options))


@dataclass(frozen=True)
class HeadTask(Task[EncodedHead]):
    """Encode the head of the source `name`: in a child process, as a row may hang RDKit."""

    work: str
    name: str
    options: PrepareOptions

    def __str__(self) -> str:
        return f"{self.name}, its head"

    @property
    def identity(self) -> tuple[object, ...]:
        return (self.name, *dataclasses.astuple(self.options))

    def outputs(self, result: EncodedHead) -> list[str]:
        return []

    def run(self, watch: Watch) -> EncodedHead:
        head = read_chunk(chunk_file(self.work, _HEAD, 0), 0)
        self._encode(SourceChunk(0, _WARM_UP, _WARM_UP), Watch())
        watch.begin(self.options.molecule_seconds)
        return self._encode(head, watch)

    def _encode(self, head: SourceChunk, watch: Watch) -> EncodedHead:
        options = self.options
        started = time.thread_time()
        encoded = encode_rows(head.texts, head.ids, options.max_atoms, options.standardize, watch)
        # Its rows are numbered behind those of the head: to `watch` they are others.
        molecules = with_targets(encoded.batch, watch, len(head.texts)) if options.targets else encoded.batch
        return EncodedHead(
            molecules.num_rows,
            Counter(reject.reason for reject in encoded.rejects),
            time.thread_time() - started,
            encoded.batch.nbytes,
            molecules.nbytes,
        )


def describe_estimate(estimate: Estimate) -> str:
    """An estimate as text, one fact per line."""
    lines = [line for source in estimate.sources for line in _describe_source(source)]
    return "\n".join(
        [
            *lines,
            f"total       {_number(estimate.rows, estimate.exact)} rows, "
            f"about {_rounded(estimate.molecules):,} molecules, duplicates among them included",
            f"time        about {duration(estimate.seconds)} with {estimate.workers} workers, a core for each",
            f"disk        about {byte_size(estimate.shard_bytes)} of shards, and {byte_size(estimate.temporary_bytes)} "
            "of temporary files beside them while it works",
        ]
    )


def _describe_source(source: SourceEstimate) -> list[str]:
    stored = f", {byte_size(source.bytes)}" if source.bytes else ""
    return [
        f"source      {source.name}: {source.format}{stored}, {_number(source.rows, source.exact)} rows",
        f"head        {source.head_rows:,} rows, rejected: {rejects_in_words(source.rejected) or 'none'}",
        *(f"row         {_line(text)}  id {record_id}" for text, record_id in source.examples),
    ]


def _line(text: str) -> str:
    """The beginning of a text that may be long, a mol block, or not UTF-8."""
    return ascii(text if len(text) <= 80 else f"{text[:77]}...")


def _number(count: int, exact: bool) -> str:
    return f"{count:,}" if exact else f"about {_rounded(count):,}"


def _rounded(count: int) -> int:
    """A count to three digits: more would feign a certainty that an estimate has not."""
    return int(float(f"{count:.2e}"))
