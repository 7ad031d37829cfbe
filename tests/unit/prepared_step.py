"""One optimizer step as the loop does it, without an engine, for tests that watch the operators that it calls."""

import torch

from hmoe_ds.config import DataConfig
from hmoe_ds.config_parser import load_config
from hmoe_ds.data.mixture import open_mixture
from hmoe_ds.data.plan import BatchPlan
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.moe.balance import measure_load
from hmoe_ds.moe.exchange import Traffic
from hmoe_ds.objectives.total import Normalizers, PretrainingTask, count_normalizers
from hmoe_ds.training.feed import rank_slice
from hmoe_ds.training.loop import balance_routers
from hmoe_ds.training.recording.metrics import StepTotals
from hmoe_ds.training.recording.throughput import Throughput

VARIANTS = {
    "hard": [],
    "two groups, two slices": ["--router.groups_per_molecule=2", "--optim.accumulation=2"],
    "soft, all losses": [
        *("--router.form=soft", "--objective.balance_weight=0.1", "--objective.entropy_weight=0.1"),
        *("--objective.contrast_learned_temperature=true", "--objective.contrast_bare_scaffold=true"),
        *("--objective.fingerprint_weight=0.1", "--objective.descriptor_weight=0.1"),
    ],
    "additive": ["--router.form=additive", "--router.experts_per_atom=2"],
    "flat, recomputed": ["--router.form=flat", "--parallel.activation_checkpointing=true"],
    "experts that split": ["--router.experts_at_start=4", "--objective.balance_weight=0.1"],
}


class PreparedStep:
    """What a step of `variant` needs: its slices, counted on the CPU, and a new model."""

    def __init__(self, variant, dataset):
        self.config = config = load_config(["--data.molecules_per_step=60", *VARIANTS[variant]])
        store = open_mixture(DataConfig(path=str(dataset)), "train", targets=True)
        views = config.objective.contrast_bare_scaffold
        plan = BatchPlan(store, config.data, config.optim.accumulation, seed=0)
        self.slices = [
            rank_slice(store, part, config.objective.mask_ratio, 0, 0, 1, views) for part in plan.next_step()
        ]
        self.norm = count_normalizers(self.slices, "cpu")
        model = HMoEModel(config.model, config.router, heads=config.objective.molecule_heads)
        model.encoder.recompute = config.parallel.activation_checkpointing
        self.task = PretrainingTask(model, config.objective)

    def to(self, device: str, dtype: torch.dtype) -> None:
        """Send everything to a device, as an engine and the loop do."""
        self.slices = [part.to(device) for part in self.slices]
        self.norm = Normalizers(*(number.to(device) for number in self.norm))
        self.task.to(device, dtype)

    def run(self) -> None:
        """Forward and backward of all slices, and what follows them."""
        totals = StepTotals(Traffic(timed=True))
        for part in self.slices:
            losses, encoding = self.task(part, self.norm)
            losses.total.backward()
            load = measure_load(encoding.scaffold, encoding.atoms, part.batch.molecule_N, self.config.router)
            totals.add(losses, load)
        sums = totals.reduce()
        balance_routers(self.task, sums.load, self.config)
        Throughput(self.config, Traffic()).add(self.norm, sums.load, seconds=1.0, waited=0.0)
