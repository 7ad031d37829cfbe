"""Machines in namespaces of this one: each has a network, processes, mounts and a name of its own, and an ssh server.

They share the files of this machine. Nothing of them is seen outside, and they end with the process that made them.
"""

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.faults.processes import wait_until

_UNSHARE = [
    *("setpriv", "--pdeathsig", "KILL"),  # when the tests are gone
    *("unshare", "--mount", "--pid", "--uts", "--ipc", "--net", "--fork", "--kill-child", "--mount-proc"),
]
_NODES = ("node0", "node1", "node2")
_SSHD_CONFIG = """
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
MaxStartups 100
"""
_SSH_CONFIG = """
Host *
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
_START = """
set -e
hostname {name}
mount -t tmpfs tmpfs /run && mkdir /run/sshd
mount -t tmpfs tmpfs /dev/shm
mount --bind {folder}/hosts.{name} /etc/hosts
[ ! -e {folder}/ssh_config ] || mount --bind {folder}/ssh_config /etc/ssh/ssh_config
ip link set lo up
exec sleep infinity
"""


def require(*programs: str) -> None:
    """Skip unless this is root and the programs are here."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to make namespaces")
    missing = [name for name in programs if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (apt-get install pdsh openssh-server openmpi-bin slurm-wlm munge)")
    if subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no namespaces")


class Machine:
    """One of them, until `kill`.

    Args:
        name: of it.
        folder: with what all of them read.
        hosts: other names that it knows, with their addresses.
    """

    def __init__(self, name: str, folder: Path, hosts: dict[str, str] | None = None) -> None:
        self.name = name
        # As Debian writes it: a machine's own name leads to itself only.
        lines = ["127.0.0.1 localhost", f"127.0.1.1 {name}"]
        lines += [f"{address} {other}" for other, address in (hosts or {}).items() if other != name]
        (folder / f"hosts.{name}").write_text("\n".join(lines) + "\n")
        script = _START.format(name=name, folder=folder)
        command = [*_UNSHARE, "bash", "-c", script]
        with (folder / f"{name}.log").open("a") as log:
            self._holder = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        wait_until(lambda: bool(children.read_text().strip()), "the namespaces are there", 20)
        self.init = int(children.read_text())
        wait_until(lambda: b"sleep" in Path(f"/proc/{self.init}/cmdline").read_bytes(), f"{name} is set up", 20)

    def start(self, command: list[str], **options) -> subprocess.Popen:
        """Start a process there."""
        return subprocess.Popen(["nsenter", "--target", str(self.init), "--all", "--wd=.", *command], **options)

    def run(self, command: list[str], **options) -> str:
        """Run it there; -> what it said. Its failure is an error."""
        process = self.start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, f"{command}: {said}"
        return said

    def command_lines(self) -> list[str]:
        """Of all processes there, but for those that this module started."""
        said = self.run(["ps", "-ww", "-eo", "pid=,args="])
        return [line for line in said.splitlines() if " ps -ww" not in line and "sleep infinity" not in line]

    def kill(self) -> None:
        """Without a farewell."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)
        self._holder.wait()


class Cluster:
    """`node0`, from which runs are started, and `node1` and `node2`, which it reaches over ssh; in a context."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machines: dict[str, Machine] = {}
        for name in ("key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        (folder / "sshd_config").write_text(_SSHD_CONFIG.format(folder=folder))
        (folder / "ssh_config").write_text(_SSH_CONFIG.format(folder=folder))
        self.hostfile = folder / "hostfile"
        self.hostfile.write_text("node1 slots=1\nnode2 slots=1\n")

    def __enter__(self) -> "Cluster":
        self._switch = Machine("switch", self.folder)
        self._switch.run(["ip", "link", "add", "bridge", "type", "bridge"])
        self._switch.run(["ip", "link", "set", "bridge", "up"])
        for number in range(len(_NODES)):
            self.boot(number)
        return self

    def __exit__(self, *error: object) -> None:
        for machine in [*self.machines.values(), self._switch]:
            machine.kill()

    def boot(self, number: int) -> Machine:
        """Start a machine, or one that was killed."""
        machine = Machine(f"node{number}", self.folder, {name: f"10.77.0.1{n}" for n, name in enumerate(_NODES)})
        port = ["ip", "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns"]
        subprocess.run(["nsenter", "--target", str(self._switch.init), "--net", *port, str(machine.init)], check=True)
        self._switch.run(["ip", "link", "set", f"port{number}", "master", "bridge", "up"])
        machine.run(["ip", "address", "add", f"10.77.0.1{number}/24", "dev", "eth0"])
        machine.run(["ip", "link", "set", "eth0", "up"])
        if number > 0:
            sshd = shutil.which("sshd", path="/usr/sbin:/usr/bin:/sbin")
            machine.start([sshd, "-D", "-e", "-f", str(self.folder / "sshd_config")], stderr=subprocess.DEVNULL)
        self.machines[machine.name] = machine
        return machine

    def cut(self, number: int, up: bool = False) -> None:
        """Cut the cable of a machine, or mend it."""
        self._switch.run(["ip", "link", "set", f"port{number}", "up" if up else "down"])
