"""Exports: dtypes, without heads, of older versions, larger than the memory allows."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data_pipeline.molecules.encode import encode_rows
from hmoe_ds.config import MoleculeHeads, RouterConfig
from hmoe_ds.downstream.inference import infer
from hmoe_ds.model.description import Description, ModelFormatError, read_description
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.model.pretrained import write_pretrained
from hmoe_ds.model.tensor_file import replace_tensors
from tests.limited_files import limited_files
from tests.small_model import MODEL, ROUTER
from tests.unit.downstream.test_splits import nci

ROOT = Path(__file__).parents[3]
SMILES = nci(50)


@pytest.fixture(scope="module")
def molecules():
    return encode_rows(SMILES, SMILES).batch


def embeddings(model, molecules):
    return torch.from_numpy(infer(model, molecules, "cpu").embedding_XW)


def test_an_encoder_alone_embeds_the_same_and_has_no_heads(exported, molecules, tmp_path):
    model = HMoEModel.from_pretrained(exported)
    alone = HMoEModel(MODEL, ROUTER, heads=None)
    alone.load_state_dict({name: value for name, value in model.state_dict().items() if name in alone.state_dict()})
    alone.save_pretrained(tmp_path / "alone")
    again = HMoEModel.from_pretrained(tmp_path / "alone")
    assert again.heads is None
    assert not [name for name in load_file(tmp_path / "alone" / "model.safetensors") if "head" in name]
    assert torch.equal(embeddings(again, molecules), embeddings(model, molecules))
    assert read_description(tmp_path / "alone").heads is None
    assert read_description(exported).heads == MoleculeHeads()


def test_others_may_read_an_export_as_any_other_file(exported, tmp_path):
    umask = os.umask(0o027)
    try:
        HMoEModel.from_pretrained(exported).save_pretrained(tmp_path / "again")
    finally:
        os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "again").iterdir()}
    assert modes == dict.fromkeys(("model.safetensors", "config.json", "README.md"), 0o640)


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path):
    path = tmp_path / "weights.safetensors"
    replace_tensors(path, {"a": torch.arange(3)})
    path.chmod(0o400)
    replace_tensors(path, {"a": torch.arange(4)})
    assert path.stat().st_mode & 0o200
    before = path.read_bytes()
    with limited_files(100), pytest.raises(OSError, match=r"weights\.safetensors"):
        replace_tensors(path, {"a": torch.arange(1000)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_export_of_the_first_version_loads(exported, molecules, tmp_path):
    """As it was written before there were exports without heads."""
    description = json.loads((exported / "config.json").read_text())
    old = {**description, "format_version": 1}
    (tmp_path / "config.json").write_text(json.dumps(old))
    (tmp_path / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes())
    model = HMoEModel.from_pretrained(tmp_path)
    assert model.heads == MoleculeHeads()
    assert torch.equal(embeddings(model, molecules), embeddings(HMoEModel.from_pretrained(exported), molecules))
    (tmp_path / "config.json").write_text(json.dumps({**old, "molecule_heads": None}))
    with pytest.raises(ModelFormatError, match="molecule_heads None"):
        HMoEModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_half_precision_stays_near(dtype, error, molecules, tmp_path):
    model = HMoEModel(MODEL, ROUTER, seed=1).eval()
    parameters = {name for name, _ in model.named_parameters()}
    state = {name: value.to(dtype) if name in parameters else value for name, value in model.state_dict().items()}
    write_pretrained(tmp_path, state, Description(MODEL, ROUTER, MoleculeHeads(), {}))
    half = HMoEModel.from_pretrained(tmp_path)
    assert half.dtype == dtype
    assert half.encoder.scaffold_gate.route_bias.dtype == torch.float32
    # Near where routing is the same: a choice between two experts that are as good may fall the other way.
    distances = (embeddings(half, molecules) - embeddings(model, molecules)).norm(dim=1)
    assert distances.median() < error * embeddings(model, molecules).norm(dim=1).median()


@pytest.mark.parametrize("form", ["hard", "soft", "flat"])
def test_experts_in_the_file_compute_the_same(form, molecules, tmp_path):
    router = RouterConfig(**{**ROUTER.__dict__, "form": form})
    HMoEModel(MODEL, router, seed=3).save_pretrained(tmp_path)
    expected = embeddings(HMoEModel.from_pretrained(tmp_path), molecules)
    mapped = HMoEModel.from_pretrained(tmp_path, experts="file")
    torch.testing.assert_close(embeddings(mapped, molecules), expected, rtol=1e-5, atol=1e-6)
    moved = mapped.double()  # as to a device: the experts stay what they were
    assert moved.encoder.moe_layers()[0].executor.experts.w1.dtype == torch.float32
    assert moved.dtype == torch.float64
    torch.testing.assert_close(embeddings(moved, molecules), expected, rtol=1e-4, atol=1e-5)


def test_a_copy_tells_where_the_weights_come_from(tmp_path):
    told = {
        "step": 7,
        "standardize": False,
        "molecules": 1234,
        "sources": [{"name": "a|b.smi", "rows": 10, "licence": "CC BY-SA 3.0"}],
        "validation": {"validation_loss": 0.25},
    }
    HMoEModel(MODEL, ROUTER).save_pretrained(tmp_path / "one", told)
    HMoEModel.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert read_description(tmp_path / "two").training == told
    card = (tmp_path / "two" / "README.md").read_text()
    for words in ("7 steps, on 1,234 molecules", r"| a\|b.smi | 10 | CC BY-SA 3.0 |", "| 0.25 |", "16 |"):
        assert words in card
    assert "not noted" in (save_untold(tmp_path / "three") / "README.md").read_text()


def save_untold(folder):
    HMoEModel(MODEL, ROUTER).save_pretrained(folder)
    return folder


LARGE = """
import os, re, sys
import torch
from data_pipeline.molecules.encode import encode_rows
from hmoe_ds.downstream.inference import infer
from hmoe_ds.model.hmoe import HMoEModel

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

