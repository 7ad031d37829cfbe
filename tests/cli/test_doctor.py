"""`hmoe doctor` on this machine, and what it says of every machine: that a run compiles no operator."""

import json
import os
import subprocess
import sys
from pathlib import Path

from hmoe_ds.cli import main
from tests.distributed.harness import train_all

ROOT = Path(__file__).parents[2]


def doctor(*arguments: str, **variables: str) -> tuple[int, str, dict[str, dict]]:
    """Run it; -> exit code, standard output, findings by subject."""
    done = subprocess.run(
        [sys.executable, "-m", "hmoe_ds.cli", "doctor", "--json", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | variables,
        timeout=240,
    )
    assert done.returncode in (0, 1), done.stderr
    findings = json.loads(done.stdout.splitlines()[-1])["findings"]
    return done.returncode, done.stdout, {finding["subject"]: finding for finding in findings}


def test_this_machine_which_runs_these_tests_can_pretrain(tmp_path):
    code, out, findings = doctor("--out", str(tmp_path))
    assert code == 0, out
    assert "this machine can pretrain" in out
    assert findings["2 ranks, gloo"]["level"] == "ok"
    assert findings["accelerator"]["found"] == "the CPU, as DS_ACCELERATOR says"
    assert "what a rank imports works, on cpu" in findings["DeepSpeed"]["found"]
    assert {"python", "packages", "cores", "memory", "run.out", "network", "host name"} <= findings.keys()
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_cannot_reach_each_other_end_with_1_and_the_mend():
    code, out, findings = doctor(GLOO_SOCKET_IFNAME="nothing0")
    assert code == 1
    assert "this machine cannot pretrain" in out
    assert findings["GLOO_SOCKET_IFNAME"]["level"] == "problem"
    assert findings["2 ranks, gloo"]["level"] == "problem"
    assert "nothing0" in findings["2 ranks, gloo"]["found"]


def test_without_deepspeed_it_says_what_works_and_what_does_not(monkeypatch, capsys):
    from hmoe_ds.doctor import packages

    versions = {name: version for name, version in packages.installed().items() if name != "deepspeed"}
    monkeypatch.setattr("hmoe_ds.doctor.examine.installed", lambda: versions)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "embedding and fine-tuning an exported model work, pretraining does not" in " ".join(out.split())
    assert 'pip install --no-build-isolation "deepspeed==0.19.8"' in out


def test_a_run_compiles_no_operator(dataset, tmp_path, monkeypatch):
    builds = tmp_path / "builds"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(builds))
    layouts = {
        tmp_path / "offloaded": {"parallel__zero_stage": 2, "parallel__offload_optimizer": "true", "run__steps": 1},
        tmp_path / "stage 3": {"parallel__zero_stage": 3, "run__steps": 1},
    }
    assert all(len(lines) == 1 for lines in train_all(layouts, dataset, 1).values())
    assert not builds.exists()
