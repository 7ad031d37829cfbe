"""The API pages name every module."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("data", "moe", "model", "objectives", "training", "downstream", "report", "inspect", "doctor")


@pytest.mark.parametrize("package", PACKAGES)
def test_each_module_is_on_the_page_of_its_package(package):
    page = (ROOT / "docs" / "api" / f"{package}.md").read_text()
    named = re.findall(r"^\.\. automodule:: (\S+)$", page, flags=re.MULTILINE)
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "hmoe_ds" / package).rglob("*.py")]
    modules = {".".join(path.parts).removesuffix(".__init__") for path in files}
    assert named == sorted(modules - {f"hmoe_ds.{package}"})
