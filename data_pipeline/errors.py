"""The two ways a run can fail. A message is one line: the thing, its value, what was expected, the mend."""

from data_pipeline.redact import redacted


class PipelineError(Exception):
    """The work cannot be done: a truncated file, an empty result, a dead worker.

    Wherever it is printed or logged, its message holds no credentials of the URLs that it names.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(redacted(message))


class UsageError(PipelineError):
    """The request is wrong: no such file, an unknown column, an output folder that holds something else."""
