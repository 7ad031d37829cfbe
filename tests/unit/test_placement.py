"""Where ranks are started, and what they are started with."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from hmoe_ds.cli import main
from hmoe_ds.config import ConfigError
from hmoe_ds.training import exit_codes
from hmoe_ds.training.launching import hosts, node
from hmoe_ds.training.launching.environment import interface_towards, network_environment
from hmoe_ds.training.launching.hostfile import read_hostfile
from hmoe_ds.training.launching.hosts import Hosts, runner_environment
from hmoe_ds.training.launching.node import Node
from hmoe_ds.training.launching.placement import StartOptions, place
from hmoe_ds.training.launching.start_file import Start, as_word, from_word, read_start, shared_environment, write_start

ROOT = Path(__file__).parents[2]


def options(**changes) -> StartOptions:
    nothing = {"num_ranks": None, "hostfile": None, "launcher": None, "nodes": 1}
    return StartOptions(**nothing | {"node_rank": None, "master_addr": None, "master_port": None} | changes)


def test_a_hostfile(tmp_path):
    file = tmp_path / "hostfile"
    file.write_text("# ours\n\nworker-2 slots=8\nme@10.0.0.1   slots=4 max_slots=4  # the old one\n")
    assert list(read_hostfile(file).items()) == [("worker-2", 8), ("me@10.0.0.1", 4)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names no host; write lines such as 'worker-1 slots=8'"),
        ("a slots=1\nb\n", "line 2: 'b' is not a line such as"),
        ("a slots=0\n", "line 1: 'a slots=0' is not a line such as"),
        ("a slots=1\na slots=1\n", "line 2: host a is there twice"),
        ("-oProxyCommand=rm slots=1\n", "line 1: '-oProxyCommand=rm slots=1' is not a line"),
        (None, "cannot be read"),
    ],
)
def test_a_hostfile_that_is_none(content, message, tmp_path):
    file = tmp_path / "hostfile"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_hostfile(file)


def test_places(tmp_path, monkeypatch):
    monkeypatch.setattr("hmoe_ds.training.launching.placement.gpu_count", lambda: 0)
    assert place(options(), ep_size=2) == Node(2)
    assert place(options(num_ranks=3), ep_size=2) == Node(3)
    two = {"nodes": 2, "node_rank": 1, "master_addr": "a"}
    assert place(options(**two), ep_size=4) == Node(2, 2, 1, "a", 29500)
    assert place(options(**two, num_ranks=8, master_port=1), ep_size=4).all_ranks == 16
    assert place(options(nodes=1, node_rank=0, master_addr="a", master_port=1), ep_size=4) == Node(4)
    (tmp_path / "hosts").write_text("a slots=8\nb slots=4\n")
    assert place(options(hostfile=tmp_path / "hosts"), ep_size=4).all_ranks == 12
    monkeypatch.setattr("hmoe_ds.training.launching.placement.gpu_count", lambda: 8)
    assert place(options(**two), ep_size=4).all_ranks == 16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"launcher": "openmpi"}, "--launcher openmpi is for --hostfile"),
        ({"node_rank": 1}, "--node_rank is 1, but --nodes is 1"),
        ({"nodes": 2, "node_rank": 2, "master_addr": "a"}, "--node_rank 2: machines have the numbers 0 to 1"),
        ({"nodes": 2, "master_addr": "a"}, "--node_rank None: machines have the numbers"),
        ({"nodes": 2, "node_rank": 0}, "--master_addr is not given: name machine 0"),
        ({"hostfile": Path("h"), "num_ranks": 2}, "--num_ranks does not go with --hostfile"),
        ({"hostfile": Path("h"), "nodes": 2}, "--nodes does not go with --hostfile"),
    ],
)
def test_options_that_do_not_go_together(given, message):
    with pytest.raises(ConfigError, match=message):
        place(options(**given), ep_size=1)


@pytest.mark.parametrize("name", ["plain", "with space, 'quote', \"quotes\" $HOME `ls` %h é", "line\nbreak"])
def test_what_ranks_elsewhere_get(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    start = Start(["--run.out", name], {"MLFLOW_TRACKING_TOKEN": "secret"}, str(folder), "pdsh", "host", 29500)
    write_start(folder / "start.json", start)
    word = as_word(folder / "start.json")
    assert re.fullmatch(r"[A-Za-z0-9_-]+", word)
    through_a_shell = subprocess.run(["bash", "-c", f"echo {word}"], capture_output=True, text=True).stdout.strip()
    assert read_start(from_word(through_a_shell)) == start
    assert (folder / "start.json").stat().st_mode & 0o077 == 0


def test_what_goes_to_other_machines_and_what_is_shown_on_command_lines():
    given = {
        "MLFLOW_TRACKING_TOKEN": "t",
        "NCCL_DEBUG": "INFO",
        "AWS_SECRET_ACCESS_KEY": "s",
        "OMP_NUM_THREADS": "3",
        "PATH": "/bin",
        "HOME": "/root",
        "CUDA_VISIBLE_DEVICES": "1",
        "PYTHONPATH": "/mine",
    }
    shared = shared_environment(given)
    assert shared.keys() == {"MLFLOW_TRACKING_TOKEN", "NCCL_DEBUG", "AWS_SECRET_ACCESS_KEY", "OMP_NUM_THREADS"}
    runner = runner_environment(given)
    assert "MLFLOW_TRACKING_TOKEN" not in runner
    assert "NCCL_DEBUG" not in runner
    assert runner["PYTHONPATH"].split(os.pathsep)[-1] == "/mine"
    assert "ServerAliveInterval" in runner["PDSH_SSH_ARGS_APPEND"]


def test_all_that_deepspeed_would_export_is_kept_back():
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
    from deepspeed.launcher.runner import EXPORT_ENVS

    exported = [*EXPORT_ENVS, *CUDA_Accelerator.export_envs(None)]
    runner = runner_environment({f"{name}_X": "secret" for name in exported})
    assert not [name for name in runner if "secret" in runner[name]]


def test_the_interface_to_other_machines():
    addresses = {
        entry.address: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and name != "lo" and psutil.net_if_stats()[name].isup
    }
    for address, name in addresses.items():
        assert interface_towards(address) == name
    found = network_environment("127.0.0.1", {})  # never the loopback interface
    assert {name.lstrip("=") for name in found.values()} <= set(addresses.values())
    assert "NCCL_SOCKET_IFNAME" not in network_environment("127.0.0.1", {"NCCL_SOCKET_IFNAME": "ib0"})


def test_gpus_that_the_user_has_chosen(monkeypatch):
    monkeypatch.setattr(node, "gpu_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6")
    assert node._devices(2, 2) == ["4", "6"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert node._devices(2, 2) == [0, 1]


def test_a_launcher_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="--launcher openmpi needs mpirun, which is not installed here"):
        hosts.launch_on_hosts([], Hosts(tmp_path, {"a": 1}, "openmpi"), tmp_path, 0)


@pytest.fixture
def mute_host(tmp_path, monkeypatch):
    """A host that ssh does not reach at first, and that then has no such Python."""
    programs = tmp_path / "programs"
    programs.mkdir()
    asked = tmp_path / "asked"
    script = f"#!/bin/sh\n[ -e {asked} ] && exit 4\ntouch {asked}; echo 'Could not resolve hostname' >&2; exit 255\n"
    for name in ("ssh", "pdsh"):
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr(hosts, "_PAUSE_SECONDS", 0.0)
    return Hosts(tmp_path / "hostfile", {"mute": 1})


def test_a_host_that_does_not_answer_ends_a_run_that_has_not_begun(mute_host, tmp_path, capfd):
    assert hosts.launch_on_hosts([], mute_host, tmp_path / "run", restarts=3) == exit_codes.USAGE
    said = capfd.readouterr().err
    assert "host mute does not answer over ssh: Could not resolve hostname" in said
    assert "waiting for it" not in said
    assert "started again" not in said


def test_a_run_that_has_begun_waits_for_a_host_that_does_not_answer(mute_host, tmp_path, capfd):
    (tmp_path / "run" / "checkpoints" / "step00000010").mkdir(parents=True)
    assert hosts.launch_on_hosts([], mute_host, tmp_path / "run", restarts=3) == exit_codes.USAGE
    said = capfd.readouterr().err
    assert "Could not resolve hostname (try `ssh -o BatchMode=yes mute true`); waiting for it" in said
    assert f"host mute has no {sys.executable}" in said


@pytest.mark.parametrize("script", ["pretrain_local.sh", "pretrain_hostfile.sh", "pretrain.sbatch"])
def test_a_launch_script_says_what_it_would_start(script, tmp_path):
    (tmp_path / "hostfile").write_text("a slots=2\nb slots=2\n")
    words = ["tiny_cpu", "", str(tmp_path / "it's a run"), "--run.steps", "7", "--dry-run"]
    words += ["--hostfile", str(tmp_path / "hostfile")] if script == "pretrain_hostfile.sh" else []
    command = ["bash", str(ROOT / "launchers" / script)]
    found = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    said = subprocess.run([*command, *words], capture_output=True, text=True, env=found)
    assert said.returncode == 0, said.stderr
    assert "command     " in said.stdout
    launcher = (
        "deepspeed.launcher" if script == "pretrain_hostfile.sh" else "hmoe_ds.training.launching.deepspeed_launcher"
    )
    assert launcher in said.stdout
    assert "memory" in said.stdout
    if script != "pretrain_hostfile.sh":  # there they go by a file
        assert "--run.steps 7" in said.stdout
        assert "it'\"'\"'s a run" in said.stdout
    assert subprocess.run(command, capture_output=True).returncode == 2


def test_a_run_is_checked_and_not_started(dataset, tmp_path, capsys):
    words = ["pretrain", "--check", "--config=tiny_cpu", "--num_ranks=1", "--parallel.ep_size=1"]
    assert main([*words, f"--run.out={tmp_path / 'run'}", f"--data.path={dataset}"]) == 0
    assert "nothing is wrong with it" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert main([*words, f"--run.out={tmp_path / 'run'}", "--data.path=nowhere"]) == 2
