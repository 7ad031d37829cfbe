"""What chemists do with a pretrained model: `hmoe export`, `register`, `embed`, `finetune`, `predict`, `evaluate`."""

from __future__ import annotations

import argparse
import csv
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.molecules.rejects import rejects_in_words
from data_pipeline.redact import redacted
from hmoe_ds.commands.arguments import (
    MODEL_HELP,
    SOURCES_HELP,
    Command,
    Result,
    add_columns,
    add_no_standardize,
    add_workers,
    positive,
    whole,
)
from hmoe_ds.commands.progress import Progress
from hmoe_ds.config import Readout

if TYPE_CHECKING:
    from hmoe_ds.data.store import ShardStore
    from hmoe_ds.downstream.chunked import RowOptions
    from hmoe_ds.downstream.fitting import FitOptions


def add_commands(command: Command) -> None:
    """Declare them."""
    export = command("export", _export, "A checkpoint to one folder that loads without DeepSpeed.")
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder, or one checkpoint in it")
    export.add_argument("out", metavar="OUT", help="folder to write")
    dtypes = ("float32", "float16", "bfloat16")
    export.add_argument("--dtype", choices=dtypes, help="of the weights (default: that of the training)")
    export.add_argument(
        "--without-heads", dest="heads", action="store_false", help="leave out the heads of the pretraining objectives"
    )
    export.add_argument(
        "--data",
        metavar="DIR",
        help="dataset that it was trained on, for the novelty score (default: as the run has it)",
    )
    export.add_argument("--push", metavar="OWNER/NAME", help="also upload it to the Hugging Face hub, for you alone")
    export.add_argument("--register", metavar="NAME", help="also register it in MLflow, of MLFLOW_TRACKING_URI")

    register = command("register", _register, "An exported model into the registry of MLflow (MLFLOW_TRACKING_URI).")
    register.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    register.add_argument("name", metavar="NAME", help="of the registered model, which gets its next version")

    embed = command("embed", _embed, "Embeddings of molecules from an exported model.")
    embed.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    embed.add_argument("source", metavar="SOURCE", help=SOURCES_HELP)
    embed.add_argument("--out", required=True, help="Parquet file to write")
    embedded = embed.add_mutually_exclusive_group()
    embedded.add_argument("--per-atom", action="store_true", help="embeddings of atoms instead of molecules")
    embedded.add_argument(
        "--readout",
        choices=get_args(Readout),
        help="what the embedding of a molecule has of its atom states (default: mean)",
    )
    embed.add_argument(
        "--routing", action="store_true", help="also the group, the top experts and the novelty of each molecule"
    )
    add_columns(embed)
    add_workers(embed)
    add_no_standardize(embed, default=None)

    finetune = command("finetune", _finetune, "Learn properties from a table of molecules, and say how well.")
    finetune.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    finetune.add_argument("table", metavar="TABLE", help="CSV file with a header, Parquet, Arrow or SDF")
    finetune.add_argument(
        "--target",
        required=True,
        metavar="COL[,COL...]",
        help="columns of labels, a name with a comma in double quotes: '\"IC50, nM\",logP'; cells may be empty",
    )
    finetune.add_argument("--task", required=True, choices=("classification", "regression"), help="what they are")
    finetune.add_argument("--out", required=True, help="folder to write, which hmoe predict reads")
    finetune.add_argument("--smiles-column", "--smiles", help="column with SMILES")
    finetune.add_argument("--id-column", help="column with identifiers, for the table of predictions")
    finetune.add_argument(
        "--split",
        choices=("scaffold", "balanced-scaffold", "random", "column"),
        default="scaffold",
        help="80%% training, 10%% validation, 10%% test, by scaffold (default), at random, or as a column says",
    )
    finetune.add_argument("--split-column", metavar="COL", help="with train, validation and test in it")
    finetune.add_argument("--split-seed", type=int, default=0, metavar="N", help="of a split that is random")
    finetune.add_argument("--seeds", type=positive, default=1, metavar="N", help="fits, as an ensemble (default: 1)")
    finetune.add_argument(
        "--conflicts",
        choices=("error", "keep", "drop", "mean"),
        default="error",
        help="what to do about rows of one molecule with different labels (default: error)",
    )
    _add_fit(finetune)
    add_no_standardize(finetune, default=None)

    predict = command("predict", _predict, "Properties of molecules from what hmoe finetune made.")
    predict.add_argument("predictor", metavar="PREDICTOR", help="folder made by hmoe finetune")
    predict.add_argument("source", metavar="SOURCE", help=SOURCES_HELP)
    predict.add_argument("--out", required=True, help="CSV file to write, with a line for each row")
    add_columns(predict)
    add_workers(predict)

    evaluate = command("evaluate", _evaluate, "Pretrained models against a random forest and no pretraining.")
    evaluate.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    evaluate.add_argument(
        "--suite", choices=("moleculenet",), default="moleculenet", help="of sets (default: moleculenet)"
    )
    evaluate.add_argument(
        "--data", required=True, metavar="DIR", help="folder with bbbp.csv, bace.csv, ..., or as MoleculeNet calls them"
    )
    evaluate.add_argument("--out", required=True, help="JSON file to write, or to go on with")
    evaluate.add_argument("--sets", nargs="+", default=[], metavar="NAME", help="such as bbbp (default: all in DIR)")
    evaluate.add_argument("--seeds", type=positive, default=3, metavar="N", help="fits of each arm (default: 3)")
    evaluate.add_argument(
        "--arm",
        action="append",
        default=[],
        dest="arms",
        metavar="NAME=MODEL",
        help="another pretrained model, such as dense=DIR; may be given more than once",
    )
    _add_fit(evaluate)
    add_no_standardize(evaluate, default=None)


