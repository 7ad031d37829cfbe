"""`python -m benchmarks.gpu` where there is no GPU: whether it runs at all, and what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import durations, figures_of, peak_of, preset_for_one, slices_of
from benchmarks.synthetic import synthetic_slice
from data_pipeline.errors import UsageError
from hmoe_ds.config_checks import check_config
from hmoe_ds.config_parser import load_config
from hmoe_ds.model.size import flops_per_molecule

ROOT = Path(__file__).parents[2]
# Without what a GPU machine may lack: all of these imports fail.
ALONE = (
    "import sys; sys.modules.update(dict.fromkeys(['deepspeed', 'rdkit', 'jsonargparse', 'mlflow', 'datasets']));"
    "import benchmarks.gpu; benchmarks.gpu.main()"
)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ALONE, *words], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("with_data", [False, True])
def test_a_smoke_run_on_the_cpu(with_data, dataset):
    before = set((ROOT / "docs" / "results").iterdir())
    data = ["--data", str(dataset)] if with_data else []
    done = run("--device", "cpu", "--preset", "tiny_cpu", "--steps", "2", "--peak-tflops", "0.1", *data)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    (model,) = result["models"]
    assert result["device"] == "cpu"
    assert model["molecules_per_second"] == pytest.approx(model["molecules_per_step"] / model["step_seconds"])
    assert model["mfu"] == pytest.approx(model["tflops_per_second"] / 0.1)
    assert 100 < model["molecules_per_step"] <= 128
    assert set((ROOT / "docs" / "results").iterdir()) == before


def test_without_a_gpu_it_says_so_in_one_line():
    done = run()
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("benchmarks.gpu: error: no CUDA device here")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["tiny_cpu", "small_1gpu", "base_8gpu"])
def test_presets_are_read_as_a_run_reads_them(name):
    config, whole = preset_for_one(name), load_config(["--config", name])
    check_config(config)
    assert (config.model, config.router, config.optim) == (whole.model, whole.router, whole.optim)
    gpus = whole.parallel.ep_size
    assert config.data.molecules_per_step == whole.data.molecules_per_step // gpus


def test_synthetic_molecules_are_whole():
    part = synthetic_slice(10, atoms=25, rings=3, mask_ratio=0.2, seed=0)
    batch = part.batch
    assert (batch.num_molecules, batch.num_atoms, batch.num_bonds) == (10, 250, 270)
    assert (batch.molecule_N[batch.edge_index_2M[0]] == batch.molecule_N[batch.edge_index_2M[1]]).all()
    assert torch.equal(batch.edge_index_2M[:, ::2], batch.edge_index_2M[:, 1::2].flip(0))
    bonds = {tuple(sorted(pair)) for pair in batch.edge_index_2M[:, ::2].t().tolist()}
    assert len(bonds) == 270
    assert len(batch.scaffold_key_B.unique()) == 3
    assert len(batch.mol_key_B2.unique(dim=0)) == 10
    assert 0 < part.masks.atom_N.float().mean() < 0.4


def test_figures_are_of_whole_steps():
    config = preset_for_one("tiny_cpu")
    slices = slices_of(config, "")
    molecules = sum(part.batch.num_molecules for part in slices)
    figures = figures_of(config, slices, seconds=2.0, peak_flops=1e9)
    flops = flops_per_molecule(config, 25, 27).total * molecules
    assert figures["mfu"] == pytest.approx(flops / 2.0 / 1e9)
    assert figures["molecules_per_second"] == molecules / 2


def test_every_step_has_its_duration():
    calls = []
    found = durations(lambda: calls.append(1), 4, torch.device("cpu"))
    assert len(found) == len(calls) == 4


def test_a_peak_is_given_or_known(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert peak_of(cpu, None) is None
    assert peak_of(cpu, 0.5) == 0.5e12
    for name, tflops in (("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA L40S", 362)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_of(gpu, None) == tflops * 1e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Abacus 3000")
    with pytest.raises(UsageError, match="--peak-tflops"):
        peak_of(gpu, None)
