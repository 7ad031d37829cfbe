"""Every file that commands write, and every line that they print, without the credentials that they were given."""

from pathlib import Path

import pytest

from hmoe_ds.cli import main
from hmoe_ds.training.launching.node import free_port
from tests.distributed.harness import arguments
from tests.unit.data_pipeline.servers import serve

SECRET = "hushHUSH0815"


@pytest.fixture
def web(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.smi").write_text("CCO one\nc1ccccc1 two\nC1CC bad\n")
    (tmp_path / "files" / "test.csv").write_text("smiles,label\nCCO,1\nCCN,0\n")
    with serve(tmp_path / "files") as url:
        yield url


def where_is_the_secret(folder: Path, capfd) -> list[str]:
    """Files with the secret in their content or name; and `output`."""
    found = [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if SECRET in path.name or (path.is_file() and SECRET.encode() in path.read_bytes())
    ]
    captured = capfd.readouterr()
    return found + [captured.out + captured.err] * (SECRET in captured.out + captured.err)


def signed(url: str) -> str:
    return f"{url}?X-Amz-Signature={SECRET}"


def with_password(url: str) -> str:
    return url.replace("http://", f"http://me:{SECRET}@")


def test_preparing_from_urls_with_credentials(web, tmp_path, capfd):
    out = ["--out", str(tmp_path / "out"), "--workers", "1"]
    # The same name twice, so that sources are named by their URLs.
    sources = [signed(f"{web}/a.smi"), with_password(f"{web}/a.smi")]
    assert main(["prepare", *sources, *out, "--exclude", signed(f"{web}/test.csv")]) == 0
    assert main(["prepare", *sources, *out, "--exclude", signed(f"{web}/test.csv"), "--json"]) == 0
    assert main(["prepare", *sources, *out, "--dry-run", "--overwrite", "--json"]) == 0
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    assert where_is_the_secret(tmp_path, capfd) == []


@pytest.mark.parametrize(
    "command",
    [
        ["prepare", "{url}", "--out", "{folder}/out"],
        ["prepare", "nci5k", "--exclude", "{url}", "--out", "{folder}/out"],
        ["prepare", "nci5k", "--out", "{url}", "--staging", "{folder}/staging"],
        ["prepare", "nci5k", "--out", "{url}", "--append"],
        ["prepare", "nci5k", "--out", "{folder}/out", "--staging", "{url}"],
        ["prepare", "nci5k", "--out", "{folder}/out", "--no-such-option", "{url}"],
        ["inspect", "{url}"],
        ["embed", "{folder}/model", "{url}", "--out", "{folder}/a.parquet"],
        ["export", "{url}", "{folder}/model"],
        ["pretrain", "--data.path", "{url}", "--run.out", "{folder}/run"],
        ["pretrain", "--data.path", "[{url}, other]", "--run.out", "{folder}/run"],
        ["pretrain", "--probe.tables", "[{{path: '{url}', label: label}}]", "--run.out", "{folder}/run"],
        ["pretrain", "--run.out", "{url}"],
        ["pretrain", "--data.cache_dir", "{url}"],
        ["pretrain", "--run.steps", "{url}"],
        ["pretrain", "--no.such", "{url}"],
        ["pretrain", "--config", "{url}"],
    ],
)
@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKIA:{SECRET}@bucket/a.smi",
        f"http://me:{SECRET}@127.0.0.1:9/a.smi",
        f"http://127.0.0.1:9/a.smi?token={SECRET}",
        f"nothing://me:{SECRET}@host/a.smi",
    ],
)
def test_what_fails_is_said_without_credentials(command, url, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAAKIA")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    words = [word.format(url=url, folder=tmp_path) for word in command]
    try:
        code = main(words)
    except SystemExit as error:  # of argparse
        code = error.code
    assert code in (1, 2)
    assert where_is_the_secret(tmp_path, capfd) == []


def test_a_run_holds_no_credentials_of_its_environment(dataset, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:{free_port()}?token={SECRET}")
    for name in ("MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    words = arguments(tmp_path / "run", dataset, run__mlflow="true", run__steps=2)
    assert main(["pretrain", "--num_ranks", "1", *words]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "model")]) == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"run.json", "config.yaml", "mlflow.json"}
    assert where_is_the_secret(tmp_path, capfd) == []


def test_mlflow_is_told_no_credentials(dataset, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    words = arguments(tmp_path / "run", dataset, run__mlflow="true", run__steps=2)
    assert main(["pretrain", "--num_ranks", "1", *words]) == 0
    assert (tmp_path / "run" / "mlflow.db").is_file()
    assert where_is_the_secret(tmp_path, capfd) == []
