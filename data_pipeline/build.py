"""Sources -> a dataset folder: checks, the build, and the move into place."""

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from data_pipeline.append import Existing
from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.execution.executor import Resources, open_executor
from data_pipeline.execution.task import digest
from data_pipeline.manifest import MANIFEST_FILE, Manifest
from data_pipeline.options import PrepareOptions
from data_pipeline.output import WORK_FOLDER, Publication, check_writable, remove_leftovers, work_folder
from data_pipeline.plan import Plan, check_options, resolve
from data_pipeline.remote import is_url, one_line
from data_pipeline.sources.source import Source
from data_pipeline.stages.ranges import mapped_bytes
from data_pipeline.stages.stages import SHARD_ATOMS, Build, PrepareResult, Report
from data_pipeline.upload import holds_dataset, upload

DEFAULT_STAGING = Path.home() / ".cache" / "hmoe_ds" / "prepare"


def prepare(
    sources: Sequence[str],
    out: str | Path,
    options: PrepareOptions | None = None,
    resources: Resources | None = None,
    report: Report | None = None,
    overwrite: bool = False,
    append: bool = False,
    exclude: Sequence[str] = (),
    staging: str | Path | None = None,
) -> PrepareResult:
    """Prepare a dataset in `out`, a folder or an fsspec URL, from `sources` (`sources.resolve_sources`).

    `overwrite`: in place of a dataset in `out`. `append`: add to the dataset in `out` what it does not hold; sources
    that were read into it before are left out. `exclude`: sources whose molecules are left out. `staging`: the folder
    to build in what goes to a URL. What an interrupted run has left done in `out` or `staging` is taken over.

    Raises:
        UsageError: a source or a column that is not there; `out` holds something else, or a dataset of other
            sources or options and neither `overwrite` nor `append` is True; an append to no dataset, or to one of
            other options or another RDKit.
        PipelineError: an unreadable source, no molecules at all, dead workers, no space.
    """
    options, resources = options or PrepareOptions(), resources or Resources()
    report = report or _no_report
    _check_request(out, options, resources, overwrite, append, staging)
    if is_url(out):
        plan = Plan.make(sources, exclude, options)
        return _prepare_at_url(plan, out, Path(staging or DEFAULT_STAGING).absolute(), resources, report, overwrite)
    # Workers elsewhere may be in another folder.
    out = Path(out).absolute()
    with _named_errors(out, append):
        plan = Plan.make(sources, exclude, options, _existing(out, options) if append else None)
        return _prepare_in_folder(plan, out, resources, report, overwrite)


def check(
    sources: Sequence[str],
    out: str | Path,
    options: PrepareOptions,
    resources: Resources,
    overwrite: bool = False,
    append: bool = False,
    exclude: Sequence[str] = (),
    staging: str | Path | None = None,
) -> list[Source]:
    """What `prepare` with these arguments would read, told from heads: checksums are left out, nothing is written.

    So it cannot tell whether the dataset in `out` is of other sources, or of other exclusions.

    Raises:
        UsageError, PipelineError: as `prepare`, before it reads the sources whole.
    """
    _check_request(out, options, resources, overwrite, append, staging)
    if append:
        _existing(Path(out), options)
    elif not overwrite and _holds_dataset(out):
        check_options(out, Manifest.load(out), options)
    return resolve(sources, exclude, options, checksums=False)[0]


def _check_request(
    out: str | Path,
    options: PrepareOptions,
    resources: Resources,
    overwrite: bool,
    append: bool,
    staging: str | Path | None,
) -> None:
    if overwrite and append:
        raise UsageError("overwrite and append are both True; expected one of them at most")
    if is_url(out) and append:
        raise UsageError(f"--append: {out} is a URL; append to a copy on this machine and upload that")
    if not is_url(out) and staging is not None:
        raise UsageError(f"--staging is {staging}, but --out is a folder, in which a dataset is built; leave it out")
    most = resources.budget // mapped_bytes(1, SHARD_ATOMS)
    if options.shard_rows > most:
        raise UsageError(
            f"shard_rows is {options.shard_rows}, but with {resources.memory >> 20} MiB of memory a worker can write "
            f"shards of at most {most} molecules; lower --shard-rows, or raise --memory"
        )
    if not is_url(out):
        check_writable(Path(out))


def _holds_dataset(out: str | Path) -> bool:
    return holds_dataset(out) if is_url(out) else (Path(out) / MANIFEST_FILE).exists()


def _existing(out: Path, options: PrepareOptions) -> Existing:
    return Existing.load(out, dataclasses.asdict(options))


def _prepare_in_folder(plan: Plan, out: Path, resources: Resources, report: Report, overwrite: bool) -> PrepareResult:
    if plan.existing is not None and not plan.sources:
        remove_leftovers(out)
        return PrepareResult(plan.existing.manifest, None)
    if not overwrite and plan.existing is None and _holds_dataset(out):
        manifest = plan.matching_manifest(out)
        remove_leftovers(out)
        return PrepareResult(manifest, None)
    with work_folder(out) as work:
        if not overwrite:
            _check_unchanged(plan, out)
        publication = Publication.load(work.path, plan.key)
        if publication is None:
            with open_executor(resources, str(work.path)) as executor:
                publication = Build(plan, out, work, executor, resources.budget, report).run()
            publication.save(work.path)
        work.keep = True
        publication.publish(work.path, out)
    return publication.result


def _check_unchanged(plan: Plan, out: Path) -> None:
    """Another run may have ended between the look at `out` and the lock."""
    planned = plan.existing.manifest if plan.existing else None
    if (Manifest.load(out) if _holds_dataset(out) else None) != planned:
        raise UsageError(f"{out}: another `hmoe prepare` has changed the dataset there meanwhile; run again")


def _prepare_at_url(
    plan: Plan, url: str, staging: Path, resources: Resources, report: Report, overwrite: bool
) -> PrepareResult:
    if not overwrite and holds_dataset(url):
        return PrepareResult(plan.matching_manifest(url), None)
    # A folder for each dataset, so that what lies in it, all or part of this one, is taken over.
    folder = staging / digest(url, plan.key)
    with _named_errors(folder, append=False):
        result = _prepare_in_folder(plan, folder, resources, report, overwrite=False)
    upload(folder, url)
    # First what makes it a dataset, should a kill come in between.
    (folder / MANIFEST_FILE).unlink()
    shutil.rmtree(folder)
    return dataclasses.replace(result, counts=result.manifest.counts)


@contextmanager
def _named_errors(out: Path, append: bool) -> Iterator[None]:
    """Errors of files as PipelineError, with what to do about them."""
    try:
        yield
    except OSError as error:
        raise PipelineError(
            f"{out}: cannot write the dataset: {error}; mend it and run again: what is done is kept"
        ) from error
    except pa.ArrowException as error:
        damaged = (
            f"a file of the dataset that is appended to is damaged ({one_line(error)}); `hmoe inspect --verify {out}` "
            "names it; prepare the dataset again"
            if append
            else f"a file of an earlier run is damaged ({one_line(error)}); remove {out / WORK_FOLDER} and run again"
        )
        raise PipelineError(f"{out}: {damaged}") from error


def _no_report(stage: str, done: int, total: int) -> None:
    pass
