"""RunConfig: everything a pretraining run depends on, as one typed and validated tree.

`config_parser.py` makes it from a command line, `config_checks.py` says what no run can have.

Every number in the tree that describes a batch is global (over all ranks), so that adding ranks changes
the speed of a run and nothing else.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from data_pipeline.errors import UsageError


class ConfigError(UsageError):
    """A run that cannot start as configured. The message is one line and ends with the mend."""


@dataclass(frozen=True)
class ModelConfig:
    """Size of the encoder.

    Args:
        hidden_size: width D of atom and bond states.
        lower_blocks: blocks below the scaffold gate, all with dense feed-forwards.
        upper_blocks: blocks above the scaffold gate.
        moe_every: every n-th upper block has an H-MoE feed-forward; the others a dense one.
        dense_size: hidden width F of a dense feed-forward.
    """

    hidden_size: int = 64
    lower_blocks: int = 2
    upper_blocks: int = 2
    moe_every: int = 1
    dense_size: int = 192


@dataclass(frozen=True)
class RouterConfig:
    """The hierarchical gate and its experts.

    Args:
        groups: number of scaffold groups G.
        experts: number of experts E of each H-MoE layer, over all groups; at most, if they start with fewer.
        form: how the two levels together weigh the experts (`moe/forms.py`).
        guidance: lambda of the form `soft`: how much the scaffold level says (for nothing at all take `flat`).
        group_choice: `learned` by the scaffold gate, or `random`, by the scaffold's key, to compare with.
        groups_per_molecule: groups a molecule is routed to.
        group_blocks: equal blocks of neighbouring groups; with as many of them as ranks share the experts, or a
            multiple, a block's experts are on one rank.
        block_bonus: what a molecule's other groups get, on the cosine scale and for choosing only, if they are in the
            block of its first one; 0 for no preference.
        experts_per_atom: experts k an atom is routed to, at most; in the form `additive` those of its groups included.
        top_p: an atom takes no more experts than it needs to reach this share of its candidates' weights; 1 for all k.
        expert_size: hidden width F of one expert.
        shared_size: hidden width of the shared expert that every atom passes; 0 for none.
        gate_size: width of the spaces in which the gates compare.
        temperature: tau, divides the cosine between a molecule and a group centre.
        group_balance_rate: step of the loss-free balance bias of groups, per optimizer step; 0 for none.
        expert_balance_rate: the same for experts.
        max_received: rows that the experts of a rank compute at once; more are computed in chunks that are recomputed
            in the backward, so that memory stays bounded under any routing.
        experts_at_start: experts that live at the start, over all groups; from them the others are split (dynamic
            allocation, `moe/allocation.py`). 0: all live for good.
        split_every: steps between decisions on splits; in each of them one expert of a layer may split.
        split_load: load over the layer's mean from which an expert may split; with 1 the hottest one always may.
        reclaim_load: share of the mean load below which an expert is dead: one that splits may take its place.
        split_generations: how often the descendants of one expert may split in a row; so it is the root of at most
            2^generations experts.
    """

    groups: int = 4
    experts: int = 8
    form: Literal["hard", "soft", "additive", "flat"] = "hard"
    guidance: float = 1.0
    group_choice: Literal["learned", "random"] = "learned"
    groups_per_molecule: int = 1
    group_blocks: int = 1
    block_bonus: float = 0.0
    experts_per_atom: int = 1
    top_p: float = 1.0
    expert_size: int = 192
    shared_size: int = 96
    gate_size: int = 32
    temperature: float = 0.2
    group_balance_rate: float = 0.003
    expert_balance_rate: float = 0.01
    max_received: int = 65536
    experts_at_start: int = 0
    split_every: int = 500
    split_load: float = 1.0
    reclaim_load: float = 0.1
    split_generations: int = 4

    @property
    def candidates(self) -> int:
        """Experts among which an atom can choose."""
        match self.form:
            case "soft" if self.group_choice == "learned":
                return self.experts
            case "hard" | "soft":
                return self.groups_per_molecule * self.experts // self.groups
            case "additive":
                return self.experts - self.groups
            case "flat":
                return self.experts


@dataclass(frozen=True)
class DataConfig:
    """Which molecules, and how many at once. All counts are global.

    Args:
        path: dataset made by `hmoe prepare`, a directory or an fsspec URL; or a list of several that are mixed.
        weights: share of the molecules that each of several datasets provides, up to a common factor; without them
            the shares are those of the datasets' sizes.
        molecules_per_step: molecules of one optimizer step, at most.
        atoms_per_step: atoms of one optimizer step, at most.
        bonds_per_step: bonds of one optimizer step, at most.
        scaffold_run: molecules of one scaffold that are dealt together, at most; they are the positives of
            the contrastive loss.
        window_shards: shards whose molecules are shuffled together.
        validation_molecules: molecules of the validation split that a validation looks at, at most.
        verify: compare each shard's checksum with the manifest before its molecules are used the first time, on every
            rank: a pass over the file, at about a GB/s.
        cache_dir: folder on a local disk for shards that come from a URL; without it one in the user's cache folder.
        cache_gb: bound on that folder, in 10^9 bytes.
    """

    path: list[str] | str = ""
    weights: list[float] | None = None
    molecules_per_step: int = 128
    atoms_per_step: int = 8192
    bonds_per_step: int = 10240
    scaffold_run: int = 4
    window_shards: int = 8
    validation_molecules: int = 2048
    verify: bool = True
    cache_dir: str = ""
    cache_gb: float = 100.0

    @property
    def paths(self) -> list[str]:
        """All datasets; none when `path` is not set."""
        return self.path if isinstance(self.path, list) else [self.path] if self.path else []


# What of its atom states is seen of a molecule; `read_out` says what the parts are.
Readout = Literal["mean", "mean+max+size", "mean+max+sum+size"]


class MoleculeHeads(NamedTuple):
    """Which heads of molecule-level objectives a model has, and what they see of a molecule."""

    fingerprint: bool = False
    descriptors: bool = False
    readout: Readout = "mean"

    @property
    def names(self) -> list[str]:
        """Names of those that it has."""
        return [name for name in ("fingerprint", "descriptors") if getattr(self, name)]


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is optimised.

    Args:
        mask_ratio: share of atoms and of bonds that are hidden and predicted.
        bond_weight: weight of the masked bond loss beside the masked atom loss.
        contrast_weight: weight of the scaffold routing contrastive loss; 0 for none.
        contrast_temperature: t, divides the cosine between two molecules.
        contrast_learned_temperature: start from `contrast_temperature` and learn t, which stays above 0.01.
        contrast_of: what is compared, the routing `embedding` or the routing `distribution` over groups.
        contrast_bare_scaffold: a molecule that is alone with its scaffold in its slice takes the bare scaffold, without
            side chains, as its positive.
        z_weight: weight of the squared log-partition of both gates' logits; 0 for none.
        balance_weight: weight of the auxiliary balance loss, beside or instead of the balance biases; 0 for none.
        entropy_weight: weight of the entropy of the atoms' weights, which keeps `router.top_p` from taking all experts;
            0 for none.
        fingerprint_weight: weight of predicting each molecule's Morgan fingerprint; 0 for none. The dataset must be
            made by `hmoe prepare --targets`.
        descriptor_weight: the same for each molecule's descriptors.
        readout: what the heads of these two see of a molecule: the `mean` of its atom states, or more (`read_out` in
            `model/readout.py`).
    """

    mask_ratio: float = 0.2
    bond_weight: float = 0.5
    contrast_weight: float = 0.1
    contrast_temperature: float = 0.2
    contrast_learned_temperature: bool = False
    contrast_of: Literal["embedding", "distribution"] = "embedding"
    contrast_bare_scaffold: bool = False
    z_weight: float = 0.0001
    balance_weight: float = 0.0
    entropy_weight: float = 0.0
    fingerprint_weight: float = 0.0
    descriptor_weight: float = 0.0
    readout: Readout = "mean+max+size"

    @property
    def molecule_heads(self) -> MoleculeHeads:
        """The heads that these weights ask for."""
        heads = MoleculeHeads(self.fingerprint_weight > 0, self.descriptor_weight > 0, self.readout)
        return heads if heads.names else MoleculeHeads()

    @property
    def needs_targets(self) -> bool:
        """Whether something is predicted of molecules, so that batches must have it."""
        return bool(self.molecule_heads.names)

    @property
    def weights(self) -> dict[str, float]:
        """Weights of all terms of the loss, by their names in it (`objectives/total.py`)."""
        return {
            "atom": 1.0,
            "bond": self.bond_weight,
            "contrast": self.contrast_weight,
            "z": self.z_weight,
            "balance": self.balance_weight,
            "entropy": self.entropy_weight,
            "fingerprint": self.fingerprint_weight,
            "descriptors": self.descriptor_weight,
        }

    @property
    def reported_terms(self) -> list[str]:
        """Names of the terms that metrics show: those that are always computed, and others that are on."""
        always = {"atom", "bond", "contrast", "z"}
        return [name for name, weight in self.weights.items() if name in always or weight > 0]

    @property
    def prediction_weights(self) -> dict[str, float]:
        """Weights of those of them that predict something."""
        predictions = {"atom", "bond", "fingerprint", "descriptors"}
        return {name: self.weights[name] for name in self.reported_terms if name in predictions}


