"""Datasets, checkpoints and models that come from others: another version, another model, or files that want to run."""

import contextlib
import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.manifest import FileRecord, Manifest
from data_pipeline.schema import MOLECULE_SCHEMA, shard_schema
from hmoe_ds.cli import main
from hmoe_ds.config import ConfigError, RunConfig
from hmoe_ds.config_parser import load_config
from hmoe_ds.data.mixture import open_mixture
from hmoe_ds.data.store import ShardStore
from hmoe_ds.downstream.export import export_checkpoint
from hmoe_ds.model.checkpoint_record import LIST_FILE, CheckpointError
from hmoe_ds.model.description import ModelFormatError
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.model.tensor_file import write_tensors
from hmoe_ds.model.weight_files import SHARED_FILE, experts_file
from hmoe_ds.training.checkpoints import topology
from hmoe_ds.training.checkpoints.checkpoint_files import CheckpointFiles
from hmoe_ds.training.checks.preflight import check_run
from hmoe_ds.training.run_folder import begin_run
from tests.distributed.harness import arguments
from tests.made_up import list_files, make_up_checkpoint


def run_of(config: RunConfig, dataset: Path) -> Path:
    """The folder of a run that has done two steps on one rank, as far as checks and exports look at it."""
    molecules = open_mixture(config.data, "train")
    begin_run(config, 1, molecules.fingerprint, [store.extent for store in molecules.stores])
    out = Path(config.run.out)
    folder = make_up_checkpoint(out, 2, config.to_dict(), molecules.fingerprint)
    experts: dict[str, torch.Tensor] = {}
    shared: dict[str, torch.Tensor] = {}
    for name, value in HMoEModel(config.model, config.router).state_dict().items():
        (experts if ".experts." in name else shared)[name] = value
    write_tensors(folder / SHARED_FILE, shared)
    write_tensors(folder / experts_file(0, 1), experts)
    list_files(folder)
    return out


@pytest.fixture(scope="module")
def original(dataset, tmp_path_factory) -> Path:
    """A dataset, a run and a model, side by side."""
    folder = tmp_path_factory.mktemp("original")
    shutil.copytree(dataset, folder / "data")
    run = run_of(load_config(arguments(folder / "run", folder / "data")), folder / "data")
    export_checkpoint(run, folder / "model")
    (folder / "some.smi").write_text("CCO one\n")
    (folder / "run" / "mlflow.json").write_text("{}")
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_an_export_replaces_nothing_but_an_export(folder):
    run, notes = folder / "run", folder / "notes"
    export_checkpoint(run, folder / "model")
    (folder / "model" / "config.json").unlink()  # an export that was interrupted
    export_checkpoint(run, folder / "model")
    for name, content in {"README.md": "mine", "config.json": "{}"}.items():
        notes.mkdir()
        (notes / name).write_text(content)
        with pytest.raises(UsageError, match=f"has a {name} of something else, which would be replaced"):
            export_checkpoint(run, notes)
        assert [path.name for path in notes.iterdir()] == [name]
        assert (notes / name).read_text() == content
        shutil.rmtree(notes)
    checkpoint = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    for out in (checkpoint, checkpoint / "model"):
        with pytest.raises(UsageError, match="is in the folder of"):
            export_checkpoint(run, out)


def config_in(folder: Path, **overrides) -> RunConfig:
    return load_config(arguments(folder / "run", folder / "data", **overrides))


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    if (path.parent / LIST_FILE).exists():
        list_files(path.parent)


def refused(kind, call, *parts: str) -> None:
    with pytest.raises(kind) as error:
        call()
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


# A dataset of another version.


