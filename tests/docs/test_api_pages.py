"""The API pages name every module."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("data", "moe", "model", "objectives", "training", "downstream", "report", "inspect", "doctor")
PACKAGES = ("data_pipeline", *(f"hmoe_ds.{part}" for part in PARTS))


@pytest.mark.parametrize("package", PACKAGES)
def test_each_module_is_on_the_page_of_its_package(package):
    page = (ROOT / "docs" / "api" / f"{package.removeprefix('hmoe_ds.')}.md").read_text()
    named = re.findall(r"^\.\. automodule:: (\S+)$", page, flags=re.MULTILINE)
    files = (ROOT / package.replace(".", "/")).rglob("*.py")
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files}
    assert named == sorted(modules - {package})
