"""Models on the hub: uploaded and loaded through a server on this machine."""

import pytest
import torch

from data_pipeline.errors import PipelineError
from hmoe_ds.model.description import ModelFormatError
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.model.hub import find_model
from tests.unit.hub_server import serve_hub


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


@pytest.mark.parametrize("name", ["/no/such/folder", "folder", "../x/y", "a/b/c"])
def test_what_is_no_name_is_not_asked_for(name):
    with pytest.raises(ModelFormatError, match="is no folder"):
        find_model(name)
