"""Invariant 5: molecules and routings at the edge train like all others: finite, no hang, equal to one process."""

from pathlib import Path

import pytest

from data_pipeline.build import PrepareOptions, prepare
from tests.distributed.layouts import CLIPPED, TOPOLOGY, ZERO, Trained, check_agreement

# Isotopes of methane: one atom, no bond, no scaffold, and the same features, so that all are routed alike.
ISOTOPES = [f"[{mass}CH4]" for mass in range(2, 242)]
# Around 500 atoms: chains, a fused ladder, a peptide, a dendrimer-like ether.
LARGE = ["C" * 500, "CCO" * 166, "NCC(=O)" * 124 + "O", "c1ccccc1" + "Oc1ccccc1" * 70, "C1CC1" * 160, "CC(C)(C)" * 120]

CASES = {
    # One molecule per step: all ranks but one have no atoms, most groups and experts neither, and there is no positive.
    "ranks without atoms": {"data__molecules_per_step": 1, "data__scaffold_run": 1},
    "ranks without atoms, migration": {
        "data__molecules_per_step": 1,
        "data__scaffold_run": 1,
        "parallel__migration": "true",
    },
    "one-atom molecules": {"data": "isotopes", "data__molecules_per_step": 16},
    # Nearly all atoms are hidden, so they look the same and choose the same expert.
    "all atoms on one expert": {
        "data": "isotopes",
        "data__molecules_per_step": 48,
        "objective__mask_ratio": 0.999,
        "router__experts_per_atom": 1,
        "router__max_received": 7,
    },
    "500-atom molecules": {
        "data": "large",
        "data__molecules_per_step": 4,
        "data__scaffold_run": 1,
        "router__max_received": 100,
    },
}
ZERO_OF = {"ranks without atoms": "zero 3 spread", "all atoms on one expert": "zero 3 spread"}
LAYOUTS = [(case, "2 ranks ep 2", ZERO_OF.get(case, "zero 2")) for case in CASES]


def make_dataset(folder: Path, smiles: list[str]) -> Path:
    (folder / "molecules.smi").write_text("\n".join(smiles) + "\n")
    prepare([str(folder / "molecules.smi")], folder / "prepared", PrepareOptions(validation_fraction=0))
    return folder / "prepared"


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    return train_layouts(LAYOUTS, dataset, tmp_path_factory)


def train_layouts(chosen, dataset, tmp_path_factory):
    folders = {
        "isotopes": make_dataset(tmp_path_factory.mktemp("isotopes"), ISOTOPES),
        "large": make_dataset(tmp_path_factory.mktemp("large"), LARGE),
    }
    layouts = {}
    for case, topology, zero in chosen:
        changes = {name: value for name, value in CASES[case].items() if name != "data"}
        changes["data__path"] = folders.get(CASES[case].get("data"), dataset)
        ranks, spread = TOPOLOGY[topology]
        overrides = CLIPPED | {"optim__clip_norm": 0.3} | changes | spread | ZERO[zero]
        layouts[f"{case}, {topology}"] = (ranks, overrides)
    return Trained(dataset, tmp_path_factory.mktemp("extremes"), layouts)


@pytest.mark.parametrize("name", [f"{case}, {topology}" for case, topology, _ in LAYOUTS])
def test_extremes_equal_one_process(name, trained, tmp_path):
    check_agreement(trained, name, tmp_path)


@pytest.mark.slow
def test_extremes_on_four_ranks_equal_one_process(dataset, tmp_path_factory):
    """More of them have no atoms; each of the two groups of expert-parallel ranks has all experts."""
    chosen = [(case, "4 ranks ep 2", zero) for case, zero in ZERO_OF.items()]
    trained = train_layouts(chosen, dataset, tmp_path_factory)
    for case, topology, _ in chosen:
        check_agreement(trained, f"{case}, {topology}", tmp_path_factory.mktemp("exports"))


def test_the_cases_are_what_they_say(trained):
    def molecules(case):
        return trained.reference(f"{case}, 2 ranks ep 2")[1]

    assert len(molecules("ranks without atoms")) == 4  # steps
    for case in ("one-atom molecules", "all atoms on one expert"):
        assert {len(layer) for _, layers in molecules(case).values() for layer in layers} == {1}
    chosen = [layers[0][0][0] for _, layers in molecules("all atoms on one expert").values()]
    assert max(chosen.count(expert) for expert in set(chosen)) >= 0.98 * len(chosen)
    assert max(len(layers[0]) for _, layers in molecules("500-atom molecules").values()) >= 500
