"""MLflow, on rank 0 only; the only file that imports it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from hmoe_ds.config import RunConfig


class Tracker:
    """Logs one run to the server of MLFLOW_TRACKING_URI, or to a sqlite file in the run's folder.

    Args:
        config: logged as parameters.
        dataset_fingerprint: logged as a tag.
        run_id: MLflow run to continue, from a checkpoint.
    """

    def __init__(self, config: RunConfig, dataset_fingerprint: str, run_id: str | None) -> None:
        import mlflow

        self._mlflow = mlflow
        out = Path(config.run.out).resolve()
        mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{out / 'mlflow.db'}"))
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "hmoe_ds"))
        known = run_id is not None and self._knows(run_id)
        run = mlflow.start_run(run_id=run_id if known else None, run_name=out.name)
        self.run_id: str = run.info.run_id
        if not known:
            mlflow.log_params(_flatten(config.to_dict()))
            mlflow.set_tag("dataset_fingerprint", dataset_fingerprint)
            if run_id is not None:
                mlflow.set_tag("continues", run_id)

    def _knows(self, run_id: str) -> bool:
        """Whether the server still has the run that a checkpoint names."""
        try:
            self._mlflow.get_run(run_id)
        except self._mlflow.MlflowException:
            print(f"MLflow has no run {run_id} any more; a new one continues it", flush=True)
            return False
        return True

    def log(self, metrics: dict[str, float]) -> None:
        """Log one step's metrics without waiting for the server."""
        values = {name: value for name, value in metrics.items() if name != "step" and math.isfinite(value)}
        self._mlflow.log_metrics(values, step=int(metrics["step"]), synchronous=False)

    def flush(self) -> None:
        """Wait until everything logged so far has arrived."""
        self._mlflow.flush_async_logging()

    def close(self) -> None:
        """End the MLflow run."""
        self.flush()
        self._mlflow.end_run()


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat
