"""A checkpoint that was made on one topology, loaded on another: other ranks, expert parallelism or ZeRO stage.

DeepSpeed's files hold what each rank had: pieces of fp32 masters and of Adam's moments. `convert` puts the pieces of
each parameter together, as a universal checkpoint of DeepSpeed's format, and `load_universal` has DeepSpeed take from
that what each rank needs now.

DeepSpeed's own converter and loader are not used as they are:

- The converter writes the same values (a test compares them), but copies all pieces to disk before it joins them, holds
  all experts of ZeRO 3 in memory at once, and leaves out the step counts of ZeRO 3.
- Both fail where a rank has nothing but padding of a group of parameters, as happens on hundreds of ranks: the
  converter for ZeRO 1 in bf16, the loader for ZeRO 1 and 2.
- The loader pairs the groups of ZeRO 1 and 2 by their number, which in a large model depends on `ep_size`.
- It gives all groups of ZeRO 3 the weight decay of the first, and one step counter, which Adam advances once for each
  group: the loss of the first step is right, the next ones drift.
- It restores no buffers, such as the balance biases.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    CAT_DIM,
    EP_IS_EXPERT_PARAM,
    EP_NUM_EXPERTS,
    FP32_FLAT_GROUPS,
    OPTIMIZER_STATE_DICT,
    PARAM,
    PARAM_GROUPS,
    PARAM_SHAPES,
    PARAM_SLICE_MAPPINGS,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)
from deepspeed.utils.tensor_fragment import map_to_flat_opt_states
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.serialization import config as serialization

from hmoe_ds.config import RunConfig
from hmoe_ds.model.checkpoint_record import CheckpointError, read_record
from hmoe_ds.model.weight_files import SHARED_FILE
from hmoe_ds.training.checkpoints.checkpoint_files import read_state
from hmoe_ds.training.checkpoints.retention import UNIVERSAL
from hmoe_ds.training.deepspeed_config import deepspeed_config

# Fields of `parallel` that decide which rank has which piece of what.
_LAYOUT = ("ep_size", "zero_stage", "offload_optimizer")
# Sections of DeepSpeed's settings that do, too.
_LAYOUT_SETTINGS = ("zero_optimization", "data_types", "bf16")
_MASTER, _MOMENTS, _STEP = "fp32", ("exp_avg", "exp_avg_sq"), "step"
_PARAMETERS, _GLOBAL_STATE = "zero", "optimizer_state.pt"  # where DeepSpeed looks in a universal checkpoint


def same_topology(record: Mapping[str, Any], config: RunConfig, ranks: int) -> bool:
    """Whether the engine can load a checkpoint as it is.

    Args:
        record: of the checkpoint, as `read_record` gives it.
        config: of this start.
        ranks: of this start.
    """
    saved = record["config"]["parallel"]
    # A checkpoint that does not tell is of a version that resumed on the same number of ranks only.
    same_ranks = record.get("ranks", ranks) == ranks
    settings = deepspeed_config(config)
    before = record.get("deepspeed", settings)
    same_settings = all(before.get(name) == settings.get(name) for name in _LAYOUT_SETTINGS)
    return same_ranks and same_settings and all(saved[name] == getattr(config.parallel, name) for name in _LAYOUT)


def load_from_another(engine: deepspeed.DeepSpeedEngine, folder: Path, config: RunConfig) -> None:
    """Restore a checkpoint that was made on another topology; all ranks take part and read `folder`.

    Beside it they write the universal checkpoint, which is removed when all have loaded it.

    Args:
        engine: fresh, for the topology of this start.
        folder: of the checkpoint.
        config: of this start.

    Raises:
        CheckpointError: a file of the checkpoint is missing or damaged.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    universal = folder.with_name(folder.name + UNIVERSAL)
    if rank == 0:
        shutil.rmtree(universal, ignore_errors=True)  # of a start that did not get beyond this
    torch.distributed.barrier()
    convert(folder, universal, rank, ranks)
    torch.distributed.barrier()
    load_universal(engine, universal, config.parallel.ep_size)
    torch.distributed.barrier()
    if rank == 0:
        shutil.rmtree(universal)
    _load_buffers(engine.module.model, folder / SHARED_FILE)
    step = read_record(folder)["step"]
    engine.global_steps = step
    engine.global_samples = step * engine.train_batch_size()


