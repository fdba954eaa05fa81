"""check_law: our laws pass, laws that break one property are refused by its name, a third-party package uses it."""

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
    """Every registered law keeps every property, at a width of one's own too."""
    check_law(name)
    check_law(LAWS[name], fan_in=[768.0])


def sound(factor, reference):
    """The rate falls with the root of the rank: what the broken laws are made from."""
    return ((reference.rank or 1) / (factor.rank or 1)) ** 0.5


@dataclass(frozen=True)
class Sound(Law):
    """A law of this answer, which may hold a value that TOML cannot give back as it was."""

    value: object = 1.0
    name: ClassVar[str] = "tested"
    answer: ClassVar = staticmethod(sound)

    def multiplier(self, factor, reference):
        return self.answer(factor, reference)


def answering(answer) -> Law:
    """A law of another answer."""
    return type("Another", (Sound,), {"answer": staticmethod(answer)})()


def gives(value, role="B") -> Law:
    """A law that gives a value for factors of a role, and the sound answer for others."""
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
    """A law that breaks one property is refused for it, and the same law with nothing broken passes."""
    check_law(Sound())
    if law.name == "tested":
        monkeypatch.setitem(LAWS, "tested", law)
    with pytest.raises(LawError, match=message):
        check_law(law)


def test_a_measured_law_is_given_a_tolerance():
    """What a bisection gives to three digits fails by default and passes with a tolerance of a per cent."""
    measured = answering(lambda factor, at: float(f"{sound(factor, at) ** 0.7:.3g}"))
    with pytest.raises(LawError, match="compose"):
        check_law(measured)
    check_law(measured, tolerance=1e-2)


# --- a third-party package ------------------------------------------------------------------------------------------


@pytest.fixture
def plugin(tmp_path):
    """The example package as pip would lay it out: its modules and a dist-info with its entry points, built offline."""
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
    """The package's own tests, with it installed beside us."""
    paths = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    options = {"cwd": project, "env": {**os.environ, **own}}
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_the_example_package_passes_its_own_tests(plugin):
    """Installed beside us, its law and its convention are found by name, sound, and used by an optimizer."""
    done = own_tests(*plugin)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
