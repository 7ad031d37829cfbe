"""Too little memory or disk for a run is said before it starts, with sizes and with what would help."""

import re

import psutil
import pytest

from hmoe_ds.cli import main
from hmoe_ds.config import ConfigError
from hmoe_ds.config_parser import load_config, preset_names
from hmoe_ds.training.checks.disk_check import check_disk, checkpoint_bytes
from hmoe_ds.training.checks.memory_check import check_memory
from hmoe_ds.training.checks.preflight import check_run
from hmoe_ds.training.footprint import memory_per_rank
from hmoe_ds.training.machine import Machine, free_host_memory, ranks_here, smallest_gpu, this_machine
from tests.distributed.harness import arguments

GIB = 2**30
ATOMS, BONDS = 28, 30
PRESETS = {"tiny_cpu": 1, "small_1gpu": 1, "base_8gpu": 8, "large_multinode": 32}
# 10^12 parameters, which no machine of a test has room for.
HUGE = ["--model.hidden_size=8192", "--router.experts=4096", "--router.expert_size=16384", "--model.dense_size=8192"]


def total(config, ranks):
    parallel = config.parallel
    return memory_per_rank(config, ranks, parallel.zero_stage, parallel.offload_optimizer, ATOMS, BONDS).total


def refused(config, ranks, machine) -> str:
    with pytest.raises(ConfigError) as error:
        check_memory(config, ranks, ATOMS, BONDS, machine)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("preset", preset_names())
def test_what_fits_is_started_and_what_clearly_does_not_is_refused(preset):
    config, ranks = load_config(["--config", preset]), PRESETS[preset]
    needed = total(config, ranks)
    here = min(ranks, 8)
    for machine in (Machine(here, 1e15, needed), Machine(here, here * needed)):
        check_memory(config, ranks, ATOMS, BONDS, machine)
    message = refused(config, ranks, Machine(here, 1e15, needed / 2))
    assert message.startswith(f"this run needs about {needed / GIB:.3g} GiB per rank (parameters and gradients ")
    assert f"this machine has {needed / 2 / GIB:.3g} GiB on its smallest GPU" in message
    assert f"GiB of host memory free per rank ({here} here)" in refused(config, ranks, Machine(here, needed / 10))


def test_ranks_share_the_memory_of_their_machine():
    config = load_config(["--config", "tiny_cpu"])
    check_memory(config, 2, ATOMS, BONDS, Machine(1, total(config, 2)))
    refused(config, 2, Machine(20, total(config, 2)))


def test_an_offloaded_optimizer_needs_room_on_the_host():
    words = ["--config=base_8gpu", "--parallel.zero_stage=2", "--parallel.offload_optimizer=true"]
    config = load_config(words)
    host = memory_per_rank(config, 8, 2, True, ATOMS, BONDS).host
    check_memory(config, 8, ATOMS, BONDS, Machine(8, 8 * host, 1e12))
    refused(config, 8, Machine(8, 7.9 * host, 1e12))


@pytest.mark.parametrize("preset", ["small_1gpu", "base_8gpu", "large_multinode"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.65])
def test_every_mend_that_is_named_helps(preset, share):
    ranks = PRESETS[preset]
    config = load_config(["--config", preset])
    machine = Machine(min(ranks, 8), 1e15, share * total(config, ranks))
    message = refused(config, ranks, machine)
    mends = message.split(": set ")[1].split(" (--dry-run")[0].split(", or ")
    assert len(mends) >= 2
    for mend in mends:
        more = re.fullmatch(r"more machines, (\d+) ranks in all", mend)
        words = [] if more else [f"--{name}={value}" for name, value in re.findall(r"(\w+\.\w+) (\S+)", mend)]
        assert more or words, mend
        on = int(more.group(1)) if more else ranks
        mended = load_config(["--config", preset, *words])
        check_memory(mended, on, ATOMS, BONDS, machine)
        assert total(mended, on) <= machine.device


def test_no_mend_is_promised_where_none_helps():
    assert "no single setting is enough" in refused(load_config(["--config=tiny_cpu", *HUGE]), 1, Machine(1, GIB))


def test_a_run_that_does_not_fit_is_one_line_from_the_command(dataset, tmp_path, capsys):
    words = [*arguments(tmp_path / "run", dataset), *HUGE]
    assert main(["pretrain", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hmoe pretrain: error: ")
    assert "GiB" in line
    assert not (tmp_path / "run").exists()


def test_the_check_can_be_left_out(dataset, tmp_path):
    # So many atoms in a step that no machine holds them, if there were so many.
    words = arguments(
        tmp_path / "run", dataset, model__dense_size=131072, data__molecules_per_step=1_000_000,
        data__atoms_per_step=2**31 - 1, data__bonds_per_step=2**31 - 1,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"run\.check_memory false starts nevertheless"):
        check_run(load_config(words), 1)
    check_run(load_config([*words, "--run.check_memory=false"]), 1)


@pytest.mark.parametrize(("every", "number"), [(0, 1), (1000, 1), (100, 2)])
def test_the_first_checkpoints_must_fit_on_the_disk(every, number):
    config = load_config(["--config=tiny_cpu", "--run.steps=1000", f"--run.checkpoint_every={every}", "--run.out=here"])
    size = number * checkpoint_bytes(config)
    check_disk(config, free=size)
    with pytest.raises(ConfigError, match=r"run\.out here has .* GiB free, but a checkpoint .* at least") as error:
        check_disk(config, free=size - 1)
    assert "\n" not in str(error.value)


# What the machine has.


def test_memory_of_this_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    machine = this_machine(3)
    assert (machine.ranks, machine.device) == (3, None)
    assert 0 < machine.host <= psutil.virtual_memory().total
    assert ranks_here(16) == 16
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert ranks_here(16) == 2
    assert smallest_gpu() is None or smallest_gpu() > 0


def cgroup(folder, limit_file, limit, used_name, used):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit_file).write_text(f"{limit}\n")
    (folder / "memory.stat").write_text(f"cache 999999999999\n{used_name} {used}\n")


@pytest.mark.parametrize(
    ("version", "line"), [(2, "0::/job/step"), (1, "9:cpu,cpuacct:/other\n4:memory:/job/step")], ids=["v2", "v1"]
)
def test_limits_of_a_job_hold(version, line, tmp_path):
    limit_file, used = ("memory.max", "anon") if version == 2 else ("memory.limit_in_bytes", "total_rss")
    root = tmp_path / "cgroup" / ("" if version == 2 else "memory")
    (tmp_path / "self").write_text(line + "\n")

    def free():
        return free_host_memory(tmp_path / "cgroup", tmp_path / "self")

    unlimited = psutil.virtual_memory().available
    assert free() == pytest.approx(unlimited, rel=0.2)
    cgroup(root / "job" / "step", limit_file, "max" if version == 2 else 2**63 - 4096, used, 5)
    assert free() == pytest.approx(unlimited, rel=0.2)
    cgroup(root / "job", limit_file, 50_000_000, used, 20_000_000)  # of the job around this process
    assert free() == 30_000_000
    cgroup(root / "job" / "step", limit_file, 9_000_000, used, 0)
    assert free() == 9_000_000
    cgroup(root / "elsewhere", limit_file, 5, used, 0)
    assert free() == 9_000_000
    cgroup(root / "job" / "step", limit_file, 9_000_000, used, 10_000_000)
    assert free() == 0