@dataclass(frozen=True)
class CurriculumConfig:
    """What changes in the course of a run; `training/curriculum.py` has the formulas. All of it is off by default.

    Args:
        competence: how the share of the training molecules that are admitted, the simplest ones, grows to 1: `linear`,
            `root` (square root), `deepspeed` (by its curriculum scheduler), or `none` for all from the start.
        competence_start: share that is admitted at the first step, of `linear` and `root`.
        competence_steps: steps until all molecules are admitted, of `linear` and `root`.
        deepspeed_schedule: of `deepspeed`: min_difficulty, max_difficulty (100), schedule_type and schedule_config as
            in a DeepSpeed configuration; difficulties are percent of the molecules.
        atom_fade_steps: steps in which the share of the atom level in the routing weights grows from 0 to 1; 0 for
            its whole share from the start.
        temperature_start: temperature of the scaffold gate at the first step.
        temperature_steps: steps in which it falls, geometrically, to router.temperature; 0 for a constant one.
        guidance_start: lambda of the form `soft` at the first step; at 0 the scaffold level has no say.
        guidance_steps: steps in which it goes, linearly, to router.guidance; 0 for a constant one.
        mask_start: share of atoms and bonds that are hidden at the first step.
        mask_steps: steps in which it grows, linearly, to objective.mask_ratio; 0 for a constant one.
    """

    competence: Literal["none", "linear", "root", "deepspeed"] = "none"
    competence_start: float = 0.2
    competence_steps: int = 0
    deepspeed_schedule: dict[str, Any] | None = None
    atom_fade_steps: int = 0
    temperature_start: float = 1.0
    temperature_steps: int = 0
    guidance_start: float = 0.0
    guidance_steps: int = 0
    mask_start: float = 0.05
    mask_steps: int = 0

    @property
    def active(self) -> bool:
        """Whether anything changes in the course of the run."""
        steps = (self.atom_fade_steps, self.temperature_steps, self.guidance_steps, self.mask_steps)
        return self.competence != "none" or any(steps)

    @property
    def lowest_competence(self) -> float:
        """Share of the molecules that is admitted at any step, at least."""
        if self.competence == "deepspeed" and self.deepspeed_schedule is not None:
            return float(self.deepspeed_schedule["min_difficulty"]) / 100
        return 1.0 if self.competence == "none" else self.competence_start


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay.

    Args:
        learning_rate: peak learning rate.
        min_ratio: final learning rate as a share of the peak.
        warmup_steps: steps of linear warm-up.
        decay_steps: step at which the cosine has reached `min_ratio`; 0 for the last step of the run. Set it in a
            run that you mean to extend with a larger run.steps later.
        weight_decay: decoupled weight decay of matrices; vectors have none.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to the root of the second moment.
        clip_norm: bound on the norm of the whole gradient; 0 for none.
        accumulation: slices into which a step is cut, one forward and backward each.
    """

    learning_rate: float = 0.001
    min_ratio: float = 0.1
    warmup_steps: int = 50
    decay_steps: int = 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    accumulation: int = 1


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over ranks. Changes the speed of a run, not its result.

    Args:
        ep_size: ranks over which the experts of a layer are spread.
        zero_stage: ZeRO stage, 1 to 3; selects `ds_configs/zero<stage>.json`.
        offload_optimizer: keep optimizer state and its update in host memory; ZeRO stage 2 only.
        activation_checkpointing: recompute the blocks in the backward instead of keeping their activations.
        precision: dtype of parameters and activations; routing is always fp32 or wider.
        migration: after the scaffold gate, move each molecule to the rank that holds its group's experts, instead of
            sending its atoms there and back in every H-MoE layer (`moe/migration.py`).
        migration_budget: bound on the atoms that a rank may then have, over their mean.
        deepspeed_config: a DeepSpeed JSON of your own instead of the one in `ds_configs`.
    """

    ep_size: int = 1
    zero_stage: int = 1
    offload_optimizer: bool = False
    activation_checkpointing: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    migration: bool = False
    migration_budget: float = 1.05
    deepspeed_config: str | None = None


