"""Copies of checkpoints elsewhere: the machine may go, the run goes on."""

import shutil
import threading

import fsspec
import pytest

from data_pipeline.errors import PipelineError, UsageError
from hmoe_ds.config_parser import load_config
from hmoe_ds.model.checkpoint_record import CheckpointError
from hmoe_ds.training.checkpoints import mirror as mirror_module
from hmoe_ds.training.checkpoints.mirror import Mirror, fetch, main
from hmoe_ds.training.checks.preflight import check_run
from tests.distributed.harness import arguments, read_metrics, train
from tests.made_up import make_up_checkpoint
from tests.object_storage import s3_client, s3_server

COMMON = {"run__steps": 6, "run__checkpoint_every": 2, "parallel__ep_size": 2}


@pytest.fixture(scope="module")
def server():
    with s3_server() as url:
        yield url


@pytest.mark.timeout(400)
def test_a_run_goes_on_on_another_machine(dataset, server, tmp_path, monkeypatch):
    s3_client(server, monkeypatch).mkdir("runs")
    train(tmp_path / "whole", dataset, ranks=2, **COMMON)
    settings = COMMON | {"run__mirror": "s3://runs/one"}
    train(tmp_path / "first", dataset, ranks=2, **(settings | {"run__steps": 4, "optim__decay_steps": 6}))
    shutil.rmtree(tmp_path / "first")
    assert fetch(tmp_path / "second", "s3://runs/one") == "step00000004"
    assert [line["step"] for line in read_metrics(tmp_path / "second")] == [1, 2, 3, 4]
    train(tmp_path / "second", dataset, ranks=2, **settings, optim__decay_steps=6)
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("whole", "second")]
    assert losses[0] == losses[1]
    for name in ("weights", "experts-00000-of-00002", "experts-00001-of-00002"):
        files = [tmp_path / run / "checkpoints/step00000006" / f"{name}.safetensors" for run in ("whole", "second")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert not (tmp_path / "second" / "mirroring").exists()
    storage = fsspec.filesystem("s3")
    storage.invalidate_cache()
    assert sorted(path.rsplit("/")[-1] for path in storage.ls("runs/one/checkpoints")) == ["latest", "step00000006"]


def configured(tmp_path, url):
    return load_config(["--run.out", str(tmp_path / "run"), "--run.mirror", str(url)])


def test_one_checkpoint_after_the_other(tmp_path):
    target = tmp_path / "mirror"
    config = configured(tmp_path, target)
    folders = [make_up_checkpoint(tmp_path / "run", step, {}) for step in (2, 4)]
    with Mirror(config, 0, rank=0) as mirror:
        mirror.push(2)
        shutil.rmtree(folders[0])  # as the retention would
        mirror.push(4)
    assert sorted(path.name for path in (target / "checkpoints").iterdir()) == ["latest", "step00000004"]
    assert not (tmp_path / "run" / "mirroring").exists()
    assert fetch(tmp_path / "other", str(target)) == "step00000004"
    assert fetch(tmp_path / "other", str(target)) is None  # it has one now
    with Mirror(configured(tmp_path, tmp_path / "unused"), 0, rank=1) as mirror:
        mirror.push(4)
    assert not (tmp_path / "unused").exists()


def test_an_error_does_not_wait_for_a_copy(tmp_path, monkeypatch):
    make_up_checkpoint(tmp_path / "run", 2, {})
    begun, ended = threading.Event(), threading.Event()

    def upload(*_):
        begun.set()
        ended.wait()

    def train():
        with Mirror(configured(tmp_path, "m"), 2, rank=0):
            assert begun.wait(60)
            raise ValueError("of the training")

    monkeypatch.setattr(mirror_module, "_upload", upload)
    with pytest.raises(ValueError, match="of the training"):
        train()
    assert not ended.is_set()
    ended.set()


def test_a_copy_that_fails_is_said_and_tried_again(tmp_path, monkeypatch, capsys):
    target = tmp_path / "mirror"
    config = configured(tmp_path, target)
    make_up_checkpoint(tmp_path / "run", 2, {})
    target.write_text("a file where the folder should be")
    with (
        pytest.raises(PipelineError, match=r"step00000002 was not copied to run\.mirror .* when the run is started"),
        Mirror(config, 0, rank=0) as mirror,
    ):
        mirror.push(2)
    assert "checkpoint step00000002 was not copied to run.mirror" in capsys.readouterr().err
    target.unlink()
    with Mirror(config, 2, rank=0):  # the start that goes on from it
        pass
    assert (target / "checkpoints" / "latest").read_text() == "step00000002"


def test_a_copy_that_was_interrupted_leaves_the_one_before(tmp_path, monkeypatch):
    target = tmp_path / "mirror"
    config = configured(tmp_path, target)
    for step in (2, 4):
        make_up_checkpoint(tmp_path / "run", step, {})
    with Mirror(config, 0, rank=0) as mirror:
        mirror.push(2)
    monkeypatch.setattr(mirror_module, "LIST_FILE", "no such file")  # the last one that is copied
    with pytest.raises(PipelineError), Mirror(config, 0, rank=0) as mirror:
        mirror.push(4)
    monkeypatch.undo()
    assert fetch(tmp_path / "other", str(target)) == "step00000002"


def test_what_is_not_what_was_written_is_refused(tmp_path, capsys):
    target = tmp_path / "mirror"
    make_up_checkpoint(tmp_path / "run", 2, {})
    with Mirror(configured(tmp_path, target), 0, rank=0) as mirror:
        mirror.push(2)
    record = target / "checkpoints" / "step00000002" / "checkpoint.json"
    content = record.read_text()
    record.write_text(content.replace("2", "3"))
    with pytest.raises(CheckpointError, match=r"checkpoint\.json is damaged: its checksum"):
        fetch(tmp_path / "other", str(target))
    record.write_text(content)
    (target / "checkpoints" / "latest").write_text("../../elsewhere")
    with pytest.raises(UsageError, match="which is no checkpoint's name"):
        fetch(tmp_path / "other", str(target))
    assert main([str(tmp_path / "other"), str(target)]) == 2
    (target / "checkpoints" / "latest").write_text("step00000002")
    assert main([str(tmp_path / "other"), str(target)]) == 0
    assert main([str(tmp_path / "other"), str(target)]) == 0
    assert "step00000002 was brought back" in capsys.readouterr().out


def test_a_mirror_that_cannot_be_is_refused_before_the_start(dataset, tmp_path):
    with pytest.raises(UsageError, match="nowhere"):
        check_run(load_config(arguments(tmp_path / "run", dataset, run__mirror="nowhere://runs/one")), 1)
    with pytest.raises(UsageError, match=r"run\.mirror s3://runs/one is given with credentials"):
        load_config(arguments(tmp_path / "run", dataset, run__mirror="s3://key:secret@runs/one"))
