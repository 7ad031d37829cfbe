"""Members of an ensemble that are fitted already: a command that was killed goes on with the others."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from data_pipeline.errors import UsageError
from data_pipeline.execution.task import digest
from hmoe_ds.downstream.fitting import Fit
from hmoe_ds.downstream.label_scale import LabelScale
from hmoe_ds.downstream.property_model import PropertyModel
from hmoe_ds.model.tensor_file import replace_tensors

_NOTE = "fit"


class KeptFits:
    """Fits in a folder, which is made when one is kept.

    Args:
        folder: the folder; fits of something else may lie there, too.
        of: what they are fits of, but for the seed: plain values.
    """

    def __init__(self, folder: Path, *of: object) -> None:
        self._folder = folder
        self._identity = digest(*of)

    def load(self, seed: int, model: PropertyModel) -> Fit | None:
        """The fit with this seed, whose weights go into `model`; None where there is none.

        Raises:
            UsageError: it is damaged.
        """
        path = self._path(seed)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                note = json.loads(file.metadata()[_NOTE])
            model.load_state_dict(load_file(path))
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise UsageError(f"{path} is damaged ({error}): remove it") from error
        return Fit(model.eval(), LabelScale(**note["scale"]), note["best_epoch"], note["validation"])

    def save(self, seed: int, fit: Fit) -> None:
        """Keep it, as a whole or not at all."""
        path = self._path(seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        note = {"scale": fit.scale._asdict(), "best_epoch": fit.best_epoch, "validation": fit.validation}
        replace_tensors(path, fit.model.state_dict(), {_NOTE: json.dumps(note)})

    def _path(self, seed: int) -> Path:
        return self._folder / f"fit{seed}-{self._identity}.safetensors"
