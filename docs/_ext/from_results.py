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
:alt: Trials, 90 % band and rate of the recipe "{title}", rank by rank
```

`recipes/{name}.toml`

```text
{words}
```
"""
TASKS = {  # where the name of the file is not words
    "efficientnet-lite0-digits": "EfficientNet-Lite0 on digits",
    "language-smollm2": "Language, SmolLM2",
    "reinforcement": "Reinforcement learning",
    "vision-language": "Captions of pictures",
}


def write(path: Path, text: str) -> None:
    """A file of this text, left alone where it has it already, so that a second build reads less."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def setting_of(recipe: ra.Recipe) -> str:
    """How alpha followed the rank, and which factor started at zero where it is not PEFT's."""
    alpha = {"fixed": "alpha = rank", "alpha": "alpha kept"}[recipe.scaling_rule]
    return alpha + (", A starts at zero" if recipe.reference.init == "B" else "")


def task_of(stem: str) -> str:
    """A recipe's task in words."""
    short = re.sub(r"(-a|-b|-a-inverse-rank)$", "", stem)
    return TASKS.get(short, short.replace("-", " ").capitalize())


def index_of(recipes: dict[str, ra.Recipe]) -> Iterator[str]:
    """A table with a row a task and a column a setting, each cell a link."""
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
    """A link to a recipe, in the words of what was tried."""
    tried = " and ".join(map(str, recipe.ranks)) + ", full" * recipe.full_seen
    return f"[ranks {tried}](#{stem})"


def gallery() -> Iterator[str]:
    """The study's recipes: an index, and each with its picture and what it says of itself."""
    yield "# Gallery of the study's recipes\n"
    yield "They are records and examples, [no starting points](../recipes.md#where-it-is-valid).\n"
    yield "Every picture and every number here is read from the recipe's own files when the site is built.\n"
    yield "[How to read a band](../bands.md) says what the parts of a picture mean.\n"
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
    """A notebook with its outputs, as it runs here; an error in a cell ends the build."""
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
    """A page of benchmarks/, its links into docs/ as they are on the site."""
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
