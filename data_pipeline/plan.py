"""What a dataset is built from, resolved and checked before the work starts."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.append import Existing
from data_pipeline.errors import UsageError
from data_pipeline.execution.task import digest
from data_pipeline.manifest import Manifest
from data_pipeline.options import PrepareOptions
from data_pipeline.sources.source import Source, check_columns, resolve_sources


def resolve(
    sources: Sequence[str], exclude: Sequence[str], options: PrepareOptions, checksums: bool = True
) -> tuple[list[Source], list[Source]]:
    """Sources, and files of molecules to exclude, their headers read; `checksums`: as `sources.resolve_sources`.

    Raises:
        UsageError: a source or a column that is not there, or one of files to exclude without such files.
        PipelineError: a source that cannot be read.
    """
    resolved = resolve_sources(sources, options.format, checksums)
    for source in resolved:
        check_columns(source, options.smiles_column, options.id_column)
    if options.exclude_smiles_column is not None and not exclude:
        raise UsageError(
            f"exclude_smiles_column is {options.exclude_smiles_column!r}, but no files are excluded; name some with "
            "--exclude, or leave it out"
        )
    excluded = resolve_sources(exclude, checksums=checksums)
    for source in excluded:
        _check_excluded(source, options.exclude_smiles_column)
    return resolved, excluded


def _check_excluded(source: Source, smiles_column: str | None) -> None:
    try:
        check_columns(source, smiles_column, None)
    except UsageError as error:
        # What reads it knows the option of the other sources.
        raise UsageError(str(error).replace("--smiles-column", "--exclude-smiles-column")) from error


@dataclass(frozen=True)
class Plan:
    """What a dataset is built from; `existing`: what is appended to."""

    sources: list[Source]
    exclude: list[Source]
    options: PrepareOptions
    existing: Existing | None

    @property
    def key(self) -> str:
        """Names the dataset: 128 bits, hexadecimal."""
        content = [(s.name, s.format, s.blake2b) for s in self.sources], [s.blake2b for s in self.exclude]
        return digest(*content, self.options, self.existing.manifest if self.existing else None)

    @classmethod
    def make(
        cls,
        sources: Sequence[str],
        exclude: Sequence[str],
        options: PrepareOptions,
        existing: Existing | None = None,
    ) -> "Plan":
        """Resolve sources, and files of molecules to exclude, and read their headers.

        Raises:
            UsageError: a source or a column that is not there; other exclusions than those of `existing`.
            PipelineError: a source that cannot be read.
        """
        resolved, excluded = resolve(sources, exclude, options)
        if existing is not None:
            existing.check_exclusions(excluded)
            resolved = existing.new_sources(resolved, options.smiles_column, options.id_column)
        return cls(resolved, excluded, options, existing)

    def matching_manifest(self, out: Path | str) -> Manifest:
        """The manifest of the dataset in `out`, if it comes from the same sources and options; UsageError otherwise."""
        manifest = Manifest.load(out)
        same_sources = len(self.sources) == len(manifest.sources) and all(
            record.is_of(source) for source, record in zip(self.sources, manifest.sources, strict=True)
        )
        same_exclusions = [s.blake2b for s in self.exclude] == [record.blake2b for record in manifest.exclusions]
        if not same_sources:
            raise _other(out, "sources", ", or add to it: --append")
        if not same_exclusions:
            raise _other(out, "--exclude files")
        check_options(out, manifest, self.options)
        return manifest


def check_options(out: Path | str, manifest: Manifest, options: PrepareOptions) -> None:
    """Raise UsageError if the dataset in `out` was prepared with other options."""
    if dataclasses.asdict(options) != manifest.options:
        raise _other(out, "options")


def _other(out: Path | str, what: str, instead: str = "") -> UsageError:
    return UsageError(
        f"{out}: holds a dataset prepared from other {what}; choose another --out, or replace it: --overwrite{instead}"
    )
