"""Sources -> a dataset folder: checks, the build, and the move into place."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.executor import Resources, open_executor
from data_pipeline.manifest import MANIFEST_FILE
from data_pipeline.options import PrepareOptions
from data_pipeline.output import WORK_FOLDER, Publication, check_writable, remove_leftovers, work_folder
from data_pipeline.plan import Plan
from data_pipeline.remote import is_url, one_line
from data_pipeline.stages import Build, PrepareResult, Report


def prepare(
    sources: Sequence[str],
    out: str | Path,
    options: PrepareOptions | None = None,
    resources: Resources | None = None,
    report: Report | None = None,
    overwrite: bool = False,
    append: bool = False,
    exclude: Sequence[str] = (),
) -> PrepareResult:
    """Prepare a dataset folder `out` from `sources`: what `sources.resolve_sources` understands.

    `overwrite`: in place of a dataset in `out`. `append`: add to the dataset in `out` what it does not hold; sources
    that were read into it before are left out. `exclude`: sources whose molecules are left out. What an interrupted run
    has left done in `out` is taken over.

    Raises:
        UsageError: a source or a column that is not there; `out` holds something else, or a dataset of other
            sources or options and neither `overwrite` nor `append` is True; an append to no dataset, or to one of
            other options or another RDKit.
        PipelineError: an unreadable source, no molecules at all, dead workers, no space.
    """
    options, resources = options or PrepareOptions(), resources or Resources()
    if overwrite and append:
        raise UsageError("overwrite and append are both True; expected one of them at most")
    if is_url(out):
        raise UsageError(f"--out {out} is a URL: prepare into a folder, then upload it (docs/object_storage.md)")
    out = Path(out)
    try:
        check_writable(out)
        plan = Plan.make(sources, exclude, out, options, append)
        if plan.existing is not None and not plan.sources:
            remove_leftovers(out)
            return PrepareResult(plan.existing.manifest, None)
        if not overwrite and not append and (out / MANIFEST_FILE).exists():
            manifest = plan.matching_manifest(out)
            remove_leftovers(out)
            return PrepareResult(manifest, None)
        with work_folder(out) as work:
            publication = Publication.load(work.path, plan.key)
            if publication is None:
                with open_executor(resources, str(work.path)) as executor:
                    publication = Build(plan, out, work, executor, resources.budget, report or _no_report).run()
                publication.save(work.path)
            work.keep = True
            publication.publish(work.path, out)
        return publication.result
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
