"""What a run costs one rank, from its configuration and the number of ranks: memory and all-to-all traffic.

Experts are spread over `ep_size` of the R ranks, and R / ep_size ranks hold the same ones. So a rank computes with
n = dense + experts / ep_size parameters. ZeRO shards the dense ones over all R ranks, and a rank's experts over the
R / ep_size that hold them too: a rank's shard is p = dense / R + (experts / ep_size) / (R / ep_size) = total / R.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hmoe_ds.config import RunConfig
from hmoe_ds.model.size import (
    BYTES,
    ActivationBytes,
    PackedSize,
    activation_bytes,
    count_parameters,
    moe_layers,
    molecules_per_slice,
)
from hmoe_ds.training.deepspeed_config import deepspeed_config

_FP32 = 4
# DeepSpeed's own defaults, for what its JSON leaves out (deepspeed/runtime/zero/config.py of 0.19.8).
_DEFAULT_BUCKET = 500_000_000
_DEFAULT_LIVE = 1_000_000_000


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank.

    Args:
        parameters: in the run's precision.
        gradients: while they are accumulated over slices.
        optimizer: fp32 master copy and Adam's two moments.
        communication: DeepSpeed's bucket, or in stage 3 the parameters that are gathered at a time.
        activations: of one slice, an estimate; see `hmoe_ds.model.size.activation_bytes`.
        update: copies that the reduction and the update make after the activations are gone.
        host: in host memory, with the optimizer offloaded.
    """

    parameters: float
    gradients: float
    optimizer: float
    communication: float
    activations: float
    update: float
    host: float

    @property
    def total(self) -> float:
        """On the device at the worst moment, which is in the backward or in the update."""
        states = self.parameters + self.gradients + self.optimizer
        return states + max(self.communication + self.activations, self.update)


def memory_per_rank(
    config: RunConfig, ranks: int, zero_stage: int, offload: bool, atoms: float, bonds: float
) -> RankMemory:
    """Memory of one rank under DeepSpeed 0.19.8; the CUDA context, NCCL's buffers and fragmentation come on top.

    Bytes per parameter, s being the bytes of the run's precision and a those of DeepSpeed's `grad_accum_dtype` (n and p
    as above):

    ============  ==========  ================================  =========  ==============
    stage         parameters  gradients                         optimizer  on the host
    ============  ==========  ================================  =========  ==============
    1             s n         s n, and a n besides if a != s    12 p
    2             s n         a p                               12 p
    2, offloaded  s n                                                      (12 + s + 8) p
    3             s p         a p                               12 p
    ============  ==========  ================================  =========  ==============

    The optimizer keeps an fp32 master copy also when parameters are fp32. On the host are optimizer, parameters as they
    are sent back, and fp32 gradients twice. These coefficients were read off the tensors of real engines on 2 and 4
    ranks (stage 3: after its construction); a test does so again for stages 1 and 2.

    Args:
        config: of the run; bucket sizes are those of its own DeepSpeed settings, whatever the stage.
        ranks: number of ranks R.
        zero_stage: 1, 2 or 3.
        offload: optimizer state and update in host memory.
        atoms: mean atoms of a molecule.
        bonds: mean bonds of a molecule.
    """
    settings = deepspeed_config(config)
    size = BYTES[config.parallel.precision]
    accumulated = _accumulation_bytes(settings, size)
    held, shard = parameters_per_rank(config, ranks)
    mixed = accumulated != size
    if zero_stage == 1:
        gradients = (size + accumulated if mixed else size) * held
    else:
        gradients = 0 if offload else accumulated * shard
    # Stage 1 with mixed dtypes reduces the accumulated gradients in one copy, sent in the run's precision; else the
    # update flattens its gradients and takes the root of the second moments.
    update = (accumulated + size) * held if zero_stage == 1 and mixed else 2 * _FP32 * shard
    return RankMemory(
        parameters=size * (shard if zero_stage == 3 else held),
        gradients=gradients,
        optimizer=0 if offload else 3 * _FP32 * shard,
        communication=_communication_bytes(settings["zero_optimization"], zero_stage, size, held, mixed),
        activations=slice_activations(config, ranks, atoms, bonds).total,
        update=0 if offload else update,
        host=(3 * _FP32 + size + 2 * _FP32) * shard if offload else 0,
    )


def parameters_per_rank(config: RunConfig, ranks: int) -> tuple[float, float]:
    """Parameters that a rank computes with (n), and its shard of the whole model (p)."""
    count = count_parameters(config.model, config.router, config.objective.molecule_heads)
    return count.dense + count.experts / config.parallel.ep_size, count.total / ranks


def rank_batch(config: RunConfig, ranks: int, atoms: float, bonds: float) -> PackedSize:
    """One rank's part of a slice, dealt evenly."""
    molecules = molecules_per_slice(config, atoms, bonds) / ranks
    return PackedSize(molecules, molecules * atoms, molecules * bonds)


def slice_activations(config: RunConfig, ranks: int, atoms: float, bonds: float) -> ActivationBytes:
    """Activations of one rank's part of a slice."""
    batch = rank_batch(config, ranks, atoms, bonds)
    return activation_bytes(config, batch, molecules_per_slice(config, atoms, bonds))


@dataclass(frozen=True)
class DispatchBytes:
    """Bytes of the experts' all-to-alls in one optimizer step, under balanced routing.

    Args:
        per_rank: sent by one rank to others.
        total: sent by all ranks together.
    """

    per_rank: float
    total: float


def all_to_all_bytes(config: RunConfig, ranks: int, atoms: float, bonds: float) -> DispatchBytes:
    """Traffic of dispatch and combine, without migration.

    Each H-MoE layer sends a row of D values for each of an atom's K choices to the expert and back, in the forward and,
    as gradients, in the backward; with activation checkpointing the forward runs twice. Of E experts spread evenly,
    (ep_size - 1) / ep_size are on other ranks.

    Args:
        config: of the run.
        ranks: number of ranks.
        atoms: mean atoms of a molecule.
        bonds: mean bonds of a molecule.
    """
    parallel, router = config.parallel, config.router
    rows = config.optim.accumulation * molecules_per_slice(config, atoms, bonds) * atoms * router.experts_per_atom
    passes = 6 if parallel.activation_checkpointing else 4
    elsewhere = (parallel.ep_size - 1) / parallel.ep_size
    row = config.model.hidden_size * BYTES[parallel.precision]
    total = moe_layers(config.model) * passes * elsewhere * rows * row
    return DispatchBytes(total / ranks, total)


def _accumulation_bytes(settings: dict[str, Any], size: int) -> int:
    dtype = settings.get("data_types", {}).get("grad_accum_dtype")
    if dtype is None:
        return size
    return 2 if "16" in dtype else _FP32


def _communication_bytes(zero: dict[str, Any], stage: int, size: int, held: float, mixed: bool) -> float:
    if stage == 1 and mixed:  # this optimizer of DeepSpeed's has no bucket
        return 0
    bucket = size * zero.get("reduce_bucket_size", _DEFAULT_BUCKET)
    buckets = 2 if stage < 3 and zero.get("overlap_comm") else 1
    gathered = size * min(held, zero.get("stage3_max_live_parameters", _DEFAULT_LIVE)) if stage == 3 else 0
    return buckets * bucket + gathered
