"""Sources -> a dataset folder: checks, the build, and the move into place."""

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from data_pipeline.append import Existing
from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.executor import Resources, open_executor
from data_pipeline.manifest import MANIFEST_FILE
from data_pipeline.options import PrepareOptions
from data_pipeline.output import WORK_FOLDER, Publication, check_writable, remove_leftovers, work_folder
from data_pipeline.plan import Plan, resolve
from data_pipeline.remote import is_url, one_line
from data_pipeline.sources import Source
from data_pipeline.stages import Build, PrepareResult, Report
from data_pipeline.task import digest
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
    if overwrite and append:
        raise UsageError("overwrite and append are both True; expected one of them at most")
    report = report or _no_report
    if is_url(out):
        _existing(out, options, append)
        plan = Plan.make(sources, exclude, options)
        return _prepare_at_url(plan, out, Path(staging or DEFAULT_STAGING).absolute(), resources, report, overwrite)
    if staging is not None:
        raise UsageError(f"--staging is {staging}, but --out is a folder, in which a dataset is built; leave it out")
    # Workers elsewhere may be in another folder.
    out = Path(out).absolute()
    with _named_errors(out, append):
        plan = Plan.make(sources, exclude, options, _existing(out, options, append))
        return _prepare_in_folder(plan, out, resources, report, overwrite)


def check(
    sources: Sequence[str],
    out: str | Path,
    options: PrepareOptions,
    append: bool = False,
    exclude: Sequence[str] = (),
) -> list[Source]:
    """What `prepare` with these arguments would read, told from heads: checksums are left out, nothing is written.

    Raises:
        UsageError, PipelineError: as `prepare`, before it reads the sources whole.
    """
    _existing(out, options, append)
    return resolve(sources, exclude, options, checksums=False)[0]


def _existing(out: str | Path, options: PrepareOptions, append: bool) -> Existing | None:
    """What is appended to. Checks that `out` may be written to."""
    if is_url(out):
        if append:
            raise UsageError(f"--append: {out} is a URL; append to a copy on this machine and upload that")
        return None
    folder = Path(out).absolute()
    check_writable(folder)
    return Existing.load(folder, dataclasses.asdict(options)) if append else None


def _prepare_in_folder(plan: Plan, out: Path, resources: Resources, report: Report, overwrite: bool) -> PrepareResult:
    if plan.existing is not None and not plan.sources:
        remove_leftovers(out)
        return PrepareResult(plan.existing.manifest, None)
    if not overwrite and plan.existing is None and (out / MANIFEST_FILE).exists():
        manifest = plan.matching_manifest(out)
        remove_leftovers(out)
        return PrepareResult(manifest, None)
    with work_folder(out) as work:
        publication = Publication.load(work.path, plan.key)
        if publication is None:
            with open_executor(resources, str(work.path)) as executor:
                publication = Build(plan, out, work, executor, resources.budget, report).run()
            publication.save(work.path)
        work.keep = True
        publication.publish(work.path, out)
    return publication.result


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
