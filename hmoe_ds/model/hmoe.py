"""HMoEModel: encoder and pretraining heads, saved to and loaded from one topology-free folder, or the hub."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hmoe_ds.config import ModelConfig, MoleculeHeads, RouterConfig
from hmoe_ds.data.batch import Masks, MolBatch
from hmoe_ds.model.description import Description, read_description
from hmoe_ds.model.encoder import Encoder, Encoding
from hmoe_ds.model.familiar import Familiar, read_familiar, write_familiar
from hmoe_ds.model.heads import DescriptorHead, FingerprintHead, MaskedAtomHead, MaskedBondHead
from hmoe_ds.model.hub import find_model, push_folder
from hmoe_ds.model.pretrained import load_weights, write_pretrained
from hmoe_ds.model.readout import mean_state
from hmoe_ds.model.size import readout_width
from hmoe_ds.moe.experts import Executor, LocalExecutor
from hmoe_ds.moe.gate import FINAL_STAGE, RoutingStage
from hmoe_ds.moe.stationary import StationaryExecutor

_NO_HEADS = MoleculeHeads()


class HMoEModel(nn.Module):
    """The pretrained model.

    Args:
        model: sizes of the encoder.
        router: gate and experts.
        seed: of the initialisation; everything is drawn from it, whatever torch's global generator holds.
        executor: makes what runs the experts; the default runs them in this process.
        heads: of molecule-level objectives; None for an encoder without any pretraining heads.

    Attributes:
        provenance: where the weights come from, as far as that is known (`pretrained.Description.training`).
        familiar: what it was pretrained on, for the novelty of molecules; None where that was not noted down.
    """

    def __init__(
        self,
        model: ModelConfig,
        router: RouterConfig,
        seed: int = 0,
        executor: Executor = LocalExecutor,
        heads: MoleculeHeads | None = _NO_HEADS,
    ) -> None:
        super().__init__()
        self.config, self.router, self.heads = model, router, heads
        self.provenance: dict[str, Any] = {}
        self.familiar: Familiar | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = Encoder(model, router, seed, executor)
            width = model.hidden_size
            self.atom_head = None if heads is None else MaskedAtomHead(width)
            self.bond_head = None if heads is None else MaskedBondHead(width)
            seen = readout_width(heads.readout, width) if heads else 0
            self.fingerprint_head = FingerprintHead(seen, width) if heads and heads.fingerprint else None
            self.descriptor_head = DescriptorHead(seen, width) if heads and heads.descriptors else None

    def forward(self, batch: MolBatch, masks: Masks | None = None, stage: RoutingStage = FINAL_STAGE) -> Encoding:
        """Atom states and routing of B molecules; `stage` is for training under a curriculum."""
        return self.encoder(batch, masks, stage)

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and atom states; routing and its buffers are fp32 or wider."""
        return self.encoder.norm.weight.dtype

    def embed(self, batch: MolBatch) -> Tensor:
        """Mean atom state of each molecule; -> [B, D]"""
        return mean_state(self.encoder(batch).h_ND, batch)

    def save_pretrained(self, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
        """Write `model.safetensors`, `config.json` and a model card; `familiar.safetensors` where there is something.

        Args:
            path: folder, made if need be.
            metadata: where the weights come from, kept in `config.json` under `training`; without it `provenance`.
        """
        training = self.provenance if metadata is None else metadata
        write_pretrained(path, self.state_dict(), Description(self.config, self.router, self.heads, training))
        if self.familiar is not None:
            write_familiar(Path(path), self.familiar)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        revision: str | None = None,
        experts: Literal["memory", "file"] = "memory",
    ) -> HMoEModel:
        """Load what `save_pretrained` or `hmoe export` wrote, in evaluation mode.

        Args:
            source: a folder, or `owner/name` of a model on the Hugging Face hub.
            revision: branch, tag or commit of a model on the hub.
            experts: `file` leaves them in the mapped file, from which only those that are used are read; so a model
                may be larger than the memory. On a GPU all else lies there, and experts are copied when they are used.

        Raises:
            ModelFormatError: no exported model there, or one of another format version.
            PipelineError: the hub is out of reach.
        """
        folder = find_model(source, revision)
        described = read_description(folder)
        executor = LocalExecutor if experts == "memory" else StationaryExecutor
        build = partial(cls, described.model, described.router, executor=executor, heads=described.heads)
        model = load_weights(build, folder, map_experts=experts == "file")
        model.provenance = described.training
        model.familiar = read_familiar(folder, described.model.hidden_size)
        return model

    def push_to_hub(
        self, name: str, private: bool = True, revision: str | None = None, metadata: dict[str, Any] | None = None
    ) -> str:
        """Save the model and upload it; -> the address of what was uploaded. The token is that of `hf auth login`.

        Args:
            name: `owner/name`, made if need be.
            private: make it so that others do not see it.
            revision: branch; without one the main one.
            metadata: as of `save_pretrained`.

        Raises:
            PipelineError: the hub is out of reach, or says no.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, metadata)
            return push_folder(folder, name, private, revision)


def weights_of(described: Description, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the weights that the described model has, which may be without heads."""
    with torch.device("meta"):  # names without values
        names = HMoEModel(described.model, described.router, heads=described.heads).state_dict()
    return {name: weights[name] for name in names}
