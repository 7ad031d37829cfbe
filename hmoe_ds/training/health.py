"""Signs that routing has degenerated, told from the metrics in plain words, with what to try."""

from __future__ import annotations

from collections.abc import Mapping

from hmoe_ds.config import RouterConfig, RunConfig

# A gate that knows nothing gives its chosen groups C of G parts of the probability; one that learns, clearly more.
_LEAST_P_OVER_CHANCE = 1.1
# Beside a dense feed-forward the routed one starts at 1.
_RMS_RATIOS = (0.1, 10.0)
_LEAST_GROUP_ENTROPY = 0.5


def health_warnings(config: RunConfig, metrics: Mapping[str, float]) -> dict[str, str]:
    """What is wrong with the routing after a step; {} while the learning rate warms up, and when all is well.

    Args:
        config: of the run.
        metrics: of the step: `chosen_p`, `routed_over_dense_rms`, `group_entropy`.

    Returns:
        A sentence for each metric that has degenerated.
    """
    router, found = config.router, {}
    if metrics["step"] <= config.optim.warmup_steps:
        return {}
    chance = router.groups_per_molecule / router.groups
    if _weighs_by_p(router) and metrics["chosen_p"] < _LEAST_P_OVER_CHANCE * chance:
        found["chosen_p"] = (
            f"the chosen groups have a mean probability of {metrics['chosen_p']:.2f}, hardly more than by chance "
            f"({chance:.2f}): molecules get little of their routed output; raise objective.contrast_weight, or lower "
            "router.group_balance_rate or router.temperature"
        )
    ratio, (least, most) = metrics["routed_over_dense_rms"], _RMS_RATIOS
    if not least <= ratio <= most:
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
    return found


def _chooses_groups(router: RouterConfig) -> bool:
    return router.groups > 1 and router.group_choice == "learned" and router.form != "flat"


def _weighs_by_p(router: RouterConfig) -> bool:
    fewer = router.groups_per_molecule < router.groups
    return fewer and _chooses_groups(router) and router.form in ("hard", "additive")
