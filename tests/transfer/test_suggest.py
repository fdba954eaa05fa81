"""suggest_lr: where its learning rates come from, how wide its interval is, which arguments raise
an error, and the command `rankaware suggest`.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rankaware_optim import (
    LawError,
    MuA,
    RankAwareError,
    Reference,
)
from rankaware_optim.cli import main
from rankaware_optim.inspection import inspect_model
from rankaware_optim.transfer import suggest_lr
from rankaware_optim.transfer._suggest import MARGIN, PUBLISHED

from ..helpers.adapters import peft_folder
from ..helpers.models import PlainLoRA, adapted
from ..helpers.optimizers import called, with_defaults

lora_references = st.builds(
    Reference,
    rank=st.integers(1, 4096),
    alpha=st.floats(0.5, 512),
    rslora=st.booleans(),
    init=st.sampled_from("AB"),
    fan_in=st.integers(16, 2**16),
)
full_references = st.builds(
    Reference, method=st.just("full"), fan_in=st.integers(16, 2**16)
)
references = lora_references | full_references


def middle(suggestion) -> float:
    """Return log2 of the middle of the interval."""
    return math.log2(suggestion.low * suggestion.high) / 2


def reach(suggestion) -> float:
    """Return how many octaves the ends of the interval are from its middle."""
    return math.log2(suggestion.high / suggestion.low) / 2


def test_embeddings_do_not_decide_the_init_or_the_width():
    """If embeddings are adapted beside other layers, the suggestion follows the other layers,
    although in PEFT A of an embedding starts at zero.
    """
    torch.manual_seed(0)
    linear = adapted("container")
    embeddings = [adapted("container", "embedding", init="B") for _ in range(2)]
    alone, both = suggest_lr(linear), suggest_lr(nn.Sequential(*embeddings, linear))
    assert both == alone
    assert both.reference == alone.reference


def test_adapted_embeddings_alone_have_no_suggestion():
    """If LoRA adapts only embeddings, suggest_lr raises an error that names them and says what to do."""
    with pytest.raises(LawError, match=r"only its embeddings.*ra\.calibrate"):
        suggest_lr(adapted("container", "embedding"))


# --- the learning rate ----------------------------------------------------------------------------------------------

# Each row is a rank, and log2 of the median of the published best learning rates of 35 models. Best rates at
# the edge of a grid are left out, which lowers the medians at the higher ranks.
MEDIANS = [(1, -12.4), (4, -12.0), (16, -11.7), (64, -11.3), (128, -11.1)]


@pytest.mark.parametrize(("rank", "median"), MEDIANS)
def test_published_medians_are_met(rank, median):
    """At the published configurations, the middle of the interval is within half an octave of the
    published median, which the interval contains.
    """
    found = suggest_lr(Reference(rank, 32, fan_in=4096), task="chat")
    assert middle(found) == pytest.approx(median, abs=0.5)
    assert found.low < 2.0**median < found.high


@given(reference=lora_references)
def test_the_law_moves_the_rate(reference):
    """From one LoRA configuration to another, the middle of the interval changes exactly by the
    law's multiplier.
    """
    moved = math.log2(MuA(tokens=8.0).multiplier(reference.as_factor(), PUBLISHED))
    octaves = middle(suggest_lr(reference)) - middle(suggest_lr(PUBLISHED))
    assert octaves == pytest.approx(moved, abs=1e-9)


@given(reference=references, task=st.sampled_from(["chat", "other", "rl"]))
def test_the_rate_leans_low_inside_its_band(reference, task):
    """The suggestion is positive and half an octave below the middle of its interval, or more for
    reinforcement learning with full finetuning.
    """
    found = suggest_lr(reference, task=task)
    assert 0 < found.low < found.lr < found.high
    below = middle(found) - math.log2(found.lr)
    if (reference.method, task) == ("full", "rl"):
        assert below > MARGIN
    else:
        assert below == pytest.approx(MARGIN)
    assert float(found) == found.lr


# Published best learning rates of full supervised finetuning, with the steps and the model's largest fan-in.
FULL_BEST = [
    (3e-5, 157, 9728),
    (5e-5, 175, 6144),
    (1.6e-5, 784, 18944),
    (2.5e-5, 200, 9728),
    (3.4e-5, 1000, 8960),
    (5e-6, 14670, 13824),
]


@pytest.mark.parametrize(("best", "steps", "width"), FULL_BEST)
def test_full_finetuning_starts_from_its_own_published_rates(best, steps, width):
    """For supervised full finetuning the interval contains the best learning rates that others
    published, and the width does not change the suggestion.
    """
    at = Reference(method="full", fan_in=width)
    found = suggest_lr(at, task="chat", steps=steps)
    assert found.low < best < found.high
    wider = suggest_lr(replace(at, fan_in=1.5 * width), task="chat", steps=steps)
    assert found.lr == wider.lr


def test_a_narrow_network_has_loras_rate_by_the_law():
    """For a narrow network, full finetuning's suggestion is converted from LoRA's, and at the width
    where published learning rates take over it does not jump.
    """
    at = Reference(method="full", fan_in=512)
    moved = math.log2(MuA(tokens=8.0).multiplier(at.as_factor(), PUBLISHED))
    octaves = middle(suggest_lr(at)) - middle(suggest_lr(PUBLISHED))
    assert octaves == pytest.approx(moved, abs=1e-9)
    rates = [suggest_lr(replace(at, fan_in=width)).lr for width in range(5000, 6500)]
    assert all(a >= b > 0.99 * a for a, b in pairwise(rates))


def test_full_finetuning_in_reinforcement_learning_quotes_the_lowest_rate():
    """For reinforcement learning with full finetuning, the interval contains the published best
    learning rates of GRPO, and the suggestion is near the lowest of them.
    """
    found = suggest_lr(Reference(method="full", fan_in=14336), task="rl")
    assert found.low < 7e-7 < found.lr < 2e-6
    assert found.high > 4e-5
    assert "ra.calibrate" in str(found)


def test_dpo_is_known_for_full_finetuning_only():
    """For DPO, suggest_lr has a suggestion for full finetuning, but raises an error for LoRA."""
    full = Reference(method="full", fan_in=11008)
    found = suggest_lr(full, task="dpo")
    for best in (8e-7, 1e-6, 2e-6):
        assert found.low < best < found.high
    with pytest.raises(LawError, match=r"DPO.*1e-5.*[Cc]alibrate"):
        suggest_lr(AT, task="dpo")


@pytest.mark.parametrize(("steps", "octaves"), [(195, 0), (780, 0), (3120, -0.8)])
def test_longer_runs_lower_the_rate(steps, octaves):
    """Four times the published 780 steps lower the middle of the interval by 0.8 octaves, fewer
    steps keep it, and both widen the interval.
    """
    plain, found = suggest_lr(PUBLISHED), suggest_lr(PUBLISHED, steps=steps)
    assert middle(found) - middle(plain) == pytest.approx(octaves, abs=1e-9)
    assert (reach(found) > reach(plain)) == (steps != 780)


@pytest.mark.parametrize("steps", [0, -780, math.nan, "780"])
def test_an_impossible_number_of_steps_is_an_error(steps):
    """suggest_lr names the number of steps that was passed if it is not a positive number."""
    with pytest.raises(
        RankAwareError,
        match=re.escape(f"steps must be a positive number, but it is {steps!r}"),
    ):
        suggest_lr(PUBLISHED, steps=steps)


# Plain LoRA's learning rate is divided by these: the root of the published factor times our own factor.
PISSA, OLORA = math.sqrt(10 / 0.88), math.sqrt(18 / 0.8)
LORA_GA, DORA = 18, math.sqrt(1.8 / 1.5)
FACTORS = [
    ({"init": "pissa"}, PISSA),
    ({"init": "pissa_niter_16"}, PISSA),
    ({"init": "olora"}, OLORA),
    ({"init": "lora_ga"}, LORA_GA),
    ({"init": "lora-ga"}, LORA_GA),
    ({"init": "eva"}, 1),
    ({"init": True}, 1),
    ({"dora": True}, DORA),
    ({"dora": True, "init": "pissa"}, DORA * PISSA),
]


@pytest.mark.parametrize(("options", "factor"), FACTORS)
def test_documented_inits_and_dora_have_their_factor(options, factor):
    """A nonzero init and DoRA divide the suggested learning rate by their factor and widen the
    interval, but PEFT's inits with B = 0 change nothing.
    """
    plain, found = suggest_lr(PUBLISHED), suggest_lr(PUBLISHED, **options)
    assert plain.lr / found.lr == pytest.approx(factor)
    assert (reach(found) > reach(plain)) == (factor > 1)


# In a published GRPO run at alpha 32, accuracy is flat between these learning rates, and collapses at twice
# the higher one.
FLAT = 3e-5, 1e-4


@pytest.mark.parametrize("rank", [1, 16, 256])
def test_a_published_grpo_learns_at_the_suggested_rate(rank):
    """For reinforcement learning with LoRA, the suggestion is among the learning rates at which a
    published run learned, and the interval contains all of them.
    """
    found = suggest_lr(Reference(rank, 32, fan_in=2048), task="rl")
    assert FLAT[0] < found.lr < FLAT[1]
    assert found.low < FLAT[0] < FLAT[1] < found.high
    assert "runs collapsed at 2e-4" in str(found)
    assert "schedule-free" not in str(found)


class WithPartCalledModel(nn.Module):
    """A model whose body is called `model`, beside other parts, as in most models of transformers."""

    def __init__(self, body, head):
        super().__init__()
        self.model, self.head = body, head


def test_a_model_whose_part_is_called_model_is_read_whole():
    """A model with a part called `model` is read as a whole, because only a trainer is replaced by
    its `model`.
    """
    model = WithPartCalledModel(nn.Linear(32, 32), nn.Linear(512, 4))
    full = Reference(method="full", fan_in=512)
    assert suggest_lr(model, method="full").lr == suggest_lr(full).lr
    towers = WithPartCalledModel(model_of((4, 64)), model_of((16, 64), (16, 64)))
    assert suggest_lr(towers).reference.rank == 16
    assert suggest_lr([towers]).reference.rank == 16


def test_the_hidden_size_may_be_stated():
    """The argument hidden_size replaces the width of a reference, and without any width the
    suggestion says that 4096 was assumed.
    """
    at = Reference(16, 32)
    stated = suggest_lr(at, hidden_size=2048)
    assert stated.lr == suggest_lr(replace(at, fan_in=2048)).lr
    assert stated.lr == suggest_lr(replace(at, fan_in=512), hidden_size=2048).lr
    assert stated.reference == at
    assert "hidden size is unknown, so 4096 was assumed" in str(suggest_lr(at))
    assert "unknown" not in str(stated)
    assert "largest fan-in is unknown" in str(suggest_lr(Reference(method="full")))


@pytest.mark.parametrize("value", [0, -1, math.nan, "4096", True])
def test_an_impossible_hidden_size_is_an_error(value):
    """An impossible hidden_size raises an error, and so does any hidden_size for full finetuning,
    which uses the largest fan-in.
    """
    with pytest.raises(RankAwareError, match="hidden_size is"):
        suggest_lr(AT, hidden_size=value)
    with pytest.raises(RankAwareError, match="largest fan-in"):
        suggest_lr(AT, method="full", hidden_size=4096)


# --- the interval ---------------------------------------------------------------------------------------------------

AT = Reference(rank=16, alpha=32, fan_in=4096)
WIDER = [
    (AT, replace(AT, rank=512, alpha=32)),
    (AT, replace(AT, rank=256, alpha=32)),
    (AT, replace(AT, alpha=256)),
    (AT, replace(AT, rslora=True)),
    (AT, replace(AT, fan_in=1024)),
    (replace(AT, fan_in=1024), replace(AT, fan_in=128)),
    (AT, replace(AT, fan_in=16384)),
    (AT, replace(AT, fan_in=None)),
    (AT, replace(AT, init="B")),
    (AT, Reference(method="full", fan_in=4096)),
]


@pytest.mark.parametrize(("near", "far"), WIDER)
def test_the_band_widens_with_distance(near, far):
    """The interval is wider for configurations that are farther from those of the published sweeps."""
    assert reach(suggest_lr(far)) > reach(suggest_lr(near)) + 0.005


# --- the optimizer --------------------------------------------------------------------------------------------------


MATCHED = {"settings": {"adjust_lr_fn": "match_rms_adamw"}}
OPTIMIZERS = [
    # the class, its options, and the documented range in multiples of AdamW's learning rate (None for an AdamW)
    (torch.optim.AdamW, {}, None),
    (type("Mine", (torch.optim.AdamW,), {}), {}, None),
    (torch.optim.NAdam, {}, (1, 1)),
    (called("Lion"), {}, (1 / 10, 1 / 2)),
    (called("AdamWScheduleFree"), {}, (1, 10)),
    (called("Muon"), MATCHED, (1, 1)),
    (with_defaults("Muon", "timm", **MATCHED["settings"]), {}, (1, 1)),
]


@pytest.mark.parametrize(("optimizer", "options", "span"), OPTIMIZERS)
def test_documented_rules_lead_to_other_optimizers(optimizer, options, span):
    """For another optimizer, the middle of the interval is AdamW's times the middle of the
    documented range, and the interval contains all of that range.
    """
    plain = suggest_lr(AT, task="chat")
    found = suggest_lr(AT, optimizer, task="chat", **options)
    least, most = span or (1, 1)
    octaves = middle(found) - middle(plain)
    assert 2**octaves == pytest.approx(math.sqrt(most * least))
    centre = 2 ** middle(plain)
    assert found.low <= centre * least <= centre * most <= found.high
    assert (reach(found) > reach(plain)) == (span is not None)
    assert ("the suggestion uses the middle" in str(found)) == (span is not None)


# --- models ---------------------------------------------------------------------------------------------------------


def model_of(*pairs: tuple[int, int], init: str = "A", width: int = 64) -> nn.Module:
    """Return a model of PlainLoRA layers, one for each (rank, fan-in)."""
    return nn.ModuleList(
        PlainLoRA(nn.Linear(n, width, bias=False), r, 2.0, init) for r, n in pairs
    )


@pytest.mark.parametrize("init", "AB")
def test_a_model_is_answered_at_its_own_configuration(init):
    """The suggestion for a model uses the model's most common rank, scaling, init and fan-in."""
    model = model_of((8, 64), (8, 64), (4, 256), init=init)
    found = suggest_lr(model)
    assert found.reference == Reference(rank=8, alpha=16, init=init)
    assert found.configuration.endswith(", hidden size 64")
    assert found.lr == suggest_lr(replace(found.reference, fan_in=64)).lr
    assert suggest_lr(inspect_model(model)) == found


