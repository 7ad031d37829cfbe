"""`hmoe prepare`: molecule files to a dataset directory."""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import TYPE_CHECKING

from data_pipeline.redact import redacted
from hmoe_ds.commands.arguments import (
    SOURCES_HELP,
    Command,
    Result,
    add_columns,
    add_no_standardize,
    add_workers,
    positive,
    size_in_bytes,
)
from hmoe_ds.commands.progress import Progress

if TYPE_CHECKING:
    from data_pipeline.options import PrepareOptions
    from data_pipeline.sources.source import Source


def add_command(command: Command) -> None:
    """Declare it."""
    prepare = command("prepare", _prepare, "Molecule files to a dataset directory.")
    prepare.add_argument("sources", nargs="+", metavar="SOURCE", help=SOURCES_HELP)
    prepare.add_argument("--out", required=True, help="dataset directory to write, or a URL")
    prepare.add_argument(
        "--dry-run", action="store_true", help="read the heads of the sources and say what it would take"
    )
    add_columns(prepare)
    prepare.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="FILE",
        help="leave out the molecules of these files, such as test sets",
    )
    prepare.add_argument(
        "--exclude-smiles-column",
        metavar="COL",
        help="column with SMILES in all files to exclude; --smiles-column is not for them (default: found by itself)",
    )
    add_workers(prepare)
    prepare.add_argument("--scheduler", metavar="tcp://HOST:PORT", help="use the workers of this Dask cluster instead")
    prepare.add_argument("--staging", metavar="DIR", help="where to build what goes to a URL (default: in ~/.cache)")
    prepare.add_argument("--memory", type=size_in_bytes, default="2GiB", help="of each worker (default: 2GiB)")
    prepare.add_argument("--validation-fraction", type=float, default=0.05, help="share of scaffolds held out")
    prepare.add_argument("--shard-rows", type=positive, default=65536, help="molecules per shard, about")
    prepare.add_argument("--max-atoms", type=positive, default=512, help="larger molecules are rejected")
    prepare.add_argument(
        "--molecule-seconds", type=float, default=10.0, help="CPU time after which a molecule is rejected (default: 10)"
    )
    add_no_standardize(prepare)
    prepare.add_argument(
        "--targets", action="store_true", help="also store a fingerprint and descriptors, for molecule-level objectives"
    )
    existing = prepare.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace the dataset that is in --out")
    existing.add_argument("--append", action="store_true", help="add what is new to the dataset that is in --out")


def _prepare(options: argparse.Namespace, rest: list[str]) -> Result:
    import rdkit

    from data_pipeline.build import check, prepare
    from data_pipeline.describe import describe, describe_counts
    from data_pipeline.execution.executor import Resources
    from data_pipeline.options import PrepareOptions

    settings = PrepareOptions(
        smiles_column=options.smiles_column,
        id_column=options.id_column,
        validation_fraction=options.validation_fraction,
        shard_rows=options.shard_rows,
        max_atoms=options.max_atoms,
        standardize=options.standardize,
        molecule_seconds=options.molecule_seconds,
        format=options.format,
        targets=options.targets,
        exclude_smiles_column=options.exclude_smiles_column,
    )
    resources = Resources(options.workers, options.scheduler, options.memory)
    if options.dry_run:
        existing = options.overwrite, options.append
        sources = check(options.sources, options.out, settings, resources, *existing, options.exclude, options.staging)
        return _estimate(sources, settings, options.workers)
    started = time.perf_counter()
    with Progress() as progress:
        result = prepare(
            options.sources,
            options.out,
            settings,
            resources,
            progress.report,
            overwrite=options.overwrite,
            append=options.append,
            exclude=options.exclude,
            staging=options.staging,
        )
    seconds = time.perf_counter() - started
    print(describe(result.manifest))
    description = dataclasses.asdict(result.manifest)
    if result.counts is None:
        print(f"{redacted(options.out)} was already prepared from these sources with these options; nothing was done")
        version = result.manifest.versions["rdkit"]
        if version != rdkit.__version__:
            print(f"it was made with rdkit {version}, this is {rdkit.__version__}; to prepare it anew: --overwrite")
        return description
    if options.append:
        print(f"appended    {describe_counts(result.counts)}")
        description["appended"] = dataclasses.asdict(result.counts)
    if result.resumed:
        print(f"taken over from an interrupted run: {result.resumed} of {result.tasks} pieces of the work")
    rate = result.counts.read / seconds
    print(f"prepared in {seconds:.1f} s, {rate:,.0f} rows/s, {options.scheduler or f'{options.workers} workers'}")
    return {
        **description,
        "seconds": seconds,
        "rows_per_second": rate,
        "tasks": result.tasks,
        "resumed": result.resumed,
    }


def _estimate(sources: list[Source], settings: PrepareOptions, workers: int) -> Result:
    from data_pipeline.estimate import describe_estimate, estimate

    figures = estimate(sources, settings, workers)
    print(describe_estimate(figures))
    return dataclasses.asdict(figures)
