"""Where numba keeps what it compiles."""

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

import data_pipeline

_VARIABLE = "NUMBA_CACHE_DIR"


def cache_environment() -> dict[str, str]:
    """What this process and its children need in their environment so that numba finds a place, which it wants.

    Mostly nothing: it takes the folder of the code, or one in the user's cache. Where neither can be written, as for a
    user without a home in a container, it is a folder that goes with this process. It must be set before numba is
    loaded.
    """
    if _VARIABLE in os.environ or os.access(Path(data_pipeline.__file__).parent, os.W_OK) or _users_cache("numba"):
        return {}
    return {_VARIABLE: str(_passing_folder())}


def cache_of_version(version: str) -> dict[str, str]:
    """The same for processes whose cache is of one version of the code alone: numba sees no change in another file."""
    given = os.environ.get(_VARIABLE)
    base = Path(given) if given else _users_cache("hmoe_ds/numba") or _passing_folder()
    return {_VARIABLE: str(base / version)}


def _users_cache(name: str) -> Path | None:
    """A folder in the user's cache, where numba looks for it, too; None where it cannot be written."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / name
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter where the user has no home at all
        return None
    return folder if os.access(folder, os.W_OK) else None


@cache
def _passing_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="hmoe_ds-numba-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
