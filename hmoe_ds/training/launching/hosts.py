"""Starts ranks on several machines over ssh, through DeepSpeed's runner: with pdsh, or with Open MPI."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import hmoe_ds
from data_pipeline.durable import make_folder
from data_pipeline.errors import PipelineError
from hmoe_ds.config import ConfigError
from hmoe_ds.training.launch import Command, Launcher
from hmoe_ds.training.launching.node import MASTER_PORT, free_port
from hmoe_ds.training.launching.start_file import Start, as_word, shared_environment, write_start
from hmoe_ds.training.launching.supervisor import supervisor_environment
from hmoe_ds.training.run_folder import newest_step

# Of each launcher, the programs that it needs here.
LAUNCHERS = {"pdsh": ("pdsh",), "openmpi": ("mpirun", "ompi_info")}
# A machine that is gone is noticed within a minute, and nothing waits for a password.
SSH_OPTIONS = "-o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
START_FILE = "start.json"
# DeepSpeed's runner writes variables with these names on the command lines of other machines. They go by file.
_EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
_CHECKS = 64
_CHECK_SECONDS = 60.0
# How long a run that has begun waits for a host that does not answer.
_PATIENCE_SECONDS = 12 * 3600.0
_PAUSE_SECONDS = 30.0
_MARK = "hmoe-addresses"
_UNQUOTED = re.compile(r"[\w@%+=:,./-]+")


class HostAwayError(PipelineError):
    """A host does not answer."""


class Hosts(NamedTuple):
    """The machines of a run.

    Attributes:
        file: hostfile.
        ranks: of each host, rank 0 on the first one.
        launcher: one of LAUNCHERS.
        master: address of the first host for the others; None: the one that it says first.
    """

    file: Path
    ranks: dict[str, int]
    launcher: str = "pdsh"
    master: str | None = None

    @property
    def all_ranks(self) -> int:
        """Of the run."""
        return sum(self.ranks.values())


def launch_on_hosts(argv: Sequence[str], hosts: Hosts, out: Path, restarts: int) -> int:
    """Run the training loop with arguments `argv` on all hosts; -> its exit code, 128 + n after SIGINT.

    Args:
        argv: of the loop.
        hosts: machines that share this one's file system and Python.
        out: the run's folder.
        restarts: restarts in a row without a new checkpoint after which it gives up.

    Raises:
        ConfigError: the launcher's program is not installed.
    """
    for name in (*LAUNCHERS[hosts.launcher], "ssh"):
        if shutil.which(name) is None:
            raise ConfigError(f"--launcher {hosts.launcher} needs {name}, which is not installed here: install it")
    if _UNQUOTED.fullmatch(sys.executable) is None:
        raise ConfigError(f"{sys.executable} does not pass through a shell as it is: use a Python under another path")
    make_folder(out)
    has_begun = itertools.chain([newest_step(out) > 0], itertools.repeat(True))
    with Launcher(out, elsewhere=True) as launcher:
        try:
            return launcher.run(lambda: _next_command(argv, hosts, out, launcher, next(has_begun)), restarts)
        finally:
            _start_file(out).unlink(missing_ok=True)


def _next_command(argv: Sequence[str], hosts: Hosts, out: Path, launcher: Launcher, has_begun: bool) -> Command:
    """The command of an attempt, once all hosts have answered.

    Raises:
        ConfigError: one does not see the file, or has no such Python; or it does not answer, and the run has not begun:
            its name may be wrong.
        HostAwayError: it did not answer until the patience, or the run, was ended.
    """
    # Another port for each attempt, as that of the one before may still be in use.
    file, port, deadline = _start_file(out), free_port(), time.monotonic() + _PATIENCE_SECONDS
    while True:
        write_start(file, _start(argv, hosts, "", port))
        try:
            addresses = check_hosts(list(hosts.ranks), file)
            break
        except HostAwayError as error:
            if not has_begun:
                raise ConfigError(str(error)) from error
            if time.monotonic() > deadline:
                raise
            print(f"hmoe pretrain: {error}; waiting for it", file=sys.stderr, flush=True)
            if not launcher.pause(_PAUSE_SECONDS):
                raise
    master = hosts.master or addresses[0]
    write_start(file, _start(argv, hosts, master, port))
    return hosts_command(hosts._replace(master=master), out, port)


def _start(argv: Sequence[str], hosts: Hosts, master: str, port: int) -> Start:
    environment = shared_environment(os.environ) | supervisor_environment()
    return Start(list(argv), environment, str(Path.cwd()), hosts.launcher, master, port)


def hosts_command(hosts: Hosts, out: Path, port: int = MASTER_PORT) -> Command:
    """The command that starts the ranks, by a file in the run's folder."""
    words = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hosts.file.absolute())),
        *("--launcher", hosts.launcher, "--force_multi", "--no_ssh_check", "--log_level", "error"),
        *("--master_port", str(port), "--no_local_rank"),
        *(["--master_addr", hosts.master] if hosts.master else []),
        # Ranks are no MPI programs: nothing is to be bound to one core.
        *(["--launcher_args", "--bind-to none"] if hosts.launcher == "openmpi" else []),
        *("--module", "hmoe_ds.training.launching.start_rank", as_word(_start_file(out))),
    ]
    # The runner has the other machines change into this one's folder, whose name a shell could take apart.
    return Command(words, runner_environment(os.environ), folder="/")