folder, experts, *limited = sys.argv[1:]
molecules = encode_rows(["c1ccccc1CCO"], ["x"]).batch
for group in limited:  # what was taken before does not count
    open(group + "/cgroup.procs", "w").write(str(os.getpid()))
before = anonymous()
model = HMoEModel.from_pretrained(folder, experts=experts)
infer(model, molecules, "cpu")
print(anonymous() - before)
"""


@pytest.fixture(scope="module")
def large_model(tmp_path_factory):
    """More than 200 MB, nearly all of it experts."""
    folder = tmp_path_factory.mktemp("large")
    router = RouterConfig(groups=4, experts=64, expert_size=2048, shared_size=16, gate_size=8)
    HMoEModel(MODEL.__class__(**{**MODEL.__dict__, "hidden_size": 64}), router).save_pretrained(folder)
    assert (folder / "model.safetensors").stat().st_size > 200e6
    return folder


@pytest.fixture
def at_most_100_mb():
    """A control group of the kernel with so little memory that the large model does not fit; needs root."""
    folders = {Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes", Path("/sys/fs/cgroup"): "memory.max"}
    for parent, limit in folders.items():
        group = parent / f"hmoe_ds_test_{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / limit).exists():
            (group / limit).write_text(str(100 << 20))
            yield group
            group.rmdir()
            return
        group.rmdir()
    pytest.skip("needs root and a memory controller")


def run_large(*arguments):
    command = [sys.executable, "-c", LARGE, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_experts_in_the_file_take_no_memory_of_the_process(large_model):
    """Pages of a mapped file, which the system may drop, are not what counts: only memory of the process's own is."""
    size = (large_model / "model.safetensors").stat().st_size
    taken = {}
    for experts in ("memory", "file"):
        done = run_large(large_model, experts)
        assert done.returncode == 0, done.stderr
        taken[experts] = int(done.stdout.splitlines()[-1])
    assert taken["memory"] > 0.9 * size
    assert taken["file"] < 0.2 * size


def test_a_model_larger_than_the_memory_that_the_kernel_allows(large_model, at_most_100_mb):
    killed = run_large(large_model, "memory", at_most_100_mb)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = run_large(large_model, "file", at_most_100_mb)
    assert done.returncode == 0, done.stderr


def test_damage_is_told(exported, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    with safe_open(exported / "model.safetensors", framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del weights["encoder.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        ModelFormatError, match=r"encoder\.norm\.weight is missing in one, floating \[16\] in the other"
    ):
        HMoEModel.from_pretrained(tmp_path)
