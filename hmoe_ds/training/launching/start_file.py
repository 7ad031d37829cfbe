"""What ranks on other machines are started with: arguments and environment, in a file of the run's folder.

Not on a command line, which every user of a machine can read, and which a shell on the way takes apart.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

# Of the environment, what goes to other machines; the rest belongs to each of them.
PREFIXES = (
    *("AWS_", "AZURE_", "CUBLAS_", "DS_", "FI_", "FSSPEC_", "GLOO_", "GOOGLE_", "HF_", "HMOE_", "MLFLOW_", "NCCL_"),
    *("COMET_", "OMP_", "PYTHONWARNINGS", "PYTORCH_", "THP_", "TORCH_", "UCX_", "WANDB_"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE"),
    *("REQUESTS_CA_BUNDLE",),
)


class Start(NamedTuple):
    """A start of ranks.

    Attributes:
        arguments: of the training loop.
        environment: what this machine's environment has beyond that of the others.
        folder: that relative paths start from.
        launcher: that starts them.
        master: address of rank 0's host; empty: not known yet.
        port: where ranks find each other there.
    """

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    launcher: str
    master: str
    port: int


def write_start(file: Path, start: Start) -> None:
    """Write it for the eyes of the owner only."""
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        json.dump(start._asdict(), stream)


def read_start(file: Path) -> Start:
    """What `write_start` wrote."""
    return Start(**json.loads(file.read_text(encoding="utf-8")))


def shared_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that ranks on other machines get, too."""
    return {name: value for name, value in environment.items() if name.startswith(PREFIXES)}


def as_word(file: Path) -> str:
    """A path as a word that no shell takes apart."""
    return base64.urlsafe_b64encode(os.fsencode(file)).decode("ascii").rstrip("=")


def from_word(word: str) -> Path:
    """The path in a word of `as_word`."""
    return Path(os.fsdecode(base64.urlsafe_b64decode(word + "=" * (-len(word) % 4))))
