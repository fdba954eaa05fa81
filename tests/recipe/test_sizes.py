"""A recipe of any size is refused by counts, or is read and drawn in bounded memory."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from rankaware_optim import CalibrationError, Recipe, RecipeError
from rankaware_optim.reports._page import rate_table, report_html
from rankaware_optim.reports._picture import picture_of
from rankaware_optim.sweeps import fit_sweep

from ..helpers.recipes import RECIPE, tensors_of


def with_text(folder: Path, text: str) -> Path:
    target = RECIPE.save(folder / "r.toml")
    target.write_text(target.read_text() + text)
    return target


MANY = {
    "tables": (
        "".join(f"[t{i}]\n" for i in range(600_000)),
        "longer than 256,000 bytes",
    ),
    "dotted keys": ("\n[x]\n" + "a." * 100_000 + "b = 1\n", "cannot be read"),
    "long text": ('\n[x]\na = "' + "x" * 300_000 + '"\n', "longer than 256,000 bytes"),
}


@pytest.mark.parametrize("what", MANY)
def test_a_toml_is_refused_by_its_size(what, tmp_path):
    """Hundreds of thousands of tables, or of dots in a key, are refused."""
    text, message = MANY[what]
    with pytest.raises(RecipeError, match=message):
        Recipe.load(with_text(tmp_path, text))


def test_a_toml_of_the_largest_size_is_written_and_read(tmp_path):
    """256,000 bytes are kept, and one more is neither written nor read."""
    target, notes = tmp_path / "r.toml", [""] * 30
    made = replace(RECIPE, notes=tuple(notes))
    missing = 256_000 - made.save(target).stat().st_size
    notes[:25] = ["n" * 10_000] * 25
    notes[25] = "n" * (missing - 250_000)
    full = replace(RECIPE, notes=tuple(notes))
    assert full.save(target).stat().st_size == 256_000
    assert Recipe.load(target) == full
    with pytest.raises(RecipeError, match=r"256,001 bytes, more than 256,000\."):
        replace(full, notes=(*notes[:26], "n", *notes[27:])).save(target)
    with pytest.raises(RecipeError, match="longer than 256,000 bytes"):
        Recipe.load(with_text(tmp_path, "#" * 256_000))


COUNTS = {
    "seen.ranks": {"ranks": tuple(range(1, 66))},
    "seen.notes": {"notes": ("n",) * 101},
    "seen.other_rates": {"other_rates": {f"w{i}": 1e-3 for i in range(3001)}},
    "optimizer.settings": {"settings": {f"s{i}": 1 for i in range(501)}},
    "versions": {"versions": {f"p{i}": "1" for i in range(1001)}},
    "source": {"source": {f"s{i}": "1" for i in range(21)}},
    "name": {"name": "n" * 10_001},
    "trial.rank": {"tensors": {"rank": np.arange(66)}},
}


@pytest.mark.parametrize("path", COUNTS)
def test_counts_are_bounded(path, tmp_path):
    """A recipe with more of something than any calibration has is neither written nor read, and the error names it."""
    with pytest.raises(RecipeError, match=f"impossible value.* @ {path}"):
        replace(RECIPE, **COUNTS[path]).save(tmp_path / "r.toml")
    assert not list(tmp_path.iterdir())


LARGEST = [
    {"ranks": tuple(range(1, 65))},
    {"notes": ("n",) * 100},
    {"other_rates": {f"w{i}": 1e-3 for i in range(3000)}},
    {"settings": {f"s{i}": 1 for i in range(500)}},
    {"settings": {"s": [[1] * 500] * 4 + [1] * 496}},
    {"versions": {f"p{i}": "1" for i in range(1000)}},
    {"source": {f"s{i}": "1" for i in range(20)}},
    {"name": "n" * 10_000},
    {"seed": 2**63 - 1},
    {"covariance": np.full((3, 3), 1e4)},
    {"covariance": np.array([[1e4, -1e4, 0], [-1e4, 1e4, 0], [0, 0, 1e4]])},
    {"tensors": {"rank": np.arange(65)}},
    {"tensors": {"rank": np.array([1, 2**31 - 1])}},
]


@pytest.mark.parametrize("changes", LARGEST)
def test_the_largest_counts_are_kept(changes, tmp_path):
    """As many as are allowed, and numbers at the ends of their ranges, are written and read."""
    made = replace(RECIPE, **changes)
    assert Recipe.load(made.save(tmp_path / "r.toml")) == made


@pytest.mark.parametrize(("count", "refused"), [(1000, False), (1001, True)])
def test_former_lengths_are_bounded_too(count, refused, tmp_path):
    """A list that is not used any more is refused where it is longer than any was."""
    target = RECIPE.save(tmp_path / "r.toml")
    lengths = f"[horizon]\ntried = {[1] * count}"
    target.write_text(target.read_text().replace("[horizon]", lengths))
    if refused:
        with pytest.raises(RecipeError, match=r"@ horizon\.tried"):
            Recipe.load(target)
    else:
        assert len(Recipe.load(target).notes) == 1


@pytest.mark.parametrize("values", [[1] * 501, [[1] * 501]])
def test_lists_of_settings_are_bounded(values, tmp_path):
    """Values of several groups may be lists themselves, of 500 values each."""
    with pytest.raises(RecipeError, match=r"@ optimizer\.settings"):
        replace(RECIPE, settings={"s": values}).save(tmp_path / "r.toml")


def test_names_of_tensors_are_bounded(tmp_path):
    """A file of trials with very many names is refused before they are read."""
    target = RECIPE.save(tmp_path / "r.toml")
    names = {
        f"trial.t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        for i in range(5000)
    }
    header = json.dumps(names).encode()
    data = len(header).to_bytes(8, "little") + header
    former = tensors_of(target).read_bytes()
    tensors_of(target).write_bytes(data)
    text = target.read_text()
    target.write_text(
        text.replace(
            hashlib.sha256(former).hexdigest(), hashlib.sha256(data).hexdigest()
        )
    )
    with pytest.raises(RecipeError, match="header is too long"):
        Recipe.load(target)
    assert save({})  # the format that was written by hand


def test_a_sweep_of_very_many_ranks_is_refused():
    """A sweep that no recipe could hold is refused before it is fitted."""
    rows = [
        {"rank": rank, "lr": lr, "loss": 1.0}
        for rank in range(1, 66)
        for lr in (1e-3, 2e-3)
    ]
    with pytest.raises(CalibrationError, match="more than 64 ranks"):
        fit_sweep(rows, alpha=16, fan_in=64)


def long_curves(trials: int, values: int) -> dict[str, np.ndarray]:
    """Trials at three ranks with long curves."""
    chance, number = np.random.default_rng(0), np.arange(trials)
    return {
        "rank": np.array([4, 16, 64])[number % 3],
        "seed": number % 2,
        "lr": 2.0 ** chance.uniform(-14, -6, trials),
        "value": np.where(number % 5 == 4, np.nan, chance.uniform(0.4, 0.6, trials)),
        "pruned": number % 5 == 4,
        "diverged": np.zeros(trials, bool),
        "steps": np.full(trials, values),
        "curve": chance.uniform(0.4, 0.9, (trials, values)).astype(np.float32),
    }


def test_long_curves_are_drawn_in_little_memory():
    """The picture of curves with millions of values takes less memory than the curves."""
    made = replace(RECIPE, ranks=(4, 16, 64), tensors=long_curves(300, 20_000))
    tracemalloc.start()
    try:
        assert all(arm.curve for arm in picture_of(made).arms)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < made.tensors["curve"].nbytes


def test_a_rank_with_very_many_trials_has_no_curve():
    """The time of a curve grows with the cube of its rank's trials, so beyond 400 only points are drawn."""
    arms = picture_of(
        replace(RECIPE, tensors={**long_curves(2000, 1), "rank": np.full(2000, 4)})
    ).arms
    assert [(len(arm.points), arm.curve) for arm in arms] == [(2000, ())]


def test_notes_that_name_ranks_are_stored_once():
    """The page holds a recipe's own notes once, although they name ranks as the notes on a rank do."""
    note = "".join(f"rank {rank} " for rank in range(1, 1000))
    table = rate_table(replace(RECIPE, notes=(note,)))
    assert len(json.dumps(table["sentences"])) < 20 * len(note)


CONTROLS = "\x1b[31m\x07\x9b\u202e\udcff"


def test_no_control_reaches_the_page(tmp_path):
    """Characters that control a terminal or turn text around are in no text of the page, nor in its data."""
    text = f"a{CONTROLS}b"
    made = replace(
        RECIPE,
        **{
            "name": text,
            "notes": (text,),
            "optimizer": text,
            "settings": {text: text},
            "missing": text,
        },
        **{
            "other_rates": {text: "base"},
            "versions": {text: text},
            "source": {text: text},
        },
    )
    page = report_html(made)
    assert "a[31mb" in page
    assert not [sign for sign in page if not (sign.isprintable() or sign in "\n\t")]
    assert not [
        code
        for code in ("\\u001b", "\\u0007", "\\u009b", "\\u202e", "\\udcff")
        if code in page
    ]
