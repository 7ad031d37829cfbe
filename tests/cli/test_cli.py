"""The commands as a user runs them: prepare, inspect, pretrain through the launcher, export, embed."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from hmoe_ds.downstream.embed import embed_batch
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.training.launching.node import free_port
from tests.distributed.harness import SMALL
from tests.faults.processes import processes_of, wait_until

ROOT = Path(__file__).parents[2]
SMILES = ["CCO", "c1ccccc1", "CC(=O)Oc1ccccc1C(=O)O", "C1CCCCC1N", "CN1C=NC2=C1C(=O)N(C(=O)N2C)C"]


def hmoe(*arguments, expect=0):
    """Run a command; -> (parsed JSON of the last line or None, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "-m", "hmoe_ds.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
    )
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    result = json.loads(done.stdout.splitlines()[-1]) if "--json" in arguments and expect == 0 else None
    return result, done.stdout, done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory, dataset):
    """A run of two steps on two expert-parallel ranks, with MLflow, and its export."""
    folder = tmp_path_factory.mktemp("run")
    settings = SMALL | {"data.path": dataset, "run.out": folder / "run", "run.steps": 2, "run.mlflow": "true"}
    settings |= {"parallel.ep_size": 2}
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    result, _, _ = hmoe("pretrain", "--num_ranks", 2, "--json", *words)
    assert result["steps"] == 2
    hmoe("export", folder / "run", folder / "model")
    return folder


