"""Files that list machines and how many ranks each runs, as DeepSpeed and MPI read them: `worker-1 slots=8`."""

from __future__ import annotations

import re
from pathlib import Path

from hmoe_ds.config import ConfigError

_LINE = re.compile(r"(?P<host>[A-Za-z0-9][A-Za-z0-9._@-]*)\s+slots=(?P<slots>[1-9]\d*)(\s+max_slots=\d+)?")


def read_hostfile(file: Path) -> dict[str, int]:
    """Ranks of each host, in the order of the file: rank 0 is on the first one. Empty lines and `#` are comments.

    Raises:
        ConfigError: there is no such file, no host in it, or a line that is none.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hostfile {file} cannot be read: {error}") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ConfigError(f"--hostfile {file}, line {number}: {line!r} is not a line such as 'worker-1 slots=8'")
        if match["host"] in hosts:
            raise ConfigError(
                f"--hostfile {file}, line {number}: host {match['host']} is there twice; add its slots up"
            )
        hosts[match["host"]] = int(match["slots"])
    if not hosts:
        raise ConfigError(f"--hostfile {file} names no host; write lines such as 'worker-1 slots=8'")
    return hosts
