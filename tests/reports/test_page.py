"""The page of a recipe: self-contained, escaped, and its table of rates is `Recipe.at`'s. The browser tests read it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from shutil import which

import numpy as np
import pytest
from click.testing import CliRunner

from rankaware_optim import (
    RankAwareError,
    RankAwareOptimizer,
    RankAwareWarning,
    Recipe,
)
from rankaware_optim.cli._main import main
from rankaware_optim.recipe._uncertainty import margin, spread
from rankaware_optim.reports import write_report
from rankaware_optim.reports._page import rate_table, report_html

from ..helpers.models import mlp
from ..helpers.recipes import KINDS, RECIPE

HOSTILE = """</script><script>alert("x")</script><img src=x onerror=alert(1)>' & {{ 7 * 7 }} \u2028"""
RECIPES = Path(__file__).parents[2] / "recipes"
VOID = {"meta", "link", "input", "img"}


class Page(HTMLParser):
    """Tags with their attributes in order, and what was left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.mark.parametrize("kind", KINDS)
def test_every_recipe_has_a_page(kind):
    """Whatever was calibrated, there is a well-formed page with a heading and a control, the same each time."""
    text = report_html(KINDS[kind])
    page = Page(text)
    assert page.open == []
    assert [tag for tag, _ in page.tags].count("h1") == 1
    values = [
        value for _, attributes in page.tags for value in attributes.values() if value
    ]
    assert not any(re.search(r"nan|None", value) for value in values)
    assert report_html(KINDS[kind]) == text


def test_a_recipe_without_trials_has_a_page_without_drawings():
    """The rates are there without the picture of trials."""
    text = report_html(replace(RECIPE, tensors={}))
    assert "Score against rate" not in text
    assert "Rates by rank" in text


def test_nothing_is_loaded_from_anywhere():
    """No tag of the page names an address, and its policy forbids the browser to ask for one."""
    page = Page(report_html(RECIPE))
    addresses = [
        v
        for _, a in page.tags
        for k, v in a.items()
        if k in ("src", "href", "action", "data", "srcset")
    ]
    assert addresses == ["data:,"]
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none';")
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp", report_html(RECIPE))


def test_whatever_a_recipe_says_is_escaped():
    """Names, settings, versions and notes cannot open a tag, close the script, or run as a template."""
    clean = report_html(
        replace(RECIPE, versions={"a": "b"}, settings={"a": "b"}, notes=("b",))
    )
    made = replace(
        RECIPE,
        name=HOSTILE,
        versions={HOSTILE: HOSTILE},
        settings={HOSTILE: HOSTILE},
        notes=(HOSTILE,),
    )
    text = report_html(
        replace(made, optimizer=f"{HOSTILE}.{HOSTILE}", scaling_rule="fixed")
    )
    tags = [tag for tag, _ in Page(text).tags]
    assert tags == [tag for tag, _ in Page(clean).tags]
    assert "<img" not in text
    assert "49" not in re.search(r"<h1>(.*?)</h1>", text, re.S)[1].replace(
        "&#39;", ""
    ).replace("&#34;", "")


def test_the_page_can_be_read_aloud():
    """Every input has a label, every drawing a sentence, every table a caption, and the page a language."""
    text = report_html(RECIPE)
    page = Page(text)
    named = {label["for"] for label in page.all("label") if "for" in label}
    fields = [
        field
        for field in page.all("input")
        if "id" in field and field["type"] == "number"
    ]
    assert {field["id"] for field in fields} <= named
    assert all(
        drawing["aria-label"]
        for drawing in page.all("svg")
        if drawing.get("role") == "img"
    )
    assert text.count("<table>") == text.count("<caption>")
    assert page.all("html") == [{"lang": "en"}]
    assert "rank 4: 3 trials, 1 diverged; the lowest score is 0.4 at rate 0.002" in text


def at(recipe: Recipe, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankAwareWarning)
        return recipe.at(*args, **kwargs)


def test_the_table_holds_what_the_recipe_says():
    """At every tenth node rate, band, ceiling and flag are those of `Recipe.at`, to four digits."""
    table = rate_table(RECIPE)
    for i in range(0, len(table["ranks"]), 10):
        rank, own = table["ranks"][i], at(RECIPE, table["ranks"][i])
        assert 2 ** table["own"][i] == pytest.approx(own.lr, rel=1e-4)
        for edge in ("low", "high", "ceiling"):
            assert 2 ** (table["own"][i] + table[edge][i]) == pytest.approx(
                getattr(own, edge), rel=1e-4
            )
        assert table["outside"][i] == own.extrapolated
        notes = table["sentences"][table["notes"][i]]
        assert [note.replace("{rank}", str(rank)) for note in notes] == list(own.notes)
        for j in range(0, len(table["scalings"]), 10):
            there = at(RECIPE, rank, alpha=rank * 2.0 ** table["scalings"][j])
            assert 2 ** table["lr"][i][j] == pytest.approx(there.lr, rel=1e-4)
    assert table["ranks"][:64] == list(range(1, 65))
    assert {*RECIPE.ranks, RECIPE.reference.rank} <= {*table["ranks"]}


def test_alpha_is_refused_where_it_cannot_be_told():
    """Where no alpha can be given the table holds the recipe's own rates alone, and says why."""
    recipe = replace(RECIPE, scaling_rule="as swept")
    table = rate_table(recipe)
    assert "has no alpha" in table["refused"]
    assert table["lr"] == []
    assert 2 ** table["own"][table["ranks"].index(64)] == pytest.approx(
        at(recipe, 64).lr, rel=1e-4
    )


