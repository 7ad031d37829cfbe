"""Folders and manifests of others: no name in them leads out of their folder, and no record of a run is executed."""

import json
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.build import prepare
from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.execution.records import from_bytes, to_bytes
from data_pipeline.manifest import Manifest, verify
from data_pipeline.output import WORK_FOLDER, Publication
from data_pipeline.stages.statistics import SplitStatistics
from data_pipeline.upload import upload
from hmoe_ds.data.store import ShardStore
from hmoe_ds.model.checkpoint_record import find_checkpoint

OUTSIDE = [
    *("/etc/passwd", "../secret", "train/../../secret", "..", ".", "", "train//data", "./train/data", "train/"),
    *("train/data\0.arrow", "train/data\n.arrow", "..\\secret", 5, None, ["train"]),
]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    (folder / "a.smi").write_text("CC\nc1ccccc1\nCCO\n")
    prepare([str(folder / "a.smi")], folder / "out")
    return folder


@pytest.fixture
def prepared(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out"


def edited(folder: Path, change) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def refused(call, *parts: str) -> None:
    with pytest.raises(PipelineError) as error:
        call()
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("kind", ["shard", "file"])
def test_a_name_in_a_manifest_that_leads_out_of_the_folder(prepared: Path, name: object, kind: str) -> None:
    def change(content: dict) -> None:
        record = content["files"][0] if kind == "file" else content["splits"]["train"]["shards"][0]
        record["file"] = name

    edited(prepared, change)
    # A name that is no text is a damaged manifest.
    parts = ["manifest.json", repr(name)] + (["is not inside its folder"] if isinstance(name, str) else [])
    for call in (
        lambda: Manifest.load(prepared),
        lambda: Manifest.load(f"file://{prepared}"),
        lambda: verify(prepared),
        lambda: ShardStore(prepared, "train"),
        lambda: upload(prepared, f"memory://contained/{os.getpid()}"),
        lambda: prepare(["nci5k"], prepared, append=True),
    ):
        refused(call, *parts)


def test_an_upload_removes_nothing_outside_of_the_url(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("")
    target = tmp_path / "bucket"
    shutil.copytree(prepared, target)
    edited(target, lambda content: content["files"][0].update(file="../precious"))
    upload(prepared, f"file://{target}")
    assert (tmp_path / "precious").exists()
    assert verify(target) == []


@pytest.mark.parametrize("checksum", ["../../precious", "/etc/passwd", "", "0" * 31, "G" * 32, "0" * 32 + "\n"])
def test_a_checksum_that_is_none_is_not_taken_for_a_files_name(prepared: Path, checksum: str) -> None:
    edited(prepared, lambda content: content["splits"]["train"]["shards"][0].update(blake2b=checksum))
    refused(lambda: Manifest.load(prepared), "manifest.json: the manifest is damaged", repr(checksum))


@pytest.mark.parametrize(("field", "value"), [("rows", "3"), ("bytes", -1), ("atoms", True), ("max_atoms", 2.5)])
def test_a_number_that_is_none(prepared: Path, field: str, value: object) -> None:
    edited(prepared, lambda content: content["splits"]["train"]["shards"][0].update({field: value}))
    refused(lambda: Manifest.load(prepared), "the manifest is damaged", field, repr(value))


@pytest.mark.parametrize("linked", ["train", "shard", "scaffolds.parquet"])
def test_a_link_that_leads_out_of_the_folder(prepared: Path, linked: str, tmp_path: Path) -> None:
    shard = Manifest.load(prepared).splits["train"].shards[0].file
    name = shard if linked == "shard" else linked
    shutil.move(prepared / name, tmp_path / "elsewhere")
    (prepared / name).symlink_to(tmp_path / "elsewhere")
    calls = [
        lambda: verify(prepared),
        lambda: upload(prepared, f"memory://linked/{os.getpid()}"),
        lambda: prepare(["nci5k"], prepared, append=True),
    ]
    if linked != "scaffolds.parquet":  # which training does not read
        calls += [lambda: ShardStore(prepared, "train").check_files(), lambda: ShardStore(prepared, "train").shard(0)]
        calls += [lambda: prepare([str(prepared)], tmp_path / "again")]
    for call in calls:
        refused(call, "outside its folder")


def test_links_inside_a_folder_and_to_a_folder_are_followed(prepared: Path, tmp_path: Path) -> None:
    shard = prepared / Manifest.load(prepared).splits["train"].shards[0].file
    shard.rename(prepared / "moved")
    shard.symlink_to(prepared / "moved")
    (tmp_path / "link").symlink_to(prepared)
    assert verify(tmp_path / "link") == []
    assert len(ShardStore(tmp_path / "link", "train").shard(0).num_atoms) == 3


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_folder_of_datasets_that_names_files_outside(prepared: Path, name: object, tmp_path: Path) -> None:
    for file, content in (
        ("train/state.json", {"_data_files": [{"filename": name}]}),
        ("dataset_dict.json", {"splits": [name]}),
    ):
        folder = tmp_path / f"copy-{file.replace('/', '-')}"
        shutil.copytree(prepared, folder)
        (folder / file).write_text(json.dumps(content))
        for source in (str(folder), f"file://{folder}"):
            refused(lambda source=source: prepare([source], tmp_path / "again"), file, repr(name))


def test_a_work_folder_that_is_a_link_is_not_emptied(tmp_path: Path) -> None:
    precious = tmp_path / "home" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / WORK_FOLDER).symlink_to(precious.parent)
    refused(lambda: prepare(["synth:20"], tmp_path / "out"), WORK_FOLDER, "remove the link")
    assert precious.exists()


@pytest.mark.parametrize(
    ("remove", "moves"),
    [(["../precious"], [("a", "b")]), ([], [("../precious", "train/a")]), ([], [("a", "/etc/passwd")])],
)
def test_what_is_left_to_move_stays_in_its_folders(remove: list, moves: list, tmp_path: Path) -> None:
    (tmp_path / "publication-k").write_bytes(to_bytes(Publication("k", None, remove, moves)))
    (tmp_path / "a").touch()
    refused(lambda: Publication.load(tmp_path, "k"), "publication-k", "is not inside its folder")


@pytest.mark.parametrize("name", ["../other", "/etc", "", "a\nb"])
def test_the_name_of_the_latest_checkpoint(name: str, tmp_path: Path) -> None:
    (tmp_path / "latest").write_text(name)
    if name.strip():
        refused(lambda: find_checkpoint(tmp_path), "latest", repr(name))
    else:
        refused(lambda: find_checkpoint(tmp_path), "latest")


class _Payload:
    """What pickle calls when it reads it: anything, here the making of a file."""

    def __init__(self, *call: object) -> None:
        self._call = call

    def __reduce__(self) -> tuple:
        return self._call[0], self._call[1:]


def test_a_record_of_others_runs_no_code(prepared: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    payload = pickle.dumps(_Payload(open, str(mark), "w"))
    pickle.loads(payload)
    assert mark.exists()
    mark.unlink()
    work = prepared / WORK_FOLDER
    work.mkdir()
    (work / "publication-0").write_bytes(payload)
    prepare([str(tmp_path / "a.smi")], prepared)
    assert not mark.exists()
    assert not work.exists()


@pytest.mark.parametrize(
    "function", [os.system, eval, shutil.rmtree, Path.unlink, prepare, Manifest.load, getattr, np.load]
)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_records_call_nothing_but_what_they_hold(function, protocol: int) -> None:
    with pytest.raises(pickle.UnpicklingError):
        from_bytes(pickle.dumps(_Payload(function, "nowhere"), protocol))


@pytest.mark.parametrize("name", ["os", "os.system", "Path", "rmtree", "shutil.rmtree", "_remove"])
def test_records_call_nothing_that_our_modules_import(name: str) -> None:
    by_name = b"\x80\x04\x8c\x14data_pipeline.output\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
    with pytest.raises(pickle.UnpicklingError):
        from_bytes(by_name)


def test_records_hold_what_tasks_result_in() -> None:
    statistics = SplitStatistics(rows=3, complexity=Counter({1.5: 2}))
    counts, one = np.arange(4), np.float32(2.5)
    again = from_bytes(to_bytes(({"train": statistics}, [counts, one], (1 << 70, "text", b"bytes", None))))
    assert again[0] == {"train": statistics}
    np.testing.assert_array_equal(again[1][0], counts)
    assert again[1][1] == one
    assert again[2] == (1 << 70, "text", b"bytes", None)


def test_a_manifest_without_a_split_is_damaged(prepared: Path) -> None:
    edited(prepared, lambda content: content["splits"].pop("validation"))
    with pytest.raises(PipelineError, match=r"damaged .'validation'.") as error:
        Manifest.load(prepared)
    assert not isinstance(error.value, UsageError)
