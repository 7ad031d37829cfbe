"""Which row a process works on, and a bound on the CPU time that one row may take.

RDKit cannot be interrupted from inside its process. So the kernel ends the process when a row has used its time, and
its parent (`supervise`), which shares the row's number with it, does the task again without that row.
"""

import mmap
import signal
from collections.abc import Mapping

from data_pipeline.molecules.rejects import MoleculeReject

NO_ROW = -1
# Ends the process: nothing handles it. It comes by CPU time, so a busy machine rejects no other rows than an idle one.
TIME_IS_UP = signal.SIGPROF


class Watch:
    """Watches the rows of one task. Without `cell`, what a process that is not supervised uses, it does nothing.

    `cell`: memory shared with the parent, for the number of the row; `rejected`: rows that ended the process before,
    and the reasons for which they are rejected.
    """

    def __init__(self, cell: mmap.mmap | None = None, rejected: Mapping[int, str] | None = None) -> None:
        self._row = None if cell is None else memoryview(cell).cast("q")
        self._rejected = rejected or {}
        self._seconds = 0.0

    def begin(self, seconds: float) -> None:
        """From now on, a row may take `seconds` of CPU time."""
        self._seconds = seconds

    def at(self, index: int) -> None:
        """RDKit begins to work on row `index`.

        Raises:
            MoleculeReject: the row has ended the process before.
        """
        if index in self._rejected:
            raise MoleculeReject(self._rejected[index])
        if self._row is not None:
            self._row[0] = index
            signal.setitimer(signal.ITIMER_PROF, self._seconds)

    def rest(self) -> None:
        """RDKit is done with the row, and other work follows."""
        if self._row is not None:
            signal.setitimer(signal.ITIMER_PROF, 0)
            self._row[0] = NO_ROW
