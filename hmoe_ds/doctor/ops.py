"""DeepSpeed's compiled operators. Training here uses none: AdamW is torch's, where it is offloaded too."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from hmoe_ds.doctor.finding import Finding, note, ok

# A build takes minutes.
_STALE_SECONDS = 1800.0


def describe_ops(accelerator: str, prebuilt: Sequence[str], which: Callable[[str], str | None]) -> Finding:
    """Which operators are built, and whether others could be, by programs that use them.

    Args:
        accelerator: that DeepSpeed has chosen.
        prebuilt: names of operators that were built when DeepSpeed was installed.
        which: path of a program, or None.
    """
    built = f"prebuilt: {', '.join(prebuilt)}" if prebuilt else "none is prebuilt"
    there = [name for name in ("g++", "ninja", "nvcc") if which(name)]
    missing = [name for name in ("g++", "ninja", "nvcc") if not which(name)]
    compilers = ", ".join([*there, *(f"no {name}" for name in missing)])
    found = f"what a rank imports works, on {accelerator}; a run uses none of its ops, so none is compiled"
    return ok("DeepSpeed", f"{found} ({built}; compilers: {compilers})")


def extensions_folder(environment: Mapping[str, str], home: Path) -> Path:
    """Where torch builds operators on their first use."""
    if "TORCH_EXTENSIONS_DIR" in environment:
        return Path(environment["TORCH_EXTENSIONS_DIR"])
    return Path(environment.get("XDG_CACHE_HOME") or home / ".cache") / "torch_extensions"


def check_build_locks(folder: Path, now: float) -> Iterator[Finding]:
    """Builds that are locked: by one that goes on, or by one that was killed.

    Args:
        folder: of builds, below which they lie by name, or by version and name.
        now: seconds since the epoch.
    """
    for lock in sorted({*folder.glob("*/lock"), *folder.glob("*/*/lock")}):
        age = now - lock.stat().st_mtime
        if age < _STALE_SECONDS:
            yield ok("DeepSpeed ops", f"{lock.parent.name} is being compiled since {age / 60:.0f} minutes")
        else:
            yield note(
                "DeepSpeed ops",
                f"the build of {lock.parent.name} was killed {age / 3600:.1f} hours ago, and its lock is left: every "
                "program that uses this operator waits for it forever",
                "",
                f"rm {shlex.quote(str(lock))}",
            )
