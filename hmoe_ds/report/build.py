"""`hmoe report`: one self-contained page on a run, from its folder and its dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.durable import replace_text
from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.redact import redacted
from hmoe_ds.report import expert_chapters, html, run_chapters, scaffold_chapters
from hmoe_ds.report.run_story import RunStory, read_run
from hmoe_ds.report.sample import RoutedMolecules, route_molecules


def write_report(run: str | Path, out: str | Path, dataset: str | None = None, molecules: int = 2048) -> dict[str, Any]:
    """Write the report of a run as one HTML file.

    Args:
        run: its folder; it may still go on.
        out: file to write.
        dataset: whose molecules are routed by the last checkpoint; the first one of the run if it is None.
        molecules: of each split, at most.

    Returns:
        What is in it: the last step, the step whose checkpoint routed molecules (None if none did), and why none did.

    Raises:
        UsageError: no run there, `out` is no HTML file; with `dataset`, also when molecules cannot be routed.
    """
    out = Path(out)
    if out.suffix not in (".html", ".htm"):
        raise UsageError(f"--out {out}: expected a file whose name ends with .html")
    story = read_run(run)
    routed, reason = _routed(story, dataset, molecules)
    parts = [*run_chapters.head(story, routed), run_chapters.training(story)]
    if routed is None:
        parts.append(run_chapters.unrouted(reason))
    else:
        parts += [scaffold_chapters.groups(story, routed), expert_chapters.atoms(story, routed)]
        parts += [scaffold_chapters.embedding_map(routed), expert_chapters.traffic(story, routed)]
    parts += [expert_chapters.allocation(story), run_chapters.settings(story)]
    replace_text(out, html.page(f"Routing report: {story.folder.name}", parts))
    routed_step = None if routed is None else routed.step
    return {"out": str(out), "step": story.lines[-1]["step"], "routed_step": routed_step, "missing": reason or None}


def _routed(story: RunStory, dataset: str | None, molecules: int) -> tuple[RoutedMolecules | None, str]:
    """Molecules and how they were routed, or why they could not be.

    A dataset that was asked for must be there; that of the run may be on another machine.
    """
    path = dataset or story.config.data.paths[0]
    try:
        return route_molecules(story.folder, path, molecules), ""
    except (PipelineError, OSError) as error:
        if dataset is not None:
            raise
        return (
            None,
            f"Molecules of the run's dataset could not be routed: {redacted(str(error))}. Give a dataset with --data.",
        )
