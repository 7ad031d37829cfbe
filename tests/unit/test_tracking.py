"""MLflow: what is logged, and that a resumed run continues its MLflow run."""

import mlflow

from hmoe_ds.config import load_config
from hmoe_ds.training.tracking import Tracker


def test_a_run_is_continued_and_a_lost_one_is_begun_anew(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    config = load_config(["--run.out", str(tmp_path), "--optim.learning_rate", "0.125"])
    first = Tracker(config, "molecules", run_id=None)
    first.log({"step": 1, "loss": 3.0, "validation_consistency": float("nan")})
    first.close()
    second = Tracker(config, "molecules", run_id=first.run_id)
    second.log({"step": 2, "loss": 2.0})
    second.close()
    assert second.run_id == first.run_id

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = client.get_run(first.run_id)
    assert run.data.params["optim.learning_rate"] == "0.125"
    assert run.data.tags["dataset_fingerprint"] == "molecules"
    assert run.data.metrics.keys() == {"loss"}
    assert [(entry.step, entry.value) for entry in client.get_metric_history(run.info.run_id, "loss")] == [
        (1, 3.0),
        (2, 2.0),
    ]

    lost = "0" * 32
    third = Tracker(config, "molecules", run_id=lost)
    third.close()
    assert third.run_id not in (first.run_id, lost)
    assert client.get_run(third.run_id).data.tags["continues"] == lost
