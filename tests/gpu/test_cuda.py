"""The same on one CUDA device: `make test-gpu`. Skipped where there is none, and in `make test`, which hides it."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hmoe_ds.config import ModelConfig, RouterConfig
from hmoe_ds.data.batch import gather
from hmoe_ds.data.store import ShardStore
from hmoe_ds.downstream.export import export_checkpoint
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.moe.experts import Experts
from hmoe_ds.moe.grouped import GroupedProducts, LoopedProducts, feed_forward_by
from tests.distributed.harness import train
from tests.distributed.layouts import Trained, check_agreement, check_bf16, layout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; see `make test-gpu`")

FP32 = dict([layout("1 rank", "zero 1"), layout("1 rank", "zero 3 spread", "accumulation", "recompute")])
BF16 = dict([layout("1 rank", zero, precision="bf16") for zero in ("zero 1", "zero 2", "zero 3", "zero 2 offload")])


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    return Trained(dataset, tmp_path_factory.mktemp("cuda"), FP32 | BF16)


@pytest.mark.parametrize("name", FP32)
def test_training_on_cuda_agrees_with_fp64_on_the_cpu(name, trained, tmp_path):
    check_agreement(trained, name, tmp_path)


@pytest.mark.parametrize("name", BF16)
def test_bf16_training_on_cuda_follows_fp64_on_the_cpu(name, trained, tmp_path):
    check_bf16(trained, name, tmp_path)


@pytest.mark.parametrize("counts", [[5, 0, 11, 1], [0, 0, 40, 0]])
def test_grouped_experts_equal_looped_ones(counts):
    experts = Experts(4, 32, 24, seed=0, layer=1).to("cuda", torch.bfloat16)
    x_ND = torch.randn(sum(counts), 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ends_E = torch.tensor(counts, device="cuda").cumsum(0)
    results = []
    for products in (GroupedProducts(ends_E), LoopedProducts(ends_E)):
        y_ND = feed_forward_by(products, x_ND, experts.w1, experts.w2, experts.w3)
        results.append((y_ND, *torch.autograd.grad(y_ND.square().sum(), [x_ND, *experts.parameters()])))
    for grouped, looped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, looped, rtol=0.02, atol=0.02)


def test_a_batch_through_pinned_memory_encodes_as_on_the_cpu(dataset):
    model = HMoEModel(ModelConfig(hidden_size=32), RouterConfig()).eval()
    store = ShardStore(dataset, "train")
    batch = gather(store, torch.arange(64).numpy())
    with torch.no_grad():
        expected = model.embed(batch)
        found = model.to("cuda").embed(batch.to("cuda")).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert F.cosine_similarity(found, expected).min() > 0.9999


def test_a_deterministic_run_on_cuda_resumes_bitwise(dataset, tmp_path):
    settings = {"run__deterministic": "true", "run__checkpoint_every": 2, "parallel__precision": "bf16"}
    whole = train(tmp_path / "whole", dataset, **settings, run__steps=4)
    train(tmp_path / "parts", dataset, **settings, run__steps=2, optim__decay_steps=4)
    train(tmp_path / "again", dataset, **settings, run__steps=4, optim__decay_steps=4)
    resumed = train(tmp_path / "parts", dataset, **settings, run__steps=4, optim__decay_steps=4)
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole]
    for name in ("parts", "again"):
        export_checkpoint(tmp_path / name, tmp_path / f"{name} model")
    first, second = (load_file(tmp_path / f"{name} model" / "model.safetensors") for name in ("parts", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