def replace_shard(data: Path, change) -> str:
    """Change the content of the first shard, with a manifest that fits; -> its name."""
    record = Manifest.load(data).splits["train"].shards[0]
    with pa.memory_map(str(data / record.file)) as file:
        batch = change(pa.ipc.open_stream(file).read_next_batch())
        with pa.OSFile(str(data / "new"), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
    (data / "new").rename(data / record.file)
    found = FileRecord.of(data, record.file)
    entry = {"bytes": found.bytes, "blake2b": found.blake2b}
    edit(data / "manifest.json", lambda content: content["splits"]["train"]["shards"][0].update(entry))
    return record.file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch.drop_columns(["complexity"]), "complexity: no such column, expected float"),
        (lambda batch: batch.append_column("more", batch.column("num_atoms")), "more: uint16, expected no such column"),
        (lambda batch: batch.select(batch.schema.names[::-1]), "order: "),
        (
            lambda batch: batch.set_column(9, "num_atoms", batch.column("num_atoms").cast("int32")),
            "num_atoms: int32, expected uint16",
        ),
    ],
)
def test_a_shard_with_other_columns(change, message, folder):
    shard = replace_shard(folder / "data", change)
    refused(ConfigError, lambda: check_run(config_in(folder), 1), "data.path: ", shard, message, "`hmoe prepare` again")
    for path in (folder / "data", f"file://{folder / 'data'}"):
        store = open_mixture(config_in(folder, data__path=path, data__cache_dir=folder / "cache").data, "train")
        refused(UsageError, lambda store=store: store.shard(0), str(path), shard, message)


def test_a_shard_without_the_targets_that_the_manifest_promises(folder):
    edit(folder / "data" / "manifest.json", lambda content: content["options"].update(targets=True))
    refused(ConfigError, lambda: check_run(config_in(folder), 1), "fingerprint_bins: no such column")


def longer(batch, column, values):
    return batch.set_column(batch.schema.get_field_index(column), MOLECULE_SCHEMA.field(column), values)


@pytest.mark.parametrize(
    "change",
    [
        lambda batch: batch.slice(0, 7),
        lambda batch: longer(batch, "num_atoms", pa.array([9999] * batch.num_rows, pa.uint16())),
        lambda batch: longer(batch, "num_bonds", pa.array([9999] * batch.num_rows, pa.uint16())),
        lambda batch: longer(batch, "scaffold_mask", pa.array([[1]] * batch.num_rows, pa.list_(pa.uint8()))),
        lambda batch: longer(batch, "bond_index", pa.array([[0, 1]] * batch.num_rows, pa.list_(pa.uint16()))),
        lambda batch: longer(batch, "scaffold_key", pa.array([None] * batch.num_rows, pa.uint64())),
    ],
)
def test_rows_that_do_not_fit(change, folder):
    shard = replace_shard(folder / "data", change)
    refused(PipelineError, lambda: ShardStore(folder / "data", "train").shard(0), shard, "its rows do not fit")


def test_a_shard_that_points_outside_of_its_buffers(folder):
    record = Manifest.load(folder / "data").splits["train"].shards[0]
    path = folder / "data" / record.file
    with pa.memory_map(str(path)) as file:
        last = pa.ipc.open_stream(file).read_next_batch().column("scaffold_mask").offsets[-3:]
    written = bytearray(path.read_bytes())
    where = written.index(b"".join(int(offset.as_py()).to_bytes(4, "little") for offset in last))
    written[where + 8 : where + 12] = (2**31 - 1).to_bytes(4, "little")
    path.write_bytes(written)
    refused(PipelineError, lambda: ShardStore(folder / "data", "train").shard(0), record.file)


