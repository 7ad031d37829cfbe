"""Who may import whom (the layers of the README's map)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASE = ["config", "durable", "run_files"]
LAYERS = [*BASE, "data", "moe", "model", "objectives", "training", "doctor", "commands", "cli"]
ON_MODEL = ["downstream", "report"]  # sit on model and data, beside objectives and training
ON_BOTH = ["inspect"]  # looks at what training and downstream write


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def part_of(module: str) -> str:
    """The part of `hmoe_ds` that a module belongs to; the configuration is one part of three files."""
    part = module.split(".")[1]
    return "config" if part.startswith("config_") else part


def test_the_data_pipeline_knows_no_torch_and_no_model():
    for path in files("data_pipeline"):
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert not roots & {"torch", "hmoe_ds", "deepspeed", "torch_geometric"}, path


def test_layers_import_downwards_only():
    for path in files("hmoe_ds"):
        part = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for name in imports_of(path):
            if not name.startswith("hmoe_ds."):
                continue
            imported = part_of(name)
            if part in ("commands", "cli"):
                continue
            if part in ON_BOTH:
                assert imported not in ("doctor", "commands", "cli"), f"{path} imports {name}"
            elif part in ON_MODEL:
                assert imported in {*BASE, "data", "moe", "model", *ON_MODEL}, f"{path} imports {name}"
            elif part in LAYERS:
                assert imported in LAYERS[: LAYERS.index(part) + 1], f"{path} imports {name}"


def test_deepspeed_and_mlflow_are_imported_where_they_belong():
    for path in files("hmoe_ds"):
        roots = {name.split(".")[0] for name in imports_of(path)}
        relative = path.relative_to(ROOT / "hmoe_ds").as_posix()
        if "deepspeed" in roots:
            alone = ("moe/deepspeed_ep.py", "doctor/training_probe.py")
            assert relative in alone or relative.startswith("training/"), path
        if "mlflow" in roots:
            assert relative in ("training/recording/mlflow_sender.py", "downstream/registry.py"), path


@pytest.mark.parametrize("module", ["hmoe_ds.data.mixture", "hmoe_ds.objectives.total", "hmoe_ds.training.feed"])
def test_reading_a_dataset_and_the_loss_need_no_rdkit_and_no_deepspeed(module):
    code = f"import sys; sys.modules['rdkit'] = sys.modules['deepspeed'] = None; import {module}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize("module", ["embed", "export", "finetune", "predict", "evaluate", "transformer", "registry"])
def test_downstream_needs_no_deepspeed(module):
    code = "import sys; sys.modules['deepspeed'] = sys.modules['mlflow'] = None; import hmoe_ds.cli"
    code += f"; import hmoe_ds.downstream.{module}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
