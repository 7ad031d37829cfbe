"""The search on the tune set: every arm its own learning rate, then the hierarchy's parts one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.ablation.bench import Bench
from benchmarks.ablation.datasets import Datasets
from benchmarks.ablation.trial import Settings, words
from hmoe_ds.config import ConfigError
from hmoe_ds.config_parser import load_config

SEED = 1000
RATES = (0.002, 0.004, 0.008)

# The feed-forwards of all arms are 192 wide for an atom: 64 shared and 2 experts of 64, or the like.
BASE: Settings = {
    "model.hidden_size": 64,
    "model.lower_blocks": 2,
    "model.upper_blocks": 2,
    "model.dense_size": 192,
    "router.groups": 4,
    "router.experts": 16,
    "router.experts_per_atom": 2,
    "router.expert_size": 64,
    "router.shared_size": 64,
    # So many atoms are in every step, however large the molecules are that a curriculum admits.
    "data.molecules_per_step": 1024,
    "data.atoms_per_step": 3072,
    "data.bonds_per_step": 6144,
    "data.validation_molecules": 8192,
}
NO_CONTRAST: Settings = {"objective.contrast_weight": 0}
DENSE: Settings = {
    "router.groups": 1,
    "router.experts": 1,
    "router.experts_per_atom": 1,
    "router.expert_size": 192,
    "router.shared_size": 0,
    **NO_CONTRAST,
}
FLAT: Settings = {"router.form": "flat", **NO_CONTRAST}
_NO_SHARED: Settings = {"router.experts_per_atom": 3, "router.shared_size": 0}
HIERARCHIES: Mapping[str, Settings] = {
    "hard": {},
    "hard, two groups": {"router.groups_per_molecule": 2},
    "soft": {"router.form": "soft"},
    "additive": {"router.form": "additive", **_NO_SHARED},
}
_THIRD = Fraction(1, 3)
_DATA: Settings = {"curriculum.competence": "root", "curriculum.competence_steps": _THIRD}
_MASKS: Settings = {"curriculum.mask_steps": _THIRD}
_GATES: Settings = {"curriculum.temperature_start": 0.5, "curriculum.temperature_steps": _THIRD}
_CURRICULA: Sequence[Settings] = [_DATA, _MASKS, _GATES, {**_DATA, **_MASKS, **_GATES}]
_GUIDANCE: Settings = {"curriculum.guidance_steps": _THIRD}


# Of each question what was tried, as text, and its loss: how a search stands in a results file.
Answers = Mapping[str, Sequence[tuple[str, float]]]


class Search:
    """Remembers what it tried.

    Args:
        bench: runs the trials.
        steps: of each trial.
        answers: of an earlier search with as many steps; a question that it answers is not asked again.

    Attributes:
        tried: what was tried for each question: the change and its loss on the tune set.
    """

    def __init__(self, bench: Bench, steps: int, answers: Answers) -> None:
        self._bench, self._steps, self._answers = bench, steps, answers
        self.tried: dict[str, list[tuple[Settings, float]]] = {}

    @property
    def answers(self) -> Answers:
        """What was found so far."""
        return {name: [(str(change), loss) for change, loss in tried] for name, tried in self.tried.items()}

    def best(self, question: str, start: Settings, changes: Sequence[Settings]) -> dict[str, Any]:
        """`start` with the change of `changes` that gives the lowest loss."""
        return self.best_of_each({question: (start, changes)})[question]

    def best_of_each(self, questions: Mapping[str, tuple[Settings, Sequence[Settings]]]) -> dict[str, dict[str, Any]]:
        """`best` for several questions that do not wait for each other."""
        known = {name: self._known(name, changes) for name, (_, changes) in questions.items()}
        asked = [
            (name, {**start, **change})
            for name, (start, changes) in questions.items()
            for change in changes
            if known[name] is None
        ]
        trials = [self._bench.trial(settings, SEED, self._steps) for _, settings in asked]
        losses = [figures["tune_loss"] for figures in self._bench.run(trials)]
        found = {}
        for name, (start, changes) in questions.items():
            mine = known[name] or [loss for (asker, _), loss in zip(asked, losses, strict=True) if asker == name]
            self.tried[name] = list(zip(changes, mine, strict=True))
            change, _ = min(self.tried[name], key=lambda entry: entry[1])
            found[name] = {**start, **change}
        return found

    def _known(self, question: str, changes: Sequence[Settings]) -> list[float] | None:
        """The losses of `changes`, if an earlier search tried just these."""
        earlier = self._answers.get(question, ())
        return [loss for _, loss in earlier] if [text for text, _ in earlier] == [str(one) for one in changes] else None

    def loss(self, question: str) -> float:
        """The lowest loss that was found."""
        return min(loss for _, loss in self.tried[question])


class Arms(NamedTuple):
    """Settings of the main arms.

    Attributes:
        dense: a dense feed-forward in place of experts.
        flat: a mixture of experts without scaffolds.
        complete: H-MoE with all its parts, each in its best form.
        best: the same, without dynamic allocation if it is better so.
    """

    dense: Settings
    flat: Settings
    complete: Settings
    best: Settings


def find_arms(search: Search) -> Arms:
    """What the search finds."""
    rates: list[Settings] = [{"optim.learning_rate": rate} for rate in RATES]
    unchanged: Settings = {}
    starts = {"dense": DENSE, "flat": FLAT, **HIERARCHIES}
    arms = search.best_of_each({name: (settings, rates) for name, settings in starts.items()})
    form = min(HIERARCHIES, key=search.loss)
    more_experts: list[Settings] = [unchanged, {"router.experts": 32}]
    hmoe = search.best("groups", arms[form], [unchanged, {"router.groups": 2}, {"router.groups": 8}])
    is_soft = arms[form].get("router.form") == "soft"
    if is_soft:
        guidance: list[Settings] = [{"router.guidance": value} for value in (0.3, 3.0)]
        hmoe = search.best("guidance", hmoe, [unchanged, *guidance])
    found = search.best_of_each({"experts": (hmoe, more_experts), "experts of flat": (arms["flat"], more_experts)})
    hmoe, flat = found["experts"], found["experts of flat"]
    flat = search.best("shared expert of flat", flat, [unchanged, _NO_SHARED])
    plain = [unchanged, _DATA, _MASKS]
    found = search.best_of_each({"curriculum of flat": (flat, plain), "curriculum of dense": (arms["dense"], plain)})
    flat, dense = found["curriculum of flat"], found["curriculum of dense"]
    hmoe = search.best("contrast", hmoe, [{"objective.contrast_weight": value} for value in (0.03, 0.1, 0.3)])
    hmoe = search.best("curriculum", hmoe, [*_CURRICULA, *([_GUIDANCE] if is_soft else [])])
    complete = search.best("allocation", hmoe, _allocations(hmoe))
    best = search.best("allocation or none", {}, [hmoe, complete])
    return Arms(dense, flat, complete, best)


def _allocations(hmoe: Settings) -> list[Settings]:
    """Growth from half the experts, or a few more where a group would have too few, in two thirds of the run."""
    experts, groups = (int({**BASE, **hmoe}[f"router.{name}"]) for name in ("experts", "groups"))
    starts = (count for count in range(groups, experts + 1, groups) if 2 * count >= experts)
    # The arm with random groups has the same number, and with it only the experts of a group to choose from.
    random: Settings = {**hmoe, "router.group_choice": "random"}
    start = next(count for count in starts if _is_accepted({**random, "router.experts_at_start": count}))
    grown: Settings = {
        "router.experts_at_start": start,
        "router.split_every": Fraction(2, 3 * max(1, experts - start)),
    }
    return [{**grown, "router.split_load": load} for load in (1.0, 1.5)]


def _is_accepted(settings: Settings) -> bool:
    counts = {name: value for name, value in {**BASE, **settings}.items() if not isinstance(value, Fraction)}
    try:
        load_config(words({**counts, "curriculum.competence": "none"}, Datasets(Path("main"), Path("report"))))
    except ConfigError:
        return False
    return True
