"""The packages that are installed, against what this one declares in pyproject.toml."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from hmoe_ds.doctor.finding import Finding, note, ok, problem

# Packages of the extra `train` that a run can do without, and how.
_DISPENSABLE = {"mlflow": "--run.mlflow false"}


def declared() -> metadata.PackageMetadata | None:
    """What hmoe-ds says about itself; None where it is used without having been installed."""
    try:
        return metadata.metadata("hmoe-ds")
    except metadata.PackageNotFoundError:
        return None


def installed() -> dict[str, str]:
    """Versions of all packages of this Python by their canonical names."""
    return {canonicalize_name(package.name): package.version for package in metadata.distributions()}


def check_declared(own: metadata.PackageMetadata | None, versions: Mapping[str, str]) -> Iterator[Finding]:
    """Python and all packages, against what hmoe-ds declares."""
    if own is None:
        yield note(
            "hmoe-ds", "not installed, so what it needs is not known", "", 'pip install -e ".[train]" in its folder'
        )
        return
    yield check_python(platform.python_version(), own["Requires-Python"])
    yield from check_packages(own.get_all("Requires-Dist", []), versions)


def check_python(version: str, allowed: str) -> Finding:
    """The interpreter, against a specifier such as ">=3.10"."""
    if SpecifierSet(allowed).contains(version, prereleases=True):
        return ok("python", version)
    return problem("python", version, allowed, "make the environment anew with another Python")


def check_packages(requirements: Sequence[str], versions: Mapping[str, str]) -> Iterator[Finding]:
    """Each package that is missing or of another version, and in one line the versions of the others.

    Args:
        requirements: as in the metadata of a package, with markers of extras; those of `train` count, of others not.
        versions: of what is installed, by canonical name.
    """
    parsed = [Requirement(line) for line in requirements]
    base = [needed for needed in parsed if _holds(needed, "")]
    train = [needed for needed in parsed if _holds(needed, "train") and needed not in base]
    bounded = [
        f"{needed.name} {versions[name]}"
        for needed in (*base, *train)
        if needed.specifier and (name := canonicalize_name(needed.name)) in versions and _fits(needed, versions)
    ]
    yield ok("packages", ", ".join(bounded))
    yield from (_unfit(needed, versions) for needed in base if not _fits(needed, versions))
    yield from (_unfit_for_training(needed, versions) for needed in train if not _fits(needed, versions))


def _holds(needed: Requirement, extra: str) -> bool:
    return needed.marker is None or needed.marker.evaluate({"extra": extra})


def _fits(needed: Requirement, versions: Mapping[str, str]) -> bool:
    version = versions.get(canonicalize_name(needed.name))
    return version is not None and needed.specifier.contains(version, prereleases=True)


def _unfit(needed: Requirement, versions: Mapping[str, str]) -> Finding:
    found = versions.get(canonicalize_name(needed.name), "not installed")
    return problem(needed.name, found, _expected(needed), _install(needed))


def _unfit_for_training(needed: Requirement, versions: Mapping[str, str]) -> Finding:
    if needed.name in versions:
        return _unfit(needed, versions)
    if needed.name in _DISPENSABLE:
        return note(
            needed.name, "not installed", _expected(needed), f"{_install(needed)}, or {_DISPENSABLE[needed.name]}"
        )
    found = "not installed: embedding and fine-tuning an exported model work, pretraining does not"
    return problem(needed.name, found, _expected(needed), _install(needed))


def _expected(needed: Requirement) -> str:
    return str(needed.specifier) or "any version"


def _install(needed: Requirement) -> str:
    # DeepSpeed is built on the machine, and looks for the torch that is there.
    isolation = " --no-build-isolation" if needed.name == "deepspeed" else ""
    return f'pip install{isolation} "{needed.name}{needed.specifier}"'
