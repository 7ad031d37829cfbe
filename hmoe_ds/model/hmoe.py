"""HMoEModel: encoder and pretraining heads, saved to and loaded from one topology-free directory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_pipeline.errors import UsageError
from hmoe_ds.config import ConfigError, ModelConfig, MoleculeHeads, RouterConfig, RunConfig, section_from_dict
from hmoe_ds.config_checks import check_config
from hmoe_ds.data.batch import Masks, MolBatch, sum_by_molecule
from hmoe_ds.model.encoder import Encoder, Encoding
from hmoe_ds.model.heads import DescriptorHead, FingerprintHead, MaskedAtomHead, MaskedBondHead
from hmoe_ds.moe.experts import Executor, LocalExecutor
from hmoe_ds.moe.gate import FINAL_STAGE, RoutingStage
from hmoe_ds.moe.wide import wide

FORMAT_VERSION = 1
_NO_HEADS = MoleculeHeads()
WEIGHTS, CONFIG = "model.safetensors", "config.json"


class ModelFormatError(UsageError):
    """A directory that is no exported model, or one that this version cannot read."""


class HMoEModel(nn.Module):
    """The pretrained model.

    Args:
        model: sizes of the encoder.
        router: gate and experts.
        seed: of the initialisation; everything is drawn from it, whatever torch's global generator holds.
        executor: makes what runs the experts; the default runs them in this process.
        heads: of molecule-level objectives; the others are always there.
    """

    def __init__(
        self,
        model: ModelConfig,
        router: RouterConfig,
        seed: int = 0,
        executor: Executor = LocalExecutor,
        heads: MoleculeHeads = _NO_HEADS,
    ) -> None:
        super().__init__()
        self.config, self.router, self.heads = model, router, heads
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = Encoder(model, router, seed, executor)
            self.atom_head = MaskedAtomHead(model.hidden_size)
            self.bond_head = MaskedBondHead(model.hidden_size)
            self.fingerprint_head = FingerprintHead(model.hidden_size) if heads.fingerprint else None
            self.descriptor_head = DescriptorHead(model.hidden_size) if heads.descriptors else None

    def forward(self, batch: MolBatch, masks: Masks | None = None, stage: RoutingStage = FINAL_STAGE) -> Encoding:
        """Atom states and routing of B molecules; `stage` is for training under a curriculum."""
        return self.encoder(batch, masks, stage)

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and atom states; routing and its buffers are fp32 or wider."""
        return self.encoder.norm.weight.dtype

    def embed(self, batch: MolBatch) -> Tensor:
        """Mean atom state of each molecule; -> [B, D]"""
        return self.readout(self.encoder(batch).h_ND, batch)

    def readout(self, h_ND: Tensor, batch: MolBatch) -> Tensor:
        """Atom states to their mean over each molecule; -> [B, D]"""
        # A sum of many atoms in bf16 would lose the last ones.
        total_BD = sum_by_molecule(wide(h_ND), batch.molecule_N, batch.num_molecules)
        return (total_BD / batch.ptr_B.diff().unsqueeze(-1)).to(h_ND.dtype)

    def save_pretrained(self, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
        """Write `model.safetensors` and `config.json`.

        Args:
            path: directory, made if need be.
            metadata: where the weights come from, kept in `config.json` under `training`.
        """
        write_pretrained(path, self.state_dict(), self.config, self.router, self.heads, metadata or {})

    @classmethod
    def from_pretrained(cls, path: str | Path) -> HMoEModel:
        """Load what `save_pretrained` or `hmoe export` wrote.

        Raises:
            ModelFormatError: no exported model there, or one of another format version.
        """
        path = Path(path)
        if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
            raise ModelFormatError(
                f"{path} is no exported model: expected {CONFIG} and {WEIGHTS} in it; `hmoe export` makes them"
            )
        try:
            description = json.loads((path / CONFIG).read_text())
            weights = load_file(path / WEIGHTS)
        except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
            raise ModelFormatError(f"{path} holds a damaged model ({error}): export the checkpoint again") from error
        described = _described(path / CONFIG, description)
        _check_weights(path, weights, described)
        model = cls(described.model, described.router, heads=described.heads)
        state = model.state_dict(keep_vars=True)
        for name, tensor in state.items():
            # Parameters and buffers keep the dtypes they were trained in: routing buffers are fp32 in a bf16 model.
            tensor.data = tensor.data.to(weights[name].dtype)
        model.load_state_dict(weights)
        return model.eval()


class _Described(NamedTuple):
    """What `config.json` says of a model."""

    model: ModelConfig
    router: RouterConfig
    heads: MoleculeHeads


def _described(path: Path, description: Any) -> _Described:
    """Raises ModelFormatError for another format version, and for a model that cannot be."""
    version = description.get("format_version") if isinstance(description, dict) else None
    if version != FORMAT_VERSION:
        raise ModelFormatError(
            f"{path} has format_version {version!r}: this version of hmoe_ds reads {FORMAT_VERSION}; export the "
            "checkpoint again"
        )
    try:
        model, router = (section_from_dict(name, description.get(name)) for name in ("model", "router"))
        check_config(RunConfig(model=model, router=router))
    except ConfigError as error:
        raise ModelFormatError(f"{path}: {error}") from error
    # Models exported before there were heads of molecules have none.
    heads = description.get("molecule_heads", {})
    if not isinstance(heads, dict) or not heads.keys() <= set(MoleculeHeads._fields):
        raise ModelFormatError(f"{path} has molecule_heads {heads!r}: use the version of hmoe_ds that wrote it")
    return _Described(model, router, MoleculeHeads(**heads))


def _check_weights(path: Path, weights: dict[str, Tensor], described: _Described) -> None:
    """Raise ModelFormatError unless they are those of the model; before it is built, which may take much memory."""
    with torch.device("meta"):  # shapes without values
        expected = HMoEModel(described.model, described.router, heads=described.heads).state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        found, wanted = (_kind(state.get(name)) for state in (weights, expected))
        if found != wanted:
            raise ModelFormatError(
                f"{path / WEIGHTS} and {path / CONFIG} are of different models: {name} is {found} in one, {wanted} in "
                "the other; export the checkpoint again"
            )


def _kind(tensor: Tensor | None) -> str:
    if tensor is None:
        return "missing"
    return f"{'floating' if tensor.is_floating_point() else str(tensor.dtype)} {list(tensor.shape)}"


def write_pretrained(
    path: str | Path,
    weights: dict[str, Tensor],
    model: ModelConfig,
    router: RouterConfig,
    heads: MoleculeHeads,
    metadata: dict[str, Any],
) -> None:
    """Write an export from a full state dict; see `HMoEModel.save_pretrained`."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    # The description comes last: a folder that has one is complete.
    (path / CONFIG).unlink(missing_ok=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, path / WEIGHTS)
    description = {
        "format_version": FORMAT_VERSION,
        "model": dataclasses.asdict(model),
        "router": dataclasses.asdict(router),
        "molecule_heads": heads._asdict(),
        "training": metadata,
    }
    (path / CONFIG).write_text(json.dumps(description, indent=2) + "\n")
