"""Models on the hub: uploaded and loaded through a server on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import PipelineError, UsageError
from hmoe_ds.model.description import ModelFormatError
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.model.hub import check_name, find_model
from tests.unit.hub_server import serve_hub

ROOT = Path(__file__).parents[3]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    with serve_hub() as (address, held):
        # As HF_ENDPOINT, HF_TOKEN and HF_HUB_CACHE set them, which were read when the package was imported.
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", held.token)
        yield held


def test_a_model_goes_up_and_comes_back(exported, hub, monkeypatch):
    model = HMoEModel.from_pretrained(exported)
    address = model.push_to_hub("chemists/small", metadata={"step": 5})
    assert "chemists/small" in address
    assert hub.private == {"chemists/small": True}
    assert set(hub.paths("chemists/small", "main")) == {"model.safetensors", "config.json", "README.md"}
    again = HMoEModel.from_pretrained("chemists/small")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ModelFormatError, match="chemists/other is no folder here, and the hub has no such model"):
        find_model("chemists/other")


def test_who_may_not_write_is_told_so(exported, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(PipelineError, match=r"chemists/small could not be written on the hub .*hf auth login"):
        HMoEModel.from_pretrained(exported).push_to_hub("chemists/small")
    assert not hub.files


def test_a_hub_that_is_out_of_reach(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PipelineError, match="chemists/small is no folder here, and the hub is out of reach"):
        find_model("chemists/small")


def test_a_model_that_does_not_get_to_the_hub(exported):
    """In a process of its own, as its address is read when the hub's package is imported."""
    program = "import sys; from hmoe_ds.model.hub import push_folder; push_folder(sys.argv[1], 'chemists/small')"
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", program, str(exported)]
    done = subprocess.run(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=300)
    last = done.stderr.strip().splitlines()[-1]
    assert "PipelineError: chemists/small could not be written on the hub" in last
    assert last.endswith("try again")


@pytest.mark.parametrize("name", ["a", "a/b/c", "a b/c"])
def test_a_name_is_checked_before_anything_is_written(name):
    with pytest.raises(UsageError, match="is no name of a model on the hub: expected owner/name"):
        check_name(name)


@pytest.mark.parametrize("name", ["/no/such/folder", "folder", "../x/y", "a/b/c"])
def test_what_is_no_name_is_not_asked_for(name):
    with pytest.raises(ModelFormatError, match="is no folder"):
        find_model(name)
