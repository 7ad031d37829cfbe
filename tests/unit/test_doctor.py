"""The checks of `hmoe doctor` on machines that are made up."""

import errno
import json
import os
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hmoe_ds.doctor import folder as folder_checks
from hmoe_ds.doctor.accelerator import Driver, Gpu, TorchView, check_accelerator, parse_view, read_driver
from hmoe_ds.doctor.finding import note
from hmoe_ds.doctor.folder import check_file_system, check_folder, check_locks, check_speed
from hmoe_ds.doctor.host import check_cores, check_memory, check_open_files, check_shared_memory
from hmoe_ds.doctor.network import (
    Interface,
    check_host_name,
    check_infiniband,
    check_interfaces,
    check_launchers,
    check_variables,
    find_way,
)
from hmoe_ds.doctor.ops import check_build_locks, describe_ops, extensions_folder
from hmoe_ds.doctor.packages import check_declared, check_packages, check_python
from hmoe_ds.doctor.probe import Probe, ProbeError
from hmoe_ds.doctor.torch_probe import torch_view

GIB = 2**30
H100 = Gpu("NVIDIA H100", 80 * GIB, 79 * GIB, (9, 0))
CUDA = TorchView("12.6", "2.21.5", ["sm_80", "sm_90"], [H100, H100])
TWO_GPUS = Driver("550.54.14", on_bus=2, devices=2)
REQUIREMENTS = [
    "torch>=2.6",
    "torch-geometric>=2.6",
    "tqdm",
    'deepspeed==0.19.8; extra == "train"',
    'mlflow>=3; extra == "train"',
    'pytest>=8; extra == "dev"',
]
VERSIONS = {"torch": "2.13.0+cpu", "torch-geometric": "2.8.1", "tqdm": "4", "deepspeed": "0.19.8", "mlflow": "3.17"}
LOOPBACK, ETHERNET = Interface("lo", ("127.0.0.1", "::1")), Interface("eth0", ("10.0.0.5", "fe80::1%eth0"))


def found(findings) -> list[tuple[str, str]]:
    """Level and subject of each."""
    return [(finding.level, finding.subject) for finding in findings]


# packages


def test_all_packages_fit():
    [finding] = check_packages(REQUIREMENTS, VERSIONS)
    assert finding.level == "ok"
    assert finding.found == "torch 2.13.0+cpu, torch-geometric 2.8.1, deepspeed 0.19.8, mlflow 3.17"


@pytest.mark.parametrize(
    ("name", "version", "level", "text", "mend"),
    [
        ("torch", "2.5.1", "problem", "2.5.1", 'pip install "torch>=2.6"'),
        ("torch-geometric", None, "problem", "not installed", 'pip install "torch-geometric>=2.6"'),
        ("tqdm", None, "problem", "not installed", 'pip install "tqdm"'),
        ("deepspeed", "0.18.0", "problem", "0.18.0", 'pip install --no-build-isolation "deepspeed==0.19.8"'),
        ("deepspeed", None, "problem", "pretraining does not", 'pip install --no-build-isolation "deepspeed==0.19.8"'),
        ("mlflow", None, "note", "not installed", 'pip install "mlflow>=3", or --run.mlflow false'),
        ("mlflow", "2.9", "problem", "2.9", 'pip install "mlflow>=3"'),
    ],
)
def test_a_package_that_is_missing_or_of_another_version_is_named(name, version, level, text, mend):
    versions = {key: value for key, value in VERSIONS.items() if key != name} | ({name: version} if version else {})
    listing, finding = check_packages(REQUIREMENTS, versions)
    assert name + " " not in listing.found
    assert (finding.subject, finding.level, finding.mend) == (name, level, mend)
    assert text in finding.found


def test_names_of_packages_are_compared_in_their_canonical_form():
    assert found(check_packages(["Torch_Geometric>=2.6"], VERSIONS)) == [("ok", "packages")]


def test_python_is_compared_with_what_is_declared():
    assert check_python("3.12.1", ">=3.10").level == "ok"
    assert check_python("3.9.18", ">=3.10").level == "problem"


def test_without_metadata_nothing_is_compared():
    assert found(check_declared(None, VERSIONS)) == [("note", "hmoe-ds")]