def _start_file(out: Path) -> Path:
    return (out / START_FILE).absolute()


def runner_environment(given: Mapping[str, str]) -> dict[str, str]:
    """The environment of DeepSpeed's runner: without what it would show to all users of the other machines."""
    kept = {name: value for name, value in given.items() if not name.startswith(_EXPORTED)}
    options = f"{SSH_OPTIONS} {given.get('PDSH_SSH_ARGS_APPEND', '')}".strip()
    packages = [str(Path(hmoe_ds.__file__).parent.parent), *filter(None, [given.get("PYTHONPATH")])]
    return {
        **kept,
        "PDSH_SSH_ARGS_APPEND": options,
        "PYTHONPATH": os.pathsep.join(packages),
    }


def check_hosts(hosts: Sequence[str], file: Path) -> list[str]:
    """Look at all hosts at once; -> the address of each that it says first.

    Args:
        hosts: their names.
        file: that this machine has just written.

    Raises:
        HostAwayError: one does not answer.
        ConfigError: one does not see the file, or has no such Python.
    """
    with ThreadPoolExecutor(_CHECKS) as pool:
        return list(pool.map(lambda host: _check_host(host, file), hosts))


def _check_host(host: str, file: Path) -> str:
    remote = (
        f"test -r {shlex.quote(str(file))} || exit 3; test -x {sys.executable} || exit 4; "
        f"echo; echo {_MARK} $(hostname -I)"  # whatever the shell there says when it starts
    )
    command = ["ssh", "-n", *shlex.split(SSH_OPTIONS), host, remote]
    try:
        answer = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_CHECK_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise HostAwayError(f"host {host} takes longer than {_CHECK_SECONDS:g} s to look at {file}") from None
    if answer.returncode == 3:
        raise ConfigError(
            f"host {host} does not see {file}: put run.out on a file system that all hosts share, under the same path"
        )
    if answer.returncode == 4:
        raise ConfigError(f"host {host} has no {sys.executable}: install the same environment there, or share it")
    if answer.returncode:
        said = (answer.stderr.strip().splitlines() or [f"ssh ended with {answer.returncode}"])[-1]
        raise HostAwayError(f"host {host} does not answer over ssh: {said} (try `ssh -o BatchMode=yes {host} true`)")
    words = answer.stdout.partition(_MARK)[2].split()
    return words[0] if words else host.rpartition("@")[2]
