"""The README of an exported model: what it is, what it was trained on and on which terms, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hmoe_ds.config import ModelConfig, MoleculeHeads, RouterConfig
from hmoe_ds.model.size import count_parameters, moe_layers

# Of what a validation measures, that a reader who did not train the model can make something of.
_METRICS = {
    "validation_loss": "loss of all objectives",
    "validation_loss_atom": "loss of masked atoms, nats",
    "validation_atom_entropy": "the same, for a model that knows only how frequent elements are",
    "validation_loss_bond": "loss of masked bonds, nats",
    "validation_consistency": "consistency of groups within scaffolds (1: always the same, 0: as by chance)",
    "validation_molecules": "molecules, with scaffolds held out of training",
}


def model_card(
    model: ModelConfig,
    router: RouterConfig,
    heads: MoleculeHeads | None,
    training: Mapping[str, Any],
    weights: Mapping[str, Tensor],
) -> str:
    """The text, in the Markdown of the Hugging Face hub.

    Args:
        model: sizes of the encoder.
        router: gate and experts.
        heads: of molecule-level objectives; None for an encoder without any pretraining heads.
        training: where the weights come from.
        weights: all of them.
    """
    return "\n".join(
        [
            "---",
            "library_name: hmoe_ds",
            "tags: [chemistry, molecules, mixture-of-experts]",
            "---",
            "",
            "# A pretrained encoder of molecules",
            "",
            *_what_it_is(model, router, heads, weights),
            "",
            "## Use",
            "",
            "```",
            "hmoe embed MODEL molecules.csv --out embeddings.parquet",
            "hmoe finetune MODEL table.csv --target activity --task classification --out predictor",
            "```",
            "```python",
            "from hmoe_ds.model.hmoe import HMoEModel",
            'model = HMoEModel.from_pretrained("MODEL")  # this folder, or its name on the hub',
            "```",
            "",
            "## Training",
            "",
            *_training(training),
            "",
        ]
    )


def _what_it_is(
    model: ModelConfig, router: RouterConfig, heads: MoleculeHeads | None, weights: Mapping[str, Tensor]
) -> list[str]:
    count = count_parameters(model, router, heads or MoleculeHeads())
    without = 0 if heads is not None else count.heads
    dtypes = sorted(
        {str(value.dtype).removeprefix("torch.") for value in weights.values() if value.is_floating_point()}
    )
    size = sum(value.numel() * value.element_size() for value in weights.values())
    return [
        "A graph network over atoms and bonds with a hierarchical mixture of experts: a molecule's scaffold chooses",
        "groups of experts, its atoms choose experts among them.",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {count.total - without:,}, of which an atom passes {count.active - without:,} |",
        f"| file | {size / 1e6:,.1f} MB, {' and '.join(dtypes)} |",
        f"| width of embeddings | {model.hidden_size} |",
        f"| blocks | {model.lower_blocks} lower, {model.upper_blocks} upper, {moe_layers(model)} with experts |",
        f"| experts | {router.experts} in {router.groups} groups, {router.experts_per_atom} for each atom |",
        f"| pretraining heads | {'none' if heads is None else 'kept'} |",
    ]


def _training(training: Mapping[str, Any]) -> list[str]:
    if "step" not in training:
        return ["What the weights were trained on is not noted in this model."]
    molecules = f", on {training['molecules']:,} molecules" if "molecules" in training else ""
    form = " in their standard form" if training.get("standardize") else ""
    lines = [f"{training['step']:,} steps{molecules}{form}. The whole configuration is in `config.json`."]
    if training.get("sources"):
        lines += ["", "| source | rows | terms |", "|---|---|---|"]
        lines += [
            f"| {each['name'].replace('|', chr(92) + '|')} | {each['rows']:,} | {each['licence'] or 'not known'} |"
            for each in training["sources"]
        ]
    else:
        lines += ["", "The sources of the molecules are not noted in this checkpoint."]
    measured = {name: training.get("validation", {}).get(name) for name in _METRICS}
    if any(value is not None for value in measured.values()):
        lines += ["", "| validation | |", "|---|---|"]
        lines += [f"| {_METRICS[name]} | {value:,.4g} |" for name, value in measured.items() if value is not None]
    return lines
