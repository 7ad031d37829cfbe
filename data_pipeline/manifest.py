"""manifest.json: what a dataset holds, where it came from, and the checksum of each of its files.

It holds no time and no number of workers: the same sources and options give the same bytes. It is written last, so a
folder that has one is complete.
"""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from data_pipeline.contained import check_contained, contained_path
from data_pipeline.durable import replace_text
from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.keys import file_checksum
from data_pipeline.options import LATER_OPTIONS
from data_pipeline.remote import is_url, join_url, read_bytes, read_checksum, read_size
from data_pipeline.schema import FORMAT_NAME, FORMAT_VERSION, SPLITS

if TYPE_CHECKING:  # `sources` needs RDKit, which reading a dataset does not
    from data_pipeline.sources.source import Source

Record = TypeVar("Record")

MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class FileRecord:
    """A file of the dataset. `file` is relative to the dataset folder; `blake2b`: 128 bits, hexadecimal."""

    file: str
    bytes: int
    blake2b: str

    @classmethod
    def of(cls, directory: Path, file: str) -> "FileRecord":
        """The record of an existing file."""
        path = directory / file
        return cls(file, path.stat().st_size, file_checksum(path))


@dataclass(frozen=True)
class ShardRecord(FileRecord):
    """A shard: its file, its molecules, how many atoms and bonds they have together, and the most that one has."""

    rows: int
    atoms: int
    bonds: int
    max_atoms: int
    max_bonds: int


@dataclass(frozen=True)
class DescriptorRecord:
    """A descriptor over the `count` molecules of a split that have it; mean and standard deviation 0 without any."""

    name: str
    count: int
    mean: float
    standard_deviation: float


@dataclass(frozen=True)
class SplitRecord:
    """A split. `scaffolds`: distinct ones; `complexity_percentiles`: 0, 1, ..., 100, or [] for an empty split;
    `descriptors`: in the order of the column, or [] for a dataset without that column."""

    rows: int
    atoms: int
    bonds: int
    max_atoms: int
    max_bonds: int
    scaffolds: int
    acyclic: int
    complexity_percentiles: list[float]
    shards: list[ShardRecord]
    descriptors: list[DescriptorRecord] = field(default_factory=list)


@dataclass(frozen=True)
class SourceRecord:
    """A source as it was read: its name, its bytes (`blake2b`: 128 bits, hexadecimal), its data rows.

    `smiles_column`, `id_column`: as they were asked for, None when found by themselves.
    """

    name: str
    format: str
    bytes: int
    blake2b: str
    licence: str | None
    rows: int
    smiles_column: str | None
    id_column: str | None

    @classmethod
    def of(cls, source: "Source", rows: int, smiles_column: str | None, id_column: str | None) -> "SourceRecord":
        """The record of a source; where it lies is not part of it, so that machines agree."""
        content = (source.format, source.bytes, source.blake2b)
        return cls(source.name, *content, source.licence, rows, smiles_column, id_column)

    def is_of(self, source: "Source") -> bool:
        """True if `source` has the same name, format and bytes, wherever it lies."""
        return (self.name, self.format, self.bytes, self.blake2b) == (
            source.name,
            source.format,
            source.bytes,
            source.blake2b,
        )

    def has_content_of(self, source: "Source", smiles_column: str | None, id_column: str | None) -> bool:
        """True if `source`, read by these columns, has the same rows, whatever its name."""
        read = (source.format, source.bytes, source.blake2b, smiles_column, id_column)
        return (self.format, self.bytes, self.blake2b, self.smiles_column, self.id_column) == read


@dataclass(frozen=True)
class ExclusionRecord:
    """A file whose molecules were left out: its rows, and how many of them could not be read as molecules."""

    name: str
    bytes: int
    blake2b: str
    rows: int
    rejected: int


