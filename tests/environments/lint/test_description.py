"""Tests of the files that describe the package: they follow their schemas and agree with pyproject.toml."""

from __future__ import annotations

import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import tomli
from packaging.requirements import Requirement
from packaging.version import Version
from rattler_build import Stage0Recipe

ROOT = Path(__file__).parents[3]
PYPROJECT = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
CODE = (ROOT / "rankaware_optim" / "__init__.py").read_text(encoding="utf-8")
[VERSION] = re.findall(r'^__version__ = "(.*)"$', CODE, re.M)
FOLLOWED = {
    "citation-file-format": "CITATION.cff",
    "github-issue-forms": ".github/ISSUE_TEMPLATE/*.yml",
    "github-workflows": ".github/workflows/*.yaml",
}
CONDA_NAMES = {"torch": "pytorch"}  # where they differ from those on PyPI


@pytest.mark.parametrize("schema", FOLLOWED)
def test_files_follow_their_schema(schema: str) -> None:
    """The citation file, the issue forms and the workflows are valid under the schemas of check-jsonschema."""
    files = sorted(map(str, ROOT.glob(FOLLOWED[schema])))
    command = [sys.executable, "-m", "check_jsonschema", *files]
    command += ["--builtin-schema", f"vendor.{schema}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert files
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def conda() -> dict[str, Any]:
    """Return the conda recipe as rendered by rattler-build, which rejects unknown keys, licences
    and versions.
    """
    [variant] = Stage0Recipe.from_file(ROOT / "conda" / "recipe.yaml").render()
    return variant.recipe.to_dict()


def in_conda(text: str) -> str:
    """Return a pip requirement in conda's notation."""
    requirement = Requirement(text)
    name = CONDA_NAMES.get(requirement.name, requirement.name)
    return f"{name} {requirement.specifier}".strip()


def test_conda_installs_what_pip_installs(conda: dict[str, Any]) -> None:
    """The conda recipe has the same dependencies, Python version and build backend as pyproject.toml."""
    python = PROJECT["requires-python"]
    needs = map(in_conda, PROJECT["dependencies"])
    backend = map(in_conda, PYPROJECT["build-system"]["requires"])
    oldest = f"python {python.removeprefix('>=')}.*"
    assert conda["requirements"]["run"] == [f"python {python}", *needs]
    assert conda["requirements"]["host"] == [oldest, "pip", *backend]


def test_the_lowest_environment_has_every_minimum() -> None:
    """`tox run -e lowest` installs every dependency in the lowest version that pyproject.toml allows."""
    config = ConfigParser(interpolation=None)
    config.read(ROOT / "tox.ini", encoding="utf-8")
    lines = config["testenv:lowest"]["deps"].splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    minimums = {}
    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        (minimum,) = requirement.specifier
        minimums[requirement.name] = Version(minimum.version)
    assert {name: Version(version) for name, version in pinned.items()} == minimums


def test_conda_says_what_pyproject_says(conda: dict[str, Any]) -> None:
    """The conda recipe has the same name, version, summary, licence and commands as pyproject.toml."""
    commands = [f"{name} = {place}" for name, place in PROJECT["scripts"].items()]
    assert conda["package"] == {"name": PROJECT["name"], "version": VERSION}
    assert conda["build"]["python"]["entry_points"] == commands
    assert conda["about"] == {
        "summary": PROJECT["description"],
        "license": PROJECT["license"],
        "license_file": PROJECT["license-files"],
    }


def test_the_citation_says_what_pyproject_says() -> None:
    """CITATION.cff has the same name, version, description, licence, authors and keywords as pyproject.toml."""
    lines = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    described = {
        f"title: {PROJECT['name']}",
        f"version: {VERSION}",
        f"abstract: {PROJECT['description']}",
        f"license: {PROJECT['license']}",
        *(f"  - name: {author['name']}" for author in PROJECT["authors"]),
        *(f"  - {keyword}" for keyword in PROJECT["keywords"]),
    }
    assert described <= set(lines)
