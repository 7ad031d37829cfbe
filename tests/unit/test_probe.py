"""The online probe's parts: the linear model, the labelled tables and their split, what is refused before a run."""

import gzip
import json

import numpy as np
import pytest
from rdkit import Chem
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hmoe_ds.config import ConfigError, ProbeTable, config_from_dict
from hmoe_ds.config_parser import load_config
from hmoe_ds.data.labelled import read_labelled
from hmoe_ds.training.checks.preflight import check_run
from hmoe_ds.training.linear_probe import r_squared, ridge_predictions, roc_auc
from hmoe_ds.training.run_folder import check_resumable
from tests.distributed.harness import arguments
from tests.labelled_tables import molecules_of, ring_count, write_table
from tests.made_up import make_up_checkpoint


@pytest.mark.parametrize(("rows", "width", "noise"), [(60, 8, 0.1), (40, 8, 30.0), (30, 50, 1.0)])
def test_ridge_is_sklearns_at_the_penalty_that_leaving_one_out_chooses(rows, width, noise):
    generator = np.random.default_rng(rows)
    x = generator.normal(3.0, 5.0, (rows + 20, width))
    y = x @ generator.normal(size=width) + noise * generator.normal(size=len(x)) + 7
    train, test = x[:rows], x[rows:]
    scaled = StandardScaler().fit_transform(train)
    penalties = rows * 10.0 ** np.arange(-4, 2.5, 0.5)
    # The slow way: a refit without each molecule, on the same features.
    errors = [
        np.mean(
            [
                (y[i] - Ridge(penalty).fit(np.delete(scaled, i, 0), np.delete(y[:rows], i)).predict(scaled[i : i + 1]))
                ** 2
                for i in range(rows)
            ]
        )
        for penalty in penalties
    ]
    best = penalties[np.argmin(errors)]
    assert best == RidgeCV(penalties).fit(scaled, y[:rows]).alpha_
    expected = make_pipeline(StandardScaler(), Ridge(best)).fit(train, y[:rows]).predict(test)
    np.testing.assert_allclose(ridge_predictions(train, y[:rows], test), expected, rtol=1e-8)


def test_a_feature_that_only_has_rounding_noise_says_nothing():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(50, 3))
    y = x[:, 0] + generator.normal(size=50)
    noisy = np.column_stack([x, np.ones(50), 1 + 1e-8 * y])
    np.testing.assert_allclose(
        ridge_predictions(noisy[:40], y[:40], noisy[40:]), ridge_predictions(x[:40], y[:40], x[40:])
    )


def test_figures_are_sklearns():
    generator = np.random.default_rng(0)
    label = generator.integers(0, 2, 200).astype(float)
    score = np.round(label + generator.normal(size=200), 1)  # with ties
    assert roc_auc(score, label) == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    assert r_squared(score, label) == pytest.approx(r2_score(label, score), abs=1e-12)
    assert roc_auc(np.zeros(200), label) == 0.5


def test_both_sides_of_the_split_have_scaffolds_of_their_own(tmp_path):
    path = write_table(tmp_path / "rings.csv", molecules_of(0, 1500), ring_count)
    found = read_labelled(ProbeTable(str(path), "label"), 5000, standardize=True)
    keys, held_out = found.molecules.scaffold_key, found.held_out_B
    assert not set(keys[held_out]) & set(keys[~held_out])
    assert not held_out[keys == 0].any()
    scaffolds = set(keys[keys != 0])
    assert len(set(keys[held_out])) / len(scaffolds) == pytest.approx(0.2, abs=0.05)
    # The side does not depend on what else is in the table.
    path = write_table(tmp_path / "fewer.csv", molecules_of(500, 900), ring_count)
    fewer = read_labelled(ProbeTable(str(path), "label"), 5000, standardize=True)
    sides = dict(zip(found.molecules.mol_key_n2[:, 0].tolist(), held_out, strict=True))
    assert [sides[key] for key in fewer.molecules.mol_key_n2[:, 0].tolist()] == fewer.held_out_B.tolist()


