"""`hmoe inspect` as it is called: its last line, its exit codes, paths that are nothing it knows."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from tests.cli.test_cli import ROOT


def test_a_model_from_the_command_line(exported):
    command = [sys.executable, "-m", "hmoe_ds.cli", "inspect", exported, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=True)
    *lines, last = done.stdout.splitlines()
    result = json.loads(last)
    assert (result["kind"], result["trained"]["step"], result["dtype"]) == ("model", 5, "float32")
    assert result["problems"] == []
    assert f"{result['parameters']['total']:,}" in "\n".join(lines)
    assert lines[-2].split(maxsplit=2)[2] == result["embed"]


@pytest.mark.parametrize(("words", "unbuffered"), [(["inspect"], ""), (["inspect"], "1"), (["pretrain", "--help"], "")])
def test_a_reader_that_has_gone_ends_it_without_a_word(words, unbuffered, exported):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "hmoe_ds.cli", *words, *([exported] if words == ["inspect"] else [])]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=120, check=False, env=environment
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_what_is_damaged_ends_with_1(exported, hmoe_here, tmp_path):
    shutil.copytree(exported, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"nonsense")
    _, out, err = hmoe_here("inspect", tmp_path / "model", expect=1)
    assert "model.safetensors is damaged" in out
    assert not err


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing", "does not exist; expected the folder of one of"),
        ("empty", "is an empty folder"),
        ("text", "is a folder with some.txt"),
        ("text/some.txt", "is a file; expected"),
        ("", "holds model (a model of `hmoe export`): give one of these folders"),
        ("model/config.json", "is a file in a model of `hmoe export`: give its folder"),
        ("another", "another/config.json has format_version None"),
        ("half", "half is no exported model"),
        ("garbage", "garbage/run.json"),
    ],
)
def test_paths_that_are_none_of_the_kinds(path, message, exported, hmoe_here, tmp_path):
    shutil.copytree(exported, tmp_path / "model")
    for name in ("empty", "text"):
        (tmp_path / name).mkdir()
    (tmp_path / "text" / "some.txt").write_text("some")
    if path in ("another", "half", "garbage"):
        (tmp_path / path).mkdir()
        (tmp_path / path / {"garbage": "run.json"}.get(path, "config.json")).write_text('{"hidden_size": 768}')
    if path == "another":
        (tmp_path / path / "model.safetensors").write_bytes(b"")
    _, out, err = hmoe_here("inspect", f"{tmp_path}/{path}", expect=2)
    assert err.startswith("hmoe inspect: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not out