# accelerators


def test_gpus_that_fit_are_described_once():
    [finding] = check_accelerator(CUDA, TWO_GPUS, {})
    assert finding.level == "ok"
    assert "2 x NVIDIA H100, 80.0 GiB, compute capability 9.0" in finding.found
    assert "driver 550.54.14, torch built for CUDA 12.6, NCCL 2.21.5" in finding.found


@pytest.mark.parametrize(
    ("view", "driver", "environment", "level", "text"),
    [
        (TorchView(), TWO_GPUS, {}, "problem", "torch is built for the CPU only"),
        (TorchView(), TWO_GPUS, {"CUDA_VISIBLE_DEVICES": "0,1"}, "problem", "torch is built for the CPU only"),
        (TorchView(), TWO_GPUS, {"DS_ACCELERATOR": "cpu"}, "ok", "DS_ACCELERATOR"),
        (TorchView("12.6", error="too old"), TWO_GPUS, {}, "problem", "too old"),
        (TorchView("12.6"), TWO_GPUS, {"CUDA_VISIBLE_DEVICES": "7"}, "problem", "CUDA_VISIBLE_DEVICES=7"),
        (TorchView("12.6"), TWO_GPUS, {"CUDA_VISIBLE_DEVICES": ""}, "note", "hides 2 GPUs"),
        (TorchView(), Driver("550.54", on_bus=8), {}, "note", "no GPU can be opened"),
        (TorchView(), Driver(on_bus=8), {}, "note", "no driver is loaded"),
        (TorchView(), Driver(), {}, "ok", "there is no GPU"),
    ],
)
def test_gpus_that_torch_does_not_see(view, driver, environment, level, text):
    [finding] = check_accelerator(view, driver, environment)
    assert finding.level == level
    assert text in finding.found
    assert bool(finding.mend) == (level != "ok")


@pytest.mark.parametrize(
    ("built_for", "capability", "runs"),
    [
        (["sm_80", "sm_90"], (8, 6), True),  # the same major version
        (["sm_86"], (8, 0), False),
        (["sm_90"], (12, 0), False),
        (["sm_90", "compute_90"], (12, 0), True),  # compiled by the driver
        (["sm_90a"], (9, 0), True),
        (["sm_100", "sm_120"], (10, 0), True),
        (["sm_100", "sm_120"], (9, 0), False),
    ],
)
def test_code_for_other_architectures_is_a_problem(built_for, capability, runs):
    view = replace(CUDA, built_for=built_for, gpus=[replace(H100, capability=capability)])
    problems = [finding for finding in check_accelerator(view, TWO_GPUS, {}) if finding.level == "problem"]
    assert bool(problems) != runs


def test_gpus_that_are_old_or_in_use_are_noted_one_by_one():
    old = Gpu("Tesla V100", 32 * GIB, 31 * GIB, (7, 0))
    view = replace(CUDA, built_for=["sm_70", "sm_90"], gpus=[H100, old, replace(H100, free=20 * GIB)])
    first, *others = check_accelerator(view, TWO_GPUS, {})
    assert "2 x NVIDIA H100" in first.found
    assert "1 x Tesla V100" in first.found
    assert found(others) == [("note", "GPU 1"), ("note", "GPU 2")]
    assert "bf16" in others[0].found
    assert "60.0 of 80.0 GiB" in others[1].found


def test_several_gpus_without_nccl_are_a_problem():
    assert ("problem", "NCCL") in found(check_accelerator(replace(CUDA, nccl=None), TWO_GPUS, {}))
    assert len(list(check_accelerator(replace(CUDA, nccl=None, gpus=[H100]), TWO_GPUS, {}))) == 1


def test_what_torch_sees_passes_through_json():
    assert parse_view(json.loads(json.dumps(asdict(CUDA)))) == CUDA


@pytest.fixture
def cuda_build(monkeypatch):
    """A torch that is built for CUDA, and sees one GPU."""
    properties = SimpleNamespace(name="NVIDIA H100", total_memory=80 * GIB, major=9, minor=0)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 21, 5))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (79 * GIB, 80 * GIB))