def test_a_rate_that_depends_on_more_is_said():
    """Without a rule for alpha only the reference's own rank has a rate; without a width, full finetuning has none."""
    table = rate_table(replace(RECIPE, scaling_rule="unknown"))
    assert [
        rank
        for rank, own in zip(table["ranks"], table["own"], strict=True)
        if own is not None
    ] == [4]
    assert all(math.isfinite(value) for row in table["lr"] for value in row)
    lost = replace(
        RECIPE, reference=replace(RECIPE.reference, fan_in=None), full_fan_in=None
    )
    assert "fan_in" in rate_table(lost)["full"]["error"]


def test_the_table_is_json_in_the_page():
    """The page's script reads the very table, whatever the notes hold."""
    made = replace(RECIPE, notes=(HOSTILE,))
    (block,) = re.findall(
        r'<script id="table" type="application/json">(.*?)</script>',
        report_html(made),
        re.S,
    )
    assert json.loads(block) == rate_table(made)


def test_the_command_writes_the_page(tmp_path):
    """report prints where it wrote; a place that cannot be written is one sentence, and nothing stays behind."""
    path = RECIPE.save(tmp_path / "r.toml")
    done = CliRunner().invoke(
        main, ["report", str(path), "-o", str(tmp_path / "pages" / "r.html")]
    )
    assert (done.exit_code, done.output.strip()) == (
        0,
        str(tmp_path / "pages" / "r.html"),
    )
    assert (tmp_path / "pages" / "r.html").read_text(encoding="utf-8") == report_html(
        RECIPE
    )
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RankAwareError, match="cannot be written"):
        write_report(RECIPE, tmp_path / "file" / "r.html")
    assert sorted(p.name for p in (tmp_path / "pages").iterdir()) == ["r.html"]


def test_infinite_scores_stand_at_the_frames_edge():
    """Every trial is drawn once: inside the frame, or as a mark at its upper edge."""
    text = report_html(RECIPE)
    marks = ("finished", "above", "diverged", "pruned")
    drawn = [text.count(f'class="mark {mark}"') for mark in marks]
    # each once more in the key
    assert drawn == [4 + 1, 1 + 1, 1 + 1, 0]
    assert sum(drawn) - 3 == len(RECIPE.tensors["lr"])


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_a_curve_goes_on_to_its_frame(path):
    """It ends at a side of its frame or at the upper edge, and nowhere within."""
    text = report_html(Recipe.load(path))
    frame = re.search(r'class="frame" d="M(\S+) (\S+)V\S+H([\d.]+)"', text).groups()
    left, top, right = map(float, frame)
    curves = re.findall(r'class="fit" points="([^ "]+) [^"]* ([^ "]+)"', text)
    assert len(curves) >= 2
    for ends in curves:
        for end in ends:
            x, y = map(float, end.split(","))
            assert x in (left, right) or y == top


def test_scores_that_differ_have_labels_that_differ():
    """Where scores are large against their spread, the labels of an axis still differ."""
    values = 123456.7 + 1e-3 * np.arange(len(RECIPE.tensors["value"]))
    large = replace(
        RECIPE, tensors={**RECIPE.tensors, "value": values, "start": values + 1e-3}
    )
    panels = [
        re.findall(r'text-anchor="end">([^<]+)<', panel)
        for panel in report_html(large).split("<svg")[1:]
    ]
    assert any(len(labels) > 2 for labels in panels)
    assert all(len(set(labels)) == len(labels) for labels in panels)


def cells(text: str, label: str) -> list[str]:
    """The cells of the table of rates beside a label."""
    (row,) = re.findall(
        rf'<tr[^>]*><th scope="row">{label}</th>(.*?)</tr>', text.split("90 % from")[1]
    )
    return re.findall("<td>(.*?)</td>", row)


