"""Sizes from the configuration alone, against the built model: parameters, FLOPs, activations."""

import functools
import math
import re
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hmoe_ds.config import DataConfig
from hmoe_ds.config_checks import check_topology
from hmoe_ds.config_parser import load_config, preset_names
from hmoe_ds.data.mixture import open_mixture
from hmoe_ds.data.plan import BatchPlan
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.model.size import (
    PackedSize,
    activation_bytes,
    count_by_part,
    count_parameters,
    flops_per_molecule,
    molecules_per_slice,
    training_flops,
)
from hmoe_ds.moe.balance import measure_load
from hmoe_ds.moe.grouped import FLOP_FORMULAS
from hmoe_ds.objectives.molecule import set_descriptor_scale
from hmoe_ds.objectives.total import PretrainingTask, count_normalizers
from hmoe_ds.training.feed import rank_slice
from hmoe_ds.training.recording.throughput import step_work
from tests.presets import shrunken

# Where the parameters of each part live.
PARTS = {
    "embedding": r"encoder\.(atom|bond)_embedding\.",
    "lower": r"encoder\.lower\.",
    "scaffold_gate": r"encoder\.scaffold_gate\.",
    "atom_gates": r"encoder\.upper\.\d+\.feed_forward\.gate\.",
    "shared_experts": r"encoder\.upper\.\d+\.feed_forward\.shared\.",
    "experts": r"encoder\.upper\.\d+\.feed_forward\.executor\.experts\.",
    "upper": r"encoder\.(upper\.\d+\.(messages|norm|feed_forward\.w\d)|norm)\.",
    "heads": r"(atom|bond|fingerprint|descriptor)_head\.",
}
VARIANTS = {
    "fp32": [],
    "bf16": ["--parallel.precision=bf16"],
    "two groups, several dense blocks": [
        *("--router.groups_per_molecule=2", "--router.experts_per_atom=3", "--model.upper_blocks=4"),
        *("--model.moe_every=2", "--model.lower_blocks=1", "--router.expert_size=32", "--model.dense_size=80"),
    ],
    "no shared expert": ["--router.shared_size=0"],
    "heads of molecules": ["--objective.fingerprint_weight=0.1", "--objective.descriptor_weight=0.1"],
    "heads that see the mean": [
        *("--objective.fingerprint_weight=0.1", "--objective.descriptor_weight=0.1", "--objective.readout=mean")
    ],
    "descriptors, bf16": ["--objective.descriptor_weight=0.1", "--parallel.precision=bf16"],
    "experts that split": ["--router.experts_at_start=4"],
    "experts that split, recomputed": ["--router.experts_at_start=4", "--parallel.activation_checkpointing=true"],
    "recomputed": ["--parallel.activation_checkpointing=true"],
    "recomputed, no shared expert": ["--parallel.activation_checkpointing=true", "--router.shared_size=0"],
}


def meta_model(config) -> HMoEModel:
    with torch.device("meta"):
        return model_of(config)


def model_of(config) -> HMoEModel:
    return HMoEModel(config.model, config.router, heads=config.objective.molecule_heads)


def count(config):
    return count_parameters(config.model, config.router, config.objective.molecule_heads)


@pytest.mark.parametrize("overrides", [*preset_names(), *VARIANTS])
def test_parameters_are_those_of_the_built_model(overrides):
    words = VARIANTS.get(overrides, ["--config", overrides])
    config = load_config(words)
    model, counted = meta_model(config), count_by_part(count(config))
    built = {
        part: sum(weight.numel() for name, weight in model.named_parameters() if re.match(pattern, name))
        for part, pattern in PARTS.items()
    }
    assert {part: counted[part] for part in PARTS} == built
    assert counted["total"] == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("variant", ["fp32", "heads of molecules"])
def test_a_model_on_the_meta_device_is_the_model_without_its_values(variant):
    config = load_config(VARIANTS[variant])
    built = model_of(config).state_dict()
    assert {name: (value.shape, value.dtype) for name, value in meta_model(config).state_dict().items()} == {
        name: (value.shape, value.dtype) for name, value in built.items()
    }


@pytest.mark.parametrize("preset", preset_names())
def test_an_atom_passes_as_much_as_a_model_with_only_its_chosen_experts(preset):
    """The rest of the experts cost nothing but their keys in the gate."""
    config = load_config(["--config", preset])
    active = count(config).active
    chosen = config.router.experts_per_atom
    words = ["--router.groups=1", "--router.groups_per_molecule=1", f"--router.experts={chosen}"]
    model = meta_model(load_config(["--config", preset, *words, "--parallel.ep_size=1"]))
    layers = len(model.encoder.moe_layers())
    unchosen_keys = layers * (config.router.experts - chosen) * config.router.gate_size
    unchosen_centers = (config.router.groups - 1) * config.router.gate_size
    assert active == sum(weight.numel() for weight in model.parameters()) + unchosen_keys + unchosen_centers


@pytest.mark.parametrize(
    ("preset", "active", "total"),
    [("base_8gpu", 100e6, 1e9), ("large_multinode", 300e6, 10e9)],
)
def test_presets_have_the_size_they_promise(preset, active, total):
    counted = count(load_config(["--config", preset]))
    assert counted.active == pytest.approx(active, rel=0.2)
    assert counted.total == pytest.approx(total, rel=0.2)


def test_the_small_preset_is_between_10_and_30_million_active_parameters():
    counted = count(load_config(["--config", "small_1gpu"]))
    assert 10e6 < counted.active < 30e6
    assert counted.total == pytest.approx(100e6, rel=0.2)


