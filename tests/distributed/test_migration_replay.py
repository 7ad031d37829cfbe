"""The replay of recorded routing counts, to the byte, what real ranks count in their steps."""

import numpy as np
import pytest

from benchmarks.migration.ranks import Job, measure
from benchmarks.migration.record import record
from hmoe_ds.config import RouterConfig
from hmoe_ds.config_parser import load_config
from hmoe_ds.downstream.export import export_checkpoint
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.moe.replay import Routing, RowBytes, off_node, sent_bytes
from tests.distributed.harness import train_all

STEPS = 3
# Nothing is learnt, so all steps have the routing of the model that is exported in the end.
FROZEN = {
    "run__steps": STEPS,
    "optim__learning_rate": 0,
    "router__group_balance_rate": 0,
    "router__expert_balance_rate": 0,
    "router__experts": 16,
}
TWO_GROUPS = {"router__groups_per_molecule": 2, "router__group_blocks": 2, "router__block_bonus": 0.05}
MIGRATION = {"parallel__migration": "true"}
# Name: ranks, overrides.
RUNS = {
    "2 ranks": (2, {}),
    "2 ranks, migration": (2, MIGRATION),
    "2 ranks, migration, two groups, top_p": (2, MIGRATION | TWO_GROUPS | {"router__top_p": 0.4}),
    "2 ranks, migration, bf16": (2, MIGRATION | {"parallel__precision": "bf16"}),
    "4 ranks, two groups": (4, TWO_GROUPS),
    "4 ranks, migration": (4, MIGRATION | {"optim__accumulation": 2}),
    "4 ranks, migration, two groups, a wide budget": (4, MIGRATION | TWO_GROUPS | {"parallel__migration_budget": 3}),
}


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """Folder and lines of metrics of each run."""
    folder, found = tmp_path_factory.mktemp("replay"), {}
    for ranks in (2, 4):
        changes = {
            folder / str(number): FROZEN | {"parallel__ep_size": ranks} | overrides
            for number, (count, overrides) in enumerate(RUNS.values())
            if count == ranks
        }
        found |= train_all(changes, dataset, ranks)
    return {name: (folder / str(number), found[folder / str(number)]) for number, name in enumerate(RUNS)}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_replayed_bytes_are_those_of_real_ranks(name, runs, tmp_path):
    folder, lines = runs[name]
    config = load_config(["--config", str(folder / "config.yaml")])
    export_checkpoint(folder, tmp_path / "model")
    recording = record(HMoEModel.from_pretrained(tmp_path / "model"), config, STEPS)
    budget = config.parallel.migration_budget if config.parallel.migration else None
    sent = [
        int(sent_bytes(part, recording.rows, config.router, RUNS[name][0], budget).sum()) for part in recording.slices
    ]
    of_steps = np.array(sent).reshape(STEPS, -1).sum(axis=1).tolist()
    assert of_steps == [line["exchanged_bytes"] for line in lines], recording.rows
    assert all(of_steps)


@pytest.mark.slow
def test_the_benchmarks_ranks_do_the_steps_of_a_run(runs, tmp_path):
    (folder, lines), (_, lines_without) = runs["2 ranks, migration"], runs["2 ranks"]
    export_checkpoint(folder, tmp_path / "model")
    words = ["--config", str(folder / "config.yaml")]
    found = measure(Job(words, str(tmp_path / "model"), STEPS - 1, str(tmp_path / "found.json")), 2)
    assert found.sent["with"] == [line["exchanged_bytes"] for line in lines[1:]]
    assert found.sent["without"] == [line["exchanged_bytes"] for line in lines_without[1:]]


def test_bytes_off_the_node_are_those_between_ranks_of_two_nodes():
    router = RouterConfig(groups=4, experts=4)
    # Four molecules of one atom and no bond, dealt to ranks 0, 1, 2, 3; their experts are on ranks 1, 0, 3, 0.
    groups = np.array([[1], [0], [3], [0]])
    ones = np.ones(4, np.int64)
    routing = Routing(ones, 0 * ones, ones, groups, groups[None])
    sent = sent_bytes(routing, RowBytes(100, 4, 40, 11, 12), router, 4, None)
    # Each rank tells each other one how many rows come; states and gradients go there and back.
    expected = 8 * (1 - np.eye(4, dtype=int))
    for source, target in ((0, 1), (1, 0), (2, 3), (3, 0)):
        expected[source, target] += 200
        expected[target, source] += 200
    np.testing.assert_array_equal(sent, expected)
    assert off_node(sent, 2) == 8 * 8 + 400
    assert off_node(sent, 4) == 0
