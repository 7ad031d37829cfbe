#!/usr/bin/env python3
"""Print a manifest that pretrains on Kubernetes, for `kubectl apply -f -`; docs/kubernetes.md.

python launchers/k8s/render.py PRESET DATASET OUT [--kind pytorchjob] [--name NAME] [--image IMAGE] [--nodes N]
    [--num_ranks N] [--dry-run] [--section.field VALUE ...]

It is `job.yaml` or `pytorchjob.yaml` with these values filled in. PRESET may be a file. DATASET, OUT and such a file
are named as pods see them: on the volumes /data and /runs, or by a URL.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

# Of a node, for each GPU.
CPUS, MEMORY_GIB = 8, 64
RESTARTS = 10
# Only a run on several nodes takes these.
OF_SEVERAL_NODES = ("--nodes", "--node_rank", "--master_addr", "--master_port")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; -> its exit code."""
    options, rest = _parse(argv)
    documents = list(yaml.safe_load_all(Path(__file__).with_name(f"{options.kind}.yaml").read_text(encoding="utf-8")))
    fill = _fill_job if options.kind == "job" else _fill_pytorchjob
    pods = fill(documents[-1], options)
    documents[-1]["metadata"]["name"] = options.name
    for pod in pods:
        _fill_container(pod["spec"]["containers"][0], options, rest)
    # JSON, as YAML's readers differ on whether 1e-3 or no is a string.
    print(json.dumps({"apiVersion": "v1", "kind": "List", "items": documents}, indent=2), flush=True)
    return _dry_run(options, rest) if options.dry_run else 0


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Print a manifest that pretrains on Kubernetes.")
    parser.add_argument("preset", help="or a configuration file, as pods see it")
    parser.add_argument("dataset", help="as pods see it, such as /data/zinc, or a URL")
    parser.add_argument("out", help="folder of the run, such as /runs/zinc")
    parser.add_argument("--kind", choices=("job", "pytorchjob"), default="job")
    parser.add_argument("--name", default="pretrain", help="of the job (default: pretrain)")
    parser.add_argument("--image", default="hmoe_ds:cuda", help="with its registry (default: hmoe_ds:cuda)")
    parser.add_argument("--nodes", type=int, default=4, help="default: 4")
    parser.add_argument("--num_ranks", type=int, default=8, help="GPUs of each node (default: 8)")
    parser.add_argument("--dry-run", action="store_true", help="also print sizes, memory per GPU and traffic")
    parser.epilog = "All other arguments are those of `hmoe pretrain`."
    return parser.parse_known_args(argv)


def _fill_job(job: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """-> the templates of its pods."""
    spec = job["spec"]
    spec["completions"] = spec["parallelism"] = options.nodes
    return [spec["template"]]


def _fill_pytorchjob(job: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """-> the templates of its pods."""
    spec = job["spec"]
    replicas = spec["pytorchReplicaSpecs"]
    spec["nprocPerNode"] = str(options.num_ranks)
    spec["runPolicy"]["backoffLimit"] = RESTARTS * options.nodes
    replicas["Worker"]["replicas"] = options.nodes - 1
    if options.nodes == 1:
        del replicas["Worker"]
    return [replicas["Master"]["template"]]  # that of the workers is the same object


def _fill_container(container: dict[str, Any], options: argparse.Namespace, rest: list[str]) -> None:
    container["image"] = options.image
    cpus, memory, gpus = str(CPUS * options.num_ranks), f"{MEMORY_GIB * options.num_ranks}Gi", str(options.num_ranks)
    container["resources"]["requests"] = {"cpu": cpus, "memory": memory}
    container["resources"]["limits"] = {"memory": memory, "nvidia.com/gpu": gpus}
    command, words = container["args"][:2], container["args"][2:]
    values = dict(zip(words[::2], words[1::2], strict=True))
    own = {"--config": options.preset, "--data.path": options.dataset, "--run.out": options.out}
    values |= {name: _literal(value) for name, value in own.items()}
    if options.kind == "job":  # the operator fills them in
        values |= {"--nodes": str(options.nodes), "--num_ranks": gpus}
    if options.nodes == 1:
        values = {name: value for name, value in values.items() if name not in OF_SEVERAL_NODES}
    container["args"] = [*command, *(word for pair in values.items() for word in pair), *map(_literal, rest)]


def _literal(word: str) -> str:
    """`word` written so that Kubernetes, which replaces $(NAME), hands it on as it is."""
    return word.replace("$", "$$")


def _dry_run(options: argparse.Namespace, rest: list[str]) -> int:
    """What it would take, for molecules of the usual size, as the dataset is not here; -> the exit code."""
    place = ["--node_rank", "0", "--master_addr", options.name] if options.nodes > 1 else []
    place += ["--nodes", str(options.nodes), "--num_ranks", str(options.num_ranks)]
    training = ["--config", options.preset, "--run.out", options.out, *rest]
    return subprocess.call([sys.executable, "-m", "hmoe_ds.cli", "pretrain", "--dry-run", *place, *training])


if __name__ == "__main__":
    sys.exit(main())
