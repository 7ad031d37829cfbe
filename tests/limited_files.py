"""A full disk, for the files of this process."""

import contextlib
import resource
import signal


@contextlib.contextmanager
def limited_files(size: int):
    """No file can be written beyond so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