def test_rows_without_a_label_or_a_molecule_are_left_out(tmp_path):
    lines = ["id,structure,y,other", *(f"{i},{s},{i / 7},1" for i, s in enumerate(molecules_of(0, 200)))]
    lines[5:5] = ["a,CCO,,1", "b,CCO,NaN,1", "c,nonsense,1.5,1", 'd,"",2,1', "e,CCO"]
    with gzip.open(tmp_path / "table.csv.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    found = read_labelled(ProbeTable(str(tmp_path / "table.csv.gz"), "y", smiles="structure"), 5000, standardize=False)
    readable = [Chem.MolFromSmiles(smiles) is not None for smiles in molecules_of(0, 200)]
    assert found.unreadable == 2 + readable.count(False)
    assert found.label_B.tolist() == [i / 7 for i in range(200) if readable[i]]
    assert found.molecules.rows == len(found.label_B)
    assert not found.is_classification


def test_of_a_large_table_a_sample_is_taken_that_is_always_the_same(tmp_path):
    path = write_table(tmp_path / "rings.csv", molecules_of(0, 1000), ring_count)
    table = ProbeTable(str(path), "label")
    sample, again, whole = (read_labelled(table, count, standardize=True) for count in (300, 300, 5000))
    assert sample.molecules.rows == 300
    assert sample.fingerprint == again.fingerprint != whole.fingerprint
    keys = whole.molecules.mol_key_n2[:, 0].tolist()
    place = [keys.index(key) for key in sample.molecules.mol_key_n2[:, 0].tolist()]
    assert place == sorted(place)
    assert max(place) > 800  # not just the beginning


def refuse(message, dataset, tmp_path, table, **overrides):
    config = load_config(arguments(tmp_path / "run", dataset, probe__tables=json.dumps([table]), **overrides))
    with pytest.raises(ConfigError, match=message) as error:
        check_run(config, ranks=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "table", "message"),
    [
        (None, {}, "probe.tables: .*table.csv"),
        ("smiles,z\nC,1\n", {}, r"has no column 'y': name one of its columns, 'smiles', 'z'"),
        ("smiles,y\nC,1\n", {"smiles": "s"}, r"no column 's'; the file's columns are 'smiles', 'y'"),
        ("what,y\nC,1\n", {}, "no SMILES column among 'what', 'y'; name it with smiles"),
        ("y\nC\n", {}, "no SMILES column among 'y'"),
        ("smiles,y\nC,1\nCC,active\n", {}, "has the label 'active' in row 2 of column 'y': expected a number"),
        ("smiles,y\nC,1\nCC,inf\n", {}, "has the label 'inf' in row 2"),
        ("smiles,y\nC,1\nCC,1\n", {}, "has only the label 1 in column 'y': expected two classes"),
        ("smiles,y\nC,\nCC,\n", {}, "has no labelled molecule in column 'y'"),
        ("smiles,y\nnonsense,1\n", {}, "has no labelled molecule in column 'y'"),
        ("smiles,y\nC,1\nCC,0\n", {}, "has 0 molecules with the held-out scaffolds of 2, and fewer than two different"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_before_the_run(content, table, message, dataset, tmp_path):
    path = tmp_path / "table.csv"
    if content is not None:
        path.write_text(content)
    refuse(message, dataset, tmp_path, {"path": str(path), "label": "y"} | table)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ('[{"path": "a b.csv", "label": "y"}]', "probe.tables has the name 'a b', which cannot be part of a metric's"),
        ('[{"path": "a.csv", "label": "y"}, {"path": "a.csv", "label": "z"}]', "two tables of the name a: give each"),
        ('[{"path": "a.csv"}]', "label"),
        ('[{"path": "a.csv", "label": "y", "weight": 3}]', "weight"),
        ("a.csv", "probe.tables"),
    ],
)
def test_tables_are_described_completely(tables, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(["--probe.tables", tables])
    assert "\n" not in str(error.value)


def test_tables_in_a_file_round_trip(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "probe:\n  every: 50\n  tables:\n  - path: data/bbbp.csv.gz\n    label: p_np\n"
        "  - {path: data/bbbp.csv.gz, label: w, name: weight}\n"
    )
    config = load_config(["--config", str(tmp_path / "run.yaml")])
    assert [table.title for table in config.probe.tables] == ["bbbp", "weight"]
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_probe_may_come_and_go_between_the_parts_of_a_run(dataset, tmp_path):
    plain = load_config(arguments(tmp_path, dataset))
    probed = load_config(arguments(tmp_path, dataset, probe__tables='[{"path": "a.csv", "label": "y"}]'))
    record = {"format_version": 2, "ranks": 1, "dataset": "x", "shards": [], "config": plain.to_dict()}
    (tmp_path / "run.json").write_text(json.dumps(record))
    make_up_checkpoint(tmp_path, 2, plain.to_dict())
    check_resumable(probed, "x")
