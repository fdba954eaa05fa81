"""Tests of the two files of a recipe: round trips, errors on loading, and saves that are killed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tomli
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

import rankaware_optim as ra
from rankaware_optim import (
    Constant,
    MuA,
    Power,
    RankAwareWarning,
    Recipe,
    RecipeError,
    Reference,
)
from rankaware_optim._checks import RANGES
from rankaware_optim.errors import PlotError
from rankaware_optim.reports import report_html
from rankaware_optim.sweeps import fit_sweep

from ..helpers.calibrations import bowl
from ..helpers.damage import damaged
from ..helpers.models import mlp
from ..helpers.recipes import KINDS, RECIPE, TENSORS, trials_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "recipes" / "SCHEMA.md"
HANG = 120  # seconds
FULL = replace(
    RECIPE,
    law=Power(-0.3, law=MuA(tokens=2.0)),
    margin=0.25,
    reference=Reference(rank=4, alpha=8, fan_in=64, batch=16),
    settings={"weight_decay": 0.01, "betas": (0.9, 0.999), "foreach": True},
    steps=100,
    warmup=0.05,
    other_rates={"head.weight": "base", "head.bias": 1e-3},
    layers={"layer0": 64.0},
    versions={"torch": "2.6"},
    source={"train": "train"},
    steepness=1.0,
    scatter=0.2,
    tensors={
        **TENSORS,
        "diverged": np.isinf(TENSORS["value"]),
        "pruned": np.zeros(6, bool),
        "steps": np.full(6, 100),
    },
)
NEXT = replace(RECIPE, name="next", tensors={**TENSORS, "seed": TENSORS["seed"] + 1})


@pytest.fixture
def target(tmp_path) -> Path:
    """Return the path of a saved recipe that has a value in every field."""
    return FULL.save(tmp_path / "r.toml")


# --- what is written is read ------------------------------------------------------------------------------------------

positive = st.floats(1e-9, 1e6)
references = st.builds(
    Reference,
    rank=st.integers(1, 4096),
    alpha=positive,
    rslora=st.booleans(),
    init=st.sampled_from("AB"),
    fan_in=st.none() | positive,
    batch=st.none() | positive | st.integers(1, 99),
) | st.builds(Reference, method=st.just("full"), fan_in=positive)
text = st.text(st.characters(codec="utf-8"))
names = st.text("ab.*", min_size=1)
of_any_kind = st.booleans() | st.integers(0, 9) | positive | st.text("ab")
CURVES = {"lr": np.ones(1), "curve": np.array([[1.0, math.nan]])}
recipes = st.builds(
    replace,
    st.just(FULL),
    name=text,
    fitted_lr=st.floats(1e-9, 9e5),
    ceiling=st.none() | st.just(1e6),
    reference=references,
    law=st.builds(Power, exponent=st.integers(-2, 2), law=st.just(Constant())),
    settings=st.dictionaries(names, of_any_kind),
    notes=st.lists(text, max_size=3).map(tuple),
    other_rates=st.dictionaries(names, st.just("base") | positive),
    source=st.dictionaries(st.text("ab", min_size=1), text),
    tensors=st.sampled_from([{}, CURVES]),
)


@settings(
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(made=recipes)
def test_a_saved_recipe_loads_as_it_was(made, tmp_path):
    """Saving and loading a recipe leaves every value, every array and the tag unchanged.

    A recipe without trials has a single file, and no file counts as missing.
    """
    path = made.save(tmp_path / "r.toml")
    found = Recipe.load(path)
    assert found == made
    assert (found.tag, found.missing) == (made.tag, "")
    assert np.array_equal(found.covariance, made.covariance)
    beside = {trials_of(path)} if made.tensors else set()
    assert set(tmp_path.iterdir()) == {path} | beside
    trials_of(path).unlink(missing_ok=True)


def test_the_toml_introduces_itself(target):
    """The TOML file starts with comments and the schema, and `save` writes only this file and the trials."""
    lines = target.read_text().splitlines()
    values = [line for line in lines if not line.startswith("#")]
    assert len(lines) - len(values) > 2
    assert values[0] == "schema = 1"
    NEXT.save(target)
    assert set(target.parent.iterdir()) == {target, trials_of(target)}
    # a byte order mark, which some editors add
    target.write_bytes(b"\xef\xbb\xbf" + target.read_bytes())
    assert Recipe.load(target) == NEXT


def test_a_link_stays_a_link(tmp_path):
    """Saving to a symbolic link writes the file that it points to, and loading from the link finds the trials."""
    (tmp_path / "store").mkdir()
    link, made = tmp_path / "r.toml", tmp_path / "store" / "v1.toml"
    link.symlink_to(made)
    for name in ("first", "second"):
        assert replace(RECIPE, name=name).save(link) == link
        assert link.is_symlink()
        assert Recipe.load(link) == Recipe.load(made) == replace(RECIPE, name=name)
    assert set((tmp_path / "store").iterdir()) == {made, trials_of(made)}


def test_linked_files_of_a_cache_belong_together(target, tmp_path):
    """If both files are symbolic links, as in the Hub's cache, loading finds the trials next to the TOML's link."""
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate((target, trials_of(target))):
        blob = tmp_path / "blobs" / str(number)
        path.rename(blob)
        path.symlink_to(blob)
    assert Recipe.load(target) == FULL


# --- every field --------------------------------------------------------------------------------------------------


def flat(table: dict, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield the path and the value of every entry of a nested table."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}{key}/")
        else:
            yield f"{path}{key}", value


OF_ANY_KEY = ("settings", "layers", "other_rates")
OF_ANY_KEY += ("versions", "source", "law")
OF_TRIALS = "rank seed lr own_lr value start diverged pruned steps curve"


def test_the_page_lists_every_field(target):
    """SCHEMA.md has a row for every field of the TOML, every array of the trials and every range that is checked."""
    page = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    paths = dict(flat(tomli.loads(target.read_text())))
    fields = {path for path in paths if not path.startswith(OF_ANY_KEY)}
    fields |= {f"{path}/*" for path in OF_ANY_KEY}
    named = {path.replace("/", ".") for path in fields}
    assert set(rows) == {*named, *OF_TRIALS.split()}
    listed = re.findall(r"^\| (\w+) \| (\S+) \| (\S+) \|.*\|$", page, re.M)
    ranges = [(name, f"{low:g}", f"{high:g}") for name, (low, high) in RANGES.items()]
    assert [row for row in listed if row[0] in RANGES] == ranges


def with_value(target: Path, path: str, value: object) -> None:
    """Set the value at a path of the TOML file, or remove it if the value is `...`."""
    document = tomli.loads(target.read_text())
    *tables, key = path.split("/")
    table = document
    for name in tables:
        table = table[name]
    table[key] = value
    if value is ...:
        del table[key]
    target.write_text(tomli_w.dumps(document))


NUMBERS = [math.nan, math.inf, -1.0, 0.0, 10**400]
POSITIVE = [
    *("full_fan_in", "fitted_lr", "ceiling", "reference/rank"),
    *("reference/alpha", "reference/fan_in", "reference/batch", "steps"),
    *("law/full_factor", "law/pivot", "law/law/tokens", "law/law/ratio"),
    *("layers/layers.*.q", "other_rates/head.bias"),
]
OF_ANOTHER_KIND = {str: 7, bool: "no", int: "text", float: "text", list: 4}
EYE = np.eye(3).tolist()
BAD = [
    *((path, value) for path in POSITIVE for value in NUMBERS),
    *(("schema", value) for value in (0, 2, True)),
    *((name, 5e-3) for name in ("lr", "band_low", "band_high")),
    *(("ceiling", value) for value in (1e-3, 1.9e-3, 2e-3)),
    *(("margin", value) for value in (11, math.nan, -0.5)),
    *(("reference/rank", value) for value in (2**31, 1.5)),
    *(("law/exponent", value) for value in (1e9, math.nan)),
    *(("law/name", value) for value in ("mua", "constant", "os:path", ...)),
    *(("law/law", value) for value in ({"name": "x"}, {"name": "mua", "token": 8.0})),
    *(("ranks", value) for value in ([4, 0], [4, 4], list(range(1, 66)))),
    *(("settings/foreach", value) for value in (2**100, {"a": 1}, [[1]])),
    *(("covariance", value) for value in ([[1, 0, 0], [0, 1, 0]], [[1, 0], [0, 1]])),
    *(("covariance", [[value, 0, 0], *EYE[1:]]) for value in (math.nan, -1)),
    ("covariance", [[1, -6, 0], [-6, 1, 0], [0, 0, 1]]),
    ("covariance", [[1, 0, 0.5], *EYE[1:]]),
    ("warmup", 2),
    ("reference/method", "lore"),
    ("reference/init", "C"),
    ("scaling_rule", "banana"),
    ("score", "accuracy"),
    ("notes", [1]),
    ("other_rates", {"a": "bases"}),
]  # fmt: skip


def refused(target: Path, path: str, value: object) -> None:
    """Check that loading the TOML file with this value raises an error that names the field or its table."""
    with_value(target, path, value)
    with pytest.raises(RecipeError, match="cannot be read") as caught:
        Recipe.load(target)
    assert any(name in caught.value.cause for name in path.split("/"))


def test_every_bad_value_is_our_error_and_names_its_field(target):
    """An impossible value, a value of the wrong type, a missing value and a misspelt name are errors that name the field."""
    document = dict(flat(tomli.loads(target.read_text())))
    assert len(document) > 40
    tables = {path.rpartition("/")[0] for path in document} - {""}
    lines = {path for path in document if not path.startswith(OF_ANY_KEY)}
    missing = [(path, ...) for path in lines | tables]
    misspelt = [(f"{table}/rslor", True) for table in tables - {*OF_ANY_KEY}]
    of_another_kind = [
        (path, OF_ANOTHER_KIND[type(value)])
        for path, value in document.items()
        if not path.startswith(("settings", "other_rates"))
    ]
    for path, value in [*BAD, *missing, *misspelt, *of_another_kind]:
        FULL.save(target)
        refused(target, path, value)


def test_a_value_that_is_unknown_stands_as_none(target):
    """A field that is None is written as "none" and read back as None."""
    unknown = {"ceiling": None, "full_fan_in": None, "steps": None, "warmup": None}
    made = replace(RECIPE, **unknown, reference=Reference(4, 8), tensors={})
    made.save(target)
    assert target.read_text().count('"none"') == 7
    assert Recipe.load(target) == made


def test_a_covariance_may_be_rounded(target):
    """A covariance is accepted although rounding made one of its eigenvalues slightly negative."""
    made = replace(FULL, covariance=np.diag([1.0, 0, -1e-7]))
    assert Recipe.load(made.save(target)) == made


UNWRITABLE = [
    {"fitted_lr": 1e-40},
    {"settings": {"x": 2**70}},
    {"steps": -1},
    {"covariance": np.eye(3) * math.nan},
    {"tensors": {"lr": np.ones(2, np.complex64)}},
    {"tensors": {"rank": np.arange(66)}},
    {"tensors": {"unheard": np.ones(2)}},
    {"tensors": {"lr": np.ones(2), "value": np.ones(1)}},
    {"tensors": {"lr": np.ones(2001)}},
    {"notes": ("n" * 10_000,) * 30},
]


@pytest.mark.parametrize("change", UNWRITABLE)
def test_what_could_not_be_read_again_is_not_saved(change, target):
    """`save` raises an error for a value that `load` would reject, and leaves the recipe on the disk unchanged."""
    with pytest.raises(RecipeError, match="cannot be written"):
        replace(FULL, **change).save(target)
    assert Recipe.load(target) == FULL


# --- the toml alone -----------------------------------------------------------------------------------------------


def test_the_toml_alone_gives_every_rate(target):
    """A recipe without its file of trials still gives every learning rate, and its text names the missing file."""
    beside = trials_of(target)
    beside.unlink()
    found = Recipe.load(target)
    assert found.missing == beside.name
    assert replace(found, missing="", tensors=FULL.tensors) == FULL
    assert found.at(rank=8) == FULL.at(rank=8)
    lacking = f"{beside.name} is missing"
    assert lacking in " ".join(str(found).split())
    assert lacking in report_html(found)
    with pytest.raises(PlotError, match=lacking):
        found.plot()
    model = mlp((8,), width=64)
    assert ra.RankAwareOptimizer(model, "adamw", recipe=target, other_lr=1e-3)


class Unpicklable:
    def __reduce__(self):
        return (warnings.warn, ("unpickled",))


def names_of_arrays(count: int) -> bytes:
    """Return a safetensors file that lists `count` empty arrays in its header."""
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{i}": empty for i in range(count)}).encode()
    return len(header).to_bytes(8, "little") + header


TRIALS = [
    # the data in place of the trials, whether the TOML has its hash, and a part of the warning
    (save(NEXT.tensors), False, "a different recipe"),
    (lambda data: data[:-8], False, "a different recipe"),
    (pickle.dumps(Unpicklable()), False, "a different recipe"),
    (lambda data: data[:-8], True, "cannot be read"),
    (pickle.dumps(Unpicklable()), True, "header"),
    (b"", True, "[Hh]eader"),
    (names_of_arrays(5000), True, "header is longer"),
    (save({"w": np.ones(2)}), True, "array 'w'"),
]


@pytest.mark.parametrize(("data", "is_hashed", "why"), TRIALS)
def test_trials_that_do_not_fit_leave_the_rates(data, is_hashed, why, target):
    """If the file of trials is wrong or damaged, one warning says why, the learning rates are read, and nothing is unpickled."""
    beside = trials_of(target)
    beside.write_bytes(data(beside.read_bytes()) if callable(data) else data)
    if is_hashed:
        digest = hashlib.sha256(beside.read_bytes()).hexdigest()
        with_value(target, "trials_sha256", digest)
    with pytest.warns(
        RankAwareWarning,
        match=f"{why}.*copy the .toml file and the .trials.safetensors file",
    ) as caught:
        found = Recipe.load(target)
    assert len(caught) == 1
    assert (found.missing, found.tensors) == (beside.name, {})
    assert found.at(rank=8) == FULL.at(rank=8)


# --- places ---------------------------------------------------------------------------------------------------------

DAMAGE = [
    ("unlinked", lambda p: p.unlink(), "cannot be read"),
    ("no text", lambda p: p.write_bytes(b"\xff\xfe"), "cannot be read"),
    ("a pickle", lambda p: p.write_bytes(pickle.dumps(Unpicklable())), "cannot be"),
    ("deep", lambda p: p.write_text("name = " + "[" * 5000), "cannot be read"),
    ("dots", lambda p: p.write_text("a." * 100_000 + "b = 1"), "cannot be read"),
    ("long", lambda p: p.write_text("#" * 256_001), "longer than 256,000 bytes"),
    ("a folder", lambda p: (p.unlink(), p.mkdir()), "cannot be read"),
    ("a pipe", lambda p: (p.unlink(), os.mkfifo(p)), "regular file"),
]


@pytest.mark.parametrize(("kind", "damage", "message"), DAMAGE)
def test_a_damaged_toml_is_refused(kind, damage, message, target):
    """A TOML file that is missing, damaged, too long or not a regular file raises an error at once."""
    damage(target)
    with pytest.raises(RecipeError, match=message):
        Recipe.load(target)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes are POSIX")
def test_what_is_no_file_is_left_alone(tmp_path):
    """Saving to the path of a pipe or a folder, or to a path below a file, raises an error and changes nothing."""
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for name in ("pipe.toml", "folder.toml", "file/r.toml"):
        with pytest.raises(RecipeError, match="cannot be written"):
            RECIPE.save(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.processes
@pytest.mark.xdist_group("torn saves")
def test_a_torn_save_leaves_a_recipe(tmp_path):
    """A save that is killed leaves the old or the new recipe, perhaps without its trials, but never a mixture of the two.

    A reader during a save finds the same. The next save writes the whole new recipe.
    """
    command = [sys.executable, "-m", "tests.helpers.torn_saves", str(tmp_path)]
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths}
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=HANG
    )
    assert not ended.returncode, ended.stderr
    torn = [line.split() for line in ended.stdout.splitlines()]
    found = {"killed": [], "read": [], "saved": []}
    for kind, _, name, state in torn:
        found[kind].append(name)
        assert state in ("whole", "rates")
        assert (name, state) == ("new", "whole") or kind != "saved"
    assert found["killed"] == sorted(found["killed"], reverse=True)
    assert {*found["killed"]} == {*found["read"]} == {"old", "new"}
    assert found["saved"]


@pytest.mark.parametrize("path", [None, 3, {"name": "r"}], ids=str)
def test_what_is_no_path_is_said(path):
    """Passing something other than a path to `load` or `save` raises an error that asks for a path."""
    for call in (Recipe.load, FULL.save):
        with pytest.raises(RecipeError, match="Pass the path"):
            call(path)


@dataclass(frozen=True)
class OwnLaw(Constant):
    """A scaling law such as another project would register."""

    name: ClassVar[str] = "own-law"


def test_a_recipe_whose_law_is_not_registered_says_the_true_cause(tmp_path):
    """If a recipe's law is not registered, the error names `register_law` and does not ask for a new copy of the file."""
    ra.register_law(OwnLaw())
    try:
        path = replace(FULL, law=Power(law=OwnLaw())).save(tmp_path / "r.toml")
        assert Recipe.load(path).law.law == OwnLaw()
    finally:
        ra.register_law(OwnLaw(), remove=True)
    with pytest.raises(RecipeError, match=r"'own-law'.*register_law") as caught:
        Recipe.load(path)
    assert "copy" not in caught.value.cure