def test_full_finetuning_takes_the_largest_fan_in():
    """With method="full", the suggestion uses the largest fan-in of a model, a survey or a
    reference.
    """
    full = Reference(method="full")
    found = suggest_lr(
        nn.Sequential(nn.Linear(32, 128), nn.Linear(128, 32)), method="full"
    )
    assert found.reference == full
    assert found.lr == suggest_lr(replace(full, fan_in=128)).lr
    assert "converted from LoRA" in str(found)
    of_lora = inspect_model(model_of((8, 64), (8, 256)))
    wanted = suggest_lr(replace(full, fan_in=256)).lr
    for model in (of_lora, Reference(8, 16, fan_in=256)):
        assert suggest_lr(model, method="full", init="pissa").lr == wanted


def test_neither_factor_at_zero_asks_for_the_init():
    """Adapters in which neither A nor B is zero raise an error unless init= is passed."""
    model = model_of((8, 64))
    plain = suggest_lr(model).lr
    nn.init.ones_(model[0].lora_B)
    with pytest.raises(LawError, match=r"neither A nor B.*'pissa'"):
        suggest_lr(model)
    assert suggest_lr(model, init="pissa").lr == pytest.approx(plain / PISSA)


@pytest.mark.parametrize("init", [None, "A"])
def test_pairs_without_a_law_have_no_suggestion(init):
    """KaSA adapters, which have a diagonal between A and B, raise an error that names them,
    whatever init= is passed.
    """
    model = nn.Sequential(adapted("container"))
    model[0].lora_diag = nn.ParameterDict({"default": torch.ones(4)})
    with pytest.raises(LawError, match="no scaling law covers its KaSA adapters"):
        suggest_lr(model, init=init)


