"""Where numba keeps what it compiles."""

import os
import subprocess
import sys
from pathlib import Path

import data_pipeline
from data_pipeline.execution.compiled import cache_environment, cache_of_version

PACKAGE = Path(data_pipeline.__file__).parent


def test_numba_finds_a_place_by_itself_mostly(monkeypatch):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    assert cache_environment() == {}


def test_each_version_of_the_code_has_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    assert cache_of_version("a")["NUMBA_CACHE_DIR"].startswith(f"{tmp_path}/")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "given"))
    assert cache_of_version("a") == {"NUMBA_CACHE_DIR": str(tmp_path / "given" / "a")}
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_of_version("a")["NUMBA_CACHE_DIR"].startswith(f"{tmp_path}/xdg/")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # where nothing can be made
    assert Path(cache_of_version("a")["NUMBA_CACHE_DIR"]).parent.is_dir()


def test_a_user_who_can_write_nowhere_has_a_folder_for_the_time_being():
    """As a random user in a container, for whom numba refuses to compile otherwise."""
    program = """
import os
from data_pipeline.execution.compiled import cache_environment
os.access = lambda *_: False
os.environ.update(cache_environment())
folder = os.environ["NUMBA_CACHE_DIR"]
assert os.stat(folder).st_mode & 0o777 == 0o700
from data_pipeline.molecules.encode import encode_rows
assert encode_rows(["CCO"], ["a"]).batch.num_rows == 1
assert os.listdir(folder)
print(folder)
"""
    environment = {**os.environ, "HOME": "/dev/null"}
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not Path(done.stdout.strip()).exists()
