"""The site's pages: their Python runs, and the API page names what is public. `tox run -e docs` builds the site."""

from __future__ import annotations

import pkgutil
import re
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
import tomli
from packaging.requirements import Requirement

import rankaware_optim
from rankaware_optim.inspection import conventions

from .test_examples import batches, build

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = ("index", "quickstart", "which-rate", "notebooks", "loops", "inspect", "calibrate", "short-long", "recipes",
         "full-finetuning", "law", "extend/convention")  # fmt: skip


def blocks_of(page: str) -> list[str]:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


@pytest.fixture
def own_conventions() -> Iterator[None]:
    """What is registered during a test is taken out again: other tests have layers of the same names."""
    before = conventions()
    yield
    for row in set(conventions()) - set(before):
        rankaware_optim.register_convention(row, remove=True)


@pytest.mark.usefixtures("own_conventions")
def test_the_pages_examples_run(tmp_path: Path, monkeypatch) -> None:
    """The Python blocks of all pages run in order, as one program, each page with a model of its own."""
    monkeypatch.chdir(tmp_path)
    names = {"build": build, "batches": batches}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for page in PAGES:
            names["model"] = build(32)
            for block in blocks_of(page):
                exec(compile(block, f"{page}.md", "exec"), names)
    assert {w.category for w in caught} <= {rankaware_optim.RankAwareWarning}


def test_no_page_with_python_is_left_out() -> None:
    """Every page of docs/ that has a Python block is among those that are run."""
    ours = {
        path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")
    }
    made = {
        page for page in ours if page.startswith(("_build/", "generated/", "examples/"))
    }
    assert {page for page in ours - made if blocks_of(page)} == set(PAGES)


def test_the_api_page_names_what_is_public() -> None:
    """Every name that `rankaware_optim` exports, other than its packages, is on the API page, which has no other."""
    stub = (Path(rankaware_optim.__file__).parent / "__init__.pyi").read_text(
        encoding="utf-8"
    )
    public = set(re.findall(r"^from \.[\w.]+ import (\w+) as \1$", stub, re.M))
    listed = set(
        re.findall(
            r"^   ([A-Za-z_.]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.M
        )
    )
    assert public
    assert public - listed == set()
    for name in listed:
        assert pkgutil.resolve_name(f"rankaware_optim.{name}")


def packages_in(heading: str) -> dict[str, list[str]]:
    """The packages in the last column of the quickstart's table under a heading, by its first column."""
    text = (DOCS / "quickstart.md").read_text(encoding="utf-8")
    section = text.partition(f"### {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+) \|$", section.partition("\n### ")[0], re.M)[1:]
    cells = [row.split(" | ") for row in rows]
    return {first.strip("`"): last.split(", ") for first, *_, last in cells}


def names_of(requirements: list[str]) -> list[str]:
    return [Requirement(text).name for text in requirements]


def test_the_tables_of_packages_are_those_of_pyproject() -> None:
    """The quickstart names every extra with its packages, and says of every required one when it is imported."""
    project = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    extras = project["optional-dependencies"].items()
    assert packages_in("Extras") == {extra: names_of(needs) for extra, needs in extras}
    imported = chain(["lazy-loader"], *packages_in("What is imported when").values())
    assert sorted(imported) == sorted(names_of(project["dependencies"]))


def test_nothing_installs_the_package_from_pypi() -> None:
    """No text says `pip install rankaware-optim` while no release holds the name."""
    folders = ("docs", "examples", "rankaware_optim", "recipes", ".github")
    names = ("README.md", "SKILL.md", "CONTRIBUTING.md", "SECURITY.md")
    texts = [ROOT / name for name in names]
    for folder in folders:
        texts += [
            p
            for p in (ROOT / folder).rglob("*")
            if p.suffix in (".md", ".py", ".ipynb", ".sh", ".yaml", ".yml")
        ]
    from_pypi = re.compile(r"(pip|uv|uvx|pipx)\b[^\n`]*\brankaware[-_]optim", re.I)
    assert len(texts) > 100
    assert [p for p in texts if from_pypi.search(p.read_text(encoding="utf-8"))] == []
