"""Pages that are made when the site is built: the benchmarks, the gallery of the study's recipes, and the notebook of
examples/ with its outputs.

They are written to docs/benchmarks/ and docs/generated/, which Git ignores, and repeat the files of benchmarks/ and
recipes/. So the links of benchmarks/README.md work on the site too.

GitHub shows the same pages, where no directive works. So the pages carry the site's directives in comments, and this
module unpacks them while Sphinx reads a page.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

import rankaware_optim as ra

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
RESULTS, RECIPES, GENERATED = (
    ROOT / "benchmarks" / "results",
    ROOT / "recipes",
    DOCS / "generated",
)
PAGES = DOCS / "benchmarks" / "results"
NOTEBOOK = ROOT / "examples" / "move_and_calibrate.ipynb"

RESULT = """\
```{{include}} ../../../benchmarks/results/{name}.md
:relative-images:
```
"""
SCHEMA = """\
```{include} ../../recipes/SCHEMA.md
```
"""
CONTENTS = """

```{toctree}
:maxdepth: 1

answers
results/index
```
"""
# <!-- toctree ... -->, which GitHub does not show
HIDDEN = re.compile(r"<!-- toctree\n(.*?)\n-->", re.S)
# the API's names: a list on GitHub, written by shown.py, and on the site the directive that stands in its marker
NAMES = re.compile(r"<!-- shown: names of\n(.*?)\n-->\n.*?<!-- end -->", re.S)
# links of a page that lead out of docs/, on GitHub, and where the site has the same
OUT = re.compile(r"\]\(((?:\.\./)*)\.\./(benchmarks|examples|recipes)/([^)#\s]+)")
ON_SITE = {
    "benchmarks/README.md": "benchmarks/index.md",
    "examples/README.md": "examples/index.rst",
    "recipes/README.md": "generated/recipes.md",
    "recipes/SCHEMA.md": "generated/schema.md",
}
RECIPE = """\
({name})=

## {title}

```{{image}} recipes/{name}.png
:width: 100%
:alt: Trials, 90 % interval and learning rate of the recipe "{title}", one panel per rank
```

`recipes/{name}.toml`

```text
{words}
```
"""
TASKS = {  # tasks whose file name is not made of words
    "efficientnet-lite0-digits": "EfficientNet-Lite0 on digits",
    "language-smollm2": "Language, SmolLM2",
    "reinforcement": "Reinforcement learning",
    "vision-language": "Captions of pictures",
}


def write(path: Path, text: str) -> None:
    """Write a file, unless it has this text already: a second build then reads less."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def setting_of(recipe: ra.Recipe) -> str:
    """Return how alpha depended on the rank, and whether A started at zero, which is not PEFT's default."""
    alpha = {"fixed": "alpha = rank", "alpha": "alpha fixed"}[recipe.scaling_rule]
    return alpha + (", A starts at zero" if recipe.reference.init == "B" else "")


def task_of(stem: str) -> str:
    """Return a recipe's task in words."""
    short = re.sub(r"(-a|-b|-a-inverse-rank)$", "", stem)
    return TASKS.get(short, short.replace("-", " ").capitalize())


def index_of(recipes: dict[str, ra.Recipe]) -> Iterator[str]:
    """Yield a table of links, with one row per task and one column per setting."""
    cells = {(task_of(stem), setting_of(made)): stem for stem, made in recipes.items()}
    tasks, settings = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    yield f"| task | {' | '.join(settings)} |"
    yield "|---" * (len(settings) + 1) + "|"
    for task in tasks:
        stems = [cells.get((task, setting)) for setting in settings]
        row = " | ".join(ranks_of(recipes[s], s) if s else "" for s in stems)
        yield f"| {task} | {row} |"
    yield ""


def ranks_of(recipe: ra.Recipe, stem: str) -> str:
    """Return a link to a recipe that names the ranks tried."""
    tried = " and ".join(map(str, recipe.ranks)) + ", full" * recipe.full_seen
    return f"[ranks {tried}](#{stem})"


def gallery() -> Iterator[str]:
    """Yield the gallery: an index, then each recipe with its picture and its text."""
    yield "# Gallery of the study's recipes\n"
    yield "These recipes are records and examples, but [not starting points](../recipes.md#where-it-is-valid) for other models.\n"
    yield "When the site is built, every picture and every number on this page is read from the recipe's own files.\n"
    yield "[How to read an interval](../bands.md#in-a-picture) explains the parts of a picture.\n"
    paths = sorted(RECIPES.glob("*.toml"))
    recipes = {path.stem: ra.Recipe.load(path) for path in paths}
    yield from index_of(recipes)
    for stem, recipe in recipes.items():
        path = GENERATED / "recipes" / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        recipe.plot().savefig(path, dpi=130)
        title = f"{task_of(stem)}: {setting_of(recipe)}"
        yield RECIPE.format(name=stem, title=title, words=recipe.explain())


def executed(path: Path) -> str:
    """Run a notebook and return it with its outputs. An error in a cell ends the build."""
    notebook = nbformat.read(path, as_version=4)
    # Optuna's import says that its bar would be a widget if ipywidgets were here
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore:IProgress not found"}
    NotebookClient(notebook, coalesce_streams=True, timeout=600).execute(env=quiet)
    return nbformat.writes(notebook)


def title_of(page: Path) -> str:
    found = re.search(r"^# (.+)$", page.read_text(encoding="utf-8"), re.M)
    return found[1] if found else page.stem


def on_site(app: Any, name: str, source: list[str]) -> None:
    """Unpack a page's hidden directives, and lead its links out of docs/ to the site's own pages."""
    text = HIDDEN.sub(r"```{toctree}\n\1\n```", source[0])
    text = NAMES.sub(r"```{eval-rst}\n\1\n```", text)
    source[0] = OUT.sub(_link, text)


def _link(link: re.Match[str]) -> str:
    up, folder, name = link.groups()
    if name.endswith(".png"):
        return link[0]
    path = f"{folder}/{name}"
    if path in ON_SITE:
        path = ON_SITE[path]
    elif folder == "examples":
        path = path.replace(".py", ".rst")
    return f"]({up}{path}"


def _of_benchmarks(name: str) -> str:
    """Return a page of benchmarks/ with its links into docs/ as they are on the site."""
    text = (ROOT / "benchmarks" / f"{name}.md").read_text(encoding="utf-8")
    return text.replace("](../docs/", "](../")


def make(app: Any) -> None:
    pages = sorted(RESULTS.glob("*.md"), key=title_of)
    for page in pages:
        write(PAGES / page.name, RESULT.format(name=page.stem))
    names = "\n".join(page.stem for page in pages)
    contents = f"```{{toctree}}\n:maxdepth: 1\n\n{names}\n```\n"
    write(PAGES / "index.md", f"# All pages on file\n\n{contents}")
    write(DOCS / "benchmarks" / "index.md", _of_benchmarks("README") + CONTENTS)
    write(DOCS / "benchmarks" / "answers.md", _of_benchmarks("answers"))
    write(GENERATED / "recipes.md", "\n".join(gallery()))
    write(GENERATED / "schema.md", SCHEMA)
    if app.builder.format == "html":
        write(GENERATED / NOTEBOOK.name, executed(NOTEBOOK))


def setup(app: Any) -> dict[str, bool]:
    app.connect("builder-inited", make, priority=100)
    app.connect("source-read", on_site)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
