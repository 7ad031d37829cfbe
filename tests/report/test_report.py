"""What the report says, against what was written down and counted another way."""

import collections
import itertools
import json
import re
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from rdkit import Chem

from data_pipeline.errors import UsageError
from hmoe_ds.downstream.export import export_checkpoint
from hmoe_ds.report import expert_chapters, scaffold_chapters
from hmoe_ds.report.atom_kinds import expert_kinds, kinds_of
from hmoe_ds.report.build import write_report
from hmoe_ds.report.drawings import draw_molecule
from hmoe_ds.report.palette import COLORS, rgb
from hmoe_ds.report.run_story import read_run
from hmoe_ds.report.sample import route_molecules
from hmoe_ds.report.scaffolds import scaffold_table, typical_scaffolds
from hmoe_ds.report.traffic import replayed_traffic


@pytest.fixture(scope="module")
def routed(run, dataset):
    return route_molecules(run, str(dataset), molecules=300)


def test_the_page_says_what_the_run_wrote_down(run, report):
    text = report.read_text()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert "of 12" in text
    assert f"{last['loss']:.3f}" in text
    assert f"{last['validation_loss']:.3f} on validation" in text
    splits = len((run / "allocation.jsonl").read_text().splitlines())
    assert splits > 0
    assert f"{splits:,} splits" in text
    assert "a &lt;b&gt;run &amp; more" in text


def test_loads_are_those_of_the_global_batch(run):
    story = read_run(run)
    assert story.load is not None
    assert story.load.step_S.tolist() == list(range(1, 13))
    molecules = story.series("molecules")[1]
    np.testing.assert_array_equal(story.load.molecules_SG.sum(axis=1), molecules)
    atoms_S = story.load.atoms_SLE.sum(axis=2)
    assert (atoms_S == atoms_S[:, :1]).all()  # in each layer all atoms choose as many
    np.testing.assert_allclose(story.series("expert_load_max_over_mean")[1], _imbalance(story), rtol=1e-9)


def _imbalance(story):
    live_S = story.series("experts_live")[1]
    atoms_SLE = story.load.atoms_SLE
    return (atoms_SLE.max(axis=2) / (atoms_SLE.sum(axis=2) / live_S[:, None])).mean(axis=1)


def test_molecules_are_routed_as_hmoe_embed_does(run, dataset, routed, tmp_path):
    import pyarrow.parquet as pq

    from hmoe_ds.downstream.embed import EmbedOptions, RowOptions, embed_source

    export_checkpoint(run, tmp_path / "model")
    held_out = routed.held_out
    (tmp_path / "some.smi").write_text("".join(f"{smiles}\n" for smiles in held_out.smiles[:40]))
    embed_source(
        tmp_path / "model", str(tmp_path / "some.smi"), tmp_path / "x.parquet", RowOptions(None, None),
        EmbedOptions(None, False, True), 1,
    )  # fmt: skip
    assert pq.read_table(tmp_path / "x.parquet")["group"].to_pylist() == held_out.group_B[:40].tolist()


def test_the_sample_holds_out_scaffolds(routed):
    train, held_out = routed.train, routed.held_out
    assert not np.intersect1d(train.scaffold_key_B[train.scaffold_key_B != 0], held_out.scaffold_key_B).size
    assert train.ptr_B[-1] == train.expert_LN.shape[1] == len(train.atom_features_N9)
    for sample in (train, held_out):
        atoms = [Chem.MolFromSmiles(smiles).GetNumAtoms() for smiles in sample.smiles]
        assert atoms == np.diff(sample.ptr_B).tolist()
        for key, smiles in zip(sample.scaffold_key_B.tolist(), sample.smiles, strict=True):
            assert key == 0 or Chem.MolFromSmiles(smiles).HasSubstructMatch(
                Chem.MolFromSmiles(routed.scaffold_smiles[key])
            )


def test_counts_of_scaffolds(routed):
    train = routed.train
    table = scaffold_table(train.scaffold_key_B, train.group_B, 2)
    pairs = zip(train.scaffold_key_B.tolist(), train.group_B.tolist(), strict=True)
    expected = collections.Counter(pair for pair in pairs if pair[0] != 0)
    found = {
        (key, group): count
        for key, row in zip(table.key_S.tolist(), table.count_SG.tolist(), strict=True)
        for group, count in enumerate(row)
        if count
    }
    assert found == expected
    assert (np.diff(table.count_SG.sum(axis=1)) <= 0).all()


