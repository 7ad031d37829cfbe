"""Credentials do not reach messages, whatever the storage library says, and names of sources hold none."""

import pickle

import pytest

from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.redact import has_credentials, redacted, without_credentials

# A URL, and what is left of it.
WITH = {
    "s3://AKIA012:hush+hush/hush@bucket/zinc": "s3://bucket/zinc",
    "https://me:hushhush@host/a.smi": "https://host/a.smi",
    "https://me:hush@hush@host:8080/a.smi": "https://host:8080/a.smi",
    "https://hushhush@host/a.smi": "https://host/a.smi",
    "https://host/a.smi?X-Amz-Credential=hushhush&X-Amz-Signature=hushhush": "https://host/a.smi",
    "https://host/a.smi?token=hushhush": "https://host/a.smi",
    "https://host/a.smi#access_token=hushhush": "https://host/a.smi",
    "az://container/a.smi?sv=2024&sig=hushhush": "az://container/a.smi",
    "abfs://container@account.dfs.core.windows.net/a?sig=hushhush": "abfs://container@account.dfs.core.windows.net/a",
    "postgresql+psycopg2://me:hushhush@host:5432/mlflow": "postgresql+psycopg2://host:5432/mlflow",
    "sftp://me:hushhush@host/a.smi": "sftp://host/a.smi",
}
WITHOUT = [
    *("s3://bucket/zinc", "s3://bucket/part-?.smi", "s3://bucket/me@host/a.smi", "https://host:8080/a@b.smi"),
    *("github://org:repo@main/a.smi", "abfs://container@account.dfs.core.windows.net/a", "sqlite:////home/me/a.db"),
    *("/home/me/a.smi", "C[C@H](N)C(=O)O", "memory://a", "hf://datasets/chem/zinc@main/a.parquet", "a:b@c", ""),
]


@pytest.mark.parametrize("url", WITH)
def test_a_url_with_credentials(url):
    assert has_credentials(url)
    assert without_credentials(url) == WITH[url]
    for text in (
        url,
        f"{url}: denied",
        f"data.path is '{url}'",
        f"[{url}, b]",
        f"at ({url}); check it",
        f"{url}\n{url}",
    ):
        assert "hush" not in redacted(text)
        assert WITH[url] in redacted(text)


@pytest.mark.parametrize("url", WITHOUT)
def test_a_path_without_credentials_stays_as_it_is(url):
    assert not has_credentials(url)
    assert without_credentials(url) == url
    assert redacted(f"{url}: no such file; check '{url}'") == f"{url}: no such file; check '{url}'"


def test_what_a_library_quotes_of_a_url():
    url = "s3://AKIA012345:hush/hush@bucket/a?sig=hushhush"
    said = 'Invalid bucket name "AKIA012345:hush/hush@bucket" (key AKIA012345, secret hush/hush, sig=hushhush)'
    message = redacted(f"{url}: cannot be read ({said}); check it")
    assert "hush" not in message
    assert "AKIA012345" not in message
    assert message.startswith("s3://bucket/a?***: cannot be read (Invalid bucket name")


@pytest.mark.parametrize(
    "name",
    [
        *("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN"),
        *("MLFLOW_TRACKING_TOKEN", "FSSPEC_S3_SECRET", "FSSPEC_S3_KEY", "AZURE_STORAGE_CONNECTION_STRING"),
        *("AZURE_STORAGE_ACCOUNT_KEY", "WANDB_API_KEY"),
    ],
)
def test_credentials_of_the_environment(name, monkeypatch):
    monkeypatch.setenv(name, "hushhush")
    assert redacted("403: signature of hushhush differs") == "403: signature of *** differs"


@pytest.mark.parametrize("name", ["PWD", "TOKENIZERS_PARALLELISM", "AWS_SHARED_CREDENTIALS_FILE", "AWS_REGION"])
def test_other_variables_are_no_secrets(name, monkeypatch):
    monkeypatch.setenv(name, "/home/me")
    assert redacted("/home/me/a.smi: no such file") == "/home/me/a.smi: no such file"


def test_errors_hold_no_credentials_also_behind_a_process():
    error = UsageError("https://me:hushhush@host/a.smi: no such file")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == repr(again.args[0]).strip("'") == "https://host/a.smi: no such file"
    assert isinstance(again, PipelineError)