# --- files that were damaged ----------------------------------------------------------------------------------------

SHIPPED = ROOT / "recipes" / "language-b.toml"
SWEEP = "rank,alpha,fan_in,lr,loss\n" + "".join(
    f"{rank},{rank},64,{2.0**x},{bowl(x + 8)}\n"
    for rank in (4, 64)
    for x in range(-12, -4)
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with the two files of a recipe and the CSV file of a sweep."""
    folder = tmp_path_factory.mktemp("files")
    for path in SHIPPED.parent.glob(f"{SHIPPED.stem}.*"):
        shutil.copy(path, folder)
    (folder / "sweep.csv").write_text(SWEEP)
    return folder


DAMAGED = [
    # the file that is damaged, the file that is read, and the function that reads it
    ("language-b.toml", "language-b.toml", ra.Recipe.load),
    ("language-b.trials.safetensors", "language-b.toml", ra.Recipe.load),
    ("sweep.csv", "sweep.csv", fit_sweep),
]


@pytest.mark.parametrize(("name", "given_name", "read"), DAMAGED)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_gives_rates(files, name, given_name, read, data):
    """However a file is damaged, reading it raises an error of this package or gives a learning rate with a finite interval."""
    path, whole = files / name, (files / name).read_bytes()
    path.write_bytes(data.draw(damaged(whole)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ra.RankAwareWarning)
            rate = read(files / given_name).at(16)
    except ra.RankAwareError:
        return
    finally:
        path.write_bytes(whole)
    assert 0 < rate.low <= rate.lr <= rate.high < math.inf


# --- equality, and tags ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [field.name for field in fields(Recipe)])
def test_every_value_is_compared(name):
    """Two recipes that differ in any field are unequal, except for the field that names a missing file."""
    made = KINDS["two ranks"]
    is_table = isinstance(getattr(made, name), dict)
    other = replace(made, **{name: {"another": 1} if is_table else "another"})
    assert (made == other) == (name == "missing")
    assert other == replace(other)


def test_nan_equals_nan():
    """Two recipes whose trials have NaN in the same places are equal."""
    damaged = KINDS["damaged curves"]
    copies = {name: array.copy() for name, array in damaged.tensors.items()}
    assert replace(damaged, tensors=copies) == damaged


def test_the_hashes_stay():
    """The tags of the shipped recipes never change, because saved optimizer states contain these tags."""
    paths = sorted(SHIPPED.parent.glob("*.toml"))
    tags = [Recipe.load(path).tag for path in paths]
    assert [tag.split()[1] for tag in tags] == [path.stem for path in paths]
    digest = hashlib.sha256("\n".join(tags).encode()).hexdigest()
    assert digest[:12] == "77f51ff00ab4", tags
