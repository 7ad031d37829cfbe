"""MLflow's model registry: exported models by name and version. The only file here that imports MLflow."""

from __future__ import annotations

import importlib.util
import os
import re
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.redact import redacted, without_credentials
from hmoe_ds.model.description import CARD, FILES
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.model.hub import find_model

TRACKING_URI, EXPERIMENT = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"
EXAMPLE = ["CCO", "c1ccccc1O"]
ANSWER_SECONDS = 120.0  # for a first answer; a new sqlite file takes many on a busy machine
_NAME = re.compile(r"\w[\w .-]{0,199}")
_LONGEST_DESCRIPTION = 5000  # characters, in MLflow's database
_ENVIRONMENT = {  # as far as the user has not set it
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

Answer = TypeVar("Answer")


class Registry:
    """The registry in MLFLOW_TRACKING_URI, under one name; making this object finds out whether it is there.

    Args:
        name: of the registered model, which need not be there.

    Raises:
        UsageError: MLflow is not installed, no registry is given, or `name` cannot be one.
        PipelineError: the registry does not answer, for `ANSWER_SECONDS` at most, or says no.
    """

    def __init__(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{name!r} cannot be the name of a registered model: expected letters, digits, spaces, '_', '.' and "
                "'-', such as zinc-encoder"
            )
        if importlib.util.find_spec("mlflow") is None:
            raise UsageError("registering a model needs mlflow, which is not installed: pip install 'hmoe-ds[train]'")
        uri = os.environ.get(TRACKING_URI)
        if not uri:
            raise UsageError(
                f"registering a model needs {TRACKING_URI}: set it to a server, such as http://mlflow:5000, or a file, "
                "such as sqlite:////data/mlflow.db"
            )
        for variable, value in _ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        from mlflow import MlflowClient

        self.name, self._uri = name, uri
        self._client: Any = _asked(self, lambda: MlflowClient(uri))
        _asked(self, lambda: self._client.search_registered_models(max_results=1))

    def __str__(self) -> str:
        return f"MLflow at {without_credentials(self._uri)}"

    def register(self, model: str | Path) -> dict[str, Any]:
        """Register the next version of the name: a pyfunc model whose `predict` is `pyfunc.Embedder.predict`.

        It has the model card as its description, and is linked to the MLflow run that trained it, if this server has
        that.

        Args:
            model: folder made by `hmoe export`, or `owner/name` on the hub.

        Returns:
            `name`, `version`, `uri` for `mlflow.pyfunc.load_model`, and `mlflow_run`, None without a link.

        Raises:
            ModelFormatError: no exported model there.
            PipelineError: the registry says no, or is gone.
        """
        folder = find_model(model)
        loaded = HMoEModel.from_pretrained(folder, experts="file")
        from mlflow import MlflowException

        try:
            return self._register(folder, loaded)
        except (MlflowException, OSError) as error:
            raise PipelineError(
                f"{folder} could not be registered as {self.name}: {self} says {_line(error)}; mend that and repeat it "
                f"with: hmoe register {folder} {self.name}"
            ) from error

    def _register(self, folder: Path, model: HMoEModel) -> dict[str, Any]:
        import mlflow

        client, tags = self._client, _tags(model)
        files = [folder / name for name in FILES if (folder / name).is_file()]
        trained_by = self._training_run(tags.get("mlflow_run"))
        experiment = self._experiment() if trained_by is None else trained_by.info.experiment_id
        run_id = None if trained_by is None else trained_by.info.run_id
        logged = client.create_logged_model(experiment, name="encoder", source_run_id=run_id, tags=tags)
        with TemporaryDirectory() as temporary:
            path, content = Path(temporary) / "model", Path(temporary) / "content"
            content.mkdir()
            for file in files:
                (content / file.name).symlink_to(file.resolve())
            written = mlflow.models.Model(
                artifact_path=logged.artifact_location,
                run_id=run_id,
                model_uuid=logged.model_id,
                model_id=logged.model_id,
            )
            mlflow.pyfunc.save_model(
                path,
                loader_module="hmoe_ds.downstream.pyfunc",
                data_path=str(content),
                pip_requirements=[f"hmoe-ds=={version('hmoe-ds')}", f"torch=={torch.__version__.partition('+')[0]}"],
                signature=_signature(model.config.hidden_size),
                input_example=EXAMPLE,
                mlflow_model=written,
            )
            client.log_model_artifacts(logged.model_id, str(path))
        client.finalize_logged_model(logged.model_id, "READY")
        if not client.search_registered_models(f"name = '{self.name}'"):
            client.create_registered_model(self.name)
        card = "".join(file.read_text() for file in files if file.name == CARD)
        made = client.create_model_version(
            self.name,
            source=f"models:/{logged.model_id}",
            run_id=run_id,
            tags=tags,
            description=_without_front_matter(card)[:_LONGEST_DESCRIPTION],
            model_id=logged.model_id,
        )
        uri = f"models:/{self.name}/{made.version}"
        return {"name": self.name, "version": int(made.version), "uri": uri, "mlflow_run": run_id}

    def _training_run(self, run_id: str | None) -> Any:
        """The MLflow run that trained the model, if its id is known and this server has it."""
        from mlflow import MlflowException

        if run_id is None:
            return None
        try:
            return self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def _experiment(self) -> str:
        """Id of the experiment that holds models of runs which this server does not know."""
        name = os.environ.get(EXPERIMENT, "hmoe_ds")
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        # MLflow would put the files of an sqlite registry into the current directory.
        file = self._uri.removeprefix("sqlite:///")
        local = None if file == self._uri else str(Path(file).absolute().with_name("mlflow_artifacts"))
        return self._client.create_experiment(name, artifact_location=local)


def _tags(model: HMoEModel) -> dict[str, str]:
    """What a version is found by: its size, and where it comes from as far as that is known."""
    told = {
        "step": model.provenance.get("step"),
        "dataset_fingerprint": model.provenance.get("dataset"),
        "mlflow_run": model.provenance.get("mlflow_run"),
        "parameters": sum(value.numel() for value in model.parameters()),
    }
    return {name: str(value) for name, value in told.items() if value is not None}


def _signature(width: int) -> Any:
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    # A column without a name: a list is one, too.
    return ModelSignature(
        inputs=Schema([ColSpec("string")]), outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, width))])
    )


def _without_front_matter(card: str) -> str:
    """A model card as Markdown alone, without the lines for the Hugging Face hub."""
    return re.sub(r"\A---\n.*?\n---\n+", "", card, flags=re.DOTALL)


def _asked(registry: Registry, request: Callable[[], Answer]) -> Answer:
    """The answer to a request, whatever it may be waiting for, within `ANSWER_SECONDS`."""
    answers: list[Answer] = []
    errors: list[Exception] = []

    def ask() -> None:
        try:
            answers.append(request())
        except Exception as error:  # told by the thread that waits
            errors.append(error)

    # A daemon, so that a request without an answer does not keep the process.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if answers:
        return answers[0]
    why = _line(errors[0]) if errors else f"no answer within {ANSWER_SECONDS:.0f} s"
    raise PipelineError(f"{registry} cannot be reached ({why}): start it, or set {TRACKING_URI} to where it is")


def _line(error: BaseException) -> str:
    """What went wrong in the first place: MLflow wraps what requests wraps what the system says."""
    while error.__context__ is not None:
        error = error.__context__
    return redacted(" ".join(str(error).split()) or type(error).__name__)[:200]
