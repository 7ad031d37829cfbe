"""The `hmoe` command: each subcommand is a thin call into the package.

Exit codes: 0 when the work is done, 1 when it could not be done, 2 for a usage error, 128 + n after signal n; those of
`pretrain` are in `training/exit_codes.py`.
`--json` makes the last line of standard output one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tqdm import tqdm

from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.redact import redacted

if TYPE_CHECKING:
    from data_pipeline.options import PrepareOptions
    from data_pipeline.sources import Source

Result = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; -> its exit code."""
    parser, options, rest = _parse(sys.argv[1:] if argv is None else list(argv))
    try:
        result = options.run(options, rest)
    except UsageError as error:
        print(f"{parser.prog} {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog} {options.command}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (PipelineError, OSError) as error:
        print(f"{parser.prog} {options.command}: error: {redacted(str(error))}", file=sys.stderr)
        return 1
    exit_code = result.pop("exit_code", 0)
    if options.json:
        print(json.dumps(result))
    return exit_code


def _prepare(options: argparse.Namespace, rest: list[str]) -> Result:
    import rdkit

    from data_pipeline.build import check, prepare
    from data_pipeline.describe import describe, describe_counts
    from data_pipeline.executor import Resources
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
    )
    resources = Resources(options.workers, options.scheduler, options.memory)
    if options.dry_run:
        existing = options.overwrite, options.append
        sources = check(options.sources, options.out, settings, resources, *existing, options.exclude, options.staging)
        return _estimate(sources, settings, options.workers)
    started = time.perf_counter()
    with _Progress() as progress:
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


def _inspect(options: argparse.Namespace, rest: list[str]) -> Result:
    from data_pipeline.describe import describe
    from data_pipeline.manifest import Manifest, verify

    manifest = Manifest.load(options.path)
    print(describe(manifest))
    problems = verify(options.path, read=options.verify)
    found = "all files are as they were written" if options.verify else "all files have the size they were written with"
    print("files       " + ("; ".join(problems) or found) + ("" if options.verify else "; --verify reads them"))
    return {**dataclasses.asdict(manifest), "problems": problems, "exit_code": 1 if problems else 0}


def _pretrain(options: argparse.Namespace, rest: list[str]) -> Result:
    from hmoe_ds.config_parser import load_config

    config = load_config(rest)  # before the imports that take longer
    from hmoe_ds.training import exit_codes
    from hmoe_ds.training.placement import StartOptions, check_placed, command_of, place, start

    names = [field.name for field in dataclasses.fields(StartOptions)]
    where = StartOptions(**{name: getattr(options, name) for name in names})
    placement, out = place(where, config.parallel.ep_size, options.dry_run), Path(config.run.out)
    if options.dry_run:
        from hmoe_ds.training.dry_run import describe_dry_run, dry_run

        figures = dry_run(config, placement.all_ranks)
        command = shlex.join(command_of(rest, placement, out).words)
        print(f"command     {redacted(command)}\n\n{describe_dry_run(figures)}")
        return {"command": redacted(command), **figures}
    if config.run.mirror and config.run.resume == "auto" and not options.node_rank:
        from hmoe_ds.training.mirror import fetch

        fetched = fetch(out, config.run.mirror)
        if fetched is not None:
            print(f"run {config.run.out}: {fetched} was brought back from {config.run.mirror}")
    check_placed(config, placement)
    if options.check:
        print(f"run {config.run.out}: nothing is wrong with it, as far as can be told before it starts")
        return {"out": config.run.out, "ranks": placement.all_ranks}
    exit_code = start(rest, placement, out, options.restarts)
    if exit_code == exit_codes.REQUEUE:
        print(f"run {config.run.out} was asked to stop: the same command goes on with it")
    if exit_code == exit_codes.DONE:
        print(f"run {config.run.out}: {config.run.steps} steps done; export it with `hmoe export {config.run.out} OUT`")
    return {
        "out": config.run.out,
        "steps": config.run.steps,
        "ranks": placement.all_ranks,
        "exit_code": exit_code,
    }


def _export(options: argparse.Namespace, rest: list[str]) -> Result:
    from hmoe_ds.downstream.export import export_checkpoint

    result = export_checkpoint(options.checkpoint, options.out)
    print(f"exported step {result['step']}, {result['parameters']:,} parameters, to {options.out}")
    return result


def _embed(options: argparse.Namespace, rest: list[str]) -> Result:
    from hmoe_ds.downstream.embed import embed_source

    with _Progress() as progress:
        result = embed_source(
            options.model,
            options.source,
            options.out,
            options.smiles_column,
            options.id_column,
            options.standardize,
            progress.report,
        )
    print(f"embedded {result['molecules']} molecules, {result['dimensions']} numbers each, into {options.out}")
    if result["rejected"]:
        print(f"{result['rejected']} rows could not be read as molecules; they are listed in {result['rejects']}")
    return result


def _doctor(options: argparse.Namespace, rest: list[str]) -> Result:
    from hmoe_ds.doctor.examine import examine

    findings = []
    for finding in examine(options.out):
        print(finding, flush=True)
        findings.append(finding)
    problems, notes = (sum(finding.level == level for finding in findings) for level in ("problem", "note"))
    verdict = "cannot pretrain" if problems else "can pretrain"
    print(f"this machine {verdict}; problems: {problems}, notes: {notes}")
    return {
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "problems": problems,
        "notes": notes,
        "exit_code": 1 if problems else 0,
    }


class _Parser(argparse.ArgumentParser):
    """Usage errors quote what was typed, but for credentials."""

    def error(self, message: str) -> NoReturn:
        super().error(redacted(message))


