"""`hmoe inspect`: tell what a path is, and look at it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data_pipeline.remote import is_url
from hmoe_ds.inspect.checkpoint import inspect_checkpoint
from hmoe_ds.inspect.dataset import inspect_dataset
from hmoe_ds.inspect.kind import kind_of
from hmoe_ds.inspect.model import inspect_model
from hmoe_ds.inspect.predictor import inspect_predictor
from hmoe_ds.inspect.report import Report
from hmoe_ds.inspect.run import inspect_run

_INSPECT: dict[str, Callable[[Path, bool], Report]] = {
    "checkpoint": inspect_checkpoint,
    "dataset": lambda path, verify: inspect_dataset(str(path), verify),
    "model": inspect_model,
    "predictor": inspect_predictor,
    "run": inspect_run,
}


def examine(path: str, verify: bool) -> Report:
    """What there is to know of a dataset, a run, a checkpoint, an exported model or a predictor.

    Args:
        path: of its folder; of a dataset also a URL.
        verify: read all files that have a checksum and compare them.

    Raises:
        UsageError: it is none of these, or one of another version.
        PipelineError: a record of it is damaged.
    """
    if is_url(path):
        return inspect_dataset(path, verify)
    return _INSPECT[kind_of(Path(path))](Path(path), verify)
