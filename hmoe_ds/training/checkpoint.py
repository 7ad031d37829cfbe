"""Save and restore a run: DeepSpeed's model and optimizer files, and our own state beside them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import deepspeed

from hmoe_ds.config import RunConfig
from hmoe_ds.training.engine import set_learning_rate
from hmoe_ds.training.run_folder import FORMAT_VERSION, checkpoint_dir, checkpoint_tag


@dataclass
class TrainState:
    """What a run needs to go on, beside what the engine holds.

    Args:
        step: optimizer steps done.
        plan: state of the batch plan.
        mlflow_run_id: the MLflow run to continue.
    """

    step: int
    plan: dict[str, Any]
    mlflow_run_id: str | None


def save_checkpoint(engine: deepspeed.DeepSpeedEngine, config: RunConfig, state: TrainState, dataset: str) -> None:
    """Write checkpoint `step<N>` and make it the latest; all ranks take part.

    Args:
        engine: model and optimizer.
        config: kept inside, so that a checkpoint can be exported on its own.
        state: kept inside.
        dataset: fingerprint of the training data, kept inside.
    """
    client_state = {
        "hmoe_ds": {"format_version": FORMAT_VERSION, **asdict(state), "config": config.to_dict(), "dataset": dataset}
    }
    engine.save_checkpoint(str(checkpoint_dir(config)), tag=checkpoint_tag(state.step), client_state=client_state)


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, config: RunConfig) -> TrainState:
    """Restore the latest checkpoint into `engine`; all ranks take part. `run_folder.check_resumable` comes first."""
    _, client_state = engine.load_checkpoint(str(checkpoint_dir(config)))
    saved = client_state["hmoe_ds"]
    # With another run.steps the schedule is another one from here on, not only from the step after the next.
    set_learning_rate(engine, config, saved["step"])
    return TrainState(step=saved["step"], plan=saved["plan"], mlflow_run_id=saved["mlflow_run_id"])
