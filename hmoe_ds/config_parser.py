"""From a command line, with a file or the name of a preset and overrides, to a checked RunConfig.

config = load_config(["--config", "tiny_cpu", "--data.path", "data/zinc", "--run.out", "runs/zinc"])
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from hmoe_ds.config import SECTIONS, ConfigError, RunConfig
from hmoe_ds.config_checks import check_config


def preset_names() -> list[str]:
    """Names that `--config` understands beside file paths."""
    return sorted(p.name[:-5] for p in resources.files("hmoe_ds.presets").iterdir() if p.name.endswith(".yaml"))


def load_config(argv: Sequence[str]) -> RunConfig:
    """The configuration that a command line describes, checked as far as it can be without data or ranks.

    Args:
        argv: `--config FILE|PRESET` and any number of `--section.field value`.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range, no such file or preset.
    """
    parser = _parser()
    if sum(word == "--data.path" or word.startswith("--data.path=") for word in argv) > 1:
        raise ConfigError("--data.path is given more than once: write several datasets as --data.path '[one, two]'")
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            known = parser.parse_args(_with_preset_path(list(argv)))
        except Exception as error:  # jsonargparse raises many types; all of them mean a bad command line
            raise ConfigError(_explain(str(error))) from error
    tree = parser.instantiate_classes(known)
    config = RunConfig(**{name: getattr(tree, name) for name in SECTIONS})
    check_config(config)
    return config


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="hmoe pretrain", exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file or preset: " + ", ".join(preset_names()))
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name)
    return parser


def config_help() -> str:
    """Help text that lists every field with its default and meaning."""
    return _parser().format_help()


def _with_preset_path(argv: list[str]) -> list[str]:
    """Replace a preset's name after `--config` by the path of its file; say so when it is neither."""
    resolved = []
    for position, word in enumerate(argv):
        if word.startswith("--config="):
            word = "--config=" + _config_file(word.split("=", 1)[1])
        elif position and argv[position - 1] == "--config":
            word = _config_file(word)
        resolved.append(word)
    return resolved


def _config_file(name: str) -> str:
    if name in preset_names():
        return str(resources.files("hmoe_ds.presets") / f"{name}.yaml")
    if not Path(name).is_file():
        raise ConfigError(
            f"--config {name!r} is neither a file nor a preset: give a YAML file or one of {', '.join(preset_names())}"
        )
    _check_plain(name)
    return name


def _check_plain(name: str) -> None:
    """Raise ConfigError unless the file, which may come from others, holds sections of plain values.

    jsonargparse would import what `class_path` names before it finds that no field takes it.
    """
    try:
        tree = yaml.safe_load(Path(name).read_bytes())
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--config {name} is no YAML of plain values ({' '.join(str(error).split())}): mend it"
        ) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {name} holds no sections: give them as in `hmoe pretrain --help`, such as 'run:'")
    for section, values in tree.items():
        if section in SECTIONS and not isinstance(values, dict):
            raise ConfigError(f"--config {name} has {section}: {values!r}: give its fields, such as those in a preset")
    if _has_key(tree, "class_path"):
        raise ConfigError(f"--config {name} has a class_path, and no field takes a class: remove it")


def _has_key(tree: Any, key: str) -> bool:
    if isinstance(tree, dict):
        return key in tree or any(_has_key(value, key) for value in tree.values())
    return isinstance(tree, list) and any(_has_key(value, key) for value in tree)


def _explain(message: str) -> str:
    """jsonargparse's message as one line that ends with the mend."""
    message = re.sub(r"\s+", " ", message).strip()
    keys = [f"{name}.{field.name}" for name, section in SECTIONS.items() for field in dataclasses.fields(section)]
    unknown = re.search(r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message)
    if unknown is None:
        return f"{message}; `hmoe pretrain --help` lists every field with its type"
    word = unknown.group(1) or unknown.group(2)
    close = difflib.get_close_matches(word, keys + [key.split(".")[1] for key in keys], n=1, cutoff=0.5)
    hint = f"did you mean --{next(key for key in keys if key.endswith(close[0]))}? " if close else ""
    return f"{message}; {hint}`hmoe pretrain --help` lists every field"
