"""Fitting a property model: minimise the loss on the training side, keep the epoch that is best on validation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.errors import PipelineError, UsageError
from hmoe_ds.config import Readout
from hmoe_ds.data.batch import gather
from hmoe_ds.data.store import BatchStore
from hmoe_ds.downstream.inference import batches_of
from hmoe_ds.downstream.label_scale import LabelScale, label_scale, scaled_back
from hmoe_ds.downstream.property_model import PropertyModel, parameter_groups
from hmoe_ds.downstream.scores import PRIMARY, Array, Task, is_better, score, worst
from hmoe_ds.downstream.splits import Rows, Split

_LARGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class FitOptions:
    """How a property model is fitted.

    Args:
        mode: `full` trains encoder and head, `frozen` the head alone.
        readout: what the head sees of a molecule.
        head_epochs: in mode `full`, passes over the training side, at most, in which the head alone is trained before
            all is: a fresh head would pull pretrained features away from what they are (Kumar et al., "Fine-Tuning can
            Distort Pretrained Features and Underperform Out-of-Distribution", 2022). 0 for none.
        epochs: passes after these, at most.
        patience: epochs without a better validation score after which a fit ends.
        batch_size: molecules of one step.
        learning_rate: of the head, and of the encoder's last block times `layer_decay`.
        layer_decay: by which the learning rate falls from layer to layer downwards; 1 for the same everywhere.
        weight_decay: of AdamW.
        dropout: of the head.
        class_weights: weigh both classes of a target alike, however rare one is.
    """

    mode: Literal["full", "frozen"] = "full"
    readout: Readout = "mean+max+sum+size"
    head_epochs: int = 20
    epochs: int = 100
    patience: int = 20
    batch_size: int = 32
    learning_rate: float = 1e-3
    layer_decay: float = 1.0
    weight_decay: float = 0.0
    dropout: float = 0.1
    class_weights: bool = False

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[object, bool, str]] = {
            "readout": (self.readout, self.readout in get_args(Readout), f"one of {', '.join(get_args(Readout))}"),
            "learning_rate": (self.learning_rate, 0 < self.learning_rate < float("inf"), "a number above 0"),
            "layer_decay": (self.layer_decay, 0 < self.layer_decay <= 1, "a number above 0, up to 1"),
            "weight_decay": (self.weight_decay, 0 <= self.weight_decay < float("inf"), "a number from 0"),
            "head_epochs": (self.head_epochs, self.head_epochs >= 0, "a whole number from 0"),
            "dropout": (self.dropout, 0 <= self.dropout < 1, "a number from 0, below 1"),
        }
        for name, (value, is_right, expected) in ranges.items():
            if not is_right:
                raise UsageError(f"--{name.replace('_', '-')} is {value}: expected {expected}")
        if self.mode == "frozen" and self.layer_decay != 1:
            raise UsageError("--layer-decay is for layers that learn: leave it out, or give --mode full")

    @property
    def most_epochs(self) -> int:
        """Passes over the training side, at most."""
        return self.epochs + (self.head_epochs if self.mode == "full" else 0)


class FitError(PipelineError):
    """A fit that leads nowhere."""


class Fit(NamedTuple):
    """A fitted model, which has the weights of its best epoch.

    Attributes:
        model: in evaluation mode.
        scale: of its outputs.
        best_epoch: from 1; the last one where validation has no score, as it has only one class.
        validation: primary metric on validation after each epoch, of quantities on the scale of the fit.
    """

    model: PropertyModel
    scale: LabelScale
    best_epoch: int
    validation: list[float]

    def outputs(self, molecules: pa.RecordBatch) -> Array:
        """Of encoded molecules, on the scale of the labels; [n, T]"""
        device = next(self.model.parameters()).device
        return scaled_back(outputs_of(self.model, molecules, device), self.scale)


def fit(
    model: PropertyModel,
    molecules: pa.RecordBatch,
    label_nT: Array,
    split: Split,
    task: Task,
    options: FitOptions,
    seed: int,
    report: Callable[[int], None] = lambda epoch: None,
) -> Fit:
    """Fit `model`, in place.

    Args:
        model: what to start from; on the device to work on.
        molecules: n encoded molecules.
        label_nT: their labels; NaN where there is none.
        split: rows of `molecules`.
        task: what the labels are.
        options: how.
        seed: of the order of molecules and of dropout; torch's own generators stay as they are.
        report: called with each epoch that is done.

    Raises:
        FitError: loss or outputs were not finite from the beginning. Later, that ends the epochs of the head, or those
            of all, and the best one so far counts.
    """
    scale = label_scale(task, label_nT[split.train])
    scaled_nT = (label_nT - scale.mean_T) / scale.deviation_T
    best, best_epoch = worst(task), 0
    validation: list[float] = []
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for stage in _stages(options):
            fitting = _Fitting(model, molecules, scaled_nT, task, stage)
            weights, begun = fitting.copy_weights(), len(validation)
            for epoch, value in enumerate(_epochs(fitting, split, scaled_nT, task, stage.epochs), start=begun + 1):
                validation.append(value)
                report(epoch)
                if is_better(task, value, best):
                    best, best_epoch, weights = value, epoch, fitting.copy_weights()
                elif np.isnan(value):  # where validation has only one class, the last epoch is as good as any
                    best_epoch, weights = epoch, fitting.copy_weights()
                if epoch - max(best_epoch, begun) >= options.patience:
                    break
            fitting.trained.load_state_dict(weights)
    if not best_epoch:
        raise FitError(
            f"the loss was not finite in the first epoch, with the learning rate {options.learning_rate:g}: lower "
            "--learning-rate, or look for labels that are far from all others"
        )
    return Fit(model.eval(), scale, best_epoch, validation)


def _stages(options: FitOptions) -> Iterator[FitOptions]:
    """The parts of a fit, one after the other: each begins with the best weights of the one before."""
    if options.mode == "full" and options.head_epochs:
        yield replace(options, mode="frozen", epochs=options.head_epochs, layer_decay=1.0)
    yield options


def _epochs(fitting: _Fitting, split: Split, label_nT: Array, task: Task, most: int) -> Iterator[float]:
    """Run epochs; the score on validation after each, until loss or outputs are not finite.

    On the scale of the fit, so that all targets count alike.
    """
    for _ in range(most):
        if not fitting.run_epoch(split.train):
            return
        output_nT = fitting.predict(split.validation)
        if not np.isfinite(output_nT).all():
            return
        yield score(task, output_nT, label_nT[split.validation]).means[PRIMARY[task]]


@torch.no_grad()
def outputs_of(model: PropertyModel, molecules: pa.RecordBatch, device: torch.device | str) -> Array:
    """What a fitted model's head says of encoded molecules, [n, T]; what it says of one does not depend on others."""
    parts = [model(batch.to(device)).double().cpu().numpy() for batch in batches_of(molecules)]
    return np.concatenate(parts) if parts else np.empty((0, model.head.targets))


class _Fitting:
    """The optimizer, and how the outputs of some rows are computed: by the whole model, or by the head alone."""

    def __init__(
        self, model: PropertyModel, molecules: pa.RecordBatch, label_nT: Array, task: Task, options: FitOptions
    ) -> None:
        self.device = next(model.parameters()).device
        self._model, self._molecules, self._options = model, molecules, options
        self._store = BatchStore(molecules)
        label = torch.from_numpy(label_nT).float().to(self.device)
        self._known_nT, self._label_nT = ~label.isnan(), label.nan_to_num()
        self._loss = F.mse_loss if task == "regression" else F.binary_cross_entropy_with_logits
        self._weighs_classes = options.class_weights and task == "classification"
        self._readout_nW: Tensor | None = None
        if options.mode == "frozen":
            model.encoder.eval()
            with torch.no_grad():
                parts = [model.read_out(batch.to(self.device)) for batch in batches_of(molecules)]
            self._readout_nW = torch.cat(parts)
            groups: list[dict[str, Any]] = [{"params": list(model.head.parameters()), "lr": options.learning_rate}]
        else:
            groups = parameter_groups(model, options.learning_rate, options.layer_decay)
        self.trained = model.head if options.mode == "frozen" else model
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay, fused=True)

    def copy_weights(self) -> dict[str, Any]:
        """Of what is trained."""
        return copy.deepcopy(self.trained.state_dict())

    def run_epoch(self, rows: Rows) -> bool:
        """One pass over `rows` in random order; -> whether all losses were finite."""
        self.trained.train()
        order = rows[torch.randperm(len(rows)).numpy()]
        weight_nT = self._weights(rows)
        for part in np.array_split(order, -(-len(order) // self._options.batch_size)):
            places = torch.from_numpy(part).to(self.device)
            weight = weight_nT[places]
            losses = self._loss(self._outputs(part), self._label_nT[places], reduction="none")
            loss = (losses * weight).sum() / weight.sum().clamp(min=1e-12)
            if not loss.isfinite():
                return False
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._parameters, _LARGEST_GRADIENT)
            self._optimizer.step()
        return True

    @torch.no_grad()
    def predict(self, rows: Rows) -> Array:
        """Outputs of `rows`, [rows, T]."""
        self.trained.eval()
        parts = [self._outputs(part) for part in np.array_split(rows, -(-len(rows) // 256))]
        return torch.cat(parts).double().cpu().numpy()

    def _outputs(self, rows: NDArray[np.int64]) -> Tensor:
        if self._readout_nW is not None:
            return self._model.head(self._readout_nW[torch.from_numpy(rows).to(self.device)])
        return self._model(gather(self._store, rows).to(self.device))

    def _weights(self, rows: Rows) -> Tensor:
        """Of each molecule and target in the loss: 0 without a label; with class weights the same for both classes."""
        known_nT = self._known_nT.float()
        if not self._weighs_classes:
            return known_nT
        places = torch.from_numpy(rows).to(self.device)
        positive_T = (self._label_nT * known_nT)[places].sum(dim=0)
        negative_T = ((1 - self._label_nT) * known_nT)[places].sum(dim=0)
        total_T = positive_T + negative_T
        of_positive_T, of_negative_T = total_T / (2 * positive_T.clamp(min=1)), total_T / (2 * negative_T.clamp(min=1))
        return known_nT * torch.where(self._label_nT > 0.5, of_positive_T, of_negative_T)
