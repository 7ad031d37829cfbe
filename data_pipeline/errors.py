"""The two ways a run can fail. A message is one line: the thing, its value, what was expected, the mend."""


class PipelineError(Exception):
    """The work cannot be done: a truncated file, an empty result, a dead worker."""


class UsageError(PipelineError):
    """The request is wrong: no such file, an unknown column, an output folder that holds something else."""
