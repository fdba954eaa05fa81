"""The experiment of width: its networks, which runs it asks for, what its laws predict, and what its rules conclude."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(
    not BENCHMARKS.exists(), reason="the benchmarks are not at hand"
)
A, B, FULL = "Init[A], s = 1", "Init[B], s = 1", "full"
WIDTHS = {  # hidden, mean fan-in, largest
    "Llama 96": (96, 131.6, 256),
    "Llama 192": (192, 263.1, 512),
    "Llama 384": (384, 526.2, 1024),
    "DiT 64": (64, 106.7, 256),
    "DiT 128": (128, 213.3, 512),
    "DiT 256": (256, 426.7, 1024),
    "Llama 192, MLP 192": (192, 192, 192),
    "Llama 192, MLP 1024": (192, 413.9, 1024),
}


@pytest.fixture
def width(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("laws.width")
    monkeypatch.setattr(module, "widths", lambda name: module.Widths(*WIDTHS[name]))
    yield module
    for name in ("laws.width", "laws.one_constant"):
        sys.modules.pop(name, None)


def by_law(width: Any, law: str, config: str) -> dict[Any, float]:
    """Rates at every width as a law moves 2^-8 from the narrowest."""
    return {
        (name, config): width.MOVES[law](
            width.Place(config, WIDTHS[names[0]][1]),
            width.Place(config, WIDTHS[name][1]),
            -8.0,
        )
        for names in width.ALIKE.values()
        for name in names
    }


# --- networks and runs ----------------------------------------------------------------------------------------------


def test_networks_of_a_kind_differ_in_width_alone(width):
    """All parts are in proportion, every head is whole, and the other MLPs have the usual one's hidden width."""
    for names in width.ALIKE.values():
        nets = [width.NETWORKS[name] for name in names]
        assert len({net.mlp / net.width for net in nets}) == 1
        assert [net.width / nets[0].width for net in nets] == [1, 2, 4]
        assert all(net.width % 32 == 0 for net in nets)
    assert {
        width.NETWORKS[name].width for name in (width.USUAL, *width.OTHER_MLPS)
    } == {192}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_package_reads_these_widths(width):
    """Hidden width, mean and largest fan-in are what a survey of each network says."""
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    for name, (hidden, mean, largest) in WIDTHS.items():
        survey = width.surveyed(name)
        assert min(f.fan_in for f in survey.factors) == hidden
        assert survey.width == pytest.approx(mean, abs=0.1)
        assert survey.full_width("A") == largest


def test_todays_weights_keep_their_names(width, monkeypatch):
    """The study's networks are cached under the names they have; others under their sizes and steps."""
    pytest.importorskip("transformers")
    from study.domains import _llama, image_generation

    asked = []
    for module in (_llama, image_generation):
        monkeypatch.setattr(
            module,
            "made_once",
            lambda name, make: asked.append((name, make.args)) or {},
        )
    for ask in (_llama.llama, image_generation.pretrained):
        ask()
        ask(96, steps=400)
    assert asked == [
        ("llama-brown-v1", (192, 512, 1500)),
        ("llama-brown-v1-96-512-400", (96, 512, 400)),
        ("dit-digits-0-4-v1", (128, 1500)),
        ("dit-digits-0-4-v1-96-400", (96, 400)),
    ]


@pytest.mark.parametrize("size", [64, 128, 256])
def test_a_dit_of_any_width_maps_images_to_velocities(width, size):
    """Images in, as many numbers out, with heads of 32."""
    import torch
    from study.domains._dit import DiT

    model = DiT(size)
    assert model(
        torch.zeros(2, 1, 28, 28), torch.rand(2), torch.tensor([0, 1])
    ).shape == (
        2,
        1,
        28,
        28,
    )
    assert model.blocks[0].heads == size // 32


