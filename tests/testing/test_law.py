"""check_law: our laws pass, laws that break one property are refused by its name, a third-party package uses it."""

from __future__ import annotations

import doctest
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
    Factor,
    Falling,
    Law,
    LawError,
    LoRAPlus,
    MuA,
    Power,
    Reference,
)
from rankaware_optim.laws import LAWS
from rankaware_optim.testing import LawConformance, check_law

PLUGIN = Path(__file__).parents[1] / "example_plugin"


@pytest.mark.parametrize("name", LAWS)
def test_our_laws_are_sound(name):
    """Every registered law keeps every property."""
    assert check_law(name) == LawConformance(LAWS[name], registered=True)


OURS = [
    MuA(tokens=1.0, ratio=16.0),
    MuA(family="spectral"),
    MuA(family="gradient-like"),
    MuA(family="relative-scale"),
    LoRAPlus(ratio=4.0),
    Power(
        exponent=-0.45, full_factor=0.5, pivot=8.0, to_full=True, law=MuA(tokens=4.0)
    ),
    Falling(knee=64.0, law=MuA(family="spectral")),
]


@pytest.mark.parametrize("law", OURS, ids=repr)
def test_our_laws_are_sound_at_other_parameters(law):
    """So do instances with other parameters, at a width of one's own."""
    assert check_law(law, fan_in=[768.0]).law is law


# --- laws that break one property -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sound(Law):
    """The rate falls with the root of the rank: the law that the broken ones are made from."""

    name: ClassVar[str] = "tested"

    def multiplier(self, factor, reference):
        return ((reference.rank or 1) / (factor.rank or 1)) ** 0.5


@dataclass(frozen=True)
class Impostor(Sound):
    name: ClassVar[str] = "mua"


@dataclass(frozen=True)
class Gives(Sound):
    """Gives `value` for factors of `role`, and the sound answer for others."""

    role: str = "B"
    value: object = 1.0

    def multiplier(self, factor, reference):
        return (
            self.value
            if factor.role == self.role
            else super().multiplier(factor, reference)
        )


@dataclass(frozen=True)
class NoWhole(Sound):
    def multiplier(self, factor, reference):
        return (reference.rank / factor.rank) ** 0.5


@dataclass(frozen=True)
class Twice(Sound):
    def multiplier(self, factor, reference):
        return 2 * super().multiplier(factor, reference)


@dataclass(frozen=True)
class OneWay(Sound):
    def multiplier(self, factor, reference):
        return min(1.0, super().multiplier(factor, reference))


@dataclass(frozen=True)
class Holds(Sound):
    """Holds a value that TOML cannot give back as it was."""

    value: object = (1.0, 2.0)


@dataclass(frozen=True)
class HoldsNothing(Sound):
    value: object = "none"


@dataclass(frozen=True)
class HoldsObject(Sound):
    value: object = sys


@dataclass(frozen=True)
class NoBind(Sound):
    def bind(self, optimizer_class, settings):
        return None


LORA = r"B at rank \d+, alpha \d+, [AB] = 0, tuned at .*fan-in \d+"
WHOLE = r"tuned at full finetuning, fan-in \d+"
BROKEN = [
    (Impostor(), "toml", "not the one registered as 'mua'"),
    *(
        (Gives(value=value), "positive", f"{LORA}.*returned")
        for value in (0, -1.0, float("inf"), float("nan"), None, "1", True)
    ),
    (NoWhole(), "positive", f"{WHOLE}.*failed in multiplier.*TypeError"),
    (Twice(), "composes", "it returns 2, but 4 by way of"),
    (Gives(role="A", value=0.5), "composes", "it returns 1, but 0.5 by way of rank"),
    (
        OneWay(),
        "composes",
        r"from full.*fan-in 1 to full.*it returns 1, but 0.5 by way of rank",
    ),
    (Holds(), "toml", r"read back as Holds\(value=\[1.0, 2.0\]\)"),
    (HoldsNothing(), "toml", r"read back as HoldsNothing\(value=None\)"),
    (HoldsObject(), "toml", "it raises TypeError"),
]


