"""The manifests for Kubernetes: they are valid, and start runs that this version of the command understands."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from hmoe_ds.cli import _parse
from hmoe_ds.config_parser import load_config
from hmoe_ds.training import exit_codes, launch
from hmoe_ds.training.launching.alive import is_rank
from hmoe_ds.training.launching.node import MASTER_PORT, Node, node_command
from hmoe_ds.training.launching.placement import StartOptions, place

FOLDER = Path(__file__).parents[2] / "launchers" / "k8s"
# The oldest that job.yaml is for, and the newest that the validator knows.
VERSIONS = ("1.33", kubernetes_validate.latest_version())
NODES, GPUS = 4, 8


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def rendered(*arguments: str) -> list[dict]:
    command = [sys.executable, str(FOLDER / "render.py"), *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["items"]


def pod_templates(document: dict) -> list[dict]:
    """Of a job of either kind: of pod 0, and of the others if that is another one."""
    if document["kind"] == "Job":
        return [document["spec"]["template"]]
    return [replica["template"] for replica in document["spec"]["pytorchReplicaSpecs"].values()]


def is_valid(document: dict) -> bool:
    """Whether it is in all versions; a kind without a schema, for which the validator only warns, is an error."""
    try:
        for version in VERSIONS:
            kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError:
        return False
    return True


def are_valid_pods(document: dict) -> bool:
    templates = ({"apiVersion": "v1", "kind": "PodTemplate", "template": pod} for pod in pod_templates(document))
    return all(map(is_valid, templates))


def environment(document: dict, template: dict, number: int) -> dict[str, str]:
    """What the container of pod `number` finds of what its arguments may name."""
    found = {entry["name"]: entry.get("value") for entry in template["spec"]["containers"][0].get("env", [])}
    name = document["metadata"]["name"]
    if document["kind"] == "Job":
        field = template["spec"]["containers"][0]["env"][0]["valueFrom"]["fieldRef"]["fieldPath"]
        assert field == "metadata.labels['batch.kubernetes.io/job-name']"  # which Kubernetes gives to the pods of a Job
        return {**found, "JOB_NAME": name, "JOB_COMPLETION_INDEX": str(number)}
    replicas = document["spec"]["pytorchReplicaSpecs"]
    return {  # as pkg/controller.v1/pytorch/envvar.go of the training operator 1.9 sets it
        **found,
        "MASTER_ADDR": f"{name}-master-0",
        "MASTER_PORT": "23456",
        "PET_NNODES": str(sum(replica["replicas"] for replica in replicas.values())),
        "PET_NODE_RANK": str(number),
        "PET_NPROC_PER_NODE": document["spec"]["nprocPerNode"],
    }


def expanded(word: str, variables: dict[str, str]) -> str:
    """As Kubernetes hands it on: $$ is a $, and $(NAME) the variable."""
    return re.sub(r"\$(?:(\$)|\((\w+)\))", lambda match: match[1] or variables[match[2]], word)


def commands(document: dict) -> list[list[str]]:
    """The command of each pod, in the order of their numbers."""
    templates = pod_templates(document)
    if document["kind"] == "Job":
        templates *= document["spec"]["completions"]
    else:
        counts = [replica["replicas"] for replica in document["spec"]["pytorchReplicaSpecs"].values()]
        templates = [pod for pod, count in zip(templates, counts, strict=True) for _ in range(count)]
    return [
        [expanded(word, environment(document, pod, number)) for word in pod["spec"]["containers"][0]["args"]]
        for number, pod in enumerate(templates)
    ]


def started(command: list[str]) -> tuple[Node, list[str]]:
    """-> (where the real command would start ranks, the arguments that say what to train)."""
    assert command[0] == "hmoe"
    _, options, rest = _parse(command[1:])
    names = StartOptions.__dataclass_fields__
    node = place(StartOptions(**{name: getattr(options, name) for name in names}), ep_size=1)
    assert isinstance(node, Node)
    return node, rest


JOBS = [documents("job.yaml")[1], documents("pytorchjob.yaml")[0]]
each_kind = pytest.mark.parametrize("job", JOBS, ids=["job", "pytorchjob"])


@pytest.mark.parametrize("name", ["volumes.yaml", "prepare.yaml", "job.yaml"])
def test_manifests_of_core_kinds_are_valid(name):
    assert all(map(is_valid, documents(name)))


def test_pods_of_the_pytorchjob_are_valid_and_there_is_no_schema_for_the_rest_of_it():
    assert are_valid_pods(JOBS[1])
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        is_valid(JOBS[1])


@each_kind
def test_the_validator_sees_a_field_that_does_not_exist(job):
    job = copy.deepcopy(job)
    pod_templates(job)[0]["spec"]["containers"][0]["livenesProbe"] = {}
    assert not are_valid_pods(job)


@each_kind
def test_each_pod_starts_its_part_of_the_same_run(job):
    starts = [started(command) for command in commands(job)]
    master = {"Job": ("pretrain-0.hmoe", MASTER_PORT), "PyTorchJob": ("pretrain-master-0", 23456)}[job["kind"]]
    assert [node for node, _ in starts] == [Node(GPUS, NODES, number, *master) for number in range(NODES)]
    config = load_config(starts[0][1])
    assert all(rest == starts[0][1] for _, rest in starts)
    assert config.data.path == "/data/nci5k"
    assert config.run.out == "/runs/nci5k"


def test_pods_of_the_job_are_found_by_the_name_that_they_are_given():
    service, job = documents("job.yaml")
    pod = job["spec"]["template"]
    assert pod["spec"]["subdomain"] == service["metadata"]["name"] == "hmoe"
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"]


@pytest.mark.parametrize("name", ["prepare.yaml", "job.yaml", "pytorchjob.yaml"])
def test_what_is_mounted_is_there(name):
    claims = {document["metadata"]["name"] for document in documents("volumes.yaml")}
    for pod in pod_templates(documents(name)[-1]):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert {mount["name"] for mount in pod["spec"]["containers"][0]["volumeMounts"]} == volumes.keys()
        claimed = {
            entry["persistentVolumeClaim"]["claimName"]
            for entry in volumes.values()
            if "persistentVolumeClaim" in entry
        }
        assert claimed <= claims


@each_kind
def test_pods_have_no_privileges_and_a_gpu_for_each_rank(job):
    for pod in pod_templates(job):
        (container,) = pod["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == str(GPUS)
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        (shared,) = (volume for volume in pod["spec"]["volumes"] if volume["name"] == "shm")
        assert shared["emptyDir"]["medium"] == "Memory"


@each_kind
def test_a_pod_that_is_asked_to_stop_has_the_time_that_the_launcher_gives_its_ranks(job):
    for pod in pod_templates(job):
        needed = launch.STOP_SECONDS + 2 * launch.GRACE_SECONDS
        assert pod["spec"]["terminationGracePeriodSeconds"] > needed


def test_the_job_is_started_again_where_the_exit_code_says_so():
    job = JOBS[0]
    rules = {rule["action"]: set() for rule in job["spec"]["podFailurePolicy"]["rules"]}
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes", {"values": []})
        assert codes.get("containerName", "hmoe") == job["spec"]["template"]["spec"]["containers"][0]["name"]
        rules[rule["action"]] |= set(codes["values"])
    assert rules == {"FailJob": {exit_codes.USAGE, exit_codes.DIVERGED}, "Ignore": {exit_codes.REQUEUE}}
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_pods_of_both_kinds_are_the_same_but_for_what_the_operator_does():
    job, master, worker = (copy.deepcopy(pod) for document in JOBS for pod in pod_templates(document))
    assert master == worker
    for name in ("subdomain", "restartPolicy"):
        del job["spec"][name]
    for pod in (job, master):
        for name in ("name", "args", "env"):
            pod["spec"]["containers"][0].pop(name, None)
    assert job == master


@pytest.mark.parametrize("kind", ["job", "pytorchjob"])
@pytest.mark.parametrize(("nodes", "gpus"), [(1, 1), (1, 8), (2, 8)])
def test_render_makes_valid_manifests_of_any_size(kind, nodes, gpus):
    size = ("--nodes", str(nodes), "--num_ranks", str(gpus))
    *others, job = rendered("small_1gpu", "/data/zinc", "/runs/zinc", "--kind", kind, "--name", "zinc", *size)
    assert all(map(is_valid, [*others, job] if kind == "job" else others))
    assert are_valid_pods(job)
    assert job["metadata"]["name"] == "zinc"
    starts = [started(command)[0] for command in commands(job)]
    assert [(node.number, node.nodes, node.ranks) for node in starts] == [(i, nodes, gpus) for i in range(nodes)]
    resources = pod_templates(job)[0]["spec"]["containers"][0]["resources"]
    assert resources["limits"] == {"memory": f"{64 * gpus}Gi", "nvidia.com/gpu": str(gpus)}


@pytest.mark.parametrize("kind", ["job", "pytorchjob"])
def test_render_hands_arguments_on_as_they_are(kind):
    names = ["/data/two words", "/runs/it's $(NODES) $$ $5"]
    tables = "[{path: \"a b.csv\", label: 'y'}]"
    words = ["--probe.tables", tables, "--optim.learning_rate", "1e-3", "--run.mirror", "é\n$"]
    *_, job = rendered("tiny_cpu", *names, "--kind", kind, *words)
    expected = ["--config", "tiny_cpu", "--data.path", names[0], "--run.out", names[1], "--run.resume", "auto", *words]
    for command in commands(job):
        assert started(command)[1] == expected


def test_render_can_say_what_it_would_take():
    command = [sys.executable, str(FOLDER / "render.py"), "tiny_cpu", "/data/not-here", "/runs/x", "--dry-run"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "memory per rank" in result.stdout
    assert "--node_rank=0" in result.stdout


def test_the_probe_knows_ranks_from_their_launchers(monkeypatch):
    monkeypatch.setattr("hmoe_ds.training.launching.node.gpu_count", lambda: 0)
    launcher = node_command(["--run.out", "x"], Node(2, 2, 0, "127.0.0.1", MASTER_PORT)).words
    assert not is_rank(launcher)
    assert not is_rank(["hmoe", "pretrain", "--run.out", "x"])
    # As DeepSpeed's launcher starts it.
    assert is_rank([sys.executable, "-u", "-m", launcher[launcher.index("--module") + 1], "--run.out", "x"])