def completed(
    width: Any,
    monkeypatch: pytest.MonkeyPatch,
    store: Path,
    best: Callable[[int], float],
) -> dict[Any, Any]:
    """What is found in a store that holds every run of one network, bowls around a best rate by seed."""
    from study.configurations import START
    from study.runs_on_file import complete

    monkeypatch.setattr(width, "STORE", store)
    monkeypatch.setattr(width, "guess", lambda name, config: -8)

    def run(job: Any) -> float:
        return 2.0 if job.scheme == START else 1.0 + (job.x - best(job.seed)) ** 2 / 8

    complete(
        width.task_of("Llama 96"), run, width.store_of("Llama 96"), 1, lambda text: None
    )
    found: dict[Any, Any] = width.on_file()
    return found


def test_a_network_on_file_has_every_configuration(width, monkeypatch, tmp_path):
    """One task runs the loss before training and all cells; their estimates are the bowl's."""
    found = completed(width, monkeypatch, tmp_path, lambda seed: -7.2)
    assert set(found) == {("Llama 96", config) for config in (A, B, FULL)}
    assert all(
        each.both.middle == pytest.approx(-7.2, abs=0.1) for each in found.values()
    )


def test_noise_is_half_the_difference_of_two_seeds(width, monkeypatch, tmp_path):
    """Two seeds whose best rates lie .4 octaves apart give a mean that is .2 uncertain."""
    found = completed(width, monkeypatch, tmp_path, lambda seed: -8.0 + 0.4 * seed)
    assert width.noise(found, "middle") == pytest.approx(0.2, abs=0.03)


def test_before_any_run_no_page_is_written(width, monkeypatch, tmp_path):
    """An empty store has no estimate, and the table says what makes one."""
    from click.testing import CliRunner

    monkeypatch.setattr(width, "STORE", tmp_path)
    monkeypatch.setattr(width, "RESULTS", tmp_path)
    said = CliRunner().invoke(width.table)
    assert width.on_file() == {}
    assert said.exit_code == 1
    assert "width.py run" in said.output
    assert not list(tmp_path.iterdir())


# --- what the laws predict ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("law", "config", "llama", "dit"),
    [
        ("µA", A, -0.42, -0.41),
        ("µA", B, -0.97, -0.96),
        ("µA", FULL, -0.98, -0.97),
        ("µA, falling at B", B, -0.64, -0.63),
        ("µA, falling at B", A, -0.42, -0.41),
        ("one rate", A, 0.0, 0.0),
        ("n^-1/2", B, -0.5, -0.5),
        ("1/n", FULL, -1.0, -1.0),
    ],
)
def test_exponents_are_the_hypotheses(width, law, config, llama, dit):
    """The figures that the page's hypotheses name are what the laws give."""
    rates = by_law(width, law, config)
    found = [width.exponent(rates, kind, config) for kind in ("Llama", "DiT")]
    assert found == pytest.approx([llama, dit], abs=0.01)


@pytest.mark.parametrize(
    ("kind", "c", "expected"), [("Llama", 0.16, -0.32), ("DiT", 0.30, -0.35)]
)
def test_one_constant_moves_init_a_less(width, kind, c, expected):
    """Init[A]'s exponent in width at the constant of the study's best rate."""
    rates = {
        (name, A): width.rate_for(width.Place(A, WIDTHS[name][1]).site, c)
        for name in width.ALIKE[kind]
    }
    assert width.exponent(rates, kind, A) == pytest.approx(expected, abs=0.01)
    assert width.growth(rates, kind, A) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("which", "expected"),
    [("hidden", (0, 0)), ("mean", (0.44, -0.64)), ("largest", (1.39, -0.99))],
)
def test_shifts_by_a_width_are_the_hypotheses(width, which, expected):
    """Octaves of full's rate from an MLP of 512 to 192 and to 1,024."""
    assert tuple(
        width.shift_by(which, name) for name in width.OTHER_MLPS
    ) == pytest.approx(expected, abs=0.01)


