"""The commands of chemists as they run them: embed, finetune, predict, evaluate; interrupted, and with messy tables."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from rdkit import Chem

from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.molecules.encode import encode_rows
from hmoe_ds.config import RouterConfig
from hmoe_ds.data.batch import gather
from hmoe_ds.data.store import BatchStore
from hmoe_ds.downstream.claim import claimed
from hmoe_ds.downstream.moleculenet import read_set
from hmoe_ds.downstream.predictor import load_predictor
from hmoe_ds.downstream.predictor_record import PredictorError, read_predictor
from hmoe_ds.downstream.worker_model import WorkerModel
from hmoe_ds.model.hmoe import HMoEModel
from tests.cli.test_cli import ROOT
from tests.small_model import MODEL, ROUTER
from tests.unit.downstream.test_splits import hu_split, nci

SMILES = nci(400)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """9,000 rows, so several chunks; some are no molecules."""
    path = tmp_path_factory.mktemp("library") / "library.csv"
    rows = [f"m{number},{SMILES[number % len(SMILES)]}" for number in range(9000)]
    rows[10], rows[8500] = "m10,nonsense", "m8500,"
    path.write_text("name,smiles\n" + "\n".join(rows) + "\n")
    return path


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def finished(work):
    return [path for path in work.rglob("results-*") if not path.name.endswith(".tmp")]


def test_embed_gives_the_same_bytes_with_more_workers_and_after_a_kill(exported, library, hmoe_here, tmp_path):
    whole, more, killed = (tmp_path / f"{name}.parquet" for name in ("whole", "more", "killed"))
    result, _, _ = hmoe_here("embed", exported, library, "--out", whole, "--workers", 1, "--json")
    assert (result["molecules"], result["rejected"], result["dimensions"]) == (8998, 2, 16)
    hmoe_here("embed", exported, library, "--out", more, "--workers", 3)
    assert more.read_bytes() == whole.read_bytes()
    assert not more.with_name("more.parquet.work").exists()

    command = [sys.executable, "-m", "hmoe_ds.cli", "embed", exported, library, "--out", killed, "--workers", "1"]
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    work = killed.with_name("killed.parquet.work")
    deadline = time.monotonic() + 240
    while not finished(work):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not killed.exists()
    before = len(finished(work))
    assert before < 3
    hmoe_here("embed", exported, library, "--out", killed, "--workers", 1)
    assert killed.read_bytes() == whole.read_bytes()
    assert not work.exists()


def test_embed_of_atoms_and_routing(exported, hmoe_here, tmp_path):
    (tmp_path / "m.smi").write_text("\n".join(SMILES[:30]) + "\n")
    files = (exported, tmp_path / "m.smi", "--out", tmp_path / "e.parquet")
    result, _, _ = hmoe_here("embed", *files, "--per-atom", "--routing", "--workers", 1, "--json")
    table = pq.read_table(tmp_path / "e.parquet")
    assert result["molecules"] == table.num_rows == 30
    model = HMoEModel.from_pretrained(exported)
    store = BatchStore(encode_rows(SMILES[:30], SMILES[:30]).batch)
    for row in range(30):
        batch = gather(store, np.array([row]))
        with torch.no_grad():
            encoding = model(batch)
        found = table.slice(row, 1).to_pylist()[0]
        np.testing.assert_allclose(found["atom_embeddings"], encoding.h_ND.numpy(), rtol=1e-4, atol=1e-5)
        assert found["group"] == encoding.scaffold.groups_BC[0, 0]
        assert found["novelty"] is None, "the model does not know what it is familiar with"
        for layer, atoms in enumerate(encoding.atoms):
            weight = dict.fromkeys(range(ROUTER.experts), 0.0)
            for choices, weights in zip(atoms.choices_NK.tolist(), atoms.weights_NK.tolist(), strict=True):
                for expert, value in zip(choices, weights, strict=True):
                    weight[expert] += value
            assert weight[found["experts"][layer]] == pytest.approx(max(weight.values()), rel=1e-5)


def test_embed_of_more_than_the_mean(exported, hmoe_here, tmp_path):
    (tmp_path / "m.smi").write_text("\n".join(SMILES[:30]) + "\n")
    files = (exported, tmp_path / "m.smi", "--workers", 1, "--json", "--out")
    hmoe_here("embed", *files, tmp_path / "atoms.parquet", "--per-atom")
    result, _, _ = hmoe_here("embed", *files, tmp_path / "e.parquet", "--readout", "mean+max+size")
    atoms = pq.read_table(tmp_path / "atoms.parquet").column("atom_embeddings").to_pylist()
    found = pq.read_table(tmp_path / "e.parquet").column("embedding").to_pylist()
    assert result["dimensions"] == 2 * MODEL.hidden_size + 1
    for embedding, states in zip(found, atoms, strict=True):
        expected = [*np.mean(states, axis=0), *np.max(states, axis=0), np.log(len(states) / 32)]
        np.testing.assert_allclose(embedding, expected, rtol=1e-4, atol=1e-5)
    # The same file with other options starts anew, whatever an interrupted command left.
    mean, _, _ = hmoe_here("embed", *files, tmp_path / "e.parquet", "--readout", "mean")
    assert mean["dimensions"] == MODEL.hidden_size
    assert len(pq.read_table(tmp_path / "e.parquet").column("embedding")[0]) == MODEL.hidden_size
    both = ("--per-atom", "--readout", "mean")
    _, _, error = hmoe_here("embed", *files, tmp_path / "x.parquet", *both, expect=2)
    assert "not allowed with argument --per-atom" in error


def write_table(path, count=300):
    """A property that a small model learns: whether there is a halogen; and a quantity with gaps."""
    lines = ["id,smiles,halogen,size,notes"]
    for number, text in enumerate(SMILES[:count]):
        size = "" if number % 5 == 0 else f"{len(text) / 10}"
        lines.append(f"{number},{text},{int('Cl' in text or 'Br' in text or 'F' in text)},{size},")
    lines[8] = "7,nonsense,1,2.0,"
    lines[9] = "8,CCCCCCCCCC,,,"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_finetune_and_predict(exported, hmoe_here, tmp_path):
    table = write_table(tmp_path / "t.csv")
    result, said, _ = hmoe_here("finetune", exported, table, "--target", "halogen", "--task", "classification",
                           "--split", "random", "--out", tmp_path / "out", "--seeds", 2, "--epochs", 8,
                           "--learning-rate", 0.005, "--layer-decay", 0.9, "--json")  # fmt: skip
    assert result["rows"]["all"] == 300
    assert result["rows"]["train"] + result["rows"]["validation"] + result["rows"]["test"] == 298
    assert result["left_out"]["no label"] == 1
    assert result["test"]["roc_auc"] > 0.6
    low, high = result["test"]["roc_auc_95"]
    assert low <= result["test"]["roc_auc"] <= high
    assert "test: roc_auc" in said

    rows = rows_of(tmp_path / "out" / "predictions.csv")
    assert len(rows) == 300
    assert rows[7]["reason"] != ""
    assert rows[7]["halogen_predicted"] == ""
    assert rows[8]["reason"] == "no label"
    assert {row["side"] for row in rows if not row["reason"]} == {"train", "validation", "test"}
    assert [row["source_id"] for row in rows] == [str(number) for number in range(300)]

    hmoe_here("predict", tmp_path / "out", table, "--out", tmp_path / "p.csv", "--workers", 1)
    predicted = rows_of(tmp_path / "p.csv")
    assert [int(row["row"]) for row in predicted] == list(range(300))
    for row, other in zip(rows, predicted, strict=True):
        assert (row["reason"] in ("", "no label")) == (other["reason"] == "")
        if not row["reason"]:
            assert float(row["halogen_predicted"]) == pytest.approx(float(other["halogen"]), abs=1e-5)
            assert float(row["halogen_deviation"]) == pytest.approx(float(other["halogen_deviation"]), abs=1e-5)
    assert min(float(row["halogen"]) for row in predicted if not row["reason"]) >= 0
    assert max(float(row["halogen_deviation"]) for row in predicted if not row["reason"]) > 0
    # A fine-tuned member is an encoder like any other.
    hmoe_here("embed", tmp_path / "out" / "member1", table, "--out", tmp_path / "e.parquet", "--workers", 1)
    hmoe_here("finetune", exported, table, "--target", "halogen", "--task", "classification", "--out", tmp_path / "out",
         expect=2)  # fmt: skip


def test_finetune_a_frozen_encoder_on_two_quantities_by_scaffold(exported, hmoe_here, tmp_path):
    table = write_table(tmp_path / "t.csv")
    what = (exported, table, "--target", "halogen,size", "--task", "regression", "--out", tmp_path / "out")
    result, said, _ = hmoe_here("finetune", *what, "--mode", "frozen", "--seeds", 2, "--epochs", 20, "--json")
    said = said.rpartition("\n{")[0]
    assert result["test"]["targets"] == 2
    # A mean over quantities in different units is not told.
    for name, scores in result["test"]["by_target"].items():
        assert f"  {name}: rmse {scores['rmse']:.3f} (95% " in said
    assert said.count("rmse") == 4
    rows = [row for row in rows_of(tmp_path / "out" / "predictions.csv") if not row["reason"]]
    texts = [row["smiles"] for row in rows]
    expected = hu_split(encode_rows(texts, texts).batch.column("smiles").to_pylist())
    for side, places in zip(("train", "validation", "test"), expected, strict=True):
        assert {rows[place]["side"] for place in places} == {side}
    assert not (tmp_path / "out" / "member1" / "model.safetensors").exists()
    predictor = load_predictor(tmp_path / "out")
    assert predictor.members[0].model.encoder is predictor.members[1].model.encoder
    weights = HMoEModel.from_pretrained(exported).state_dict()
    for name, value in predictor.members[0].model.encoder.state_dict().items():
        assert torch.equal(value, weights[name])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "nothing", "--task", "regression"], "has no column 'nothing'"),
        (["--target", 'size, "a, b"', "--task", "regression"], "has no column 'a, b'"),
        (["--target", '"a, b', "--task", "regression"], "put a name with a comma, a quote or a line break in double"),
        (["--target", "notes", "--task", "regression"], "no molecule with a label in 'notes'"),
        (["--target", "size", "--task", "classification"], "for quantities give --task regression"),
        (["--target", "size", "--task", "regression", "--smiles", "structure"], "no column 'structure'"),
        (["--target", "size", "--task", "regression", "--split", "column"], "--split-column COL go together"),
        (
            ["--target", "size", "--task", "regression", "--split", "column", "--split-column", "id"],
            "column 'id' has '1' in row 2: expected train, validation, test or an empty cell",
        ),
    ],
)
def test_what_cannot_be_learned_from_ends_with_one_line(words, message, exported, hmoe_here, tmp_path):
    table = write_table(tmp_path / "t.csv", 60)
    _, _, said = hmoe_here("finetune", exported, table, *words, "--out", tmp_path / "out", expect=2)
    assert message in said
    assert said.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", ","], "--target names no column"),
        (["--target", "size,size_deviation"], "more than one column 'size_deviation'"),
        (["--target", "size,reason"], "more than one column 'reason'"),
        (["--target", "size,source"], "more than one column 'source'"),
        (["--target", "size", "--split-seed", "-1"], "--split-seed is -1"),
        (["--target", "size", "--split-seed", "1"], "--split scaffold is the same whatever --split-seed"),
        (
            ["--target", "size", "--split", "column", "--split-column", "notes", "--split-seed", "1"],
            "--split column is the same whatever --split-seed",
        ),
        (["--target", "size", "--class-weights"], "--class-weights is for classes"),
        (["--target", "size", "--mode", "frozen", "--layer-decay", "0.8"], "--layer-decay is for layers that learn"),
        (["--target", "size", "--dropout", "2"], "--dropout is 2.0: expected a number from 0, below 1"),
    ],
)
def test_requests_that_make_no_sense(words, message, exported, hmoe_here, tmp_path):
    table = write_table(tmp_path / "t.csv", 60)
    _, _, said = hmoe_here(
        "finetune", exported, table, *words, "--task", "regression", "--out", tmp_path / "out", expect=2
    )
    assert message in said
    assert said.strip().count("\n") == 0


def test_a_target_without_both_classes_in_training_is_refused(exported, hmoe_here, tmp_path):
    lines = []
    for row, text in enumerate(SMILES[:60]):
        side = "train" if row < 40 else "validation" if row < 50 else "test"
        lines.append(f"{text},{side},{row % 2},{row % 2 if side == 'test' else ''}")
    (tmp_path / "t.csv").write_text("smiles,side,a,b\n" + "\n".join(lines) + "\n")
    what = (exported, tmp_path / "t.csv", "--target", "a,b", "--task", "classification", "--out", tmp_path / "out")
    _, _, said = hmoe_here("finetune", *what, "--split", "column", "--split-column", "side", expect=2)
    assert "leaves only one class, or no label, of 'b' for train" in said


def test_a_salt_is_on_the_side_of_its_base(exported, hmoe_here, tmp_path):
    bases = [f"C{'C' * length}N1CCCCC1" for length in range(20)] + [f"c1ccc(CN2CCCC2)cc1C{'C' * n}" for n in range(20)]
    salts = [text.replace("N1CCCCC1", "[NH+]1CCCCC1.[Cl-]") for text in bases[:20]]
    rows = [f"{text},{len(text)}" for text in [*bases, *salts]]
    (tmp_path / "t.csv").write_text("smiles,y\n" + "\n".join(rows) + "\n")
    hmoe_here("finetune", exported, tmp_path / "t.csv", "--target", "y", "--task", "regression", "--split", "random",
         "--conflicts", "keep", "--mode", "frozen", "--epochs", 1, "--out", tmp_path / "out")  # fmt: skip
    side = [row["side"] for row in rows_of(tmp_path / "out" / "predictions.csv")]
    assert side[:20] == side[40:]
    assert len(set(side)) == 3


def test_one_member_says_nothing_of_its_uncertainty(exported, hmoe_here, tmp_path):
    table = write_table(tmp_path / "t.csv", 80)
    hmoe_here("finetune", exported, table, "--target", "size", "--task", "regression", "--split", "random",
              "--mode", "frozen", "--epochs", 2, "--out", tmp_path / "out")  # fmt: skip
    (tmp_path / "two.sdf").write_text(2 * f"{Chem.MolToMolBlock(Chem.MolFromSmiles('C'))}$$$$\n")
    hmoe_here("predict", tmp_path / "out", tmp_path / "two.sdf", "--out", tmp_path / "p.csv", "--workers", 1)
    rows = rows_of(tmp_path / "p.csv")
    assert [row["smiles"] for row in rows] == ["C", "C"]  # of a mol block, which has many lines
    for row in [*rows, *rows_of(tmp_path / "out" / "predictions.csv")]:
        assert row["size_deviation"] == ""


def test_rows_are_told_apart_by_their_ids_and_read_in_the_format_given(exported, hmoe_here, tmp_path):
    lines = ["code\tstructure\ty", *(f"K{row}\t{text}\t{row}" for row, text in enumerate(SMILES[:60]))]
    lines[4] = lines[4].partition("\t")[2].join(["\t", ""])
    (tmp_path / "t.smi").write_text("\n".join(lines) + "\n")
    named = ("--smiles-column", "structure", "--id-column", "code")
    what = ("--target", "y", "--task", "regression", "--split", "random", "--mode", "frozen", "--epochs", 1)
    hmoe_here("finetune", exported, tmp_path / "t.smi", *what, *named, "--out", tmp_path / "out")
    files = (tmp_path / "out", tmp_path / "t.smi", "--out", tmp_path / "p.csv", "--workers", 1)
    hmoe_here("predict", *files, *named, "--format", "tsv")
    ids = [f"K{row}" for row in range(60)]
    ids[3] = "3"  # as it has none
    for table in (tmp_path / "out" / "predictions.csv", tmp_path / "p.csv"):
        assert [row["source_id"] for row in rows_of(table)] == ids
    hmoe_here("embed", exported, *files[1:3], tmp_path / "e.parquet", *named, "--format", "tsv", "--workers", 1)
    assert set(pq.read_table(tmp_path / "e.parquet").column("source_id").to_pylist()) <= set(ids)
    _, _, said = hmoe_here("predict", *files, "--format", "nonsense", expect=2)
    assert "nonsense" in said


def test_nothing_is_exported_where_the_rest_cannot_be_done(hmoe_here, tmp_path):
    for words, message in ((["--push", "a"], "'a' is no name"), (["--data", tmp_path / "none"], "none")):
        _, _, said = hmoe_here("export", tmp_path / "no run", tmp_path / "out", *words, expect=2)
        assert message in said
        assert "no run" not in said


def test_files_of_something_else_are_not_replaced(exported, hmoe_here, tmp_path):
    table = write_table(tmp_path / "t.csv", 60)
    for content in (b"", b"mine"):
        (tmp_path / "e.rejects.parquet").write_bytes(content)
        _, _, said = hmoe_here("embed", exported, table, "--out", tmp_path / "e.parquet", expect=2)
        assert "e.rejects.parquet, which is written beside it, holds something else" in said
        assert (tmp_path / "e.rejects.parquet").read_bytes() == content
    (tmp_path / "notes.md").write_text("mine")
    _, _, said = hmoe_here("evaluate", exported, "--data", tmp_path, "--out", tmp_path / "notes.json", expect=2)
    assert "notes.md, which its table would replace, is of something else" in said
    assert (tmp_path / "notes.md").read_text() == "mine"
    (tmp_path / "notes.md").write_text("| set | metric | of an evaluation whose JSON is gone |")
    _, _, said = hmoe_here("evaluate", exported, "--data", tmp_path, "--out", tmp_path / "notes.json", expect=2)
    assert "has none of the files" in said
    what = (exported, table, "--target", "size", "--task", "regression")
    _, _, said = hmoe_here("finetune", *what, "--out", exported / "tuned", expect=2)
    assert "tuned is in the folder of" in said


def test_finetune_goes_on_after_a_kill(exported, hmoe_here, tmp_path):
    table = write_table(tmp_path / "t.csv", 120)
    what = ("finetune", exported, table, "--target", "size", "--task", "regression", "--split", "random")
    what += ("--seeds", 3, "--epochs", 3)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    hmoe_here(*what, "--out", whole)
    command = [sys.executable, "-m", "hmoe_ds.cli", *what, "--out", killed]
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(killed.rglob("fit0-*.safetensors")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (killed / "predictor.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in killed.rglob("fit*.safetensors")}
    assert 1 <= len(kept) < 3
    # Other options have nothing to do with these fits, and leave them.
    _, _, said = hmoe_here(*what, "--learning-rate", 1e30, "--out", killed, expect=1)
    assert "lower --learning-rate" in said
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    _, _, progress = hmoe_here(*what, "--out", killed)
    assert "fit 1 of 3" not in progress
    assert "fit 3 of 3" in progress
    files = sorted(path.relative_to(whole) for path in whole.rglob("*"))
    assert sorted(path.relative_to(killed) for path in killed.rglob("*")) == files
    for file in files:
        if file.suffix in (".csv", ".safetensors"):
            assert (killed / file).read_bytes() == (whole / file).read_bytes(), file


def test_a_fit_that_is_kept_and_damaged(exported, hmoe_here, tmp_path, monkeypatch):
    table = write_table(tmp_path / "t.csv", 100)
    what = ("finetune", exported, table, "--target", "size", "--task", "regression", "--split", "random")
    what += ("--mode", "frozen", "--epochs", 2, "--out", tmp_path / "out")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("hmoe_ds.downstream.finetune.combine", interrupted)
        hmoe_here(*what, expect=128 + signal.SIGINT)
    (kept,) = (tmp_path / "out").rglob("fit0-*")
    kept.write_bytes(kept.read_bytes()[:-10])
    _, _, said = hmoe_here(*what, expect=2)
    assert f"{kept} is damaged" in said
    kept.unlink()
    hmoe_here(*what)
    assert not kept.parent.exists()


def elements_of(molecule):
    return sorted(atom.GetSymbol() for atom in molecule.GetAtoms())


def test_an_sdf_is_a_table_like_any_other(exported, hmoe_here, tmp_path):
    """With its properties as columns it gives what a CSV file with the same mol blocks gives."""
    rows = [row for row in rows_of(write_table(tmp_path / "t.csv", 120)) if row["smiles"] and row["size"]]
    with Chem.SDWriter(str(tmp_path / "t.sdf")) as sdf, (tmp_path / "blocks.csv").open("w", newline="") as file:
        blocks = csv.writer(file)
        blocks.writerow(["id", "molblock", "size"])
        for row in rows:
            molecule = Chem.MolFromSmiles(row["smiles"]) or Chem.MolFromSmiles("*")
            molecule.SetProp("_Name", row["id"])
            molecule.SetProp("size", row["size"])
            sdf.write(molecule)
            blocks.writerow([row["id"], Chem.MolToMolBlock(molecule), row["size"]])
    how = ("--target", "size", "--task", "regression", "--split", "random", "--epochs", 2, "--out")
    for name in ("t.sdf", "blocks.csv"):
        hmoe_here("finetune", exported, tmp_path / name, *how, tmp_path / f"of_{name}")
    found = rows_of(tmp_path / "of_t.sdf" / "predictions.csv")
    assert found == rows_of(tmp_path / "of_blocks.csv" / "predictions.csv")
    assert [row["source_id"] for row in found] == [row["id"] for row in rows]
    assert sum(not row["reason"] for row in found) > 80
    for row, given in zip(found, rows, strict=True):
        molecule = Chem.MolFromSmiles(given["smiles"])
        if molecule and "." not in given["smiles"]:  # standardisation moves charges, and leaves elements
            assert row["reason"] or elements_of(Chem.MolFromSmiles(row["smiles"])) == elements_of(molecule)
        assert row["reason"] or float(row["size"]) == float(given["size"])
    _, _, said = hmoe_here("finetune", exported, tmp_path / "t.sdf", "--target", "x", "--task", "regression",
                           "--out", tmp_path / "x", expect=2)  # fmt: skip
    assert "has no column 'x': name one of its columns, 'size'" in said


def test_a_diverging_fit_leaves_no_folder(exported, hmoe_here, tmp_path):
    table = write_table(tmp_path / "t.csv", 100)
    _, _, said = hmoe_here("finetune", exported, table, "--target", "size", "--task", "regression", "--split", "random",
                      "--learning-rate", 1e30, "--out", tmp_path / "out", expect=1)  # fmt: skip
    assert "lower --learning-rate" in said
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over_what_is_read(exported, hmoe_here, tmp_path):
    source = tmp_path / "m.parquet"
    pq.write_table(pa.table({"smiles": ["CCO"]}), source)
    before = source.read_bytes()
    _, _, said = hmoe_here("embed", exported, source, "--out", source, expect=2)
    assert "is the source itself" in said
    _, _, said = hmoe_here("embed", exported, source, "--out", exported / "model.safetensors", expect=2)
    assert "is in the folder of" in said
    assert source.read_bytes() == before


@pytest.mark.parametrize("name", ["e.csv", "e.txt", "e.parquet.gz"])
def test_embed_writes_no_parquet_under_the_name_of_another_format(name, exported, hmoe_here, tmp_path):
    _, _, said = hmoe_here("embed", exported, "nci5k", "--out", tmp_path / name, expect=2)
    assert "but parquet is written: give another name" in said


def test_predict_writes_no_csv_under_the_name_of_another_format(exported, hmoe_here, tmp_path):
    _, _, said = hmoe_here("predict", exported, "nci5k", "--out", tmp_path / "p.parquet", expect=2)
    assert "but csv is written: give another name" in said


def test_embed_tells_the_rows_of_several_files_apart(exported, hmoe_here, tmp_path):
    (tmp_path / "a.smi").write_text("CCO\nnonsense\nCCN\n")
    (tmp_path / "b.csv").write_text("smiles\nCCC\nCCO\n")
    hmoe_here("embed", exported, tmp_path / "[ab].*", "--out", tmp_path / "e.parquet", "--workers", 1)
    found = pq.read_table(tmp_path / "e.parquet", columns=["source", "row", "smiles"]).to_pylist()
    expected = [("a.smi", 0, "CCO"), ("a.smi", 2, "CCN"), ("b.csv", 0, "CCC"), ("b.csv", 1, "CCO")]
    assert [tuple(row.values()) for row in found] == expected


def test_a_kill_while_the_file_is_written_leaves_nothing_for_good(exported, hmoe_here, tmp_path):
    (tmp_path / "m.smi").write_text("CCO\nnonsense\n")
    words = ["embed", exported, tmp_path / "m.smi", "--out", tmp_path / "e.parquet", "--workers", "1"]
    program = """