def test_an_exported_model_is_registered_with_the_run_that_trained_it(run, tmp_path, monkeypatch):
    shutil.copy(run / "run" / "mlflow.db", tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    result, _, _ = hmoe("export", run / "run", tmp_path / "model", "--register", "tiny", "--json")
    checkpoint = json.loads((run / "run" / "checkpoints" / "step00000002" / "checkpoint.json").read_text())
    trained_by = checkpoint["mlflow_run"]  # None when MLflow had not answered by the only checkpoint
    exported = json.loads((tmp_path / "model" / "config.json").read_text())
    assert exported["training"]["mlflow_run"] == trained_by
    assert result["registered"] == {"name": "tiny", "version": 1, "uri": "models:/tiny/1", "mlflow_run": trained_by}


def test_prepare_makes_a_dataset_that_opens(tmp_path):
    (tmp_path / "some.smi").write_text("\n".join(f"{s} id{i}" for i, s in enumerate(SMILES)) + "\nnonsense bad\n")
    (tmp_path / "more.csv").write_text("name,smiles\nx,CCCl\ny,OCC\n")
    result, said, _ = hmoe(
        "prepare", tmp_path / "some.smi", tmp_path / "more.csv", "--out", tmp_path / "out", "--workers", 2, "--json"
    )
    assert result["counts"]["read"] == 8
    assert result["counts"]["duplicates"] == 1
    assert result["counts"]["rejected"] == {"syntax": 1}
    assert "rejected    1 syntax (not a SMILES)\n" in said
    opened = datasets.load_from_disk(str(tmp_path / "out"))
    assert opened["train"].num_rows + opened["validation"].num_rows == 6
    rejects = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert [(reject["row"], reject["text"]) for reject in rejects] == [(5, "nonsense")]

    (tmp_path / "new.smi").write_text("CCO old\nCCCCN new\n")
    result, out, _ = hmoe("prepare", tmp_path / "new.smi", "--out", tmp_path / "out", "--append", "--json")
    assert "2 read = 1 written + 1 duplicates + 0 excluded + 0 rejected" in out
    assert (result["appended"]["read"], result["counts"]["read"]) == (2, 10)
    _, out, _ = hmoe("inspect", tmp_path / "out")
    assert "nonsense" not in out
    shard = next((tmp_path / "out" / "train").glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[-20] ^= 1
    shard.write_bytes(bytes(content))
    hmoe("inspect", tmp_path / "out")
    _, out, _ = hmoe("inspect", "--verify", tmp_path / "out", expect=1)
    assert f"{shard.parent.name}/{shard.name}: the content is not what was written" in out
    shard.write_bytes(bytes(content[:-1]))
    _, out, _ = hmoe("inspect", tmp_path / "out", expect=1)
    assert f"{shard.name}: {len(content) - 1} bytes, expected {len(content)}" in out


def test_prepare_with_targets_and_a_run_that_wants_them(hmoe_here, tmp_path):
    (tmp_path / "some.smi").write_text("\n".join(SMILES) + "\n")
    prepare = ["prepare", tmp_path / "some.smi", "--workers", 1, "--validation-fraction", 0, "--json"]
    estimated = [hmoe_here(*prepare, "--out", tmp_path / "x", "--dry-run", *words)[0] for words in ([], ["--targets"])]
    assert estimated[1]["shard_bytes"] > estimated[0]["shard_bytes"] + 5 * 20 * 4
    result, out, _ = hmoe_here(*prepare, "--out", tmp_path / "with", "--targets")
    assert "targets     fingerprint of 1024 bins, 20 descriptors" in out
    assert result["splits"]["train"]["descriptors"][0]["name"] == "MolWt"
    assert len(datasets.load_from_disk(str(tmp_path / "with"))["train"][0]["descriptors"]) == 20
    hmoe_here(*prepare, "--out", tmp_path / "without")
    _, _, err = hmoe_here(*prepare, "--out", tmp_path / "without", "--targets", "--append", expect=2)
    assert "was prepared with targets False, not True" in err
    paths = f"[{tmp_path / 'with'}, {tmp_path / 'without'}]"
    words = ["--config", "tiny_cpu", "--run.out", tmp_path / "run", "--objective.descriptor_weight", 0.5]
    _, _, err = hmoe_here("pretrain", *words, "--data.path", paths, expect=2)
    assert f"{tmp_path / 'without'} was prepared without targets: prepare it again with `hmoe prepare --targets`" in err


def test_prepare_dry_run_writes_nothing(hmoe_here, tmp_path):
    (tmp_path / "some.smi").write_text("\n".join(f"{s} id{i}" for i, s in enumerate(SMILES)) + "\nnonsense bad\n")
    result, out, _ = hmoe_here("prepare", tmp_path / "some.smi", "--out", tmp_path / "out", "--dry-run", "--json")
    assert (result["rows"], result["exact"]) == (6, True)
    assert result["sources"][0]["rejected"] == {"syntax": 1}
    assert "some.smi: smiles" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exclude", "{tmp}/none.csv"], "none.csv"),
        (["--append"], "out"),
        (["--out", "{tmp}/some.smi"], "a file; expected a folder"),
        (["--smiles-column", "mol"], "no column 'mol'"),
        (["--memory", "100MiB"], "memory is 100 MiB"),
        (["--staging", "{tmp}"], "leave it out"),
        (["--out", "{tmp}/other"], "prepared from other options"),
    ],
)
def test_a_dry_run_finds_mistakes(arguments, message, hmoe_here, tmp_path):
    (tmp_path / "some.smi").write_text("CCO\n")
    if "{tmp}/other" in arguments:
        hmoe_here("prepare", tmp_path / "some.smi", "--out", tmp_path / "other", "--max-atoms", 9, "--workers", 1)
    words = ["--out", tmp_path / "out", *(word.replace("{tmp}", str(tmp_path)) for word in arguments), "--dry-run"]
    _, _, err = hmoe_here("prepare", tmp_path / "some.smi", *words, expect=2)
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_dataset_of_another_rdkit_is_said_to_be(hmoe_here, tmp_path):
    (tmp_path / "some.smi").write_text("CCO\nCCN\n")
    arguments = ["prepare", tmp_path / "some.smi", "--out", tmp_path / "out", "--workers", 1]
    hmoe_here(*arguments)
    manifest = tmp_path / "out" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["versions"]["rdkit"] = "2019.03.1"
    manifest.write_text(json.dumps(content))
    _, out, _ = hmoe_here(*arguments)
    assert "nothing was done" in out
    assert "made with rdkit 2019.03.1, this is" in out