def test_what_torch_sees(monkeypatch, cuda_build):
    assert torch_view() == replace(CUDA, gpus=[H100])

    def refuse():
        raise RuntimeError("The NVIDIA driver on your system is too old\nsecond line")

    monkeypatch.setattr(torch.cuda, "init", refuse)
    assert torch_view() == replace(CUDA, gpus=[], error="The NVIDIA driver on your system is too old")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert torch_view() == TorchView()


def test_the_driver_is_read_from_the_kernels_files(tmp_path):
    assert read_driver(tmp_path) == Driver()
    files = {
        "proc/driver/nvidia/version": "NVRM version: NVIDIA Open Kernel Module for x86_64  550.54.14  Release\nGCC",
        "sys/bus/pci/devices/a/vendor": "0x10de\n",
        "sys/bus/pci/devices/a/class": "0x030200\n",
        "sys/bus/pci/devices/audio/vendor": "0x10de\n",
        "sys/bus/pci/devices/audio/class": "0x040300\n",
        "sys/bus/pci/devices/other/vendor": "0x8086\n",
        "sys/bus/pci/devices/other/class": "0x030000\n",
        "dev/nvidia0": "",
        "dev/nvidiactl": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_driver(tmp_path) == Driver("550.54.14", on_bus=1, devices=1)


# DeepSpeed's operators


def test_a_lock_that_a_killed_build_left_is_named_with_the_mend(tmp_path):
    now = 1_000_000.0
    for name, age in {"py311_cpu/cpu_adam": 7200, "fused_adam": 60}.items():
        lock = tmp_path / name / "lock"
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, (now - age, now - age))
    (tmp_path / "py311_cpu/utils").mkdir()
    running, stale = check_build_locks(tmp_path, now)
    assert (running.level, stale.level) == ("ok", "note")
    assert "fused_adam is being compiled since 1 minutes" in running.found
    assert "cpu_adam was killed 2.0 hours ago" in stale.found
    assert stale.mend == f"rm {tmp_path}/py311_cpu/cpu_adam/lock"


def test_where_builds_lie():
    home = Path("/home/me")
    assert extensions_folder({}, home) == home / ".cache/torch_extensions"
    assert extensions_folder({"XDG_CACHE_HOME": "/cache"}, home) == Path("/cache/torch_extensions")
    assert extensions_folder({"TORCH_EXTENSIONS_DIR": "/builds", "XDG_CACHE_HOME": "/c"}, home) == Path("/builds")


def test_prebuilt_operators_and_compilers_are_told():
    text = describe_ops("cuda", ["fused_adam"], {"g++": "/bin/g++", "ninja": "/bin/ninja"}.get).found
    assert "prebuilt: fused_adam" in text
    assert "compilers: g++, ninja, no nvcc" in text
    assert "none is prebuilt" in describe_ops("cpu", [], {}.get).found


# what the ranks of a machine share


def test_cores_that_are_not_for_this_process_are_noted():
    assert check_cores(64, 64, None).level == "ok"
    finding = check_cores(64, 8, None)
    assert finding.level == "note"
    assert "OMP_NUM_THREADS=8" in finding.mend
    assert check_cores(64, 8, "4").level == "ok"


def test_little_memory_is_noted():
    assert check_memory(20.0 * GIB, 64.0 * GIB).level == "ok"
    assert check_memory(0.5 * GIB, 64.0 * GIB).level == "note"


@pytest.mark.parametrize(
    ("total", "free", "level", "mend"),
    [(64 << 20, 64 << 20, "note", "--shm-size"), (8 * GIB, 1 << 20, "note", "remove"), (8 * GIB, 8 * GIB, "ok", "")],
)
def test_small_or_full_shared_memory_is_noted(monkeypatch, tmp_path, total, free, level, mend):
    usage = type("Usage", (), {"total": total, "free": free})
    monkeypatch.setattr("hmoe_ds.doctor.host.shutil.disk_usage", lambda folder: usage)
    finding = check_shared_memory(tmp_path)
    assert finding.level == level
    assert mend in finding.mend


def test_no_shared_memory_is_noted(tmp_path):
    assert check_shared_memory(tmp_path / "shm").level == "note"