def test_a_magnitude_is_read_as_dora():
    """A DoRA magnitude in the model lowers the suggested learning rate, unless dora=False is
    passed.
    """
    model = model_of((8, 64))
    plain = suggest_lr(model)
    model[0].lora_magnitude_vector = nn.Parameter(torch.ones(64))
    assert plain.lr / suggest_lr(model).lr == pytest.approx(DORA)
    assert suggest_lr(model, dora=False) == plain


FULL = Reference(method="full")
REFUSED = [
    (AT, {"init": "corda"}),
    (AT, {"init": False}),
    (AT, {"method": "Full"}),
    (AT, {"task": "code"}),
    (16, {}),
    (nn.Linear(4, 4), {}),
    (AT, {"optimizer": int}),
    (AT, {"optimizer": "prodigy"}),
    *(
        (AT, {"optimizer": kind})
        for kind in ("SGD", torch.optim.SGD, torch.optim.Adagrad, called("LAMB"))
    ),
    (AT, {"optimizer": called("Muon")}),
    (AT, {"optimizer": called("Muon"), "settings": {"adjust_lr_fn": "original"}}),
]


@pytest.mark.parametrize(("model", "options"), REFUSED)
def test_what_has_no_published_rate_is_refused(model, options):
    """An optimizer that no documented rule relates to AdamW, an unknown init and impossible
    arguments raise one of our errors.
    """
    with pytest.raises(RankAwareError):
        suggest_lr(model, **options)