def test_embedding_nothing_readable_says_so_and_leaves_the_reasons(run, hmoe_here, tmp_path):
    (tmp_path / "garbage.smi").write_text("not-a-molecule\n")
    _, _, err = hmoe_here("embed", run / "model", tmp_path / "garbage.smi", "--out", tmp_path / "x.parquet", expect=1)
    assert "holds no readable molecule: see" in err
    assert not (tmp_path / "x.parquet").exists()
    assert pq.read_table(tmp_path / "x.rejects.parquet").column("reason").to_pylist() == ["syntax"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["prepare", "{tmp}/missing.smi", "--out", "{tmp}/out"], 2, "missing.smi"),
        (["prepare", "{tmp}/table.csv", "--out", "{tmp}/out", "--smiles-column", "nope"], 2, "nope"),
        (["prepare", "{tmp}/table.csv", "--out", "{tmp}/out", "--workers", "many"], 2, "'many' is not a positive"),
        (["prepare", "{tmp}/garbage.smi", "--out", "{tmp}/out"], 1, "garbage.smi"),
        (["prepare", "{tmp}/table.csv", "--out", "{tmp}/out", "--append"], 2, "no dataset here"),
        (["prepare", "{tmp}/table.csv", "--out", "{tmp}/out", "--append", "--overwrite"], 2, "not allowed with"),
        (
            ["prepare", "{tmp}/table.csv", "--out", "s3://bucket/data", "--append"],
            2,
            "is a URL; append to a copy",
        ),
        (["inspect", "{tmp}"], 2, "hmoe prepare"),
        (["export", "{tmp}", "{tmp}/model"], 2, "holds no checkpoint"),
        (["embed", "{tmp}", "nci5k", "--out", "{tmp}/x.parquet"], 2, "no exported model"),
        (["pretrain", "--config", "tiny_cpu", "--run.out", "{tmp}/run"], 2, "data.path is not set"),
        (["pretrain", "--config", "tiny_cpu", "--data.path", "{tmp}"], 2, "run.out is not set"),
        (["pretrain", "--config", "tiny_cpu", "--data.path", "{tmp}", "--run.out", "{tmp}/r"], 2, "hmoe prepare"),
        (["pretrain", "--confg", "tiny_cpu"], 2, "--confg"),
        (["pretrain", "--config", "base_8gpu", "--dry-run", "--num_ranks", "4"], 2, "parallel.ep_size is 8"),
        (["pretrain", "--config", "tiny_cpu", "--dry-run", "--data.path", "{tmp}"], 2, "hmoe prepare"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_mistakes_end_with_one_line_and_the_right_code(arguments, code, message, hmoe_here, tmp_path):
    (tmp_path / "table.csv").write_text("id,smiles\n1,CCO\n")
    (tmp_path / "garbage.smi").write_text("not-a-molecule\nstill-not\n")
    _, out, err = hmoe_here(*(word.replace("{tmp}", str(tmp_path)) for word in arguments), expect=code)
    assert message in err
    assert "Traceback" not in err + out


def test_a_mistake_is_the_exit_code_of_the_process(tmp_path):
    _, out, err = hmoe("inspect", tmp_path, expect=2)
    assert err.startswith("hmoe inspect: error: ")
    assert err.count("\n") == 1
    assert not out


def test_pretrain_refuses_ranks_that_do_not_fit(dataset, hmoe_here, tmp_path):
    arguments = ["--config", "tiny_cpu", "--data.path", dataset, "--run.out", tmp_path / "run"]
    _, _, err = hmoe_here("pretrain", "--num_ranks", 3, "--parallel.ep_size", 2, *arguments, expect=2)
    assert "does not divide the number of ranks 3" in err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_needs_neither_data_nor_gpus_and_starts_nothing(hmoe_here):
    result, out, _ = hmoe_here("pretrain", "--config", "large_multinode", "--num_ranks", 32, "--dry-run", "--json")
    assert result["ranks"] == 32
    assert result["parameters"]["total"] > 9e9
    assert "memory per rank in GiB" in out
    result, _, _ = hmoe_here("pretrain", "--config=base_8gpu", "--dry-run", "--json")
    assert result["ranks"] == 8


def test_a_run_leaves_metrics_config_and_mlflow(run):
    lines = [json.loads(line) for line in (run / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all("loss" in line for line in lines)
    assert "validation_loss" in lines[-1]
    assert (run / "run" / "config.yaml").is_file()

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{run / 'run' / 'mlflow.db'}")
    logged = client.search_runs([client.get_experiment_by_name("hmoe_ds").experiment_id])
    assert len(logged) == 1
    assert logged[0].data.params["parallel.ep_size"] == "2"
    assert [entry.step for entry in client.get_metric_history(logged[0].info.run_id, "loss")] == [1, 2]


def test_inspect_of_a_run_its_checkpoint_and_its_model(run, hmoe_here):
    result, out, _ = hmoe_here("inspect", run / "run", "--verify", "--json")
    assert (result["kind"], result["state"], result["step"], result["steps"]) == ("run", "done", 2, 2)
    assert result["checkpoints"][-1]["topology"]["ranks"] == result["checkpoints"][-1]["topology"]["ep_size"] == 2
    assert result["losses"]["loss"] > 0
    assert result["validation"]["step"] == 2
    assert out.splitlines()[0] == f"run         {run / 'run'}: done"
    checkpoint, _, _ = hmoe_here("inspect", run / "run" / "checkpoints", "--verify", "--json")
    model, out, _ = hmoe_here("inspect", run / "model", "--json")
    assert (checkpoint["kind"], model["kind"]) == ("checkpoint", "model")
    assert result["parameters"] == checkpoint["parameters"] == model["parameters"]
    assert checkpoint["trained"] == model["trained"]
    assert model["trained"]["step"] == 2
    weights = next((run / "run" / "checkpoints" / checkpoint["name"]).glob("experts-*"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    hmoe_here("inspect", run / "run")
    _, out, _ = hmoe_here("inspect", run / "run", "--verify", expect=1)
    assert f"{weights.name} is damaged" in out
    weights.write_bytes(content)


@pytest.mark.slow
def test_the_deepspeed_launcher_runs_the_loop_itself(run, dataset, tmp_path):
    """As on a cluster: `deepspeed --module hmoe_ds.training.loop`, here with the configuration that a run left."""
    config = run / "run" / "config.yaml"
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    command += ["--module", "hmoe_ds.training.loop", "--config", config, "--run.out", tmp_path / "again"]
    subprocess.run(command, check=True, cwd=ROOT, timeout=240, capture_output=True)
    first, again = (
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run / "run", tmp_path / "again")
    )
    assert first == again


def test_embed_writes_what_the_model_computes(run, tmp_path):
    source = tmp_path / "library.csv"
    source.write_text("name,smiles\n" + "".join(f"m{i},{s}\n" for i, s in enumerate(SMILES)) + "m5,notamolecule\n")
    result, out, _ = hmoe("embed", run / "model", source, "--out", tmp_path / "e.parquet", "--json")
    assert (result["molecules"], result["rejected"], result["reasons"]) == (5, 1, {"syntax": 1})
    assert "1 rows could not be read as molecules: 1 syntax (not a SMILES)" in out
    table = pq.read_table(tmp_path / "e.parquet")
    assert table["source_id"].to_pylist() == [f"m{i}" for i in range(5)]
    rejects = pq.read_table(result["rejects"]).to_pylist()
    assert [(reject["row"], reject["text"]) for reject in rejects] == [(5, "notamolecule")]

    from data_pipeline.molecules.encode import encode_rows

    model = HMoEModel.from_pretrained(run / "model")
    assert result["dimensions"] == model.config.hidden_size
    alone = [embed_batch(model, encode_rows([s], ["x"]).batch, "cpu")[0] for s in SMILES]
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), np.array(alone), rtol=1e-5, atol=1e-5)


def test_embed_standardises_unless_told_not_to(run, hmoe_here, tmp_path):
    (tmp_path / "salt.smi").write_text("CC(=O)[O-].[Na+] acetate\n")
    for switch, smiles in ((), "CC(=O)O"), (("--no-standardize",), "CC(=O)[O-].[Na+]"):
        hmoe_here("embed", run / "model", tmp_path / "salt.smi", "--out", tmp_path / "e.parquet", *switch)
        assert pq.read_table(tmp_path / "e.parquet")["smiles"].to_pylist() == [smiles]


def test_exported_experts_are_those_of_all_ranks(run):
    model = HMoEModel.from_pretrained(run / "model")
    fresh = HMoEModel(model.config, model.router, seed=0)
    for trained, initial in zip(model.encoder.moe_layers(), fresh.encoder.moe_layers(), strict=True):
        moved = (trained.executor.experts.w1 - initial.executor.experts.w1).abs().amax(dim=(1, 2))
        # Two small steps from the same initialisation: near it, and every expert that saw atoms has moved.
        assert moved.max() < 0.1
        assert (moved > 0).all()
    assert torch.isfinite(model.encoder.scaffold_gate.route_bias).all()


def test_an_interrupt_ends_the_launcher_and_all_ranks(dataset, tmp_path):
    marker = tmp_path / "run"  # in the command line of every process of this run
    words = [f"--{name}={value}" for name, value in (SMALL | {"data.path": dataset, "run.out": marker}).items()]
    command = [sys.executable, "-m", "hmoe_ds.cli", "pretrain", "--num_ranks", "2", *words, "--run.steps=100000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        metrics = marker / "metrics.jsonl"
        wait_until(lambda: metrics.is_file() and metrics.stat().st_size > 0, "there is a line of metrics")
        assert len(processes_of(marker)) >= 4  # the command, the launcher, two ranks
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 128 + signal.SIGINT
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not processes_of(marker), "all have ended")