@dataclass(frozen=True)
class LoopConfig:
    """One run: where it writes, how long it lasts, how often it reports.

    Args:
        out: folder of the run: config, metrics, checkpoints.
        steps: optimizer steps.
        seed: of initialisation, plan and masks.
        resume: `auto` continues from the last checkpoint in `out`; `never` starts anew in a fresh folder.
        log_every: steps between lines of metrics.
        validate_every: steps between validations; 0 for one at the end only.
        checkpoint_every: steps between checkpoints; 0 for one at the end only.
        keep_checkpoints: checkpoints that are kept, beside the one with the lowest validation loss; 0 for all.
        mirror: folder or fsspec URL that gets a copy of the last checkpoint (`training/checkpoints/mirror.py`).
        max_skipped: steps in a row whose gradient is not finite, which are skipped, until the run stops.
        hang_seconds: time without progress after which a run ends, naming the rank that hangs. Before the first step of
            a start it is 900 s at least.
        deterministic: use deterministic kernels on CUDA (on CPU they always are).
        mlflow: log to MLflow (MLFLOW_TRACKING_URI, or a sqlite file in `out`).
        check_memory: do not start where there is too little memory by the estimate of `--dry-run`.
    """

    out: str = ""
    steps: int = 1000
    seed: int = 0
    resume: Literal["auto", "never"] = "auto"
    log_every: int = 10
    validate_every: int = 0
    checkpoint_every: int = 0
    keep_checkpoints: int = 3
    mirror: str = ""
    max_skipped: int = 10
    hang_seconds: float = 1800.0
    deterministic: bool = False
    mlflow: bool = True
    check_memory: bool = True


