"""Speed of pretraining on one GPU: molecules/s, share of the peak FLOP/s (MFU), peak memory.

    python -m benchmarks.gpu [--data data/zinc]
    python -m benchmarks.gpu --device cpu --preset tiny_cpu     # does it run at all? writes no file

`small_1gpu`, and the model of `base_8gpu` (95M active parameters) with the batch that one of its 8 GPUs has. Forward,
backward, clipping and AdamW with fp32 master copies in plain torch, in the preset's precision; without DeepSpeed,
RDKit and jsonargparse, so it runs where torch, PyG, numba, pyarrow, fsspec, pyyaml and safetensors are. Without
`--data` the molecules are synthetic, of 25 atoms and 27 bonds. FLOPs are counted by
`hmoe_ds.model.size.flops_per_molecule` (matrix products only, of what activation checkpointing computes again too),
times are those of CUDA events, whole optimizer steps, the median. Balance biases stay as they are. Prints a line for
each model and one JSON line, which goes to docs/results/gpu.json; its "ratio" is the MFU of the last preset, its
"target" what `benchmarks.scaling_model` assumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from importlib import resources
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from torch import nn

from benchmarks.preset_gpus import PRESET_GPUS
from benchmarks.result import write_result
from benchmarks.synthetic import synthetic_slice
from data_pipeline.errors import PipelineError, UsageError
from hmoe_ds.config import RunConfig, config_from_dict
from hmoe_ds.data.mixture import open_mixture
from hmoe_ds.data.plan import BatchPlan
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.model.size import PackedSize, activation_bytes, count_parameters, flops_per_molecule
from hmoe_ds.objectives.total import Normalizers, PretrainingTask, RankSlice, count_normalizers
from hmoe_ds.training.feed import rank_slice

# Dense bf16 TFLOP/s by words of a device's name, as their makers give them; the first of which all words fit counts.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10G": 70.0,
    "RTX 4090": 165.0,
}
ASSUMED_MFU = 0.25
_ATOMS, _RINGS = 25, 3
_WARM_UP = 3


def preset_for_one(name: str) -> RunConfig:
    """A preset with its experts on one GPU and the batch that one of its GPUs has."""
    text = (resources.files("hmoe_ds.presets") / f"{name}.yaml").read_text()
    config = config_from_dict(yaml.safe_load(text))
    budgets = ("molecules_per_step", "atoms_per_step", "bonds_per_step")
    share = {budget: getattr(config.data, budget) // PRESET_GPUS.get(name, 1) for budget in budgets}
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **share),
        parallel=dataclasses.replace(config.parallel, ep_size=1),
    )


def slices_of(config: RunConfig, data: str) -> list[RankSlice]:
    """The slices of one optimizer step: of the dataset at `data`, or synthetic ones when it is ''."""
    ratio, slices = config.objective.mask_ratio, config.optim.accumulation
    if not data:
        molecules = min(
            config.data.molecules_per_step,
            config.data.atoms_per_step // _ATOMS,
            config.data.bonds_per_step // (_ATOMS - 1 + _RINGS),
        )
        return [synthetic_slice(molecules // slices, _ATOMS, _RINGS, ratio, seed) for seed in range(slices)]
    mixture = open_mixture(dataclasses.replace(config.data, path=data), "train")
    step = BatchPlan(mixture, config.data, slices, config.run.seed).next_step()
    return [rank_slice(mixture, part, ratio, config.run.seed, rank=0, ranks=1) for part in step]


class MasterAdamW:
    """AdamW on fp32 copies of parameters that may be narrower; matrices decay."""

    def __init__(self, weights: list[nn.Parameter], config: RunConfig) -> None:
        optim = config.optim
        self._weights, self._clip = weights, optim.clip_norm
        self._masters = [nn.Parameter(weight.detach().float().clone()) for weight in weights]
        groups = [
            {"params": [one for one in self._masters if one.dim() > 1], "weight_decay": optim.weight_decay},
            {"params": [one for one in self._masters if one.dim() <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            groups, lr=optim.learning_rate, betas=(optim.beta1, optim.beta2), eps=optim.epsilon
        )

    @torch.no_grad()
    def step(self) -> None:
        """Update from the gradients of the parameters, which are gone afterwards."""
        for master, weight in zip(self._masters, self._weights, strict=True):
            master.grad = torch.zeros_like(master) if weight.grad is None else weight.grad.float()
            weight.grad = None
        nn.utils.clip_grad_norm_(self._masters, self._clip or float("inf"))
        self._optimizer.step()
        self._optimizer.zero_grad()
        for master, weight in zip(self._masters, self._weights, strict=True):
            weight.copy_(master)


def build_task(config: RunConfig, device: torch.device) -> PretrainingTask:
    """Model and loss on `device`: parameters in the run's precision, buffers of the routing as they are."""
    model = HMoEModel(config.model, config.router, config.run.seed)
    if config.parallel.precision == "bf16":
        for weight in model.parameters():
            weight.data = weight.data.bfloat16()
    model.encoder.recompute = config.parallel.activation_checkpointing
    return PretrainingTask(model, config.objective).to(device)


