"""What a process writes to its standard error, kept, and passed on to that of this one."""

import os
import sys
import tempfile


class Said:
    """Give `file` to the process as its standard error."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
        self._passed_on = 0

    def pass_on(self) -> str:
        """Write what has come since the last time to this process's standard error; -> its last line that is not empty.

        The position in the file is the writer's, so it is left where it is. Nothing may be written meanwhile.
        """
        descriptor = self.file.fileno()
        size = os.fstat(descriptor).st_size
        if size <= self._passed_on:
            return ""
        text = os.pread(descriptor, size - self._passed_on, self._passed_on).decode(errors="replace")
        self._passed_on = size
        os.ftruncate(descriptor, 0)  # of days of warnings nothing is kept; the writer goes on where it was
        sys.stderr.write(text)
        return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
