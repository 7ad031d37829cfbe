"""The formats of sources, and how a file tells its own."""

from rdkit import Chem, rdBase

from data_pipeline.errors import UsageError
from data_pipeline.sources.columnar import ARROW_MAGIC, ARROW_STREAM_MAGIC, PARQUET_MAGIC, Kind
from data_pipeline.sources.columns import SMILES_HEADERS, find, format_of_header
from data_pipeline.sources.streams import COMPRESSION_EXTENSIONS, split_compression

# What `--format` takes. `id-smiles`: lines of an id and a SMILES, such as PubChem's CID-SMILES.
FORMATS = ("smiles", "id-smiles", "csv", "tsv", "sdf", "parquet", "arrow")
# Of what is generated (`synth`), which no file has.
SYNTH = "synth"

HEAD_BYTES = 64 << 10

_EXTENSIONS = {
    ".smi": "smiles",
    ".smiles": "smiles",
    ".ism": "smiles",
    ".cxsmiles": "smiles",
    ".txt": "smiles",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".sdf": "sdf",
    ".sd": "sdf",
    ".mol": "sdf",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
_HEAD_LINES = 20
_ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
# POSIX and GNU, behind the name of the first member, its mode, owner, size, time and checksum.
_TAR_MAGIC, _TAR_MAGIC_OFFSET = (b"ustar\x0000", b"ustar  \0"), 257


def check_format(name: str) -> None:
    """Raise UsageError if there is no such format."""
    if name not in FORMATS:
        raise UsageError(f"format {name!r}: unknown; expected one of {', '.join(FORMATS)}")


def check_no_archive(path: str, head: bytes) -> None:
    """Raise UsageError if content that begins with `head` is an archive: its members would be taken for one text."""
    is_tar = head.startswith(_TAR_MAGIC, _TAR_MAGIC_OFFSET)
    if is_tar or head.startswith(_ZIP_MAGIC):
        kind = "tar" if is_tar else "zip"
        raise UsageError(f"{path}: a {kind} archive; unpack it and name the files in it (a workbook: save it as CSV)")


def binary_format(head: bytes) -> Kind | None:
    """The format, parquet or arrow, that the first bytes of a file tell, or None."""
    if head.startswith(PARQUET_MAGIC):
        return "parquet"
    return "arrow" if head.startswith((ARROW_MAGIC, ARROW_STREAM_MAGIC)) else None


def format_of_name(name: str) -> str | None:
    """The format that the extension of a file name tells, or None."""
    stem, _ = split_compression(name)
    return next((form for extension, form in _EXTENSIONS.items() if stem.endswith(extension)), None)


def is_sdf(name: str, head: bytes) -> bool:
    """Whether the file `name`, which begins with `head`, is an SDF by its extension, or without one by its content."""
    form = format_of_name(name)
    return form == "sdf" or (form is None and _has_sdf_line(_lines(head)))


def detect_format(path: str, name: str, head: bytes) -> str:
    """The format of the file `name` at `path`, whose decompressed content begins with `head`.

    Parquet and Arrow are told by their first bytes; then the extension counts, except that lines of ids before SMILES
    are told by what they hold; a file without a known extension is told by what it holds.

    Raises:
        UsageError: it does not tell.
    """
    binary = binary_format(head)
    if binary is not None:
        return binary
    lines = _lines(head)
    form = format_of_name(name) or _format_of(lines)
    if form is None:
        raise UsageError(
            f"{path}: unknown file type; name its format with --format ({', '.join(FORMATS)}), or give it a known "
            f"extension: {', '.join(_EXTENSIONS)}, or one of them + {', '.join(COMPRESSION_EXTENSIONS)}"
        )
    return "id-smiles" if form == "smiles" and _has_ids_first(lines) else form


def _lines(head: bytes) -> list[str]:
    """The whole lines of the beginning of a text."""
    lines = head.decode("utf-8-sig", "surrogateescape").splitlines()
    return lines[:-1] if len(head) >= HEAD_BYTES else lines  # the last one may be cut


def _has_sdf_line(lines: list[str]) -> bool:
    return any(line.startswith(("$$$$", "M  END")) for line in lines)


def _format_of(lines: list[str]) -> str | None:
    """The format that the first lines of a text tell, or None."""
    if _has_sdf_line(lines):
        return "sdf"
    header = next(iter(lines), "")
    form = format_of_header(header)
    if form is not None:
        return form
    rows = _rows(lines)
    if find(header.split()[:1], SMILES_HEADERS) is not None or _has_ids_first(lines):
        return "smiles"
    readable = sum(_is_structure(row[0]) for row in rows)
    return "smiles" if 2 * readable > len(rows) else None


def _has_ids_first(lines: list[str]) -> bool:
    """True if most lines go on with a structure, but few begin with one: as such some ids (CNS, P) can be read."""
    rows = [row for row in _rows(lines) if len(row) > 1]
    first, second = (sum(_is_structure(row[column]) for row in rows) for column in (0, 1))
    return 2 * second > len(rows) > 2 * first


def _rows(lines: list[str]) -> list[list[str]]:
    return [line.split() for line in lines if line.strip()][:_HEAD_LINES]


def _is_structure(token: str) -> bool:
    if token.startswith("InChI="):
        return True
    with rdBase.BlockLogs():
        return len(token) < 1000 and token.isascii() and Chem.MolFromSmiles(token, sanitize=False) is not None
