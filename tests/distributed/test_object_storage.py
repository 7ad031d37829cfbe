"""A run whose datasets lie behind a URL (an S3 server) is the run whose datasets lie on disk."""

import fsspec
import pytest

from data_pipeline.errors import PipelineError
from data_pipeline.manifest import Manifest, verify
from hmoe_ds.config_parser import load_config
from hmoe_ds.training.checks.preflight import check_run
from tests.distributed.harness import TIMED, arguments, train_all
from tests.object_storage import s3_client, s3_server

SETTINGS = {
    "run__steps": 8,
    "data__window_shards": 1,
    "data__weights": [2, 1],
    "parallel__ep_size": 2,
    "run__validate_every": 3,
}


@pytest.fixture
def bucket(monkeypatch, dataset):
    """-> URL of the dataset in a bucket, in an environment that the ranks inherit."""
    with s3_server() as url:
        storage = s3_client(url, monkeypatch)
        storage.mkdir("molecules")
        storage.put(f"{dataset}/", "s3://molecules/nci/", recursive=True)
        yield "s3://molecules/nci"


def test_training_from_a_url_is_training_from_disk(bucket, dataset, second_dataset, tmp_path):
    splits = Manifest.load(bucket).splits
    largest = max(shard.bytes for shard in splits["train"].shards)
    held_out = sum(shard.bytes for shard in splits["validation"].shards)
    # Room for the validation split and three of the training shards: two windows that a step may touch and the next.
    bound = held_out + 3 * largest
    assert bound < held_out + sum(shard.bytes for shard in splits["train"].shards)
    remote = {"data__cache_dir": tmp_path / "cache", "data__cache_gb": bound / 1e9}
    runs = {
        tmp_path / "disk": SETTINGS | {"data__path": [str(dataset), str(second_dataset)]},
        tmp_path / "url": SETTINGS | remote | {"data__path": [bucket, str(second_dataset)]},
    }
    metrics = train_all(runs, dataset, ranks=2)
    timeless = [[{k: v for k, v in line.items() if k not in TIMED} for line in lines] for lines in metrics.values()]
    assert timeless[0] == timeless[1]
    cached = list((tmp_path / "cache" / "shards").iterdir())
    assert 2 <= len(cached) < len(splits["train"].shards) + len(splits["validation"].shards)
    assert sum(file.stat().st_size for file in cached) <= bound


def test_an_incomplete_upload_is_refused_before_the_run(bucket, dataset, tmp_path):
    assert verify(bucket) == []
    storage = fsspec.filesystem("s3")
    config = load_config(arguments(tmp_path / "run", dataset, data__path=bucket, data__cache_dir=tmp_path / "cache"))
    check_run(config, ranks=1)
    storage.rm_file(f"{bucket}/train/data-00001.arrow")
    with pytest.raises(PipelineError, match=r"^s3://.*data-00001\.arrow: no such object; upload the dataset"):
        check_run(config, ranks=1)