def convert(folder: Path, out: Path, part: int = 0, parts: int = 1) -> None:
    """Write a universal checkpoint: of each parameter the fp32 master, Adam's moments and the step count, whole.

    The checkpoint's files are mapped, so that no more than one parameter at a time need be in memory.

    Args:
        folder: of the checkpoint, of any ZeRO stage.
        out: folder of the universal one; it may exist, but not what is written into it.
        part: number of the share to convert, from 0, as ranks can divide the parameters among them.
        parts: number of shares.

    Raises:
        CheckpointError: a file of the checkpoint is missing or damaged.
    """
    record = read_record(folder)
    if "ranks" not in record:
        raise CheckpointError(f"{folder} is of an older version of hmoe_ds: resume it as it was spread over ranks")
    parallel = record["config"]["parallel"]
    shapes, shards = _open_shards(folder, parallel, record["ranks"])
    for name, shape in list(shapes.items())[part::parts]:
        _write_parameter(out / _PARAMETERS / name, name, shape, shards, parallel["ep_size"])
    if part == 0:
        # For ZeRO 3, whose loader takes settings of Adam from here: it finds none, and leaves the engine's as they are.
        state = {"state": {0: {_STEP: shards[0].states[0][_STEP]}}, "param_groups": [{}]}
        torch.save({OPTIMIZER_STATE_DICT: state}, out / _PARAMETERS / _GLOBAL_STATE)


def load_universal(engine: deepspeed.DeepSpeedEngine, universal: Path, ep_size: int) -> None:
    """Restore parameters, masters, moments and step counts, nothing else; all ranks take part.

    Args:
        engine: fresh, of any topology.
        universal: what `convert` wrote.
        ep_size: of the engine.
    """
    # A rank looks at its slices of the experts only.
    with serialization.patch("load.mmap", True):  # type: ignore[attr-defined]
        if engine.zero_optimization_partition_weights():
            _load_partitioned(engine.optimizer, universal)
        else:
            _load_whole(engine.optimizer, universal, ep_size)


def _load_partitioned(optimizer: Any, universal: Path) -> None:
    """Into ZeRO 3."""
    optimizer.checkpoint_event_prologue()
    optimizer.load_hp_checkpoint_state_from_checkpoint_dir_stage3(str(universal))
    for state in optimizer.state.values():
        state[_STEP] = state[_STEP].clone()  # was one tensor for all groups
    optimizer.checkpoint_event_epilogue()


def _load_whole(optimizer: Any, universal: Path, ep_size: int) -> None:
    """Into ZeRO 1 or 2."""
    ep_rank = torch.distributed.get_rank() % ep_size
    # ZeRO 1 in bf16 is another class of DeepSpeed's.
    weights_of = optimizer.bit16_groups if hasattr(optimizer, "bit16_groups") else optimizer.bf16_groups
    for group, weights in zip(optimizer.param_groups, weights_of, strict=True):
        folders = [universal / _PARAMETERS / optimizer.param_names[weight] for weight in weights]
        for weight, folder in zip(weights, folders, strict=True):
            if weight._hp_mapping is not None:
                weight.load_hp_checkpoint_state(str(folder), 0, 1, ep_rank=ep_rank, ep_size=ep_size)
        (flat,) = group["params"]
        map_to_flat_opt_states(flat, weights, optimizer.state, _MOMENTS)
        # Also where the rank's part of the group is only padding.
        optimizer.state[flat][_STEP] = torch.load(folders[0] / f"{_STEP}.pt", mmap=False)
    optimizer.update_lp_params()


def _load_buffers(model: nn.Module, weights: Path) -> None:
    with safe_open(weights, "pt") as file:
        for name, value in model.state_dict(keep_vars=True).items():
            if not isinstance(value, nn.Parameter):
                value.copy_(file.get_tensor(name))


@dataclass
class _Piece:
    """Where a rank's piece of a parameter is: its place in the flat tensors of one group."""

    group: int
    start: int
    numel: int


