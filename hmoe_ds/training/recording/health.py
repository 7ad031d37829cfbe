"""Signs that a run does badly, told from the metrics in plain words, with what to try."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping
from statistics import median

from hmoe_ds.config import RouterConfig, RunConfig

# A gate that knows nothing gives its chosen groups C of G parts of the probability; one that learns, clearly more.
_LEAST_P_OVER_CHANCE = 1.1
# Beside a dense feed-forward the routed one starts at 1.
_RMS_RATIOS = (0.1, 10.0)
_LEAST_GROUP_ENTROPY = 0.5
_MOST_STARVED = 0.1
_MOST_DATA_WAIT = 0.1
# A loss that jumps: over the median of the lines before by so much of it, and by so many median deviations.
_SPIKE, _SPIKE_DEVIATIONS = 1.1, 10
_RECENT, _ENOUGH = 20, 10  # lines
# What of a line the warnings are told from.
FIGURES = (
    *("step", "loss", "data_wait"),
    *("chosen_p", "routed_over_dense_rms", "group_entropy", "starved_experts"),
)


class HealthWatch:
    """Tells of what is wrong once while it lasts; what comes and goes within a few lines is the same trouble.

    Args:
        config: of the run.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=_RECENT)
        self._lines = 0
        self._last_line: dict[str, int] = {}  # with each sign of trouble

    def news(self, metrics: Mapping[str, float]) -> list[str]:
        """The sentences of `health_warnings` for the next line that were not told lately."""
        self._lines += 1
        found = health_warnings(self._config, metrics, self._losses)
        self._losses.append(metrics["loss"])
        told = [text for sign, text in found.items() if self._lines - self._last_line.get(sign, -_RECENT) >= _RECENT]
        self._last_line |= dict.fromkeys(found, self._lines)
        return told


def health_warnings(
    config: RunConfig, metrics: Mapping[str, float], recent_losses: Collection[float] = ()
) -> dict[str, str]:
    """What is wrong after a step; {} while the learning rate warms up, and when all is well.

    Args:
        config: of the run.
        metrics: the line of the step.
        recent_losses: of some lines before it.

    Returns:
        A sentence for each metric that has degenerated.
    """
    if metrics["step"] <= config.optim.warmup_steps:
        return {}
    return _routing_warnings(config, metrics) | _progress_warnings(metrics, recent_losses)


def _routing_warnings(config: RunConfig, metrics: Mapping[str, float]) -> dict[str, str]:
    router, found = config.router, {}
    chance = router.groups_per_molecule / router.groups
    if _weighs_by_p(router) and metrics["chosen_p"] < _LEAST_P_OVER_CHANCE * chance:
        found["chosen_p"] = (
            f"the chosen groups have a mean probability of {metrics['chosen_p']:.2f}, hardly more than by chance "
            f"({chance:.2f}): molecules get little of their routed output; raise objective.contrast_weight, or lower "
            "router.group_balance_rate or router.temperature"
        )
    ratio, (least, most) = metrics["routed_over_dense_rms"], _RMS_RATIOS
    if math.isfinite(ratio) and not least <= ratio <= most:
        found["routed_over_dense_rms"] = (
            f"the routed output is {ratio:.2g} times as large as the dense one beside it (1 at the start): "
            + ("the experts hardly matter" if ratio < least else "the experts drown the rest")
            + "; look at chosen_p, and try a lower optim.learning_rate or a higher objective.z_weight"
        )
    if _chooses_groups(router) and metrics["group_entropy"] < _LEAST_GROUP_ENTROPY:
        found["group_entropy"] = (
            f"few groups take most molecules (entropy {metrics['group_entropy']:.2f} of 1): the gate collapses; raise "
            "objective.contrast_weight or router.group_balance_rate"
        )
    if metrics["starved_experts"] > _MOST_STARVED:
        found["starved_experts"] = (
            f"{metrics['starved_experts']:.0%} of the experts get less than a tenth of the mean load and learn next to "
            "nothing: raise router.expert_balance_rate, or take fewer experts (router.experts)"
        )
    return found


def _progress_warnings(metrics: Mapping[str, float], recent_losses: Collection[float]) -> dict[str, str]:
    found = {}
    if metrics["data_wait"] > _MOST_DATA_WAIT:
        found["data_wait"] = (
            f"{metrics['data_wait']:.0%} of the time is spent waiting for molecules: have the dataset on a local disk, "
            "or give the ranks more cores"
        )
    if len(recent_losses) >= _ENOUGH:
        usual = median(recent_losses)
        deviation = median(abs(loss - usual) for loss in recent_losses)
        if metrics["loss"] > max(_SPIKE * usual, usual + _SPIKE_DEVIATIONS * deviation):
            found["loss"] = (
                f"the loss jumped to {metrics['loss']:.3g} from about {usual:.3g}: if it does not come back, go on "
                "from an earlier checkpoint with a lower optim.learning_rate or optim.clip_norm"
            )
    return found


def _chooses_groups(router: RouterConfig) -> bool:
    return router.groups > 1 and router.group_choice == "learned" and router.form != "flat"


def _weighs_by_p(router: RouterConfig) -> bool:
    fewer = router.groups_per_molecule < router.groups
    return fewer and _chooses_groups(router) and router.form in ("hard", "additive")
