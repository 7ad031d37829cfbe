"""The JSON files that let `datasets.load_from_disk` open a dataset folder."""

import hashlib
import json
from pathlib import Path
from typing import Any

from data_pipeline.durable import write_text
from data_pipeline.manifest import ShardRecord


def write_dataset_dict(dataset: Path, splits: dict[str, list[ShardRecord]]) -> list[str]:
    """Write the files for `splits`, whose shards lie in the folder. Returns their names, relative to it."""
    files = {"dataset_dict.json": {"splits": list(splits)}}
    for split, shards in splits.items():
        files[f"{split}/state.json"] = _state(split, shards)
        # Empty: `datasets` reads the columns from the shards.
        files[f"{split}/dataset_info.json"] = {}
    for name, content in files.items():
        write_text(dataset / name, json.dumps(content, indent=1) + "\n")
    return list(files)


def _state(split: str, shards: list[ShardRecord]) -> dict[str, Any]:
    return {
        "_data_files": [{"filename": Path(shard.file).name} for shard in shards],
        # `datasets` names its caches by it: it must follow from the content.
        "_fingerprint": hashlib.blake2b("".join(s.blake2b for s in shards).encode(), digest_size=8).hexdigest(),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