@dataclass(frozen=True)
class Counts:
    """What became of the rows read: read = sum of written + duplicates + excluded + sum of rejected.

    `written` is by split, `rejected` by reason; `excluded`: molecules, each once, that the user asked to leave out;
    `standardized`: rows, duplicates among them, whose molecule standardisation changed.
    """

    read: int
    written: dict[str, int]
    duplicates: int
    excluded: int
    rejected: dict[str, int]
    standardized: int

    def __add__(self, other: "Counts") -> "Counts":
        """What became of the rows of both."""
        reasons = sorted({*self.rejected, *other.rejected})
        return Counts(
            read=self.read + other.read,
            written={split: rows + other.written[split] for split, rows in self.written.items()},
            duplicates=self.duplicates + other.duplicates,
            excluded=self.excluded + other.excluded,
            rejected={reason: self.rejected.get(reason, 0) + other.rejected.get(reason, 0) for reason in reasons},
            standardized=self.standardized + other.standardized,
        )

    @property
    def unaccounted(self) -> int:
        """Rows that were read and went nowhere; anything but 0 is a defect."""
        return self.read - sum(self.written.values()) - self.duplicates - self.excluded - sum(self.rejected.values())


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json. `versions` are of the libraries that made the dataset."""

    versions: dict[str, str]
    options: dict[str, Any]
    sources: list[SourceRecord]
    exclusions: list[ExclusionRecord]
    counts: Counts
    splits: dict[str, SplitRecord]
    files: list[FileRecord]

    @classmethod
    def load(cls, directory: str | Path) -> "Manifest":
        """Read the manifest of a dataset, in a folder or behind an fsspec URL such as `s3://bucket/zinc`.

        Raises:
            UsageError: there is no dataset, or one of another format version, or one that names files outside of it;
                or a URL that fsspec cannot open.
            PipelineError: the manifest is damaged; or the storage cannot be read.
        """
        path = join_url(directory, MANIFEST_FILE) if is_url(directory) else Path(directory) / MANIFEST_FILE
        content = _read_json(path)
        version = content.pop("format_version", None)
        if content.pop("format", None) != FORMAT_NAME:
            raise UsageError(f"{path}: not the manifest of a molecule dataset; name a folder made by `hmoe prepare`")
        if version != FORMAT_VERSION:
            raise UsageError(f"{path}: format version {version!r}, expected {FORMAT_VERSION}; run `hmoe prepare` again")
        try:
            manifest = cls(
                versions=content["versions"],
                options={**LATER_OPTIONS, **content["options"]},
                sources=[_record(SourceRecord, source) for source in content["sources"]],
                exclusions=[_record(ExclusionRecord, exclusion) for exclusion in content["exclusions"]],
                counts=_record(Counts, content["counts"]),
                splits={name: _split(content["splits"][name]) for name in SPLITS},
                files=[_record(FileRecord, record) for record in content["files"]],
            )
            manifest.versions["rdkit"]
        except (KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, error) from error
        for file in manifest.all_files:
            check_contained(file.file, path)
            if not re.fullmatch(r"[0-9a-f]{32}", file.blake2b):  # it names the file in caches
                raise _damaged(path, f"{file.file} has the checksum {file.blake2b!r}")
        return manifest

    @property
    def shards(self) -> list[ShardRecord]:
        """The shards of all splits."""
        return [shard for split in self.splits.values() for shard in split.shards]

    @property
    def all_files(self) -> list[FileRecord]:
        """All files of the dataset but the manifest."""
        return [*self.shards, *self.files]

    def save(self, directory: Path) -> None:
        """Write manifest.json so that it is either there as a whole, or not at all."""
        content = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        replace_text(directory / MANIFEST_FILE, json.dumps(content, indent=1) + "\n")


def file_path(directory: str | Path, record: FileRecord) -> Path:
    """Where a file of the dataset in a folder of this machine is. Raises UsageError if a link leads out of it."""
    return contained_path(directory, record.file, Path(directory) / MANIFEST_FILE)


def is_dataset(directory: Path) -> bool:
    """True if the folder holds a manifest of ours, of whatever version."""
    path = directory / MANIFEST_FILE
    return path.is_file() and _read_json(path).get("format") == FORMAT_NAME


def verify(directory: str | Path, read: bool = True) -> list[str]:
    """Compare every file of a dataset with its size and checksum in the manifest; one line for each that differs.

    Without `read` the sizes alone.

    Raises as `Manifest.load`.
    """
    manifest = Manifest.load(directory)
    problems = [_problem(directory, record, read) for record in manifest.all_files]
    return [problem for problem in problems if problem is not None]


def _problem(directory: str | Path, record: FileRecord, read: bool) -> str | None:
    if is_url(directory):
        return _remote_problem(join_url(directory, record.file), record, read)
    path = file_path(directory, record)
    if not path.is_file():
        return f"{record.file}: missing"
    if path.stat().st_size != record.bytes:
        return f"{record.file}: {path.stat().st_size} bytes, expected {record.bytes}"
    if read and file_checksum(path) != record.blake2b:
        return f"{record.file}: the content is not what was written (checksum differs)"
    return None


def _remote_problem(url: str, record: FileRecord, read: bool) -> str | None:
    try:
        size, checksum = read_checksum(url) if read else (read_size(url), record.blake2b)
    except FileNotFoundError:
        return f"{record.file}: missing"
    if size != record.bytes:
        return f"{record.file}: {size} bytes, expected {record.bytes}"
    if checksum != record.blake2b:
        return f"{record.file}: the content is not what was written (checksum differs)"
    return None


def _read_json(path: str | Path) -> dict[str, Any]:
    try:
        content = json.loads(read_bytes(path) if isinstance(path, str) else path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        if isinstance(path, str):
            raise UsageError(
                f"{path.removesuffix('/' + MANIFEST_FILE)}: no dataset here (no {MANIFEST_FILE}); upload one made by "
                "`hmoe prepare`"
            ) from error
        raise UsageError(
            f"{path.parent}: no dataset here (no {path.name}); make one with `hmoe prepare SOURCE --out {path.parent}`"
        ) from error
    except ValueError as error:
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise _damaged(path, "not a JSON object")
    return content


def _split(content: dict[str, Any]) -> SplitRecord:
    shards = [_record(ShardRecord, shard) for shard in content["shards"]]
    descriptors = [_record(DescriptorRecord, record) for record in content.get("descriptors", [])]
    return _record(SplitRecord, {**content, "shards": shards, "descriptors": descriptors})


def _record(kind: type[Record], content: dict[str, Any]) -> Record:
    """A record of a dataclass with these fields; raises TypeError for others, or for a number or text that is none."""
    for about in dataclasses.fields(kind):  # type: ignore[arg-type]
        value = content.get(about.name)
        if (about.type is int and (type(value) is not int or value < 0)) or (
            about.type is str and not isinstance(value, str)
        ):
            raise TypeError(f"{about.name} is {value!r}")
    return kind(**content)


def _damaged(path: str | Path, detail: object) -> PipelineError:
    mend = "upload the dataset again" if isinstance(path, str) else "remove the folder and run `hmoe prepare` again"
    return PipelineError(f"{path}: the manifest is damaged ({detail}); {mend}")
