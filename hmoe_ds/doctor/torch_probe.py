"""`python -m hmoe_ds.doctor.torch_probe`: what torch sees, as JSON (`TorchView`)."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch

from hmoe_ds.doctor.accelerator import Gpu, TorchView


def torch_view() -> TorchView:
    """What torch sees in this process."""
    if torch.version.cuda is None:
        return TorchView()
    error = _error()
    return TorchView(
        cuda=torch.version.cuda,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
        built_for=torch.cuda.get_arch_list(),
        gpus=[] if error else [_gpu(index) for index in range(torch.cuda.device_count())],
        error=error,
    )


def _error() -> str | None:
    """Why CUDA cannot be used; torch says it only when it is asked for work."""
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    free, _ = torch.cuda.mem_get_info(index)
    return Gpu(properties.name, properties.total_memory, free, (properties.major, properties.minor))


if __name__ == "__main__":
    print(json.dumps(asdict(torch_view())))