# --- what the rules conclude ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("law", "config", "said"),
    [
        ("µA", A, "the package's law holds"),
        ("one constant", A, "one constant in place of the package's law"),
        ("µA, falling at B", B, "the package's law holds"),
        ("µA", B, "µA in place of the package's law"),
        ("one rate", FULL, "one rate in place of the package's law"),
    ],
)
def test_rule_1_names_the_law_that_made_the_rates(width, law, config, said):
    """Rates made by a law are read as that law's, or the package's where the two are near."""
    assert said in width.rule_1([by_law(width, law, config)] * 2, config)


def test_rule_1_settles_nothing_where_kinds_disagree(width):
    """A law that is the best in one kind alone does not replace the package's."""
    flat, steep = by_law(width, "one rate", FULL), by_law(width, "1/n", FULL)
    mixed = {
        key: (steep[key] * 2 + 8 if key[0].startswith("DiT") else x)
        for key, x in flat.items()
    }
    assert "not settled" in width.rule_1([mixed] * 2, FULL)


def test_rule_2_tells_one_constant_from_ratios(width):
    """Where c is .16 at every width and in full alike, one constant is the better law; at c = 1 it is not."""
    for c, said in ((0.05, "is the better law"), (1.0, "is not the better law")):
        rates = {
            (name, config): width.rate_for(width.Place(config, WIDTHS[name][1]).site, c)
            for names in width.ALIKE.values()
            for name in names
            for config in (A, B, FULL)
        }
        *configs, levels = width.rule_2([rates] * 2)
        assert all("c is the same at every width" in line for line in configs)
        assert said in levels


def with_mlps(width: Any, of_full: Callable[[str], float]) -> dict[Any, float]:
    """Rates of the three MLPs: Init[A]'s as µA moves it, full's as said."""
    rates = {}
    for name in (width.USUAL, *width.OTHER_MLPS):
        here, there = (width.Place(A, WIDTHS[each][1]) for each in (width.USUAL, name))
        rates[name, A] = width.MOVES["µA"](here, there, -7.0)
        rates[name, FULL] = -8.0 + (of_full(name) if name != width.USUAL else 0.0)
    return rates


@pytest.mark.parametrize("which", ["hidden", "mean", "largest"])
def test_rule_3_names_the_width_that_made_the_rates(width, which):
    """Full's rates that move as 1/κ of a width are read as decided by it."""
    rates = with_mlps(width, lambda name: width.shift_by(which, name))
    assert f"the {width.WORDS[which]} decides" in width.rule_3([rates] * 2)


def test_rule_3_settles_nothing_between_two_widths(width):
    """Half way between two widths neither decides."""
    rates = with_mlps(
        width,
        lambda name: (
            (width.shift_by("mean", name) + width.shift_by("hidden", name)) / 2
        ),
    )
    assert "nothing is settled" in width.rule_3([rates] * 2)


def test_rule_3_settles_nothing_far_from_every_width(width):
    """Where full's rate moves by octaves that none of the widths explains, the nearest does not decide."""
    rates = with_mlps(width, lambda name: 3 * width.shift_by("largest", name))
    assert "nothing is settled" in width.rule_3([rates] * 2)


def test_a_page_is_written_of_what_is_on_file(width, monkeypatch, tmp_path):
    """With one network on file the tables have dashes for the rest, and the rules settle nothing."""
    from click.testing import CliRunner

    completed(width, monkeypatch, tmp_path, lambda seed: -7.2)
    monkeypatch.setattr(width, "RESULTS", tmp_path)
    done = CliRunner().invoke(width.table, catch_exceptions=False)
    assert done.exit_code == 0
    page = (tmp_path / "width.md").read_text()
    assert (
        "| Llama 96 | 96 | 132 | 256 | full | -7.22 (-7.2, -7.2) | -6.32 (-6.3, -6.3)"
        in page
    )
    assert page.count("(an estimate is missing)") == 6
    assert "Where layers are unequal, nothing is settled" in page
