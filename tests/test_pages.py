"""Tests of the site's pages: their Python code runs, their links work, and the API page lists every public name.

`tox run -e docs` builds the site.
"""

from __future__ import annotations

import doctest
import pkgutil
import re
import runpy
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tomli
import torch
from packaging.requirements import Requirement

import rankaware_optim
from rankaware_optim.inspection import conventions

from .test_examples import batches, build

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = ("index", "quickstart", "which-rate", "notebooks", "loops", "inspect", "calibrate", "short-long", "recipes",
         "full-finetuning", "extend/convention", "extend/law")  # fmt: skip


SHOWN = runpy.run_path(str(DOCS / "shown.py"))
pages, BLOCK = SHOWN["pages"], SHOWN["BLOCK"]
OTHERS = ("README.md", "SKILL.md", "CONTRIBUTING.md", "recipes/README.md", "benchmarks/README.md", "benchmarks/answers.md")  # fmt: skip
ON_GITHUB = [*pages(), *(ROOT / name for name in OTHERS)]


def by_hand(path: Path) -> str:
    """Return the text of a page without the blocks that `docs/shown.py` generates."""
    return BLOCK.sub("", path.read_text(encoding="utf-8"))


def blocks_of(page: str) -> list[str]:
    return re.findall(
        r"^```python\n(.*?)^```", by_hand(DOCS / f"{page}.md"), re.M | re.S
    )


def prompts_of(path: Path) -> str:
    """Return the Python prompts on a page, with their output."""
    return "\n".join(re.findall(r"^```pycon\n(.*?)^```", by_hand(path), re.M | re.S))


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.stem)
def test_what_a_page_shows_is_what_is_there(path: Path) -> None:
    """The generated code, outputs and tables on a page are up to date with `python docs/shown.py`."""
    text = path.read_text(encoding="utf-8")
    assert text == SHOWN["written"](text)


def test_what_is_typed_at_a_prompt_prints_what_a_page_says() -> None:
    """The Python prompts on every page print the output shown. Prompts that need PEFT are run in `integrations`."""
    without_peft = [path for path in pages() if "peft" not in prompts_of(path)]
    assert sum(prompts_run(path).attempted for path in without_peft) > 20


def prompts_run(path: Path) -> doctest.TestResults:
    """Run the prompts on a page, check that they print the output shown, and return the counts."""
    test = doctest.DocTestParser().get_doctest(
        prompts_of(path), {}, path.name, str(path), 0
    )
    ran = doctest.DocTestRunner().run(test)
    assert ran.failed == 0, path
    return ran


@pytest.mark.parametrize("path", ON_GITHUB, ids=lambda path: path.stem)
def test_a_page_is_whole_on_github(path: Path) -> None:
    """On GitHub, a page shows no Sphinx markup, and each of its links leads to an existing file and heading."""
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"^`{3,}\{[\w-]+\}", text, re.M) == []
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    assert re.findall(r"\{[a-z:]+\}`|^\(\S+\)=$", prose, re.M) == []
    for target, _, heading in (link.partition("#") for link in links_of(prose)):
        linked = (path.parent / target).resolve() if target else path
        assert linked.exists(), target
        assert not heading or heading in headings_of(linked), (target, heading)


def links_of(prose: str) -> list[str]:
    links = re.findall(r"\]\(([^)\s]+)\)", prose)
    return [link for link in links if not link.startswith(("http", "mailto:"))]


