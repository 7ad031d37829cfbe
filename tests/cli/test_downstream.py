"""The commands of chemists as they run them: embed, finetune, predict, evaluate; interrupted, and with messy tables."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from data_pipeline.encode import encode_rows
from hmoe_ds.cli import main
from hmoe_ds.config import RouterConfig
from hmoe_ds.data.batch import gather
from hmoe_ds.data.store import BatchStore
from hmoe_ds.downstream.predictor import load_predictor
from hmoe_ds.model.hmoe import HMoEModel
from tests.cli.test_cli import ROOT
from tests.unit.downstream.conftest import MODEL, ROUTER
from tests.unit.downstream.test_splits import hu_split, nci

SMILES = nci(400)


@pytest.fixture
def hmoe(capsys):
    """Run a command in this process; -> (parsed JSON of the last line or None, stdout, stderr)."""

    def run(*arguments, expect=0):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            code = end.code
        out, err = capsys.readouterr()
        assert code == expect, f"exit {code}\n{out[-3000:]}\n{err[-3000:]}"
        return json.loads(out.splitlines()[-1]) if "--json" in arguments and expect == 0 else None, out, err

    return run


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    HMoEModel(MODEL, ROUTER, seed=1).save_pretrained(folder, {"step": 5, "standardize": True})
    return folder


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


def test_embed_gives_the_same_bytes_with_more_workers_and_after_a_kill(exported, library, hmoe, tmp_path):
    whole, more, killed = (tmp_path / f"{name}.parquet" for name in ("whole", "more", "killed"))
    result, _, _ = hmoe("embed", exported, library, "--out", whole, "--workers", 1, "--json")
    assert (result["molecules"], result["rejected"], result["dimensions"]) == (8998, 2, 16)
    hmoe("embed", exported, library, "--out", more, "--workers", 3)
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
    hmoe("embed", exported, library, "--out", killed, "--workers", 1)
    assert killed.read_bytes() == whole.read_bytes()
    assert not work.exists()


def test_embed_of_atoms_and_routing(exported, hmoe, tmp_path):
    (tmp_path / "m.smi").write_text("\n".join(SMILES[:30]) + "\n")
    files = (exported, tmp_path / "m.smi", "--out", tmp_path / "e.parquet")
    result, _, _ = hmoe("embed", *files, "--per-atom", "--routing", "--workers", 1, "--json")
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
        centers = F.normalize(model.encoder.scaffold_gate.centers, dim=1)
        nearest = max(float(F.cosine_similarity(encoding.scaffold.u_BP[0], center, dim=0)) for center in centers)
        assert found["novelty"] == pytest.approx(1 - nearest, abs=1e-5)
        for layer, atoms in enumerate(encoding.atoms):
            weight = dict.fromkeys(range(ROUTER.experts), 0.0)
            for choices, weights in zip(atoms.choices_NK.tolist(), atoms.weights_NK.tolist(), strict=True):
                for expert, value in zip(choices, weights, strict=True):
                    weight[expert] += value
            assert weight[found["experts"][layer]] == pytest.approx(max(weight.values()), rel=1e-5)


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


def test_finetune_and_predict(exported, hmoe, tmp_path):
    table = write_table(tmp_path / "t.csv")
    result, said, _ = hmoe("finetune", exported, table, "--target", "halogen", "--task", "classification",
                           "--split", "random", "--out", tmp_path / "out", "--seeds", 2, "--epochs", 8,
                           "--learning-rate", 0.005, "--json")  # fmt: skip
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

    hmoe("predict", tmp_path / "out", table, "--out", tmp_path / "p.csv", "--workers", 1)
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
    hmoe("embed", tmp_path / "out" / "member1", table, "--out", tmp_path / "e.parquet", "--workers", 1)
    hmoe("finetune", exported, table, "--target", "halogen", "--task", "classification", "--out", tmp_path / "out",
         expect=2)  # fmt: skip


def test_finetune_a_frozen_encoder_on_two_quantities_by_scaffold(exported, hmoe, tmp_path):
    table = write_table(tmp_path / "t.csv")
    what = (exported, table, "--target", "halogen,size", "--task", "regression", "--out", tmp_path / "out")
    result, _, _ = hmoe("finetune", *what, "--mode", "frozen", "--seeds", 2, "--epochs", 20, "--json")
    assert math.isfinite(result["test"]["rmse"])
    assert result["test"]["targets"] == 2
    rows = [row for row in rows_of(tmp_path / "out" / "predictions.csv") if not row["reason"]]
    expected = hu_split([row["smiles"] for row in rows])
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
        (["--target", "notes", "--task", "regression"], "no molecule with a label in 'notes'"),
        (["--target", "size", "--task", "classification"], "for quantities give --task regression"),
        (["--target", "size", "--task", "regression", "--smiles", "structure"], "has no column 'structure'"),
        (["--target", "size", "--task", "regression", "--split", "column"], "--split-column COL go together"),
        (
            ["--target", "size", "--task", "regression", "--split", "column", "--split-column", "id"],
            "column 'id' has '1' in row 2: expected train, validation, test or an empty cell",
        ),
    ],
)
def test_what_cannot_be_learned_from_ends_with_one_line(words, message, exported, hmoe, tmp_path):
    table = write_table(tmp_path / "t.csv", 60)
    _, _, said = hmoe("finetune", exported, table, *words, "--out", tmp_path / "out", expect=2)
    assert message in said
    assert said.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_predict_needs_a_predictor(exported, hmoe, tmp_path):
    _, _, said = hmoe("predict", exported, "nci5k", "--out", tmp_path / "p.csv", expect=2)
    assert "hmoe finetune" in said


def test_evaluate_goes_on_where_it_was(exported, hmoe, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    smiles = SMILES[:160]
    labels = [(int("O" in text), int(len(text) > 20)) for text in smiles]
    lines = [
        f"{text},{one},{'' if number % 4 else other}"
        for number, (text, (one, other)) in enumerate(zip(smiles, labels, strict=True))
    ]
    (data / "tox21.csv").write_text("smiles,a,b\n" + "\n".join(lines) + "\n")
    (data / "esol.csv").write_text("smiles,y\n" + "\n".join(f"{text},{len(text) / 10}" for text in smiles) + "\n")
    dense = tmp_path / "dense"
    one = RouterConfig(groups=1, experts=1, expert_size=16, shared_size=0, gate_size=8)
    HMoEModel(MODEL, one, seed=1).save_pretrained(dense)
    words = ["evaluate", exported, "--data", data, "--out", tmp_path / "r.json", "--seeds", 1, "--epochs", 2,
             "--arm", f"dense={dense}", "--json"]  # fmt: skip
    hmoe(*words, "--sets", "esol")
    before = json.loads((tmp_path / "r.json").read_text())["sets"]["esol"]
    result, said, _ = hmoe(*words)
    assert result["sets"]["esol"] == before
    cell = result["sets"]["tox21"]
    assert set(cell["arms"]) == {"forest_ecfp", "no_pretraining", "pretrained", "dense"}
    assert cell["rows"] == {"train": 128, "validation": 16, "test": 16, "unreadable": 0}
    assert [len(rows) for rows in hu_split(smiles)] == [128, 16, 16]
    for arm in cell["arms"].values():
        assert 0 <= arm["0"]["test"] <= 1
    assert "| tox21 | ROC-AUC, % | 16 |" in said
    assert (tmp_path / "r.md").read_text() in said
    stamp = (tmp_path / "r.json").stat().st_mtime_ns
    hmoe(*words)  # nothing is left to do
    assert (tmp_path / "r.json").stat().st_mtime_ns == stamp
    _, _, said = hmoe(*words, "--learning-rate", 0.1, expect=2)
    assert "holds results of other fit" in said
