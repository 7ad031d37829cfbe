"""The DeepSpeed engine: model with expert-parallel executors, AdamW, learning rate, ZeRO settings."""

from __future__ import annotations

import math
import os
import warnings
from datetime import timedelta

import deepspeed
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn
from torch.distributed import distributed_c10d

from data_pipeline.errors import PipelineError
from hmoe_ds.config import OptimConfig, RunConfig
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.moe.deepspeed_ep import expert_group, expert_parallel
from hmoe_ds.moe.exchange import Traffic
from hmoe_ds.moe.migration import Migration
from hmoe_ds.objectives.total import PretrainingTask
from hmoe_ds.training.deepspeed_config import deepspeed_config
from hmoe_ds.training.stopping.watchdog import START_SECONDS


def init_distributed() -> tuple[int, int]:
    """Join the process group that the launcher describes; -> (rank, ranks).

    A process started without a launcher is the only rank of its own group. A collective that not all ranks have joined
    after `START_SECONDS` is an error.
    """
    if "RANK" not in os.environ:
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }
        os.environ.update(alone)
    # Where DeepSpeed reads files itself, it would run code that a checkpoint of others holds.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    if deepspeed.get_accelerator().device_name() == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # DeepSpeed calls a collective that newer torch has renamed, and torch says so on every rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    # On CPU this op would be compiled at the first use, for minutes; gloo does its work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(seconds=START_SECONDS)
    _join(timeout)
    deepspeed.init_distributed(verbose=False, timeout=timeout)
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _join(timeout: timedelta) -> None:
    """Tell rank 0 that this rank is there.

    Raises:
        PipelineError: it had such a rank before, in an attempt whose other ranks have not noticed yet that one is gone.
            Neither they nor this rank would get any further.
    """
    rank, attempt = os.environ["RANK"], os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if rank == "0":
        return  # it brings a new store along
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(address, port, is_master=False, timeout=timeout)
    if store.add(f"ranks {rank} of attempt {attempt}", 1) > 1:
        raise PipelineError(
            f"rank 0, at {address}, port {port}, waits for the rank {rank} of an attempt that has failed; start again"
        )


def build_engine(config: RunConfig, traffic: Traffic) -> deepspeed.DeepSpeedEngine:
    """The engine of a run, with the learning rate of its first step; torch.distributed must be initialised.

    Its gradients are means over ranks, so a loss that is a share of a global sum is to be multiplied by
    `loss_scale`. `traffic` counts what leaves this rank for the experts of others.
    """
    parallel, router = config.parallel, config.router
    executor, heads = expert_parallel(parallel.ep_size, traffic), config.objective.molecule_heads
    model = HMoEModel(config.model, router, config.run.seed, executor, heads)
    model.encoder.recompute = parallel.activation_checkpointing
    task = PretrainingTask(model, config.objective)
    optimizer = _build_optimizer(task, config)
    engine, *_ = deepspeed.initialize(
        model=task,
        optimizer=optimizer,
        config=deepspeed_config(config),
        dist_init_required=False,
    )
    set_learning_rate(engine, config, 0)
    if parallel.migration:
        group = expert_group(parallel.ep_size)
        model.encoder.migration = Migration(group, router.groups, parallel.migration_budget, traffic)
    # Groups of DeepSpeed's come with torch's own limits, which are shorter than what a start may take.
    bound_collectives(max(config.run.hang_seconds, START_SECONDS))
    return engine


def bound_collectives(hang_seconds: float) -> None:
    """From here on a collective of any group that not all ranks have joined after twice this time is an error.

    The watchdog, which can say more, comes first.
    """
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=2 * hang_seconds), group)


def forget_gradients(engine: deepspeed.DeepSpeedEngine) -> None:
    """After a step that was not applied. DeepSpeed 0.19.8 would add the next gradients to offloaded ones."""
    if engine.zero_cpu_offload():
        for buffers in (engine.optimizer.averaged_gradients, engine.optimizer.all_grad_tensors):
            buffers.update(dict.fromkeys(buffers))


def wait_for_device() -> None:
    """Wait until the device has done what it was given; a CPU has."""
    deepspeed.get_accelerator().synchronize()


def loss_scale(config: RunConfig) -> int:
    """Undoes DeepSpeed's means over ranks and over accumulated slices."""
    return torch.distributed.get_world_size() * config.optim.accumulation


def _build_optimizer(task: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """AdamW; matrices decay, vectors do not; experts apart from the rest, as DeepSpeed wants them."""
    optim = config.optim
    matrices = [weight for weight in task.parameters() if weight.dim() > 1]
    vectors = [weight for weight in task.parameters() if weight.dim() <= 1]
    groups = split_params_into_different_moe_groups_for_optimizer(
        [
            {"name": "matrices", "params": matrices, "weight_decay": optim.weight_decay},
            {"name": "vectors", "params": vectors, "weight_decay": 0.0},
        ]
    )
    # On a CPU one pass over everything takes a fifth of the time of torch's default, one pass for each operation.
    steps_on_cpu = config.parallel.offload_optimizer or deepspeed.get_accelerator().device_name() == "cpu"
    betas = (optim.beta1, optim.beta2)
    return torch.optim.AdamW(groups, lr=optim.learning_rate, betas=betas, eps=optim.epsilon, fused=steps_on_cpu or None)


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, config: RunConfig, step: int) -> float:
    """Give all parameters the learning rate of 0-based `step`, and return it. So it depends on nothing but the step."""
    rate = config.optim.learning_rate * learning_rate_ratio(step, config.run.steps, config.optim)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    return rate


def learning_rate_ratio(step: int, steps: int, optim: OptimConfig) -> float:
    """Learning rate of 0-based `step` of a run of `steps`, as a share of the peak: linear warm-up, then cosine."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    decay_steps = (optim.decay_steps or steps) - optim.warmup_steps
    progress = min(1.0, (step - optim.warmup_steps) / max(1, decay_steps))
    return optim.min_ratio + (1 - optim.min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