import os
from hmoe_ds.cli import main
replace = os.replace
os.replace = lambda source, target: os._exit(9) if str(target).endswith("e.parquet") else replace(source, target)
main()
"""
    killed = subprocess.run([sys.executable, "-c", program, *map(str, words)], cwd=ROOT, timeout=240)
    assert killed.returncode == 9
    assert {path.name for path in tmp_path.iterdir()} == {"m.smi", "e.rejects.parquet", "e.parquet.work"}
    hmoe_here(*words)
    assert {path.name for path in tmp_path.iterdir()} == {"m.smi", "e.rejects.parquet", "e.parquet"}


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_the_rejects_are_not_written_over_what_is_read(form, exported, hmoe_here, tmp_path):
    source = tmp_path / "e.rejects.parquet"
    pq.write_table(pa.table({"smiles": ["CCO", "nonsense"]}), source)
    before = source.read_bytes()
    embed = ("embed", exported, form.format(source), "--workers", 1, "--out")
    _, _, said = hmoe_here(*embed, tmp_path / "e.parquet", expect=2)
    assert f"{source}, which is written beside it, is the source itself" in said
    (tmp_path / "links").mkdir()
    os.link(source, tmp_path / "links" / "x.rejects.parquet")
    hmoe_here(*embed, tmp_path / "links" / "x.parquet", expect=2)
    (tmp_path / "folders" / "x.rejects.parquet").mkdir(parents=True)
    _, _, said = hmoe_here(*embed, tmp_path / "folders" / "x.parquet", expect=2)
    assert "which is written beside it, is a folder" in said
    assert source.read_bytes() == before
    hmoe_here(*embed, tmp_path / "other.parquet")


def test_predicting_nothing_readable_says_so_and_why(exported, hmoe_here, tmp_path):
    table = pa.csv.read_csv(write_table(tmp_path / "t.csv", 100))
    pq.write_table(table, tmp_path / "t.parquet")
    what = (exported, tmp_path / "t.parquet", "--target", "size", "--task", "regression", "--out", tmp_path / "out")
    hmoe_here("finetune", *what, "--split", "random", "--mode", "frozen", "--epochs", 1)
    (tmp_path / "garbage.smi").write_text("not-a-molecule\n")
    _, _, said = hmoe_here("predict", tmp_path / "out", tmp_path / "garbage.smi", "--out", tmp_path / "p.csv", expect=1)
    assert "holds no readable molecule: see" in said
    assert "1 syntax (not a SMILES)" in said
    assert [row["reason"] for row in rows_of(tmp_path / "p.csv")] == ["syntax"]


def test_a_model_that_is_replaced_under_way_is_noticed(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "model")
    shared = WorkerModel.of(tmp_path / "model")
    shared.loaded()
    HMoEModel(MODEL, ROUTER, seed=7).save_pretrained(tmp_path / "model")
    with pytest.raises(PipelineError, match="has changed while it was used"):
        shared.loaded()


@pytest.mark.parametrize(
    "change",
    [
        {"standardize": None},
        {"targets": "y"},
        {"members": []},
        {"members": [{"head": "../member0", "encoder": "member0", "scale": {"mean_T": [0], "deviation_T": [1]}}]},
        {"members": [{"head": "member0", "encoder": "member0", "scale": {"mean_T": [0], "deviation_T": [0]}}]},
        {"members": [{"head": "member0", "encoder": "member0", "scale": {"mean_T": ["x"], "deviation_T": [1]}}]},
        {"members": [{"head": "member0", "encoder": "member0", "scale": {"mean_T": [None], "deviation_T": [1]}}]},
        {"readout": "sum"},
        {"format_version": 9},
    ],
)
def test_a_predictor_that_was_edited_is_refused(change, tmp_path):
    scale = {"mean_T": [0.0], "deviation_T": [1.0]}
    good = {"format_version": 2, "task": "regression", "targets": ["y"], "standardize": True, "readout": "mean",
            "members": [{"head": "member0", "encoder": "member0", "scale": scale}]}  # fmt: skip
    (tmp_path / "predictor.json").write_text(json.dumps(good))
    read_predictor(tmp_path)
    (tmp_path / "predictor.json").write_text(json.dumps(good | change))
    with pytest.raises(PredictorError, match=r"predictor\.json"):
        read_predictor(tmp_path)


def test_predict_needs_a_predictor(exported, hmoe_here, tmp_path):
    _, _, said = hmoe_here("predict", exported, "nci5k", "--out", tmp_path / "p.csv", expect=2)
    assert "hmoe finetune" in said


def test_evaluate_goes_on_where_it_was(exported, hmoe_here, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    smiles = SMILES[:160]
    labels = [(int("O" in text), int(len(text) > 20)) for text in smiles]
    lines = [
        f"{text},{one},{'' if number % 4 else other}"
        for number, (text, (one, other)) in enumerate(zip(smiles, labels, strict=True))
    ]
    (data / "tox21.csv").write_text("smiles,a,b\n" + "\n".join(lines) + "\n")
    (data / "esol.csv").write_text(
        "smiles,logSolubility\n" + "\n".join(f"{text},{len(text) / 10}" for text in smiles) + "\n"
    )
    dense = tmp_path / "dense"
    one = RouterConfig(groups=1, experts=1, expert_size=16, shared_size=0, gate_size=8)
    HMoEModel(MODEL, one, seed=1).save_pretrained(dense)
    words = ["evaluate", exported, "--data", data, "--out", tmp_path / "r.json", "--seeds", 1, "--epochs", 2,
             "--layer-decay", 0.8, "--arm", f"dense={dense}", "--json"]  # fmt: skip
    hmoe_here(*words, "--sets", "esol")
    before = json.loads((tmp_path / "r.json").read_text())["sets"]["esol"]
    result, said, _ = hmoe_here(*words)
    assert result["sets"]["esol"] == before
    cell = result["sets"]["tox21"]
    assert set(cell["arms"]) == {"forest_ecfp", "no_pretraining", "pretrained", "dense"}
    assert cell["rows"] == {"train": 128, "validation": 16, "test": 16, "unreadable": 0}
    assert [len(rows) for rows in hu_split(smiles)] == [128, 16, 16]
    for arm in cell["arms"].values():
        assert 0 <= arm["0"]["test"] <= 1
    assert "| tox21 | ROC-AUC, % | 128 / 16 / 16 / 0 | 2 of 2 |" in said or "| 1 of 2 |" in said
    assert (tmp_path / "r.md").read_text() in said
    stamp = (tmp_path / "r.json").stat().st_mtime_ns
    hmoe_here(*words)  # nothing is left to do
    assert (tmp_path / "r.json").stat().st_mtime_ns == stamp
    _, _, said = hmoe_here(*words, "--learning-rate", 0.1, expect=2)
    assert "holds results of other fit" in said
    again = tmp_path / "again"
    HMoEModel(MODEL, one, seed=2).save_pretrained(again)
    result, said, _ = hmoe_here(*words[:-3], "--arm", f"again={again}", "--sets", "esol", "--json")
    assert set(result["sets"]["esol"]["arms"]) == {*before["arms"], "again"}
    assert all(result["sets"]["esol"]["arms"][name] == arm for name, arm in before["arms"].items())
    assert "| pretrained | dense | again |" in said
    assert result["sets"]["tox21"]["arms"] == cell["arms"]
    for wrong, message in (
        (["--arm", f"pretrained={dense}"], "that is the name of another arm"),
        (["--arm", f"dense={dense}"], "--arm dense is given twice"),
        (["--arm", f"again={dense}"], "holds results of other models"),
        (["--sets", "hiv"], "--sets hiv"),
    ):
        _, _, said = hmoe_here(*words, *wrong, expect=2)
        assert message in said
    _, _, said = hmoe_here("evaluate", exported, "--data", data, "--out", tmp_path / "r.md", expect=2)
    assert "ends with .json" in said


def test_a_set_that_cannot_be_split_or_has_other_columns(tmp_path):
    acyclic = [f"{'C' * length}O" for length in range(1, 60)]
    (tmp_path / "esol.csv").write_text("smiles,logSolubility\n" + "\n".join(f"{text},1.5" for text in acyclic) + "\n")
    with pytest.raises(UsageError, match=r"the scaffold split of .*59 molecules leaves none for train"):
        read_set("esol", tmp_path / "esol.csv", standardize=True)
    rows = [f"{number},x,{text},{number % 2}" for number, text in enumerate(SMILES[:100])]
    rows[3] = f'3,x,"{Chem.MolToInchi(Chem.MolFromSmiles(SMILES[3]))}",1'
    (tmp_path / "bbbp.csv").write_text("num,name,smiles,p_np\n" + "\n".join(rows) + "\n")
    found = read_set("bbbp", tmp_path / "bbbp.csv", standardize=True)
    assert found.targets == ["p_np"]
    assert found.unreadable >= 1
    assert len(found.smiles) == found.molecules.num_rows == len(found.label_nT)
    (tmp_path / "tox21.csv").write_text("mol_id,smiles,a\nT1,CCO,1\nT2,CCC,0\n")
    with pytest.raises(UsageError, match="leaves none for train"):
        read_set("tox21", tmp_path / "tox21.csv", standardize=True)
    (tmp_path / "lipo.csv").write_text("smiles,other\nCCO,1\n")
    with pytest.raises(UsageError, match="no column of labels among 'smiles', 'other': expected 'lipo' or 'exp'"):
        read_set("lipo", tmp_path / "lipo.csv", standardize=True)
    (tmp_path / "bace.csv").write_text("mol,Class\n" + "".join(f"{text},2\n" for text in SMILES[:50]))
    with pytest.raises(UsageError, match="has the label 2 in row 1 of column 'Class': expected 0, 1 or an empty cell"):
        read_set("bace", tmp_path / "bace.csv", standardize=True)


def test_scaffolds_that_standardisation_brings_to_both_sides_are_counted(tmp_path):
    """A pyridinium salt is written with another scaffold than pyridines, and learned from as one of them."""
    bases = [f"C{'C' * length}c1ccncc1" for length in range(40)]
    bases += [f"C{'C' * length}C1CCC{'C' * ring}C1" for ring in range(1, 21) for length in range(2)]
    rows = [f"{text},1" for text in bases] + ["Cc1cc[nH+]cc1.[Cl-],1"]
    (tmp_path / "esol.csv").write_text("smiles,logSolubility\n" + "\n".join(rows) + "\n")
    assert read_set("esol", tmp_path / "esol.csv", standardize=False).shared_scaffolds == 0
    found = read_set("esol", tmp_path / "esol.csv", standardize=True)
    assert found.smiles[found.split.test[-1]].endswith("[Cl-]")
    assert found.shared_scaffolds == 1


def test_two_evaluations_of_one_file_are_one_too_many(tmp_path):
    with (
        claimed(tmp_path / "r.json"),
        pytest.raises(UsageError, match="another command writes it"),
        claimed(tmp_path / "r.json"),
    ):
        pass
    with claimed(tmp_path / "r.json"):
        pass
    assert not any(tmp_path.iterdir())