@pytest.fixture(scope="module")
def store(dataset_with_targets):
    return open_mixture(DataConfig(path=str(dataset_with_targets)), "train", targets=True)


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def case(request, store):
    """A configuration, its loss as a function without arguments, and the real molecules it is computed on."""
    config = load_config(["--data.molecules_per_step=120", *request.param])
    return config, *task_on_a_slice(config, store)


def slices_of_a_step(config, store):
    """The slices of the first step on one rank."""
    plan, views = (
        BatchPlan(store, config.data, config.optim.accumulation, seed=0),
        config.objective.contrast_bare_scaffold,
    )
    return [rank_slice(store, whole, config.objective.mask_ratio, 0, 0, 1, views) for whole in plan.next_step()]


def task_on_a_slice(config, store):
    """The loss of the first slice on one rank, as the engine sees it; and the slice."""
    part = slices_of_a_step(config, store)[0]
    model = model_of(config)
    if config.parallel.precision == "bf16":
        for weight in model.parameters():
            weight.data = weight.data.bfloat16()
    set_descriptor_scale(model, store)
    model.encoder.recompute = config.parallel.activation_checkpointing
    task, norm = PretrainingTask(model, config.objective), count_normalizers([part], "cpu")
    return task, functools.partial(task, part, norm), part.batch


def packed_size(batch) -> PackedSize:
    return PackedSize(batch.num_molecules, batch.num_atoms, batch.num_bonds)


def test_flops_are_those_that_torch_counts(case):
    config, _, compute, batch = case
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        losses, _ = compute()
        forward = counter.get_total_flops()
        losses.total.backward()
    molecules = batch.num_molecules
    flops = flops_per_molecule(config, batch.num_atoms / molecules, batch.num_bonds / molecules)
    # The heads see as many hidden atoms and bonds as were drawn, not exactly the ratio.
    assert flops.forward * molecules == pytest.approx(forward, rel=0.005)
    assert flops.backward * molecules == pytest.approx(counter.get_total_flops() - forward, rel=0.005)


# Beside those above, what only the step itself can tell: how many experts are taken, what bare scaffolds there are.
STEPS = VARIANTS | {
    "as many experts as they need": ["--router.top_p=0.7"],
    "bare scaffolds": ["--objective.contrast_bare_scaffold=true", "--parallel.activation_checkpointing=true"],
    "additive, few hidden": ["--router.form=additive", "--router.experts_per_atom=2", "--objective.mask_ratio=0.02"],
}


@pytest.mark.parametrize("variant", STEPS)
def test_flops_of_a_step_are_those_that_torch_counts(variant, store):
    words = ["--data.molecules_per_step=120", "--optim.accumulation=3", *STEPS[variant]]
    config = load_config(words)
    task, _, _ = task_on_a_slice(config, store)
    slices = slices_of_a_step(config, store)
    norm, routed = count_normalizers(slices, "cpu"), 0.0
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        for part in slices:
            losses, encoding = task(part, norm)
            losses.total.backward()
            load = measure_load(encoding.scaffold, encoding.atoms, part.batch.molecule_N, config.router)
            routed += load.atoms_LE.sum().item()
    found = training_flops(config, step_work(norm, routed, config)).total
    assert found == pytest.approx(counter.get_total_flops(), rel=1e-4)


def test_activations_are_what_autograd_keeps(case):
    config, task, compute, batch = case
    parameters = {value.untyped_storage().data_ptr() for value in task.state_dict().values()}
    storages, alive = {}, []

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        compute()
    estimate = activation_bytes(config, packed_size(batch), batch.num_molecules)
    assert estimate.kept == pytest.approx(sum(storages.values()), rel=0.05)


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made under this mode held at once."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        output = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self._known:
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage):
        self._known.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, size):
        self.live -= size


def test_activations_at_the_worst_moment_are_not_underestimated(case):
    config, task, compute, batch = case
    task.zero_grad()
    with LiveBytes() as memory:
        losses, encoding = compute()
        del encoding
        losses.total.backward()
    gradients = sum(weight.grad.numel() * weight.grad.element_size() for weight in task.parameters())
    estimate = activation_bytes(config, packed_size(batch), batch.num_molecules).total
    # At the worst moment some of the gradients of parameters exist already.
    assert memory.peak - gradients <= 1.05 * estimate
    assert estimate <= 1.35 * memory.peak


def test_the_tightest_budget_bounds_a_slice():
    budgets = ["--data.molecules_per_step=100", "--data.atoms_per_step=2000", "--data.bonds_per_step=3000"]
    config = load_config([*budgets, "--optim.accumulation=2"])
    assert molecules_per_slice(config, atoms=10, bonds=10) == 50
    assert molecules_per_slice(config, atoms=25, bonds=10) == 40
    assert molecules_per_slice(config, atoms=10, bonds=100) == 15


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_shrunken_preset_fits_its_ranks_and_has_a_loss_and_gradients(preset, ranks, store):
    config = load_config(["--config", preset, *shrunken(preset, ranks)])
    whole = load_config(["--config", preset])
    assert (config.router.groups, config.router.experts) == (whole.router.groups, whole.router.experts)
    check_topology(config, ranks)
    task, compute, _ = task_on_a_slice(config, store)
    losses, encoding = compute()
    losses.total.backward()
    # A fresh model knows nothing of the 119 elements.
    assert float(losses.atom) == pytest.approx(math.log(119), rel=0.5)
    assert torch.isfinite(losses.total)
    assert all(torch.isfinite(weight.grad).all() for weight in task.parameters())
    used = torch.cat([routing.choices_NK.flatten() for routing in encoding.atoms]).unique()
    assert len(used) > config.router.experts_per_atom


@pytest.mark.parametrize("preset", preset_names())
def test_experts_of_a_group_share_a_rank(preset):
    config = load_config(["--config", preset])
    assert config.router.groups % config.parallel.ep_size == 0
