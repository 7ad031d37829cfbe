"""GPUs: what the driver has, what torch sees of it, and whether the two fit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hmoe_ds.doctor.finding import Finding, note, ok, problem

_GIB = 2**30
_NVIDIA, _DISPLAY = "0x10de", "0x03"
# Values of CUDA_VISIBLE_DEVICES that say "no GPU"; the last one is Slurm's, for jobs that asked for none.
_HIDING = ("", "-1", "NoDevFiles")
# Share of a GPU's memory that is free when only the driver and the process that asks are there.
_FREE_SHARE = 0.9


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees; memory in bytes, `capability` as (major, minor)."""

    name: str
    memory: int
    free: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class TorchView:
    """What torch sees.

    Args:
        cuda: version that it was built for; None: for the CPU only.
        nccl: version of NCCL in it.
        built_for: architectures, such as "sm_90".
        gpus: that it sees.
        error: why CUDA cannot be used.
    """

    cuda: str | None = None
    nccl: str | None = None
    built_for: list[str] = field(default_factory=list)
    gpus: list[Gpu] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class Driver:
    """What the system has of NVIDIA.

    Args:
        version: of the driver that is loaded.
        on_bus: GPUs in the machine.
        devices: GPUs that processes here can open.
    """

    version: str | None = None
    on_bus: int = 0
    devices: int = 0


def parse_view(answer: Mapping[str, Any]) -> TorchView:
    """The view that `torch_probe` printed."""
    gpus = [Gpu(**{**gpu, "capability": tuple(gpu["capability"])}) for gpu in answer["gpus"]]
    return TorchView(**{**answer, "gpus": gpus})


def read_driver(root: Path = Path("/")) -> Driver:
    """The driver and the GPUs, from the files of the kernel under `root`."""
    file = root / "proc/driver/nvidia/version"
    match = re.search(r"\b\d+\.\d+(\.\d+)?\b", file.read_text()) if file.exists() else None
    on_bus = sum(
        (device / "vendor").read_text().strip() == _NVIDIA and (device / "class").read_text().startswith(_DISPLAY)
        for device in (root / "sys/bus/pci/devices").glob("*")
    )
    devices = len(list((root / "dev").glob("nvidia[0-9]*")))
    return Driver(match and match.group(), on_bus, devices)


def check_accelerator(view: TorchView, driver: Driver, environment: Mapping[str, str]) -> Iterator[Finding]:
    """What ranks would compute on, and whether that is the best that is here."""
    if environment.get("DS_ACCELERATOR") == "cpu":
        yield ok("accelerator", "the CPU, as DS_ACCELERATOR says")
    elif view.gpus:
        yield _describe(view, driver)
        yield from _check_gpus(view)
    elif driver.devices:
        yield _unseen(view, driver, environment.get("CUDA_VISIBLE_DEVICES"))
    elif driver.on_bus and driver.version is None:
        yield note(
            "accelerator",
            f"the CPU: {driver.on_bus} NVIDIA GPUs are in this machine, but no driver is loaded",
            "",
            "install NVIDIA's driver; nvidia-smi must list the GPUs",
        )
    elif driver.version is not None:
        yield note(
            "accelerator",
            f"the CPU: NVIDIA's driver {driver.version} is loaded, but no GPU can be opened from here",
            "",
            "start the container with its GPUs (docker run --gpus all; nvidia.com/gpu in Kubernetes)",
        )
    else:
        yield ok("accelerator", "the CPU, there is no GPU")


def _unseen(view: TorchView, driver: Driver, visible: str | None) -> Finding:
    """GPUs are there, and torch sees none."""
    if visible in _HIDING:
        mend = "unset it, or ask the scheduler for GPUs (--gres=gpu:N), unless that is meant"
        return note("accelerator", f"the CPU: CUDA_VISIBLE_DEVICES={visible} hides {driver.devices} GPUs", "", mend)
    if view.cuda is None:
        return problem(
            "accelerator",
            f"{driver.devices} GPUs are here, but torch is built for the CPU only",
            "torch built for CUDA",
            "install it anew from the index that PyTorch names for your CUDA; DS_ACCELERATOR=cpu to use none",
        )
    asked = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    return problem(
        "accelerator",
        f"{driver.devices} GPUs and driver {driver.version} are here{asked}, but torch, built for CUDA {view.cuda}, "
        f"sees none: {view.error or 'it finds no device'}",
        "",
        "update the driver or install torch for an older CUDA; on NVSwitch machines start nvidia-fabricmanager; "
        "DS_ACCELERATOR=cpu to use none",
    )


def _describe(view: TorchView, driver: Driver) -> Finding:
    kinds = Counter((gpu.name, gpu.memory, gpu.capability) for gpu in view.gpus)
    gpus = ", ".join(
        f"{number} x {name}, {memory / _GIB:.1f} GiB, compute capability {major}.{minor}"
        for (name, memory, (major, minor)), number in kinds.items()
    )
    libraries = f"driver {driver.version}, torch built for CUDA {view.cuda}, NCCL {view.nccl}"
    return ok("accelerator", f"{gpus}; {libraries}")


def _check_gpus(view: TorchView) -> Iterator[Finding]:
    if view.nccl is None and len(view.gpus) > 1:
        yield problem("NCCL", "not in this build of torch", "", "install torch as it is built for CUDA on Linux")
    for index, gpu in enumerate(view.gpus):
        subject = f"GPU {index}"
        if not _runs_on(view.built_for, gpu.capability):
            yield problem(
                subject,
                f"torch is built for {', '.join(view.built_for)}",
                "sm_{}{}, for {}".format(*gpu.capability, gpu.name),
                "install torch built for a CUDA version that knows this GPU",
            )
        if gpu.capability[0] < 8:
            yield note(subject, f"{gpu.name} does not compute in bf16", "", "--parallel.precision fp32")
        if gpu.free < _FREE_SHARE * gpu.memory:
            yield note(
                subject,
                f"{(gpu.memory - gpu.free) / _GIB:.1f} of {gpu.memory / _GIB:.1f} GiB are taken by other processes",
                "",
                "nvidia-smi shows them: end what is left of earlier runs",
            )


def _runs_on(built_for: list[str], capability: tuple[int, int]) -> bool:
    """Whether code of one of these architectures runs: binaries within a major version, PTX on all later."""
    for name in built_for:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name)
        if match is None:
            continue
        built = int(match[2]), int(match[3])
        if built <= capability and (match[1] == "compute" or built[0] == capability[0]):
            return True
    return False