@dataclass(frozen=True)
class ProbeTable:
    """A table of molecules with a label each.

    Args:
        path: CSV file with a header, Parquet, Arrow or SDF; a path or an fsspec URL.
        label: column of the labels: 0 and 1 are two classes, other numbers a quantity. A row without one is left out.
        smiles: column of the SMILES; without it the one whose name says so.
        name: of the metrics, `probe_<name>_...`; without it that of the file.
    """

    path: str
    label: str
    smiles: str | None = None
    name: str | None = None

    @property
    def title(self) -> str:
        """`name`, or the file's name up to its first point."""
        return self.name or self.path.rsplit("/", 1)[-1].split(".")[0]


@dataclass(frozen=True)
class ProbeConfig:
    """Linear models on frozen embeddings that follow what a run learns; they change nothing of it.

    Args:
        tables: what they are fitted to and tested on, such as `[{path: bbbp.csv, label: p_np}]`.
        every: steps between probes, and one at the end; 0 for one with every validation.
        max_molecules: molecules of a table, at most; of a larger one the same sample in every run.
    """

    tables: list[ProbeTable] = field(default_factory=list)
    every: int = 0
    max_molecules: int = 2048


@dataclass(frozen=True)
class RunConfig:
    """The whole tree."""

    model: ModelConfig = field(default_factory=ModelConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: LoopConfig = field(default_factory=LoopConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, as written to `config.yaml` and into checkpoints."""
        return dataclasses.asdict(self)


SECTIONS: dict[str, Any] = {
    "model": ModelConfig,
    "router": RouterConfig,
    "data": DataConfig,
    "objective": ObjectiveConfig,
    "curriculum": CurriculumConfig,
    "optim": OptimConfig,
    "parallel": ParallelConfig,
    "run": LoopConfig,
    "probe": ProbeConfig,
}


def config_from_dict(tree: dict[str, Any]) -> RunConfig:
    """Inverse of `RunConfig.to_dict`, for a tree that came from a checkpoint or an export.

    A field that is younger than the tree has the value that says what was done without it: its default, mostly.

    Raises:
        ConfigError: a section or a field that this version does not know. Values are left to `check_config`.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{tree!r} is no configuration: use the version of hmoe_ds that wrote it")
    sections = {name: section_from_dict(name, _with_younger_fields(name, values)) for name, values in tree.items()}
    if isinstance(getattr(sections.get("probe"), "tables", None), list):
        tables = [_known_fields(ProbeTable, "probe.tables", values) for values in sections["probe"].tables]
        sections["probe"] = dataclasses.replace(sections["probe"], tables=tables)
    return RunConfig(**sections)


def _with_younger_fields(name: str, values: Any) -> Any:
    """The values of a section, with those of younger fields that are not what was done without them."""
    # Heads of molecules saw the mean alone before they could see more; without such heads there is nothing to see.
    heads = name == "objective" and isinstance(values, dict)
    if heads and (values.get("fingerprint_weight") or values.get("descriptor_weight")):
        return {"readout": "mean", **values}
    return values


def section_from_dict(name: str, values: Any) -> Any:
    """One section of the tree. Raises as `config_from_dict`."""
    if name not in SECTIONS:
        raise ConfigError(f"the section {name!r} is not known: use the version of hmoe_ds that wrote it")
    return _known_fields(SECTIONS[name], name, values)


def _known_fields(kind: Any, name: str, values: Any) -> Any:
    known = {known.name for known in dataclasses.fields(kind)}
    if not isinstance(values, dict) or not values.keys() <= known:
        what = f"{name}.{min(values.keys() - known)}" if isinstance(values, dict) else f"{name} {values!r}"
        raise ConfigError(f"{what} is not known: use the version of hmoe_ds that wrote it")
    try:
        return kind(**values)
    except TypeError as error:  # a table without its path
        raise ConfigError(f"{name} is {values}, which is not complete: use the version that wrote it") from error


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as YAML that `--config` reads back."""
    path.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
