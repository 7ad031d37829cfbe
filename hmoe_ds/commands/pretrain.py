"""`hmoe pretrain`: start a run, or say what it would take."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path

from data_pipeline.redact import redacted
from hmoe_ds.commands.arguments import Command, Result, Run, positive, whole


def add_command(command: Command) -> argparse.ArgumentParser:
    """Declare it; -> its parser."""
    pretrain = command("pretrain", _pretrain, "Pretrain on this machine or several, through the deepspeed launcher.")
    pretrain.add_argument(
        "--num_ranks", type=positive, help="ranks on each machine (default: one per GPU, or parallel.ep_size in all)"
    )
    pretrain.add_argument(
        "--restarts",
        type=int,
        default=3,
        metavar="N",
        help="restarts in a row without a new checkpoint (default: 3)",
    )
    pretrain.add_argument(
        "--dry-run",
        action="store_true",
        help="print the command, sizes, FLOPs, memory per GPU and traffic (of parallel.ep_size ranks)",
    )
    pretrain.add_argument("--check", action="store_true", help="look for what is wrong with the run, and start nothing")
    hosts = pretrain.add_argument_group("several machines, reached over ssh (docs/cluster.md)")
    hosts.add_argument("--hostfile", type=Path, metavar="FILE", help="with lines such as `worker-1 slots=8`")
    hosts.add_argument("--launcher", choices=("pdsh", "openmpi"), help="that starts ranks there (default: pdsh)")
    nodes = pretrain.add_argument_group("several machines, with this command started on each (Slurm, Kubernetes)")
    nodes.add_argument("--nodes", type=positive, default=1, metavar="N", help="machines (default: 1)")
    nodes.add_argument("--node_rank", type=whole, metavar="I", help="number of this one, from 0")
    nodes.add_argument("--master_addr", metavar="HOST", help="machine 0, as the others reach it")
    nodes.add_argument("--master_port", type=positive, metavar="PORT", help="a free port there (default: 29500)")
    pretrain.epilog = "All other arguments: --config FILE|PRESET and --section.field VALUE, listed below."
    return pretrain


def print_help(parser: argparse.ArgumentParser) -> Run:
    """What runs in the place of the command when its help is asked for, with all settings; `parser` is its own."""

    def run(options: argparse.Namespace, rest: list[str]) -> Result:
        from hmoe_ds.config_parser import config_help

        print(parser.format_help() + "\n" + config_help())
        return {}

    return run


def _pretrain(options: argparse.Namespace, rest: list[str]) -> Result:
    from hmoe_ds.config_parser import load_config

    config = load_config(rest)  # before the imports that take longer
    from hmoe_ds.training import exit_codes
    from hmoe_ds.training.launching.placement import StartOptions, check_placed, command_of, place, start

    names = [field.name for field in dataclasses.fields(StartOptions)]
    where = StartOptions(**{name: getattr(options, name) for name in names})
    placement, out = place(where, config.parallel.ep_size, options.dry_run), Path(config.run.out)
    if options.dry_run:
        from hmoe_ds.training.dry_run import describe_dry_run, dry_run

        figures = dry_run(config, placement.all_ranks)
        command = shlex.join(command_of(rest, placement, out).words)
        print(f"command     {redacted(command)}\n\n{describe_dry_run(figures)}")
        return {"command": redacted(command), **figures}
    if config.run.mirror and config.run.resume == "auto" and not options.node_rank:
        from hmoe_ds.training.checkpoints.mirror import fetch

        fetched = fetch(out, config.run.mirror)
        if fetched is not None:
            print(f"run {config.run.out}: {fetched} was brought back from {config.run.mirror}")
    check_placed(config, placement)
    if options.check:
        print(f"run {config.run.out}: nothing is wrong with it, as far as can be told before it starts")
        return {"out": config.run.out, "ranks": placement.all_ranks}
    exit_code = start(rest, placement, out, options.restarts)
    if exit_code == exit_codes.REQUEUE:
        print(f"run {config.run.out} was asked to stop: the same command goes on with it")
    if exit_code == exit_codes.DONE:
        print(f"run {config.run.out}: {config.run.steps} steps done; export it with `hmoe export {config.run.out} OUT`")
    return {
        "out": config.run.out,
        "steps": config.run.steps,
        "ranks": placement.all_ranks,
        "exit_code": exit_code,
    }