@pytest.fixture
def registered(monkeypatch):
    """Lets a law be found by its name for one test."""
    return lambda law: monkeypatch.setitem(LAWS, law.name, law)


@pytest.mark.parametrize(
    ("law", "check", "message"),
    BROKEN,
    ids=[f"{c}-{type(w).__name__}" for w, c, _ in BROKEN],
)
def test_broken_laws_are_flagged(law, check, message, registered):
    """A law that breaks one property is refused by that property's name, with the factor and the reference."""
    if law.name == "tested":
        registered(law)
    with pytest.raises(LawError, match=f"The check '{check}' fails for.*({message})"):
        check_law(law)


def test_a_law_bound_to_nothing_is_flagged():
    """What `bind` returns must be a law."""
    with pytest.raises(LawError, match=r"returned None from bind\(\)"):
        check_law(NoBind())


def test_the_law_they_are_made_from_is_sound(registered):
    """The same law with nothing broken passes, so that each of the above fails for its own reason."""
    assert check_law(Sound()) == LawConformance(Sound(), registered=False)
    registered(Sound())
    assert check_law("tested") == LawConformance(Sound(), registered=True)


def test_the_law_of_the_documentation_is_sound():
    """The example in `Law`'s docstring, which people copy, is a law."""
    namespace: dict[str, object] = {
        "Law": Law,
        "Factor": Factor,
        "Reference": Reference,
    }
    (example,) = doctest.DocTestFinder(recurse=False).find(Law, globs=namespace)
    doctest.DocTestRunner().run(example, clear_globs=False)
    assert check_law(example.globs["InverseRank"]()).registered is False


@dataclass(frozen=True)
class Measured(Sound):
    """As a bisection would give it, to three digits."""

    def multiplier(self, factor, reference):
        return float(f"{super().multiplier(factor, reference) ** 0.7:.3g}")


def test_a_measured_law_is_given_a_tolerance():
    """What holds to three digits fails by default and passes with a tolerance of a per cent."""
    with pytest.raises(LawError, match="composes"):
        check_law(Measured())
    assert check_law(Measured(), tolerance=1e-2).law == Measured()


# --- a third-party package ------------------------------------------------------------------------------------------


@pytest.fixture
def plugin(tmp_path):
    """The example package as pip would lay it out: its modules and a dist-info with its entry points, built offline."""
    project = tomli.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    target = tmp_path / "site"
    shutil.copytree(
        PLUGIN / "src", target, ignore=shutil.ignore_patterns("__pycache__")
    )
    info = (
        target / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    )
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    sections = [
        "\n".join(
            [f"[{group}]", *(f"{name} = {where}" for name, where in points.items())]
        )
        for group, points in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n\n".join(sections) + "\n")
    shutil.copytree(
        PLUGIN / "tests",
        tmp_path / "project" / "tests",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    shutil.copy(PLUGIN / "pyproject.toml", tmp_path / "project")
    return target, tmp_path / "project"


def run(site, *arguments, cwd):
    paths = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_the_example_package_passes_its_own_tests(plugin):
    """Installed beside us, its law and its convention are found by name, sound, and used by an optimizer."""
    site, project = plugin
    done = run(site, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


BREAKS = [
    ("there / (", "2 * there / (", "The check 'composes' fails"),
    ('scaling=("gain",)', 'scaling=("width",)', "The check 'ones-probe' fails"),
]


def test_its_tests_can_fail(plugin):
    """With a wrong law and a wrong convention in it, the package's own tests fail by the names of the checks."""
    site, project = plugin
    module = site / "rankaware_example" / "__init__.py"
    text = module.read_text()
    for sound, broken, _ in BREAKS:
        assert sound in text
        text = text.replace(sound, broken)
    module.write_text(text)
    done = run(site, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=project)
    assert done.returncode == 1
    assert all(message in done.stdout for _, _, message in BREAKS)