class _Progress:
    """A bar per stage on a terminal; a plain line at the end of each stage when piped."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._stage = ""
        self._done = 0

    def report(self, stage: str, done: int, total: int | None) -> None:
        """Stage `stage` has done `done` of `total` (None: unknown) units."""
        if stage != self._stage:
            self._finish()
            self._stage = stage
            self._bar = tqdm(desc=stage, total=total, disable=not sys.stderr.isatty(), unit="")
        self._done = done
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def _finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
            if not sys.stderr.isatty():
                print(f"{self._stage}: {self._done} done", file=sys.stderr)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._finish()


def _parse(argv: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace, list[str]]:
    parser = _Parser(prog="hmoe", description="Pretrain mixture-of-experts models for molecules.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace, list[str]], Result], help: str) -> Any:
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print a JSON object as the last line")
        return sub

    def no_standardize(sub: Any) -> None:
        help = "keep salts, charges and functional groups as they are written"
        sub.add_argument("--no-standardize", dest="standardize", action="store_false", help=help)

    prepare = command("prepare", _prepare, "Molecule files to a dataset directory.")
    sources = "file, URL, pattern, folder, nci5k or synth:N (docs/sources.md)"
    prepare.add_argument("sources", nargs="+", metavar="SOURCE", help=sources)
    prepare.add_argument("--out", required=True, help="dataset directory to write, or a URL")
    prepare.add_argument(
        "--dry-run", action="store_true", help="read the heads of the sources and say what it would take"
    )
    prepare.add_argument("--smiles-column", help="column with SMILES, in files with a header")
    prepare.add_argument("--id-column", help="column with identifiers, in files with a header")
    prepare.add_argument("--format", help="of all sources, such as sdf (default: each tells its own)")
    prepare.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="FILE",
        help="leave out the molecules of these files, such as test sets",
    )
    prepare.add_argument("--workers", type=_positive, default=os.cpu_count(), help="processes (default: one per core)")
    prepare.add_argument("--scheduler", metavar="tcp://HOST:PORT", help="use the workers of this Dask cluster instead")
    prepare.add_argument("--staging", metavar="DIR", help="where to build what goes to a URL (default: in ~/.cache)")
    prepare.add_argument("--memory", type=_bytes, default="2GiB", help="of each worker (default: 2GiB)")
    prepare.add_argument("--validation-fraction", type=float, default=0.05, help="share of scaffolds held out")
    prepare.add_argument("--shard-rows", type=_positive, default=65536, help="molecules per shard, about")
    prepare.add_argument("--max-atoms", type=_positive, default=512, help="larger molecules are rejected")
    prepare.add_argument(
        "--molecule-seconds", type=float, default=10.0, help="CPU time after which a molecule is rejected (default: 10)"
    )
    no_standardize(prepare)
    prepare.add_argument(
        "--targets", action="store_true", help="also store a fingerprint and descriptors, for molecule-level objectives"
    )
    existing = prepare.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace the dataset that is in --out")
    existing.add_argument("--append", action="store_true", help="add what is new to the dataset that is in --out")

    inspect = command("inspect", _inspect, "What a dataset directory holds, and whether it is intact.")
    inspect.add_argument("path", metavar="DIR", help="dataset directory, or its URL")
    inspect.add_argument("--verify", action="store_true", help="read all files and compare their checksums")

    pretrain = command("pretrain", _pretrain, "Pretrain on this machine or several, through the deepspeed launcher.")
    pretrain.add_argument(
        "--num_ranks", type=_positive, help="ranks on each machine (default: one per GPU, or parallel.ep_size in all)"
    )
    pretrain.add_argument(
        "--restarts", type=int, default=3, metavar="N", help="failures in a row after which to give up (default: 3)"
    )
    pretrain.add_argument(
        "--dry-run",
        action="store_true",
        help="print the command, sizes, FLOPs, memory per GPU and traffic (of parallel.ep_size ranks)",
    )
    pretrain.add_argument("--check", action="store_true", help="look for what is wrong with the run, and start nothing")
    hosts = pretrain.add_argument_group("several machines, reached over ssh (docs/cluster.md)")
    hosts.add_argument("--hostfile", type=Path, metavar="FILE", help="with lines such as `worker-1 slots=8`")
    hosts.add_argument("--launcher", choices=("pdsh", "openmpi"), help="that starts ranks there (default: pdsh)")
    nodes = pretrain.add_argument_group("several machines, with this command started on each (Slurm, Kubernetes)")
    nodes.add_argument("--nodes", type=_positive, default=1, metavar="N", help="machines (default: 1)")
    nodes.add_argument("--node_rank", type=_whole, metavar="I", help="number of this one, from 0")
    nodes.add_argument("--master_addr", metavar="HOST", help="machine 0, as the others reach it")
    nodes.add_argument("--master_port", type=_positive, metavar="PORT", help="a free port there (default: 29500)")
    pretrain.epilog = "All other arguments: --config FILE|PRESET and --section.field VALUE, listed below."

    export = command("export", _export, "A checkpoint to one directory that loads without DeepSpeed.")
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder, or one checkpoint in it")
    export.add_argument("out", metavar="OUT", help="directory to write")

    embed = command("embed", _embed, "Embeddings of molecules from an exported model.")
    embed.add_argument("model", metavar="MODEL", help="directory made by hmoe export")
    embed.add_argument("source", metavar="SOURCE", help=sources)
    embed.add_argument("--out", required=True, help="Parquet file to write")
    embed.add_argument("--smiles-column", help="column with SMILES, in files with a header")
    embed.add_argument("--id-column", help="column with identifiers, in files with a header")
    no_standardize(embed)

    doctor = command("doctor", _doctor, "What this machine has for pretraining, what is missing, the mend.")
    doctor.add_argument("--out", type=Path, metavar="DIR", help="also try this folder, to which a run would write")

    if argv[:1] == ["pretrain"]:
        if {"-h", "--help"} & set(argv):
            from hmoe_ds.config_parser import config_help

            print(pretrain.format_help() + "\n" + config_help())
            sys.exit(0)
        options, rest = parser.parse_known_args(argv)
        return parser, options, rest
    return parser, parser.parse_args(argv), []


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 2GiB or 800MiB")
    number, unit = match.groups()
    return int(float(number) * 1024 ** " KMGT".index(unit.upper() or " "))


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