def train_step(task: PretrainingTask, optimizer: MasterAdamW, slices: list[RankSlice], norm: Normalizers) -> None:
    """One optimizer step."""
    for part in slices:
        losses, _ = task(part, norm)
        losses.total.backward()
    optimizer.step()


def durations(step: Callable[[], None], count: int, device: torch.device) -> list[float]:
    """Seconds of each of `count` calls, by CUDA events where there are any."""
    if device.type != "cuda":
        times = [time.perf_counter()]
        for _ in range(count):
            step()
            times.append(time.perf_counter())
        return [after - before for before, after in pairwise(times)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1000 for before, after in pairwise(events)]


def measure(name: str, data: str, steps: int, device: torch.device, peak_flops: float | None) -> dict[str, Any]:
    """Figures of one preset.

    Args:
        name: of the preset.
        data: dataset directory, or '' for synthetic molecules.
        steps: optimizer steps that are timed, after some that are not.
        device: where.
        peak_flops: FLOP/s that a utilisation of 1 would be; None for none.
    """
    config = preset_for_one(name)
    slices = slices_of(config, data)
    norm = count_normalizers(slices, device)
    slices = [part.to(device) for part in slices]
    task = build_task(config, device)
    optimizer = MasterAdamW(list(task.parameters()), config)
    durations(lambda: train_step(task, optimizer, slices, norm), _WARM_UP, device)
    memory = {}
    if device.type == "cuda":
        memory["states_bytes"] = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    seconds = median(durations(lambda: train_step(task, optimizer, slices, norm), steps, device))
    if device.type == "cuda":
        memory["peak_bytes"] = torch.cuda.max_memory_allocated()
    return {"preset": name, **figures_of(config, slices, seconds, peak_flops), **memory}


def figures_of(config: RunConfig, slices: list[RankSlice], seconds: float, peak_flops: float | None) -> dict[str, Any]:
    """Rates and sizes of a step that took `seconds`."""
    sizes = [PackedSize(part.batch.num_molecules, part.batch.num_atoms, part.batch.num_bonds) for part in slices]
    molecules, atoms = sum(size.molecules for size in sizes), sum(size.atoms for size in sizes)
    flops = flops_per_molecule(config, atoms / molecules, sum(size.bonds for size in sizes) / molecules).total
    count = count_parameters(config.model, config.router, config.objective.molecule_heads)
    activations = max(activation_bytes(config, size, size.molecules).total for size in sizes)
    achieved = flops * molecules / seconds
    return {
        "parameters": count.total,
        "active_parameters": count.active,
        "precision": config.parallel.precision,
        "slices": len(slices),
        "molecules_per_step": molecules,
        "atoms_per_step": atoms,
        "step_seconds": seconds,
        "molecules_per_second": molecules / seconds,
        "tflops_per_second": achieved / 1e12,
        "mfu": None if peak_flops is None else achieved / peak_flops,
        "activation_bytes_estimated": activations,
    }


def peak_of(device: torch.device, given: float | None) -> float | None:
    """Peak FLOP/s: what is given in TFLOP/s, or what is known of the device; None for a CPU.

    Raises:
        UsageError: a GPU that is not in the table.
    """
    if given is not None:
        return given * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    words = set(name.replace("-", " ").split())
    for part, tflops in PEAK_TFLOPS.items():
        if words.issuperset(part.split()):
            return tflops * 1e12
    raise UsageError(f"the peak of {name} is not known: give --peak-tflops")


def describe(figures: dict[str, Any]) -> str:
    """One line for a reader."""
    mfu = "" if figures["mfu"] is None else f"  MFU {figures['mfu']:.1%}"
    peak = f"  peak {figures['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in figures else ""
    return (
        f"{figures['preset']:<16}{figures['molecules_per_second']:>12,.0f} molecules/s"
        f"{figures['tflops_per_second']:>10.3g} TFLOP/s{mfu}{peak}"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All presets, one after the other.

    Raises:
        UsageError: no CUDA device, or one whose peak is not known.
    """
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA device here: to see whether it runs at all, `--device cpu --preset tiny_cpu`")
    peak = peak_of(device, options.peak_tflops)
    found = []
    for name in options.preset:
        found.append(measure(name, options.data, options.steps, device, peak))
        print(describe(found[-1]), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        "name": "gpu",
        "ratio": found[-1]["mfu"],
        "target": ASSUMED_MFU,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "peak_tflops": None if peak is None else peak / 1e12,
        "torch": torch.__version__,
        "molecules": options.data or "synthetic",
        "models": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="", help="dataset made by hmoe prepare; without it, synthetic molecules")
    parser.add_argument("--preset", nargs="+", default=["small_1gpu", "base_8gpu"], choices=_presets())
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps that are timed (20)")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 TFLOP/s of the device; without it, by its name")
    options = parser.parse_args()
    try:
        result = run(options)
    except PipelineError as error:
        print(f"benchmarks.gpu: error: {error}", file=sys.stderr)
        sys.exit(1)
    if result["device"] == "cpu":
        print(json.dumps(result))
    else:
        write_result(result)


def _presets() -> list[str]:
    return sorted(Path(file.name).stem for file in resources.files("hmoe_ds.presets").iterdir() if ".yaml" in file.name)


if __name__ == "__main__":
    main()
