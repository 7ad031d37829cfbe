"""Exported models on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from data_pipeline.errors import PipelineError, UsageError
from hmoe_ds.model.description import FILES, ModelFormatError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def find_model(source: str | Path, revision: str | None = None) -> Path:
    """The folder of an exported model: `source` itself, or a copy of the hub's model of that name in its cache.

    Raises:
        ModelFormatError: neither is there.
        PipelineError: the hub is out of reach.
    """
    if Path(source).is_dir():
        return Path(source)
    if not isinstance(source, str) or not _NAME.fullmatch(source):
        raise ModelFormatError(
            f"{source} is no folder: give one that `hmoe export` made, or owner/name of a model on the hub"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(FILES)))
    except (LocalEntryNotFoundError, OSError) as error:
        if _was_refused(error):
            raise ModelFormatError(
                f"{source} is no folder here, and the hub has no such model for you ({_first_line(error)}): check the "
                "name, or log in with `hf auth login`"
            ) from error
        raise PipelineError(
            f"{source} is no folder here, and the hub is out of reach ({_first_line(error)}): try again, or give the "
            "folder of an exported model"
        ) from error
    except HFValidationError as error:
        raise ModelFormatError(f"{source} is no folder here, and no name of a model on the hub: {error}") from error


def check_name(name: str) -> None:
    """Raise UsageError unless `name` may be that of a model on the hub."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name of a model on the hub: expected owner/name")


def push_folder(folder: str | Path, name: str, private: bool = True, revision: str | None = None) -> str:
    """Upload an exported model; -> its address there. See `HMoEModel.push_to_hub`."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi()
    errors: tuple[type[Exception], ...] = (HFValidationError, *_request_errors())
    try:
        api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=revision,
            allow_patterns=list(FILES),
            delete_patterns=[file for file in FILES if not (Path(folder) / file).is_file()],  # of the version before
        )
    except errors as error:
        is_final = isinstance(error, HFValidationError) or _was_refused(error)
        mend = "log in with `hf auth login` as one who may, or give another owner/name" if is_final else "try again"
        raise PipelineError(f"{name} could not be written on the hub ({_first_line(error)}): {mend}") from error
    return str(done)


def _request_errors() -> tuple[type[Exception], ...]:
    """What a request to the hub raises that is refused, or does not get there.

    These are the error of the hub's package and what it is derived from: OSError, and that of an HTTP library, which
    differs between versions of the package.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return tuple(base for base in HfHubHTTPError.__mro__ if issubclass(base, Exception) and base is not Exception)


def _was_refused(error: Exception) -> bool:
    """Whether the hub has answered that it will not; otherwise it has a fault, or did not answer."""
    response = getattr(error, "response", None)
    return response is not None and response.status_code < 500


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
