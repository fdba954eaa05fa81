"""check_law: our laws pass, a law that breaks one property raises an error about it, and a
third-party package can use check_law.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import tomli

from rankaware_optim import (
    Law,
    LawError,
)
from rankaware_optim.laws import LAWS
from rankaware_optim.testing import check_law

PLUGIN = Path(__file__).parents[1] / "example_plugin"


@pytest.mark.parametrize("name", LAWS)
def test_our_laws_are_sound(name):
    """Every registered law passes check_law, also at a width that the user chooses."""
    check_law(name)
    check_law(LAWS[name], fan_in=[768.0])


def sound(factor, reference):
    """Return a multiplier that falls with the square root of the rank, from which the broken laws
    are made.
    """
    return ((reference.rank or 1) / (factor.rank or 1)) ** 0.5


@dataclass(frozen=True)
class Sound(Law):
    """A law with the multiplier `sound`, and with a value that TOML may be unable to store."""

    value: object = 1.0
    name: ClassVar[str] = "tested"
    answer: ClassVar = staticmethod(sound)

    def multiplier(self, factor, reference):
        return self.answer(factor, reference)


def answering(answer) -> Law:
    """Return a law with another function as its multiplier."""
    return type("Another", (Sound,), {"answer": staticmethod(answer)})()


def gives(value, role="B") -> Law:
    """Return a law that answers `value` for factors of a role, and the sound multiplier for others."""
    return answering(
        lambda factor, at: value if factor.role == role else sound(factor, at)
    )


class Impostor(Sound):
    name = "mua"


class NoBind(Sound):
    def bind(self, optimizer_class, settings):
        return None


IMPOSSIBLE = (0, -1.0, float("inf"), float("nan"), None, "1", True)
BROKEN = [
    (Impostor(), "is registered as"),
    *(
        (gives(value), r"multiplier\(\) method .* returned .*role='B'")
        for value in IMPOSSIBLE
    ),
    (answering(lambda factor, at: at.rank / factor.rank), r"its multiplier\(\)"),
    (answering(lambda factor, at: 2 * sound(factor, at)), "do not compose"),
    (gives(0.5, role="A"), "do not compose"),
    (answering(lambda factor, at: min(1.0, sound(factor, at))), "do not compose"),
    (Sound((1.0, 2.0)), "to TOML and reading it back"),
    (Sound("none"), "to TOML and reading it back"),
    (NoBind(), "The law None raised"),
]


@pytest.mark.parametrize(("law", "message"), BROKEN)
def test_broken_laws_are_flagged(law, message, monkeypatch):
    """check_law raises an error about the property that a law breaks, and accepts the same law with
    nothing broken.
    """
    check_law(Sound())
    if law.name == "tested":
        monkeypatch.setitem(LAWS, "tested", law)
    with pytest.raises(LawError, match=message):
        check_law(law)


def test_a_measured_law_is_given_a_tolerance():
    """A law whose multipliers have only three digits fails by default, and passes with a tolerance
    of 1 %.
    """
    measured = answering(lambda factor, at: float(f"{sound(factor, at) ** 0.7:.3g}"))
    with pytest.raises(LawError, match="compose"):
        check_law(measured)
    check_law(measured, tolerance=1e-2)


# --- a third-party package ------------------------------------------------------------------------------------------


@pytest.fixture
def plugin(tmp_path):
    """Lay out the example package as pip would, without a network, and return its site folder and
    its project folder.
    """
    project = tomli.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    name, version = project["name"], project["version"]
    site, tests = tmp_path / "site", tmp_path / "project" / "tests"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PLUGIN / "src", site, ignore=ignore)
    shutil.copytree(PLUGIN / "tests", tests, ignore=ignore)
    shutil.copy(PLUGIN / "pyproject.toml", tests.parent)
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (info / "METADATA").write_text(metadata)
    lines = []
    for group, points in project["entry-points"].items():
        lines.append(f"[{group}]")
        lines += [f"{name} = {where}" for name, where in points.items()]
    (info / "entry_points.txt").write_text("\n".join([*lines, ""]))
    return site, tests.parent


def own_tests(site, project):
    """Run the example package's own tests with the package installed beside ours, and return the
    finished process.
    """
    paths = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    options = {"cwd": project, "env": {**os.environ, **own}}
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_the_example_package_passes_its_own_tests(plugin):
    """The installed example package passes its own tests: its law and its convention are found by
    name, are sound, and are used by an optimizer.
    """
    done = own_tests(*plugin)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