# --- the command ----------------------------------------------------------------------------------------------------


def call(*arguments):
    return CliRunner().invoke(main, ["suggest", *map(str, arguments)])


COMMANDS = [
    (
        "--rank 16 --alpha 32 --init B --task rl",
        Reference(16, 32, init="B"),
        {"task": "rl"},
    ),
    (
        "--rank 16 --alpha 32 --rslora --hidden-size 768 --init pissa --dora --steps 4000 --optimizer Lion",
        Reference(16, 32, rslora=True, fan_in=768),
        {"init": "pissa", "dora": True, "steps": 4000, "optimizer": "Lion"},
    ),
    ("--full --fan-in 4096", replace(FULL, fan_in=4096), {}),
]


@pytest.mark.parametrize(("arguments", "reference", "options"), COMMANDS)
def test_the_command_says_what_the_call_does(arguments, reference, options):
    """`rankaware suggest` prints the same suggestion that suggest_lr returns for the same
    arguments.
    """
    done = call(*arguments.split())
    assert done.exit_code == 0, done.output
    assert done.output.strip() == str(suggest_lr(reference, **options))


OF_32 = Reference(8, 16, fan_in=32)
FOLDERS = [
    ({"init_lora_weights": True}, (), OF_32, {}),
    ({"init_lora_weights": "pissa"}, (), OF_32, {"init": "pissa"}),
    ({"init_lora_weights": "corda"}, ("--init", "A"), OF_32, {}),
    ({"use_rslora": True}, (), replace(OF_32, rslora=True), {}),
    ({"init_lora_weights": "pissa"}, ("--full",), replace(FULL, fan_in=32), {}),
]


@pytest.mark.parametrize(("config", "arguments", "reference", "options"), FOLDERS)
def test_the_command_reads_an_adapter(config, arguments, reference, options, tmp_path):
    """For an adapter's folder the command reads the configuration from its files, and says so if
    they declare no init.
    """
    done = call(peft_folder(tmp_path, **config), *arguments)
    assert done.exit_code == 0, done.output
    rate = suggest_lr(reference, **options)
    assert re.search(rf"^lr +{rate.lr:.3g}$", done.output, re.MULTILINE)
    said = "The init could not be read" in done.output
    assert said == ("init_lora_weights" not in config)