def test_typical_scaffolds_are_those_a_group_has_more_than_its_share_of():
    keys = np.array([1] * 10 + [2] * 10 + [3] * 4 + [0] * 6)
    groups = np.array([0] * 9 + [1] + [1] * 10 + [0, 0, 1, 1] + [0] * 6)
    table = scaffold_table(keys, groups, 2)
    (first,) = typical_scaffolds(table, 0, most=5)
    assert (first.key, first.here, first.total) == (1, 9, 10)
    assert first.enrichment == pytest.approx((9 / 11) / (10 / 24))
    assert [one.key for one in typical_scaffolds(table, 1, most=5)] == [2]  # of scaffold 3 there are two, too few
    assert typical_scaffolds(scaffold_table(keys, np.zeros(30, np.int64), 2), 1, most=5) == []


def test_kinds_of_atoms_are_what_rdkit_says(routed):
    held_out = routed.held_out
    kinds = kinds_of(held_out.atom_features_N9)
    expected = []
    for smiles in held_out.smiles:
        for atom in Chem.MolFromSmiles(smiles).GetAtoms():
            place = "aromatic" if atom.GetIsAromatic() else "ring" if atom.IsInRing() else "chain"
            expected.append(f"{place} {atom.GetSymbol()}")
    assert kinds.tolist() == expected
    (busiest,) = expert_kinds(held_out.expert_LN[-1], kinds, most=1)
    counted = collections.Counter(held_out.expert_LN[-1].tolist())
    assert counted[busiest.expert] == max(counted.values())
    assert busiest.share == pytest.approx(max(counted.values()) / len(kinds))
    of_expert = collections.Counter(kinds[held_out.expert_LN[-1] == busiest.expert].tolist())
    assert busiest.kinds[0][1] == pytest.approx(max(of_expert.values()) / counted[busiest.expert])


def test_a_drawing_has_a_circle_for_each_atom_that_has_a_colour():
    smiles = "Cc1ccccc1O"
    plain, colored = (draw_molecule(smiles, (200, 150), colors) for colors in (None, {0: COLORS[0], 7: COLORS[1]}))
    for svg in (plain, colored):
        ET.fromstring(svg)
    assert len(re.findall("<ellipse", plain)) == 0
    assert len(re.findall("<ellipse", colored)) == 2


def test_traffic_falls_with_migration(run, routed):
    story = read_run(run)
    (two,) = replayed_traffic(routed.train.routing, routed.train.rows, story.config)  # as there are two groups
    assert (two.ranks, two.molecules) == (2, 64)
    assert two.migrated is not None
    assert 0 < two.migrated < two.without


def test_colours_differ_for_eyes_that_lack_a_kind_of_cones():
    for name, matrix in MACHADO.items():
        seen = [np.clip(np.array(matrix) @ np.array(rgb(color)), 0, 1) for color in COLORS]
        for one, other in itertools.combinations(range(len(COLORS)), 2):
            distance = np.linalg.norm(lab(seen[one]) - lab(seen[other]))
            assert distance > 10, (name, COLORS[one], COLORS[other], distance)


# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency", 2009.
MACHADO = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(color):
    """CIE Lab of an sRGB colour."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color]
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.array(to_xyz) @ linear / [0.9505, 1, 1.089]
    x, y, z = (part ** (1 / 3) if part > 0.008856 else 7.787 * part + 16 / 116 for part in (x, y, z))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_a_run_that_goes_on_is_reported_up_to_its_last_whole_line(run, tmp_path):
    shutil.copytree(run, tmp_path / "going")
    with (tmp_path / "going" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    assert read_run(tmp_path / "going").lines[-1]["step"] == 12
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "going" / "metrics.jsonl").write_text("\n".join([lines[0], "garbage", *lines[1:]]) + "\n")
    with pytest.raises(UsageError, match=r"metrics.jsonl is damaged"):
        read_run(tmp_path / "going")


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


def change_config(run, **data):
    content = yaml.safe_load((run / "config.yaml").read_text())
    content["data"] |= data
    (run / "config.yaml").write_text(yaml.safe_dump(content))


def reported(hmoe_here, run, *options):
    result, _, _ = hmoe_here("report", run, "--out", run / "r.html", "--molecules", 300, *options, "--json")
    return result, (run / "r.html").read_text()


def test_without_a_checkpoint_the_curves_remain(copy, hmoe_here):
    shutil.rmtree(copy / "checkpoints")
    (copy / "load.jsonl").unlink()  # as of runs before there was one
    result, page = reported(hmoe_here, copy)
    assert result["routed_step"] is None
    assert "holds no checkpoint" in result["missing"]
    assert "holds no checkpoint" in page
    assert "training and validation loss" in page


@pytest.mark.parametrize("path", ["nowhere/zinc", "s3://bucket/zinc", "file:///tmp/zinc"])
def test_without_the_dataset_the_curves_remain(copy, hmoe_here, path):
    change_config(copy, path=path)
    result, page = reported(hmoe_here, copy)
    assert result["routed_step"] is None
    assert path in result["missing"]
    assert "training and validation loss" in page


def test_a_dataset_that_lost_a_file(copy, hmoe_here, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "lost")
    (tmp_path / "lost" / "scaffolds.parquet").unlink()
    change_config(copy, path=str(tmp_path / "lost"))
    result, _ = reported(hmoe_here, copy)
    assert "scaffolds.parquet" in result["missing"]


def test_another_dataset_is_not_claimed_to_be_held_out(run, report, second_dataset, copy, hmoe_here):
    assert "scaffolds that the training has never seen" in report.read_text()
    result, page = reported(hmoe_here, copy, "--data", second_dataset)
    assert result["routed_step"] == 12
    assert "never seen" not in page
    assert "a dataset that is not the one of the run" in page


def test_a_run_that_diverged(copy, hmoe_here):
    with (copy / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 13, "loss": None, "loss_contrast": 0.0}) + "\n")
    _, page = reported(hmoe_here, copy)
    assert "not finite" in page


def test_a_long_run_is_thinned_out(copy):
    lines = [json.dumps({"step": step, "molecules_G": [1, 2], "atoms_LE": [[3, 4]]}) for step in range(1, 2001)]
    (copy / "load.jsonl").write_text("\n".join(lines) + "\n")
    steps = read_run(copy).load.step_S
    assert len(steps) == 500
    assert (steps[0], steps[-1]) == (1, 2000)


def test_a_map_takes_three_molecules(routed):
    one = routed.held_out._replace(u_BP=routed.held_out.u_BP[:1], group_B=routed.held_out.group_B[:1])
    assert "No map" in scaffold_chapters.embedding_map(routed._replace(held_out=one))


@pytest.mark.parametrize("form", ["flat", "additive", "soft"])
def test_words_fit_the_form_of_the_gate(run, routed, form):
    story = read_run(run)
    story = story._replace(config=replace(story.config, router=replace(story.config.router, form=form)))
    scaffolds, atoms = scaffold_chapters.groups(story, routed), expert_chapters.atoms(story, routed)
    assert ("no scaffold level to show" in scaffolds) == (form == "flat")
    assert ("expert 0 (group 0)" in atoms) == (form == "soft")


def test_what_cannot_be_reported(run, tmp_path, hmoe_here):
    _, _, err = hmoe_here("report", tmp_path, "--out", tmp_path / "r.html", expect=2)
    assert "is no run's folder: expected one that holds config.yaml" in err
    _, _, err = hmoe_here("report", run, "--out", tmp_path / "r.pdf", expect=2)
    assert "expected a file whose name ends with .html" in err
    _, _, err = hmoe_here("report", run, "--out", tmp_path / "r.html", "--data", tmp_path / "none", expect=2)
    assert str(tmp_path / "none") in err
    assert not (tmp_path / "r.html").exists()


def test_the_same_run_makes_the_same_page(run, report, tmp_path):
    write_report(run, tmp_path / "again.html", molecules=300)
    assert (tmp_path / "again.html").read_bytes() == report.read_bytes()


def test_a_figure_that_was_never_measured(run):
    story = read_run(run)
    assert story.series("no such figure")[0].size == 0
    assert story.last("no such figure") is None
