"""The page of a recipe in a real browser: its control gives what `Recipe.at` gives, and everyone can use it."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest

from rankaware_optim import (
    Power,
    RankAwareWarning,
    Recipe,
    RecipeError,
    Reference,
)
from rankaware_optim.reports._page import report_html

from ...helpers.recipes import KINDS, RECIPE

AT_A = Reference(rank=16, alpha=32, fan_in=768)
AT_B = replace(AT_A, init="B")


def recipe(law, reference=AT_A, **changes) -> Recipe:
    """A recipe as a calibration at ranks 4 and 64 would leave it."""
    wide = {"full_fan_in": 3072.0, "margin": 0.25, "notes": ("as given",)}
    return replace(RECIPE, law=law, reference=reference, **{**wide, **changes})


RECIPES = {
    "two ranks": RECIPE,
    "finite tokens": recipe(Power(0.1, 1.5)),
    "A = 0, no ceiling": recipe(Power(-0.45, to_full=True), AT_B, ceiling=None),
    "alpha kept, full seen": recipe(Power(), full_seen=True, scaling_rule="alpha"),
    "no rule": recipe(Power(), scaling_rule="unknown"),
    "no width": recipe(Power(), replace(AT_A, fan_in=None), full_fan_in=None),
    "full alone": KINDS["full alone"],
}
PAIRS = [(rank, alpha) for rank in (1, 7, 100, 777) for alpha in (0.5, 16, 33.3, 512)]
# rank, alpha, rslora; None for full finetuning
TARGETS = [
    *((rank, None, False) for rank in (1, 3, 4, 16, 63, 64, 65, 100, 256, 1000)),
    *((rank, alpha, False) for rank, alpha in (*PAIRS, (64, 16))),
    *((rank, alpha, True) for rank in (4, 100) for alpha in (1, 32)),
    None,
]


def expected(made: Recipe, target):
    """`Recipe.at`'s rate, or its error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankAwareWarning)
        try:
            if target is None:
                return made.at(method="full")
            rank, alpha, rslora = target
            return made.at(rank, alpha=alpha, rslora=rslora)
        except RecipeError as error:
            return error


def ask(page, target) -> None:
    """Fill the control in."""
    method = "LoRA" if target else "full finetuning"
    page.get_by_role("radio", name=method, exact=True).check()
    if target is None:
        return
    rank, alpha, rslora = target
    page.get_by_label("Rank", exact=True).fill(str(rank))
    field = page.get_by_label("Alpha", exact=True)
    if field.is_enabled():
        field.fill("" if alpha is None else str(alpha))
    if alpha is not None:
        page.get_by_label("rsLoRA").set_checked(rslora)


def text_of(page, name: str) -> str:
    return page.locator(f"#answer [data-is={name}]").inner_text()


@pytest.mark.parametrize("name", RECIPES)
def test_the_control_gives_what_the_recipe_gives(name, visit):
    """Rate, band, ceiling, flag and notes are those of `Recipe.at`, to three digits at powers of two and within 2 %
    between them. Where it refuses, none is.
    """
    made = RECIPES[name]
    page = visit(report_html(made))
    for target in TARGETS:
        rate = expected(made, target)
        ask(page, target)
        if isinstance(rate, RecipeError):
            assert page.locator("#answer dl").count() == 0
            assert len(page.locator("#answer").inner_text()) > 20
            continue
        exact = target is None or target in ((4, None, False), (64, 16, False))
        near = {"rel": 5.1e-3 if exact else 2.5e-2}
        low, high = text_of(page, "band").split(" to ")
        shown = [float(text) for text in (text_of(page, "lr"), low, high)]
        wanted = [rate.lr, rate.low, rate.high]
        assert shown == pytest.approx(wanted, **near), target
        ceiling = text_of(page, "ceiling")
        if rate.ceiling is None:
            assert ceiling == "none seen"
        else:
            assert float(ceiling) == pytest.approx(rate.ceiling, **near)
        known = "extrapolated" if rate.extrapolated else "within what was tried"
        assert text_of(page, "known") == known, target
        notes = page.locator("#answer li").all_inner_texts()
        assert [note for note in notes if "×" not in note] == [
            note for note in rate.notes if "×" not in note
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RankAwareWarning)
            written = eval(text_of(page, "python"), {"recipe": made})
        assert written.lr == rate.lr