@dataclass
class _Shard:
    """What one rank saved.

    Args:
        pieces: by the name of the parameter.
        masters: of each group, flat.
        states: of the optimizer, by group: moments, flat, and step.
        experts: groups whose parameters are spread over expert-parallel ranks.
    """

    pieces: dict[str, _Piece]
    masters: Sequence[Tensor]
    states: Mapping[int, Mapping[str, Tensor]]
    experts: set[int]

    def read(self, name: str, state: str) -> Tensor:
        """The piece of one of the states of a parameter, flat."""
        piece = self.pieces[name]
        flat = self.masters[piece.group] if state == _MASTER else self.states[piece.group][state]
        return flat.narrow(0, piece.start, piece.numel)


def _write_parameter(target: Path, name: str, shape: Sequence[int], shards: Sequence[_Shard], ep_size: int) -> None:
    """Put one parameter together from the pieces of all ranks; `shape` is what each rank has of it."""
    target.mkdir(parents=True)
    first = next(shard for shard in shards if name in shard.pieces)
    group = first.pieces[name].group
    is_expert = group in first.experts
    slices = ep_size if is_expert else 1
    content, whole_shape = {CAT_DIM: 0}, list(shape)
    if is_expert:
        whole_shape[0] *= ep_size
        content |= {EP_IS_EXPERT_PARAM: True, EP_NUM_EXPERTS: whole_shape[0]}
    # Ranks r, r + ep_size, ... have pieces of the same experts.
    in_order = [shard for rank in range(slices) for shard in shards[rank::slices] if name in shard.pieces]
    for state in (_MASTER, *_MOMENTS):
        whole = torch.cat([shard.read(name, state) for shard in in_order])
        torch.save({**content, PARAM: whole.view(whole_shape)}, target / f"{state}.pt")
    torch.save(first.states[group][_STEP], target / f"{_STEP}.pt")


def _open_shards(
    folder: Path, parallel: Mapping[str, Any], ranks: int
) -> tuple[dict[str, Sequence[int]], list[_Shard]]:
    """Shapes of the parameters as each rank has them, by name, and what the ranks saved, in their order."""
    partitioned = parallel["zero_stage"] == 3
    model = _map(folder / f"{'zero_pp_rank_0_' if partitioned else ''}mp_rank_00_model_states.pt")
    groups, shards = model[PARAM_SHAPES], []
    prefix = "bf16_" if parallel["precision"] == "bf16" else ""
    for rank in range(ranks):
        saved = _map(folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")[OPTIMIZER_STATE_DICT]
        shards.append(_partitioned_shard(saved, groups) if partitioned else _shard(saved))
    return {name: shape for group in groups for name, shape in group.items()}, shards


def _shard(saved: Mapping[str, Any]) -> _Shard:
    """Of ZeRO 1 or 2: groups are cut into equal parts, anywhere within a parameter."""
    pieces = {
        name: _Piece(group, place.start, place.numel)
        for group, places in enumerate(saved[PARAM_SLICE_MAPPINGS])
        for name, place in places.items()
    }
    adam = saved[BASE_OPTIMIZER_STATE]
    return _Shard(pieces, saved[SINGLE_PARTITION_OF_FP32_GROUPS], adam["state"], _expert_groups(adam))


def _partitioned_shard(saved: Mapping[str, Any], groups: Sequence[Mapping[str, Sequence[int]]]) -> _Shard:
    """Of ZeRO 3: each parameter is cut into equal parts, the last ones padded."""
    pieces = {}
    for group, (shapes, partition) in enumerate(zip(groups, saved["ds_zero_partition_groups"], strict=True)):
        start = 0
        for name, shape in shapes.items():
            numel = prod(shape)
            size = ceil(numel / partition["partition_count"])
            before = size * partition["partition_rank"]
            pieces[name] = _Piece(group, start, max(0, min(size, numel - before)))
            start += size
    adam = saved[OPTIMIZER_STATE_DICT]
    return _Shard(pieces, saved[FP32_FLAT_GROUPS], adam["state"], _expert_groups(adam))


def _expert_groups(adam: Mapping[str, Any]) -> set[int]:
    return {index for group in adam[PARAM_GROUPS] if group.get("moe") for index in group["params"]}


def _map(path: Path) -> dict[str, Any]:
    """Content of one of DeepSpeed's files, its tensors left on disk until they are looked at."""
    try:
        return read_state(path, map_location="cpu", mmap=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} lacks {path.name}: copy the whole checkpoint") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): copy it again, or use another checkpoint") from error
