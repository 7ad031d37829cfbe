"""Step times of the large presets on clusters that nobody here has: paper numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.preset_gpus import PRESET_GPUS
from benchmarks.scaling_model.fabric import Cluster
from benchmarks.scaling_model.markdown import markdown_table
from benchmarks.scaling_model.step import Gpu, StepTime, step_time
from hmoe_ds.config import RunConfig
from hmoe_ds.config_parser import load_config
from hmoe_ds.model.size import molecules_per_slice
from hmoe_ds.training.dry_run import DRUG_LIKE
from hmoe_ds.training.footprint import memory_per_rank

Scaling = Literal["weak", "strong"]

PRESETS = ("base_8gpu", "large_multinode")


@dataclass(frozen=True)
class Row:
    """One run on paper.

    Args:
        preset: its name.
        scaling: `weak`: molecules per GPU as the preset is meant; `strong`: the preset's global batch.
        gpus: ranks R.
        ep_size: ranks that share the experts.
        migration_share: bytes of the experts' all-to-alls with migration over those without; None without migration.
        step: seconds by part.
        molecules_per_second: of all GPUs.
        efficiency: molecules/s per GPU, over that of the fewest GPUs with experts inside a node and no migration.
        memory: bytes per GPU.
    """

    preset: str
    scaling: Scaling
    gpus: int
    ep_size: int
    migration_share: float | None
    step: StepTime
    molecules_per_second: float
    efficiency: float
    memory: float

    def figures(self) -> dict[str, Any]:
        """As plain data."""
        return {**dataclasses.asdict(self), "step_seconds": self.step.total}


def resized(preset: str, scaling: Scaling, gpus: int, ep_size: int) -> RunConfig:
    """A preset for `gpus` GPUs: its batch grown with them (weak) or as it is, its experts spread over `ep_size`.

    A group must lie on one rank, so with more ranks than groups there are more groups.
    """
    config = load_config(["--config", preset])
    factor = gpus / PRESET_GPUS[preset] if scaling == "weak" else 1.0
    budgets = ("molecules_per_step", "atoms_per_step", "bonds_per_step")
    data = dataclasses.replace(
        config.data, **{name: math.ceil(getattr(config.data, name) * factor) for name in budgets}
    )
    router = dataclasses.replace(config.router, groups=max(config.router.groups, ep_size))
    parallel = dataclasses.replace(config.parallel, ep_size=ep_size)
    return dataclasses.replace(config, data=data, router=router, parallel=parallel)


def paper_rows(
    preset: str,
    scaling: Scaling,
    gpus: Sequence[int],
    ep_sizes: Sequence[int],
    shares: Sequence[float],
    gpu: Gpu,
    cluster: Cluster,
) -> Iterator[Row]:
    """For each number of GPUs (ascending) and `ep_size` that divides it: without migration, then with each share."""
    fewest = 0.0
    for count in gpus:
        for ep_size in [size for size in ep_sizes if count % size == 0]:
            config = resized(preset, scaling, count, ep_size)
            molecules = config.optim.accumulation * molecules_per_slice(config, DRUG_LIKE.atoms, DRUG_LIKE.bonds)
            parallel = config.parallel
            memory = memory_per_rank(
                config, count, parallel.zero_stage, parallel.offload_optimizer, DRUG_LIKE.atoms, DRUG_LIKE.bonds
            )
            for share in (None, *shares):
                step = step_time(config, count, DRUG_LIKE, gpu, cluster, share)
                rate = molecules / step.total
                fewest = fewest or rate / count
                efficiency = rate / count / fewest
                yield Row(preset, scaling, count, ep_size, share, step, rate, efficiency, memory.total)


def paper_table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table; milliseconds, GiB per GPU."""
    names = ["compute", "update", "all_to_all", "zero", "loss", "waiting"]
    titles = ["GPUs", "ep_size", "migration", *names, "step", "molecules/s", "efficiency", "GiB"]
    cells = [
        [
            str(row.gpus),
            str(row.ep_size),
            "no" if row.migration_share is None else f"{row.migration_share:.0%}",
            *(f"{1000 * getattr(row.step, name):.1f}" for name in names),
            f"{1000 * row.step.total:.1f}",
            f"{row.molecules_per_second:,.0f}",
            f"{row.efficiency:.0%}",
            f"{row.memory / 2**30:.0f}",
        ]
        for row in rows
    ]
    return markdown_table(titles, cells)
