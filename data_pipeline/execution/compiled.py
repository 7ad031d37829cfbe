"""Where numba keeps what it compiles."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import data_pipeline

_VARIABLE = "NUMBA_CACHE_DIR"


def cache_environment() -> dict[str, str]:
    """What this process and its children need in their environment so that numba finds a place, which it wants.

    Mostly nothing: it takes the folder of the code, or one in the user's cache. Where neither can be written, as for a
    user without a home in a container, it is a folder that goes with this process. It must be set before numba is
    loaded.
    """
    if _VARIABLE in os.environ or os.access(Path(data_pipeline.__file__).parent, os.W_OK) or _has_user_cache():
        return {}
    folder = tempfile.mkdtemp(prefix="hmoe_ds-numba-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {_VARIABLE: folder}


def cache_of_version(version: str) -> dict[str, str]:
    """The same for processes whose cache is of one version of the code alone: numba sees no change in another file."""
    given = os.environ.get(_VARIABLE)
    base = Path.home() / ".cache" / "hmoe_ds" / "numba" if given is None else Path(given)
    return {_VARIABLE: str(base / version)}


def _has_user_cache() -> bool:
    try:
        (Path.home() / ".cache" / "numba").mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter where the user has no home at all
        return False
    return os.access(Path.home() / ".cache" / "numba", os.W_OK)