@pytest.mark.parametrize(
    ("full_seen", "known"),
    [(True, "tried"), (False, "extrapolated")],
    ids=["tried", "untried"],
)
def test_full_finetuning_has_the_last_row(full_seen, known):
    """Its rate and band are `Recipe.at`'s, and it is said whether it was tried."""
    made = replace(RECIPE, full_seen=full_seen, ceiling=None)
    rate = at(made, method="full")
    text = report_html(made)
    edges = [f"{edge:.3g}" for edge in (rate.lr, rate.low, rate.high)]
    assert cells(text, "full finetuning") == [*edges, known]
    labels = re.findall('<th scope="row">(.*?)</th>', text.split("90 % from")[1])
    assert labels == [f"rank {2**e}" for e in range(9)] + ["full finetuning"]
    assert cells(text, "rank 4")[-1] == "tried"
    assert cells(text, "rank 8")[-1] == "between"
    assert cells(text, "rank 128")[-1] == "extrapolated"


# the margin at its reference of a recipe of steepness 2
MARGIN = margin(2.0, spread(RECIPE, RECIPE.reference)[0])


def shown(*arguments: str, line: str) -> str:
    """The number behind the first word of a line that a command prints."""
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    (number,) = re.findall(rf"^{line} +(\S+?)(?: at .*)?$", done.output, re.M)
    return number


@pytest.mark.parametrize("rank", [1, 4, 8, 64, 256])
@pytest.mark.parametrize(
    "recipe",
    [RECIPE, replace(RECIPE, steepness=2.0, lean=MARGIN)],
    ids=["even", "steep"],
)
def test_one_rate_everywhere(recipe, rank, tmp_path):
    """The page, `rankaware lr`, `rankaware show` and the optimizer's report show one rate in the same digits."""
    path = str(recipe.save(tmp_path / "r.toml"))
    (on_page, *_) = cells(report_html(recipe), f"rank {rank}")
    assert shown("lr", path, "--rank", str(rank), line="lr") == on_page
    if rank == recipe.reference.rank:
        assert shown("show", path, line="base rate") == on_page
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Recipe .* extrapolates")
        model = mlp((rank,), scalings=recipe.reference.scaling, width=64, head=False)
        report = RankAwareOptimizer(model, "adamw", recipe=recipe).report()
    for row in str(report).splitlines()[4:6]:
        *_, lr, _why = row.split()
        assert lr == on_page


def test_the_nodes_are_fine():
    """Every rank up to 64, 32 nodes an octave up to 8,192, the width's neighbours, and half octaves of s."""
    table = rate_table(
        replace(RECIPE, reference=replace(RECIPE.reference, fan_in=5000.5))
    )
    fine = {round(2 ** (e / 32)) for e in range(13 * 32 + 1)}
    assert table["ranks"] == sorted({*range(1, 65), *fine, 5000, 5001})
    assert table["scalings"] == [e / 2 for e in range(-28, 21)]


PRINTED = [
    7.545e-4,
    7.5449e-4,
    1e-3,
    9.996e-5,
    1e-4,
    1.5e-7,
    2e-12,
    0.05,
    999.4,
    999.6,
    1234.0,
    1e6,
]


@pytest.mark.skipif(which("node") is None, reason="node runs the page's script")
def test_the_control_writes_rates_as_the_tables_do():
    """The script's rule for a rate gives Python's three digits, and at every row of a shipped recipe its rate."""
    recipe = Recipe.load(RECIPES / "language-a.toml")
    table = rate_table(recipe)
    ranks = [2**e for e in range(10)]
    logs = [table["own"][table["ranks"].index(rank)] for rank in ranks]
    logs += [table["full"]["lr"], *map(math.log2, PRINTED)]
    page = report_html(recipe)
    rule = re.search(r"  function shown\(log\) \{\n.*?\n  \}\n", page, re.S)[0]
    script = f"{rule}console.log(JSON.stringify({json.dumps(logs)}.map(shown)))"
    done = subprocess.run(
        ["node", "-e", script], capture_output=True, text=True, check=True
    )
    written = json.loads(done.stdout)
    assert written == [f"{2**log:.3g}" for log in logs]
    assert written[:10] == [cells(page, f"rank {rank}")[0] for rank in ranks]
    assert written[10] == cells(page, "full finetuning")[0]


@pytest.mark.parametrize("rule", ["unknown", "as swept"])
def test_the_page_claims_no_rule_for_alpha_that_it_lacks(rule):
    """A recipe without a rule for alpha by rank has a page that says so."""
    text = report_html(replace(RECIPE, scaling_rule=rule))
    assert "alpha follows the rank as it did" not in text
    assert "an alpha that follows the rank" not in text