def test_few_open_files_are_noted():
    assert check_open_files(1024, 4096).level == "ok"
    assert check_open_files(-1, -1).level == "ok"
    assert check_open_files(256, 4096).mend == "ulimit -n 1024"
    assert "--ulimit" in check_open_files(256, 512).mend


# network


def test_the_interface_towards_other_machines():
    other = Interface("ib0", ("10.1.0.5",))
    assert find_way([LOOPBACK, other, ETHERNET], "10.0.0.5") == ETHERNET
    assert find_way([LOOPBACK, other, ETHERNET], None) == other
    assert find_way([LOOPBACK], None) is None
    text = check_interfaces([LOOPBACK, other, ETHERNET], ETHERNET).found
    assert "reached by eth0, 10.0.0.5; also up: lo 127.0.0.1, ib0 10.1.0.5" in text
    assert check_interfaces([LOOPBACK], None).level == "note"


@pytest.mark.parametrize(
    ("addresses", "chosen", "level"),
    [
        (["10.0.0.5"], None, "ok"),
        (["127.0.1.1"], None, "note"),
        (["::1", "127.0.0.1"], None, "note"),
        (["127.0.1.1", "10.0.0.5"], None, "ok"),
        (["fe80::1%eth0"], None, "ok"),
        ([], None, "note"),
        (["127.0.1.1"], "eth0", "ok"),
    ],
)
def test_a_host_name_that_leads_to_the_loopback_is_noted(addresses, chosen, level):
    finding = check_host_name("node1", addresses, ETHERNET, chosen)
    assert finding.level == level
    assert ("GLOO_SOCKET_IFNAME=eth0" in finding.mend) == (level == "note")


@pytest.mark.parametrize(
    ("variables", "gpus", "expected"),
    [
        ({}, True, []),
        ({"GLOO_SOCKET_IFNAME": "eth0"}, False, [("ok", "variables")]),
        ({"GLOO_SOCKET_IFNAME": "ib7"}, False, [("problem", "GLOO_SOCKET_IFNAME"), ("ok", "variables")]),
        ({"GLOO_SOCKET_IFNAME": "eth"}, False, [("problem", "GLOO_SOCKET_IFNAME"), ("ok", "variables")]),
        ({"NCCL_SOCKET_IFNAME": "eth"}, True, [("ok", "variables")]),  # a prefix
        ({"NCCL_SOCKET_IFNAME": "=eth"}, True, [("problem", "NCCL_SOCKET_IFNAME"), ("ok", "variables")]),
        ({"NCCL_SOCKET_IFNAME": "=eth0"}, True, [("ok", "variables")]),
        ({"NCCL_SOCKET_IFNAME": "^docker,lo"}, True, [("ok", "variables")]),
        ({"NCCL_SOCKET_IFNAME": "^eth,lo"}, True, [("problem", "NCCL_SOCKET_IFNAME"), ("ok", "variables")]),
        ({"NCCL_SOCKET_IFNAME": "ib0"}, True, [("problem", "NCCL_SOCKET_IFNAME"), ("ok", "variables")]),
        ({"NCCL_SOCKET_IFNAME": "ib0"}, False, [("note", "NCCL_SOCKET_IFNAME"), ("ok", "variables")]),
    ],
)
def test_variables_that_name_no_interface(variables, gpus, expected):
    assert found(check_variables({"HOME": "/root", **variables}, ["lo", "eth0"], gpus)) == expected


def test_set_variables_are_listed():
    [finding] = check_variables({"NCCL_IB_DISABLE": "1", "MASTER_ADDR": "a", "PATH": "/bin"}, ["lo"], True)
    assert finding.found == "MASTER_ADDR=a, NCCL_IB_DISABLE=1"


def test_infiniband(tmp_path):
    assert list(check_infiniband(tmp_path, 65536)) == []
    state = tmp_path / "mlx5_0/ports/1/state"
    state.parent.mkdir(parents=True)
    state.write_text("4: ACTIVE\n")
    [finding] = check_infiniband(tmp_path, -1)
    assert (finding.level, finding.found) == ("ok", "mlx5_0:1 ACTIVE")
    assert found(check_infiniband(tmp_path, 65536)) == [("ok", "InfiniBand"), ("note", "InfiniBand")]
    state.write_text("1: DOWN\n")
    assert found(check_infiniband(tmp_path, -1)) == [("note", "InfiniBand")]