def _add_fit(sub: argparse.ArgumentParser) -> None:
    """What `FitOptions` has."""
    fit = sub.add_argument_group("fitting")
    fit.add_argument(
        "--mode", choices=("full", "frozen"), default="full", help="train the encoder too, or the head alone"
    )
    fit.add_argument(
        "--readout",
        choices=get_args(Readout),
        default="mean+max+sum+size",
        help="what of its atom states the head sees of a molecule (default: mean+max+sum+size)",
    )
    fit.add_argument(
        "--head-epochs",
        type=whole,
        default=20,
        metavar="N",
        help="of the head alone, before all, at most (default: 20)",
    )
    fit.add_argument("--epochs", type=positive, default=100, help="of all, at most (default: 100)")
    fit.add_argument("--patience", type=positive, default=20, help="epochs without gain until the end (default: 20)")
    fit.add_argument("--batch-size", type=positive, default=32, help="molecules of a step (default: 32)")
    fit.add_argument("--learning-rate", type=float, default=1e-3, help="(default: 0.001)")
    fit.add_argument(
        "--layer-decay", type=float, default=1.0, help="of the learning rate from layer to layer downwards (default: 1)"
    )
    fit.add_argument("--weight-decay", type=float, default=0.0, help="(default: 0)")
    fit.add_argument("--dropout", type=float, default=0.1, help="of the head (default: 0.1)")
    fit.add_argument("--class-weights", action="store_true", help="weigh both classes alike, however rare one is")


def _fit_options(options: argparse.Namespace) -> FitOptions:
    from hmoe_ds.downstream.fitting import FitOptions

    return FitOptions(**{each.name: getattr(options, each.name) for each in dataclasses.fields(FitOptions)})


def _rows(options: argparse.Namespace) -> RowOptions:
    from hmoe_ds.downstream.chunked import RowOptions

    return RowOptions(options.smiles_column, options.id_column, options.format)


def _export(options: argparse.Namespace, rest: list[str]) -> Result:
    from hmoe_ds.data.store import ShardStore
    from hmoe_ds.downstream.export import export_checkpoint
    from hmoe_ds.downstream.registry import Registry
    from hmoe_ds.model.hub import check_name, push_folder

    if options.push:
        check_name(options.push)
    dataset = None if options.data is None else ShardStore(options.data, "train")
    registry = None if options.register is None else Registry(options.register)
    result = export_checkpoint(options.checkpoint, options.out, options.dtype, options.heads)
    print(f"exported step {result['step']}, {result['parameters']:,} parameters, to {options.out}")
    result["familiar"] = _familiarize(options.out, dataset)
    if options.push:
        result["address"] = push_folder(options.out, options.push)
        print(f"uploaded to {result['address']}")
    if registry is not None:
        result["registered"] = registry.register(options.out)
        print(_registered(result["registered"]))
    return result


