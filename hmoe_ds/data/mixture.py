"""Several prepared datasets as one: where the shards and rows of each begin, and how much of a batch each provides."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.remote import is_url
from hmoe_ds.config import DataConfig
from hmoe_ds.data.cache import ShardCache
from hmoe_ds.data.cache_folder import default_folder
from hmoe_ds.data.store import Extent, Shard, ShardStore


class Mixture:
    """One split of several datasets, addressed like one store: the shards and rows of the first, then the second, ...

    Args:
        stores: one split of each dataset.
        weights: share of the molecules of a batch that each dataset provides, up to a common factor; without them
            the shares are those of the datasets' sizes.

    Attributes:
        weight_S: share of each of S datasets; they sum to 1. A dataset whose split is empty has none.
        first_row_S: row of the mixture at which each dataset begins.
        row_start: first row of each shard of all datasets, then the number of rows.
    """

    def __init__(self, stores: Sequence[ShardStore], weights: Sequence[float] | None = None) -> None:
        self.stores = list(stores)
        size_S = np.array([len(store) for store in stores], np.int64)
        self.first_row_S = np.concatenate([[0], np.cumsum(size_S)[:-1]])
        self._first_shard_S = [0, *accumulate(store.num_shards for store in stores)]
        shares_S = np.where(size_S > 0, np.asarray(weights if weights else size_S, np.float64), 0.0)
        shares_S /= max(shares_S.max(), np.finfo(np.float64).tiny)  # first, as the sum of huge ones is not finite
        self.weight_S: NDArray[np.float64] = shares_S / max(shares_S.sum(), 1.0)
        starts = [store.row_start[:-1] + first for store, first in zip(stores, self.first_row_S, strict=True)]
        self.row_start = np.concatenate([*starts, [size_S.sum()]])

    def __len__(self) -> int:
        return sum(len(store) for store in self.stores)

    @property
    def with_targets(self) -> bool:
        """Whether batches have what molecule-level objectives predict."""
        return all(store.with_targets for store in self.stores)

    def shard(self, index: int) -> Shard:
        """Views into shard `index`, counted over all datasets."""
        which = bisect_right(self._first_shard_S, index) - 1
        return self.stores[which].shard(index - self._first_shard_S[which])

    def first_molecules(self, molecules: int) -> list[int]:
        """How many each dataset provides of the first `molecules` molecules: its share, as far as it has so many."""
        shares = zip(self.stores, self.weight_S.tolist(), strict=True)
        return [min(len(store), round(weight * molecules)) for store, weight in shares]

    def mean_size(self) -> tuple[float, float]:
        """Mean atoms and bonds of a molecule of the training split, datasets by their shares."""
        splits = [store.manifest.splits["train"] for store in self.stores]
        shares = list(zip(self.weight_S.tolist(), splits, strict=True))
        atoms = sum(share * split.atoms / max(split.rows, 1) for share, split in shares)
        return atoms, sum(share * split.bonds / max(split.rows, 1) for share, split in shares)

    @property
    def provenance(self) -> dict[str, Any]:
        """What a model that is trained on these molecules keeps of them: fingerprint, count, form, sources, terms."""
        sources = [source for store in self.stores for source in store.manifest.sources]
        return {
            "dataset": self.fingerprint,
            "molecules": len(self),
            "standardize": self.standardized,
            "sources": [{"name": each.name, "rows": each.rows, "licence": each.licence} for each in sources],
        }

    @property
    def standardized(self) -> bool:
        """Whether the molecules are in their standard form; all datasets of a run are alike in that."""
        return bool(self.stores[0].manifest.options["standardize"])

    def check_files(self) -> None:
        """Raise PipelineError or UsageError when a shard is not what the manifest says, as far as a glance tells."""
        for store in self.stores:
            store.check_files()

    def descriptor_scale(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of each descriptor over the training molecules, datasets by their shares.

        The datasets must have targets; -> two arrays [T].
        """
        moments_ST2 = np.array(
            [
                [(record.mean, record.standard_deviation) for record in store.manifest.splits["train"].descriptors]
                for store in self.stores
            ]
        )
        weight_S1, mean_ST, deviation_ST = self.weight_S[:, None], moments_ST2[..., 0], moments_ST2[..., 1]
        mean_T = (weight_S1 * mean_ST).sum(axis=0)
        variance_T = (weight_S1 * (deviation_ST**2 + (mean_ST - mean_T) ** 2)).sum(axis=0)
        return mean_T, np.sqrt(variance_T)

    @cached_property
    def fingerprint(self) -> str:
        """Content hash of all splits of all datasets, in their order."""
        if len(self.stores) == 1:
            return self.stores[0].fingerprint
        text = "\n".join(store.fingerprint for store in self.stores)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def open_mixture(
    data: DataConfig,
    split: str,
    extents: Sequence[Extent] | None = None,
    caches: list[ShardCache] | None = None,
    targets: bool = False,
) -> Mixture:
    """One split of the datasets that `data` names.

    Args:
        data: paths, weights and cache.
        split: `train` or `validation`.
        extents: of each dataset, what of it belongs to a run that began earlier; without them all of it.
        caches: of the other splits that are open in this process; those of this one are added. They must know of
            each other because they share a bound.
        targets: as in `ShardStore`.

    Raises:
        PipelineError: no dataset at a path, or one of another format version; a cache that cannot be used.
    """
    limits = extents if extents is not None and len(extents) == len(data.paths) else [None] * len(data.paths)
    together = [] if caches is None else caches
    stores = [
        ShardStore(
            path, split, extent, _open_cache(path, data, together) if is_url(path) else None, targets, data.verify
        )
        for path, extent in zip(data.paths, limits, strict=True)
    ]
    return Mixture(stores, data.weights)


def _open_cache(url: str, data: DataConfig, together: list[ShardCache]) -> ShardCache:
    return ShardCache(url, data.cache_dir or default_folder(), int(data.cache_gb * 1e9), together)