@cache
def headings_of(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site form them."""
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    words = (re.sub(r"[^\w\- ]", "", title.strip().lower()) for title in titles)
    return {each.replace(" ", "-") for each in words}


@pytest.fixture
def own_conventions() -> Iterator[None]:
    """Remove the conventions that a test registered, because other tests have layers with the same names."""
    before = conventions()
    yield
    for row in set(conventions()) - set(before):
        rankaware_optim.register_convention(row, remove=True)


@pytest.mark.usefixtures("own_conventions")
def test_the_pages_examples_run(tmp_path: Path, monkeypatch) -> None:
    """The Python blocks of all pages run in order as a single program, in which each page has its own model."""
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
    """The code of every page in docs/ that has a Python block is run by these tests."""
    ours = [path.relative_to(DOCS).with_suffix("").as_posix() for path in pages()]
    assert {page for page in ours if blocks_of(page)} == set(PAGES)


def test_the_api_page_names_what_is_public() -> None:
    """The API page lists every public function and class of `rankaware_optim`, and no name that does not exist."""
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
    """Return the packages in the last column of a table in the quickstart, by the text of its first column."""
    text = (DOCS / "quickstart.md").read_text(encoding="utf-8")
    section = text.partition(f"### {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+) \|$", section.partition("\n### ")[0], re.M)[1:]
    cells = [row.split(" | ") for row in rows]
    return {first.strip("`"): last.split(", ") for first, *_, last in cells}


def names_of(requirements: list[str]) -> list[str]:
    return [Requirement(text).name for text in requirements]


def test_the_tables_of_packages_are_those_of_pyproject() -> None:
    """The quickstart's table lists every extra of pyproject.toml with its packages."""
    project = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    extras = project["optional-dependencies"].items()
    assert packages_in("Extras") == {extra: names_of(needs) for extra, needs in extras}


def test_nothing_installs_the_package_from_pypi() -> None:
    """No page or example says `pip install rankaware-optim`, because no release on PyPI has this name."""
    folders = ("docs", "examples", "rankaware_optim", "recipes", ".github")
    names = ("README.md", "SKILL.md", "CONTRIBUTING.md")
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


# words that the quickstart's list of words replaces, and the only page that may use them
REPLACED = {
    r"Init\[[AB]\]": "law.md",
    **dict.fromkeys(("cliff", "drift", "caution", "octave", "horizon"), ""),
}


def test_a_user_meets_twelve_words_at_most() -> None:
    """The quickstart explains at most twelve words, and no page uses a word that one of them replaced."""
    text = (DOCS / "quickstart.md").read_text(encoding="utf-8")
    table = text.partition("## The words\n")[2].partition("\n## ")[0]
    firsts = re.findall(r"^\| ([a-z, ]+) \|", table, re.M)[1:]
    words = [word for first in firsts for word in first.split(", ")]
    assert len(words) == len({*words}) <= 12
    texts = [ROOT / name for name in ("README.md", "SKILL.md", "recipes/README.md")]
    for page in [*pages(), *texts]:
        text = by_hand(page)
        for word, allowed in REPLACED.items():
            assert page.name == allowed or not re.search(word, text), (page, word)


def test_readme_is_short() -> None:
    """README has at most 1,000 words."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1_000


LLAMA_8B = {  # the fan-in and fan-out of the linear layers in a block
    "q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096),
    "gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096),
}  # fmt: skip


@pytest.mark.parametrize("page", ["faq", "without-regret"])
def test_a_page_and_the_wrapper_say_one_number_for_one_model(page: str) -> None:
    """For full finetuning of an 8B Llama, a page shows the same ratio and the same widths as the wrapper gives."""
    with torch.device("meta"):
        layers = {name: torch.nn.Linear(*fans) for name, fans in LLAMA_8B.items()}
    model = torch.nn.ModuleDict(layers)
    tuned: Any = {"lr": 1.0, "tuned_at": "r=16,alpha=32", "method": "full"}
    opt = rankaware_optim.RankAwareOptimizer(model, torch.optim.AdamW, **tuned)
    factor = 1 / opt.rates.groups[0].multiplier
    survey = rankaware_optim.inspect_model(model, method="full")
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    for printed in (factor, survey.width, survey.full_width()):
        digits = f"{printed:.1f}" if printed < 100 else f"{printed:.0f}"
        assert re.search(rf"\b{digits}\b", text), (page, printed)
