"""What `ranks` is asked to run."""

from typing import NamedTuple


class Job(NamedTuple):
    """`python -m module arguments` on several ranks, with a log of each in a folder."""

    module: str
    arguments: list[str]
    ranks: int
    environment: dict[str, str]
    folder: str