@pytest.mark.parametrize(
    ("there", "level"), [(["ssh", "pdsh"], "ok"), (["srun"], "ok"), (["ssh"], "note"), ([], "note")]
)
def test_launchers_of_several_machines(there, level):
    finding = check_launchers(lambda name: name if name in there else None)
    assert finding.level == level
    assert all(name in finding.found for name in there)


# the folder of a run


def test_a_folder_that_is_not_there_yet_is_tried_where_it_would_be(tmp_path):
    findings = list(check_folder(tmp_path / "runs" / "first"))
    assert [finding.subject for finding in findings] == ["run.out", "locks", "flushing"]
    assert f"{tmp_path}: " in findings[0].found
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").touch()
    assert found(check_folder(tmp_path / "run")) == [("problem", "run.out")]


def test_a_folder_that_cannot_be_written_to_is_a_problem(monkeypatch, tmp_path):
    def refuse(*arguments, **options):
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(folder_checks.tempfile, "TemporaryDirectory", refuse)
    [finding] = check_folder(tmp_path)
    assert finding.level == "problem"
    assert "Read-only file system" in finding.found


@pytest.mark.parametrize(
    ("kind", "level", "text"),
    [
        ("ext4", "ok", "needs a shared one"),
        ("lustre", "ok", "lustre"),
        ("overlay", "note", "gone"),
        ("tmpfs", "note", ""),
    ],
)
def test_the_file_system_is_that_of_the_nearest_mount(tmp_path, kind, level, text):
    inside = tmp_path / "runs" / "first"
    inside.mkdir(parents=True)
    finding = check_file_system(inside, {"/": "xfs", str(tmp_path / "runs"): kind, str(tmp_path / "other"): "btrfs"})
    assert finding.level == level
    assert f"{kind}, " in finding.found
    assert text in finding.found


def test_a_file_system_without_locks_is_noted(monkeypatch, tmp_path):
    assert check_locks(tmp_path).level == "ok"

    def refuse(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(folder_checks.fcntl, "flock", refuse)
    assert check_locks(tmp_path).level == "note"


def test_slow_flushing_is_noted():
    assert check_speed(0.02).level == "ok"
    assert check_speed(3.0).level == "note"


# what is asked in processes of their own


@pytest.fixture
def probe(monkeypatch, tmp_path):
    """A probe that runs the given code instead of a module."""

    def start(code: str) -> Probe:
        (tmp_path / "code.py").write_text(textwrap.dedent(code))
        script = tmp_path / "python"
        script.write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path}/code.py\n")
        script.chmod(0o755)
        monkeypatch.setattr("hmoe_ds.doctor.probe.sys.executable", str(script))
        return Probe("torch_probe")

    return start


def test_the_answer_is_the_last_line(probe):
    with probe("print('[INFO] a library talks')\nprint('{\"a\": 1}')") as started:
        assert started.answer(60) == {"a": 1}


@pytest.mark.parametrize(
    ("code", "seconds", "reason"),
    [
        ("raise ImportError('libcudart.so.12: no such file')", 60, "ImportError: libcudart.so.12: no such file"),
        ("raise SystemExit(3)", 60, "exit code 3"),
        ("import os; os.kill(os.getpid(), 11)", 60, "ended by signal 11"),
        ("import time; time.sleep(600)", 0.1, "no answer within 0.1 s"),
    ],
)
def test_a_process_without_an_answer_has_a_reason_and_is_ended(probe, code, seconds, reason):
    with probe(code) as started, pytest.raises(ProbeError, match=reason):
        started.answer(seconds)
    assert started._process.returncode is not None


def test_a_finding_is_printed_in_lines_that_fit():
    text = str(note("host name", "word " * 40 + "end", "something", "do this"))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0].startswith("note     host name          word")
    assert lines[-2].endswith("; expected: something")
    assert lines[-1].strip() == "mend: do this"