def _familiarize(folder: str, dataset: ShardStore | None) -> int:
    """Note down what the model is familiar with; -> from how many molecules, 0 where that cannot be told."""
    from hmoe_ds.data.mixture import Mixture
    from hmoe_ds.downstream.familiarize import datasets_of_run, familiarize
    from hmoe_ds.model.description import read_description

    if dataset is not None:
        return familiarize(folder, Mixture([dataset]))
    try:
        return familiarize(folder, datasets_of_run(read_description(Path(folder)).training))
    except PipelineError as error:
        why = redacted(str(error))
    print(f"hmoe embed will not tell how novel molecules are ({why}); --data DIR takes a dataset for it")
    return 0


def _register(options: argparse.Namespace, rest: list[str]) -> Result:
    from hmoe_ds.downstream.registry import Registry

    result = Registry(options.name).register(options.model)
    print(_registered(result))
    return result


def _registered(result: Result) -> str:
    run = f"trained by MLflow's run {result['mlflow_run']}" if result["mlflow_run"] else "linked to no run of MLflow's"
    return f"registered version {result['version']} of {result['name']}, {run}; it loads from {result['uri']}"


def _embed(options: argparse.Namespace, rest: list[str]) -> Result:
    from hmoe_ds.downstream.embed import EmbedOptions, embed_source

    what = EmbedOptions(options.standardize, options.per_atom, options.routing, options.readout or "mean")
    with Progress() as progress:
        result = embed_source(
            options.model, options.source, options.out, _rows(options), what, options.workers, progress.report
        )
    print(f"embedded {result['molecules']} molecules, {result['dimensions']} numbers each, into {options.out}")
    if result["rejected"]:
        print(f"{_unreadable(result)}; they are listed in {result['rejects']}")
    return result


def _finetune(options: argparse.Namespace, rest: list[str]) -> Result:
    from hmoe_ds.downstream.finetune import FinetuneOptions, describe_result, finetune

    if (options.split == "column") != (options.split_column is not None):
        raise UsageError("--split column and --split-column COL go together: give both, or neither")
    settings = FinetuneOptions(
        targets=_targets(options.target),
        task=options.task,
        smiles_column=options.smiles_column,
        id_column=options.id_column,
        split=options.split,
        split_column=options.split_column,
        split_seed=options.split_seed,
        seeds=options.seeds,
        conflicts=options.conflicts,
        standardize=options.standardize,
        fit=_fit_options(options),
    )
    with Progress() as progress:
        result = finetune(options.model, options.table, options.out, settings, progress.report)
    print(describe_result(result, settings))
    return result


def _targets(text: str) -> tuple[str, ...]:
    """The names of columns in `text`, which is written as the header of a CSV file."""
    try:
        names = next(csv.reader([text], skipinitialspace=True, strict=True), [])
    except csv.Error as error:
        raise UsageError(
            f"--target {text!r} cannot be read as names of columns ({error}): put a name with a comma, a quote or a "
            "line break in double quotes, and double the quotes in it"
        ) from error
    return tuple(name.strip() for name in names if name.strip())


def _predict(options: argparse.Namespace, rest: list[str]) -> Result:
    from hmoe_ds.downstream.predict import predict_source

    with Progress() as progress:
        result = predict_source(
            options.predictor, options.source, options.out, _rows(options), options.workers, progress.report
        )
    print(f"predicted {', '.join(result['targets'])} of {result['molecules']} molecules, into {options.out}")
    if result["rejected"]:
        print(f"{_unreadable(result)}; their lines say why")
    return result


def _unreadable(result: Result) -> str:
    return f"{result['rejected']} rows could not be read as molecules: {rejects_in_words(result['reasons'])}"


def _evaluate(options: argparse.Namespace, rest: list[str]) -> Result:
    from hmoe_ds.downstream.evaluate import EvaluateOptions, evaluate

    others = {}
    for arm in options.arms:
        name, sign, model = arm.partition("=")
        if not (name and sign and model):
            raise UsageError(f"--arm {arm}: expected NAME=MODEL, such as dense=models/dense")
        if name in others:
            raise UsageError(f"--arm {name} is given twice: give each a name of its own")
        others[name] = model
    settings = EvaluateOptions(tuple(options.sets), options.seeds, others, options.standardize, _fit_options(options))
    with Progress() as progress:
        result = evaluate(options.model, options.data, options.out, settings, progress.report)
    print(f"{options.suite}\n\n{result.pop('table')}")
    return result