def test_a_dataset_of_another_version_from_the_command(folder, capsys):
    edit(folder / "data" / "manifest.json", lambda content: content.update(format_version=2))
    assert main(["pretrain", *arguments(folder / "new", folder / "data")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hmoe pretrain: error: data.path: ")
    assert "format version 2, expected 3" in line


# A checkpoint and an export of another model.


def test_a_checkpoint_of_another_model_in_the_folder(folder):
    check_run(config_in(folder), 1)
    record = folder / "run" / "checkpoints" / "step00000002" / "checkpoint.json"
    intact = record.read_text()
    edit(record, lambda content: content["config"]["model"].update(hidden_size=24))
    message = "step00000002 is a checkpoint of another model, with model.hidden_size 24, not 16"
    refused(ConfigError, lambda: check_run(config_in(folder), 1), message, "give another run.out")
    record.write_text(intact)
    edit(record, lambda content: content["config"]["objective"].update(fingerprint_weight=0.5))
    refused(ConfigError, lambda: check_run(config_in(folder), 1), "with fingerprint head True, not False")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["config"]["model"].update(depth=3), "model.depth is not known: use the version"),
        (lambda content: content["config"].update(extra={}), "the section 'extra' is not known"),
        (lambda content: content["config"].update(model=[1]), "model [1] is not known"),
        (lambda content: content["config"]["model"].update(hidden_size=10**9), "model.hidden_size is 1000000000"),
        (lambda content: content["config"]["model"].update(hidden_size="16"), "is '16': set it to a whole number"),
        (lambda content: content["config"]["data"].update(path=5), "data.path is 5: set it to list[str] | str"),
        (lambda content: content["config"]["data"].update(path=["a", 5]), "data.path is ['a', 5]: set it to"),
        (lambda content: content["config"]["data"].update(weights=["1"]), "data.weights is ['1']: set it to"),
        (lambda content: content["config"]["probe"].update(tables=3), "probe.tables is 3: set it to"),
        (lambda content: content["config"]["parallel"].update(ep_size=0), "parallel.ep_size is 0"),
        (lambda content: content["config"]["run"].update(mlflow=1), "run.mlflow is 1: set it to true or false"),
        (lambda content: content["config"]["router"].update(form="tree"), "router.form is 'tree': set it to one of"),
        (lambda content: content["config"]["probe"].update(tables=[{"path": "a"}]), "is not complete"),
        (lambda content: content.pop("config"), "lacks config"),
        (lambda content: content.update(config=3), "3 is no configuration"),
        (lambda content: content.update(format_version=9), "has format_version 9, expected 2"),
    ],
)
def test_a_record_of_a_checkpoint_that_makes_no_sense(change, message, folder):
    edit(folder / "run" / "checkpoints" / "step00000002" / "checkpoint.json", change)
    refused(CheckpointError, lambda: export_checkpoint(folder / "run", folder / "exported"), "checkpoint.json", message)
    refused(CheckpointError, lambda: check_run(config_in(folder), 1), "checkpoint.json", message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["model"].update(hidden_size=32), "are of different models"),
        (lambda content: content["model"].update(lower_blocks=1000), "are of different models"),
        (lambda content: content["model"].update(hidden_size=-1), "model.hidden_size is -1"),
        (lambda content: content["model"].update(depth=3), "model.depth is not known"),
        (lambda content: content["router"].update(form="tree"), "router.form is 'tree'"),
        (lambda content: content["router"].update(groups=3), "not divisible by router.groups 3"),
        (lambda content: content.pop("router"), "router None is not known"),
        (lambda content: content.update(molecule_heads={"toxicity": True}), "molecule_heads {'toxicity': True}"),
        (lambda content: content.update(molecule_heads={"readout": ["sum"]}), "molecule_heads {'readout': ['sum']}"),
        (lambda content: content.update(format_version=None), "format_version None"),
    ],
)
def test_a_description_of_another_model(change, message, folder):
    edit(folder / "model" / "config.json", change)
    refused(ModelFormatError, lambda: HMoEModel.from_pretrained(folder / "model"), "config.json", message)


def test_weights_that_are_no_numbers_of_a_model(folder):
    state = HMoEModel.from_pretrained(folder / "model").state_dict()
    state["encoder.norm.weight"] = state["encoder.norm.weight"].to(torch.int8)
    write_tensors(folder / "model" / "model.safetensors", state)
    refused(
        ModelFormatError, lambda: HMoEModel.from_pretrained(folder / "model"), "encoder.norm.weight is torch.int8 [16]"
    )


# Files that run code when they are read by what can.


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def contents(mark: Path) -> dict[str, bytes]:
    """What runs code in a careless reader: a pickle, a file of torch.save, YAML, and Arrow's old Python extensions."""
    saved = io.BytesIO()
    torch.save(Payload(mark), saved)
    return {
        "pickle": pickle.dumps(Payload(mark)),
        "torch": saved.getvalue(),
        "yaml": f"!!python/object/apply:builtins.open [{mark}, w]\n".encode(),
        "arrow": arrow_with(mark),
        "parquet": parquet_with(mark),
    }


def extension_table(mark: Path) -> pa.Table:
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Payload(mark)),
    }
    fields = [field.with_metadata(metadata) for field in shard_schema(targets=False)]
    return pa.table([pa.array([], field.type) for field in fields], schema=pa.schema(fields))


