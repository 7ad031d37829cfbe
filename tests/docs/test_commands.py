"""What README.md and docs/ tell the reader to type works: marked blocks are run, in the order of their page."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hmoe_ds.cli import _parse
from hmoe_ds.config import ConfigError
from hmoe_ds.config_parser import load_config
from tests.distributed.harness import train
from tests.docs.blocks import Block, hmoe_commands, marked_blocks
from tests.docs.inputs import PAGES, lay_out

ROOT = Path(__file__).parents[2]
BLOCK_SECONDS = 400
FILES = {
    page.relative_to(ROOT).as_posix(): page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
BLOCKS = {name: marked_blocks(page) for name, page in FILES.items()}
MARKED = [page for page, blocks in BLOCKS.items() if blocks]


@pytest.fixture(scope="session")
def short_run(dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("short") / "run"
    train(out, dataset, run__steps=2)
    return out


@pytest.fixture(scope="session")
def tracked_run(dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tracked") / "run"
    train(out, dataset, run__steps=2, run__mlflow="true")
    return out


@pytest.fixture
def folder(tmp_path) -> Path:
    """An empty folder with `.venv/bin/hmoe` and `.venv/bin/python`, those of this checkout."""
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    for name, words in {"hmoe": [sys.executable, "-m", "hmoe_ds.cli"], "python": [sys.executable]}.items():
        (commands / name).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        (commands / name).chmod(0o755)
    return tmp_path


def run_block(block: Block, folder: Path) -> tuple[int | None, str]:
    """-> the exit code, None if its time was up, and what it printed. It leaves no process behind."""
    command = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    paths = {"PATH": f"{folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, block.text], cwd=folder, env=os.environ | paths, text=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=BLOCK_SECONDS)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]


def run_page(page: str, blocks: list[Block], folder: Path, request: pytest.FixtureRequest) -> None:
    lay_out(page, folder, request.getfixturevalue)
    for block in blocks:
        code, output = run_block(block, folder)
        ended = f"was not done in {BLOCK_SECONDS} s" if code is None else f"ended with exit code {code}"
        assert code == 0, f"{page}:{block.line}: this block {ended}:\n{block.text}\nit printed:\n{output[-4000:]}"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", [page for page in MARKED if any(not block.slow for block in BLOCKS[page])])
def test_documented_commands_work(page, folder, request):
    run_page(page, [block for block in BLOCKS[page] if not block.slow], folder, request)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", [page for page in MARKED if any(block.slow for block in BLOCKS[page])])
def test_documented_commands_that_take_longer_work(page, folder, request):
    run_page(page, BLOCKS[page], folder, request)


def test_every_documented_command_is_one_that_hmoe_takes(tmp_path, monkeypatch, capsys):
    """Also those that are not run, as they need a cluster or a bucket."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("run: {steps: 1}\n")
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    commands = [
        (f"{name}:{command.line}", command.arguments) for name, page in FILES.items() for command in hmoe_commands(page)
    ]
    assert {arguments[0] for _, arguments in commands} >= {"prepare", "inspect", "pretrain", "export", "embed"}
    wrong = []
    for place, arguments in commands:
        try:
            _, _, rest = _parse(arguments)
            if rest:
                load_config(rest)
        except (SystemExit, ConfigError) as error:
            wrong.append(f"{place}: hmoe {shlex.join(arguments)}: {error} {capsys.readouterr().err}")
    assert not wrong, "\n".join(wrong)


def test_pages_with_inputs_are_those_with_marked_blocks():
    assert set(MARKED) == set(PAGES)


@pytest.mark.parametrize(
    ("text", "code", "printed"),
    [
        ("set x; false | true; echo on", 1, ""),
        ("echo before; exit 3", 3, "before"),
        ("command -v hmoe; cat $(command -v hmoe)", 0, "-m hmoe_ds.cli"),
    ],
)
def test_a_block_that_fails_is_seen_to_fail(text, code, printed, folder):
    found, output = run_block(Block("bash", text, 1, False), folder)
    assert found == code
    assert printed in output
    assert "on\n" not in output


@pytest.mark.parametrize("content", ["<!-- runnable -->\n\n```\nls\n```\n", "<!-- runnable fast -->\n```\nls\n```\n"])
def test_a_mark_that_marks_nothing_is_an_error(content, tmp_path):
    (tmp_path / "page.md").write_text(content)
    with pytest.raises(ValueError, match="expected a block of code"):
        marked_blocks(tmp_path / "page.md")


@pytest.mark.parametrize("name", FILES)
def test_no_page_has_a_gap_that_was_to_be_filled(name):
    assert not re.findall(r"@[A-Z]+@|TODO|FIXME", FILES[name].read_text())
