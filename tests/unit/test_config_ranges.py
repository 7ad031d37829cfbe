"""Every number, choice and switch of a configuration refuses what makes no sense: one line that names the field."""

import dataclasses
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from hmoe_ds.config import SECTIONS, ConfigError
from hmoe_ds.config_parser import load_config

ROOT = Path(__file__).parents[2]
# Free text; what is wrong with it shows when it is opened.
TEXT = {
    *("data.path", "data.cache_dir", "parallel.deepspeed_config", "run.out", "run.mirror", "probe.tables"),
    "curriculum.deepspeed_schedule",  # test_config.py
}
WRONG = {
    int: ["-1", str(1 << 32), "1.5", "1e3", "nan", "inf", ".nan", ".inf", "true", "null", "many", "[1]"],
    float: ["-1", "1e12", "nan", "inf", ".nan", ".inf", "-.inf", "true", "null", "many", "[1.0]"],
    bool: ["2", "0.5", "perhaps", "null", "[true]"],
}
# A sequence of numbers: some within its list.
WRONG_IN_LISTS = ["-1", "0", ".nan", ".inf", "true", "many"]


def types_of_fields():
    for section, kind in SECTIONS.items():
        for name, hint in typing.get_type_hints(kind).items():
            if name in {field.name for field in dataclasses.fields(kind)}:
                yield f"{section}.{name}", hint


def wrong_values():
    """(field, value) of everything that a field of the tree must refuse."""
    for field, hint in types_of_fields():
        if hint in WRONG:
            yield from ((field, value) for value in WRONG[hint])
        elif typing.get_origin(hint) is typing.Literal:
            choice = typing.get_args(hint)[0]
            yield from ((field, value) for value in ("", "other", choice.upper(), "1", "null", "true", f"[{choice}]"))
        elif field == "data.weights":
            yield from ((field, f"[1, {value}]") for value in WRONG_IN_LISTS)
        else:
            assert field in TEXT, f"{field} has type {hint}: say here what it must refuse"


def refused(words):
    with pytest.raises(ConfigError) as error:
        load_config(words)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("field", "value"), list(wrong_values()))
def test_a_value_that_makes_no_sense_is_refused_by_the_name_of_its_field(field, value):
    others = ["--data.path=[one, two]"] if field == "data.weights" else []
    assert field in refused([*others, f"--{field}={value}"])


@pytest.mark.parametrize("field", [field for field, hint in types_of_fields() if hint in (int, float)])
def test_the_message_says_what_is_allowed(field):
    for value in ("-1", "4294967296"):
        message = refused([f"--{field}={value}"])
        assert message.startswith((f"{field} is {float(value):g}", f"{field} is {value}"))
        assert any(word in message for word in ("set it to", "expected"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("run: 5\n", "has run: 5: give its fields"),
        ("run:\n  - steps\n", "has run: .'steps'.: give its fields"),
        ("- 1\n", "holds no sections"),
        ("", "holds no sections"),
        ("run: {steps: 5\n", "is no YAML of plain values"),
        ("run:\n  steps: 5\n  steps: x\n", "run.steps"),
        ("run:\n  steps: true\n", "run.steps"),
        ("\0", "is no YAML of plain values"),
        ("runs:\n  steps: 5\n", "runs"),
    ],
)
def test_a_file_that_is_no_configuration(content, message, tmp_path):
    (tmp_path / "run.yaml").write_text(content)
    assert re.search(message, refused(["--config", str(tmp_path / "run.yaml")]))


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00\x80")
    refused(["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize(
    "content",
    [
        "run:\n  out: !!python/object/apply:os.system ['touch {mark}']\n",
        "!!python/object/apply:os.system ['touch {mark}']\n",
        "probe:\n  tables:\n  - class_path: evil.Table\n    init_args: {{path: a.csv, label: b}}\n",
        "run:\n  class_path: evil.Run\n",
        "class_path: evil.Run\n",
    ],
)
def test_a_configuration_from_others_runs_no_code(content, tmp_path, monkeypatch):
    mark = tmp_path / "executed"
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "run.yaml").write_text(content.format(mark=mark))
    refused(["--config", str(tmp_path / "run.yaml")])
    assert not mark.exists()


def test_the_command_says_it_without_torch():
    code = """
import sys
from hmoe_ds.cli import main
code = main(["pretrain", "--model.hidden_size=0"])
assert "torch" not in sys.modules and "rdkit" not in sys.modules
sys.exit(code)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == "hmoe pretrain: error: model.hidden_size is 0: set it to a value from 1 to 131072\n"