def arrow_with(mark: Path) -> bytes:
    sink, table = io.BytesIO(), extension_table(mark)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def parquet_with(mark: Path) -> bytes:
    sink = io.BytesIO()
    pq.write_table(extension_table(mark), sink)
    return sink.getvalue()


def use(folder: Path, part: str) -> None:
    """What reads a dataset (`data`), a run or a model; whether it fails is another matter, but never in a crash."""
    data, run, model, some = (str(folder / name) for name in ("data", "run", "model", "some.smi"))
    as_before = ["--validation-fraction=0.15", "--shard-rows=300"]
    commands = {
        "data": [
            ["inspect", data, "--verify"],
            ["inspect", f"file://{data}", "--verify"],
            ["prepare", data, "--out", str(folder / "again")],
            ["prepare", some, "--out", data, "--append", *as_before],
        ],
        "run": [
            ["inspect", run, "--verify"],
            ["inspect", f"{run}/checkpoints", "--verify"],
            ["export", run, str(folder / "exported")],
            ["pretrain", "--dry-run", f"--config={run}/config.yaml"],
        ],
        "model": [["inspect", model], ["embed", model, some, "--out", str(folder / "embedding.parquet")]],
    }
    for command in commands[part]:
        assert main([*command, *(["--workers=1"] if command[0] == "prepare" else [])]) in (0, 1, 2), command
    with contextlib.suppress(PipelineError):
        check_run(config_in(folder, run__mlflow="true"), 1)
        mixture = open_mixture(config_in(folder).data, "train")
        for shard in range(sum(store.num_shards for store in mixture.stores)):
            mixture.shard(shard)


def test_the_payloads_work(tmp_path):
    mark = tmp_path / "executed"
    pickle.loads(contents(mark)["pickle"])
    assert mark.exists()
    mark.unlink()
    torch.load(io.BytesIO(contents(mark)["torch"]), weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("part", ["data", "run", "model"])
@pytest.mark.parametrize("kind", ["pickle", "torch", "yaml", "arrow", "parquet"])
def test_no_file_of_others_is_executed(kind, part, original, tmp_path, capfd):
    mark = tmp_path / "executed"
    files = [file.relative_to(original) for file in sorted((original / part).rglob("*")) if file.is_file()]
    shards = [file for file in files if file.suffix == ".arrow"]
    tables = [file for file in files if file.suffix == ".parquet"]
    texts = [file for file in files if file not in shards and file not in tables]
    # Of shards the first is as good as the others. No reader of text knows what a table is.
    chosen = [*shards[:1], *tables, *([] if kind in ("arrow", "parquet") else texts)]
    for number, file in enumerate(chosen):  # one at a time, so that one that is refused hides none behind it
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        (folder / file).write_bytes(contents(mark)[kind])
        use(folder, part)
        assert not mark.exists(), file
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["a.smi", "a.csv", "a.sdf", "a.parquet", "a.arrow", "a.smi.gz", "a.pkl", "a.npy"])
def test_no_source_is_executed(name, tmp_path, capsys):
    mark = tmp_path / "executed"
    for number, content in enumerate(contents(mark).values()):
        (tmp_path / name).write_bytes(content)
        assert main(["prepare", str(tmp_path / name), "--out", str(tmp_path / f"{number}"), "--workers=1"]) in (1, 2)
        assert not mark.exists()


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_file_of_the_training_engine_is_not_executed(kind, tmp_path, monkeypatch):
    """In a checkpoint whose list fits it, as who makes one up can see to. Also where DeepSpeed itself reads it."""
    mark, file = tmp_path / "executed", tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    file.write_bytes(contents(mark)[kind])
    with pytest.raises(CheckpointError, match=r"is no file that a run writes .*: use a checkpoint that you trust"):
        CheckpointFiles().load(str(file))
    with pytest.raises(CheckpointError, match=r"optim_states.* is damaged"):
        topology._map(file)
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # as `init_distributed` does
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=False)
    assert not mark.exists()


def test_ranks_force_safe_loading():
    code = (
        "import os; from hmoe_ds.training.engine import init_distributed; init_distributed(); "
        "print(os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("1"), done.stderr
