"""A dataset directory, here or behind a URL."""

from __future__ import annotations

import dataclasses
import shlex

from data_pipeline.describe import describe
from data_pipeline.manifest import Manifest, verify
from data_pipeline.redact import redacted
from hmoe_ds.inspect.report import Report, fact, files_fact


def inspect_dataset(path: str, read: bool) -> Report:
    """What there is to know of a dataset.

    Args:
        path: its folder or URL.
        read: compare the files with their checksums, not with their sizes alone.

    Raises:
        As `Manifest.load`.
    """
    manifest = Manifest.load(path)
    problems, shown = verify(path, read), redacted(path)
    command = f"hmoe pretrain --config tiny_cpu --data.path {shlex.quote(shown)} --run.out RUN"
    lines = [
        fact("dataset", f"{shown}: {sum(split.rows for split in manifest.splits.values()):,} molecules"),
        describe(manifest),
        files_fact(len(manifest.all_files), problems, read),
        fact("to pretrain", command),
    ]
    figures = {**dataclasses.asdict(manifest), "path": shown, "problems": problems, "pretrain": command}
    return Report("dataset", "\n".join(lines), figures, problems)