IMPOSSIBLE = [
    *(("", ""), ("0", ""), ("-4", ""), ("1.5", ""), ("9000", "")),
    *(("8", "0"), ("8", "-1"), ("8", "1e30"), ("8", "1e-30")),
]


@pytest.mark.parametrize(("rank", "alpha"), IMPOSSIBLE)
def test_impossible_values_are_a_sentence(rank, alpha, visit):
    """No rate is shown for what cannot be, and the next possible value has one again."""
    page = visit(report_html(RECIPE))
    page.get_by_label("Rank", exact=True).fill(rank)
    page.get_by_label("Alpha", exact=True).fill(alpha)
    assert page.locator("#answer dl").count() == 0
    assert page.locator("#answer p").inner_text().endswith(".")
    ask(page, (8, 16, False))
    assert float(text_of(page, "lr")) > 0


@pytest.mark.parametrize("width", [320, 360, 768, 1400])
@pytest.mark.parametrize("kind", ["two ranks", "seven ranks", "full alone"])
def test_no_width_needs_scrolling_sideways(width, kind, visit):
    """The page is as wide as the window, whatever its names and notes; only tables scroll, within themselves."""
    made = replace(KINDS[kind], name="a-very-long-name_" * 20, notes=("x" * 400,))
    page = visit(report_html(made), viewport={"width": width, "height": 700})
    ask(page, (100, None, False) if made.ranks else None)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.locator("section").evaluate_all(
        "all => all.map(s => [s.scrollWidth, s.clientWidth])"
    )
    assert all(inner <= outer for inner, outer in sizes)


def test_the_keyboard_is_enough(visit):
    """Tab goes through the control in order, each stop visible; arrows change the method."""
    page = visit(report_html(RECIPE))
    page.keyboard.press("Tab")
    focus, seen = "document.activeElement", []
    for key in ("ArrowRight", "ArrowLeft", "Tab", "Tab", "Tab"):
        seen.append(page.evaluate(f"{focus}.value || {focus}.id"))
        assert page.evaluate(f"getComputedStyle({focus}).outlineStyle") != "none"
        page.keyboard.press(key)
    assert seen == ["lora", "full", "lora", str(RECIPE.reference.rank), "alpha"]


def luminance(colour: str) -> float:
    """Relative luminance of a colour as WCAG defines it."""
    numbers = colour[colour.index("(") + 1 : -1].split(",")[:3]
    light = 0.0
    for weight, number in zip((0.2126, 0.7152, 0.0722), numbers, strict=True):
        c = int(number) / 255
        light += weight * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
    return light


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_light_and_dark(scheme, visit):
    """Text stands out from its card by 4.5 to 1 at least, in either scheme, and the schemes differ."""
    page = visit(report_html(RECIPE), color_scheme=scheme)
    style = "e => getComputedStyle(e)."
    card = page.locator("section").first.evaluate(f"{style}backgroundColor")
    assert (luminance(card) > 0.5) == (scheme == "light")
    inks = {".soft": "color", "dd.big": "color", "h2": "color", "svg text": "fill"}
    for selector, name in inks.items():
        ink = page.locator(selector).first.evaluate(style + name)
        light, dark = sorted((luminance(ink), luminance(card)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, selector


def test_the_answer_is_announced(visit):
    """The rate is in a live region, and every drawing is one picture for those who do not see it."""
    page = visit(report_html(RECIPE))
    assert page.get_by_role("status").inner_text().count("90 % band") == 1
    assert page.locator("[role=img]").count() == 3


@pytest.mark.parametrize("kind", KINDS)
def test_drawings_stay_in_their_frames(kind, visit):
    """Every text of every drawing lies within its own box, in the page's colours."""
    page = visit(report_html(KINDS[kind]), color_scheme="dark")
    outside = """all => all.map(svg => {
        const box = svg.getBoundingClientRect();
        const far = b => b.left < box.left - 1 || b.top < box.top - 1 || b.right > box.right + 1 || b.bottom > box.bottom + 1;
        return [...svg.querySelectorAll("text")].filter(e => far(e.getBoundingClientRect())).length;
    })"""
    counts = page.locator("[role=img] svg").evaluate_all(outside)
    assert counts
    assert not any(counts)
