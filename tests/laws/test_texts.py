"""A law by a text: the same words mean the same law wherever a law is named."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

import rankaware_optim as ra
from rankaware_optim import Constant, LawError, LoRAPlus, MuA, Power
from rankaware_optim.cli import main
from rankaware_optim.laws import get_law
from rankaware_optim.optimizer import effective_lr

from ..helpers.models import PlainLoRA

TEXTS = [
    ("mua", MuA()),
    ("mua-paper", MuA(tokens=None)),
    (" mua ? tokens = 16 ", MuA(tokens=16.0)),
    ("mua?tokens=none,ratio=2", MuA(tokens=None, ratio=2.0)),
    ("mua?family=spectral", MuA(family="spectral")),
    ("power?to_full=True", Power(to_full=True)),
    ("power?to_full=false", Power(to_full=False)),
    ("loraplus?ratio=4", LoRAPlus(4.0)),
    ("power?exponent=-1,law=constant", Power(exponent=-1.0, law=Constant())),
    (
        "power?exponent=-1,law=(mua?tokens=4,ratio=2)",
        Power(exponent=-1.0, law=MuA(tokens=4.0, ratio=2.0)),
    ),
    (
        "power?law=(power?exponent=1,law=(mua?tokens=4))",
        Power(law=Power(exponent=1.0, law=MuA(tokens=4.0))),
    ),
    (
        "power?law=(mua?tokens=4,ratio=2),exponent=-1",
        Power(exponent=-1.0, law=MuA(tokens=4.0, ratio=2.0)),
    ),
    ("rankaware_optim:MuA", MuA()),
    ("rankaware_optim.laws:LoRAPlus?ratio=2", LoRAPlus(2.0)),
    ("test_law_module:HALF", Power(exponent=-0.5)),
    ("test_law_module:HALF?exponent=2", Power(exponent=2.0)),
]


@pytest.mark.parametrize(("text", "law"), TEXTS)
def test_a_law_is_named_by_text(text, law, own_module):
    """A registered name or package.module:Class, with parameters after "?"."""
    assert get_law(text) == law
    assert get_law(law) is law


def test_a_law_that_is_no_dataclass_is_named_too(own_module):
    """It has no parameters, so its text is its name alone."""
    assert get_law("test_law_module:Bare").name == "bare"


BAD_TEXTS = [
    ("unheard-of", "Unknown law 'unheard-of'.*Known are"),
    ("", "Unknown law ''"),
    (7, "not 7"),
    ("mua?token=16", "no parameter 'token'.*It has tokens"),
    ("mua?tokens", "no parameter 'tokens'.*as in"),
    ("mua?tokens=-1", "tokens=-1"),
    ("mua?tokens=many", "tokens='many'"),
    ("constant?x=1", "no parameter 'x'.*It has none"),
    ("power?law=unheard-of", "Unknown law 'unheard-of'"),
    ("nowhere_at_all:Law", "cannot be loaded: No module named 'nowhere_at_all'"),
    ("rankaware_optim:NoSuchLaw", "cannot be loaded.*NoSuchLaw"),
    ("rankaware_optim:Reference", "cannot be loaded"),
    ("rankaware_optim:Survey", "is a Survey, not a Law.*Derive it"),
    ("test_law_module:WORD", "is a str, not a Law"),
    ("test_law_module:Needs", "cannot be loaded.*what"),
    ("test_law_module:Bare?x=1", "no parameter 'x'.*It has none"),
    ("test_broken_module:Law", "cannot be loaded: no weights here"),
]


@pytest.mark.parametrize(("text", "message"), BAD_TEXTS)
def test_a_text_that_names_no_law_is_refused(text, message, own_module):
    """Unknown names, parameters and modules are a law's errors, with what is known."""
    with pytest.raises(LawError, match=message):
        get_law(text)


def test_the_optimizer_and_convert_take_the_same_words():
    """A text with parameters, or of a law of one's own, is a law for the wrapper, for groups and for `convert_lr`."""
    model, text, law = (
        PlainLoRA(torch.nn.Linear(64, 64), 16),
        "mua?tokens=2",
        MuA(tokens=2.0),
    )
    options = {"lr": 1e-3, "tuned_at": ra.Reference(rank=4, alpha=4)}
    opts = [
        ra.RankAwareOptimizer(model, "adamw", law=named, **options)
        for named in (text, law, "mua")
    ]
    rates = [[effective_lr(group) for group in opt.param_groups] for opt in opts]
    assert rates[0] == rates[1] != rates[2]
    assert [
        g["lr"] for g in ra.rank_aware_param_groups(model, law=text, **options)
    ] == rates[0]
    a, b = "r=4,alpha=4,fan_in=64", "r=64,alpha=64"
    assert float(ra.convert_lr(1e-3, from_=a, to=b, law=text)) == float(
        ra.convert_lr(1e-3, from_=a, to=b, law=law)
    )


@pytest.mark.parametrize("text", ["mua?tokens=2", "test_law_module:HALF"])
def test_every_command_takes_the_same_words(text, own_module):
    """`rankaware convert` moves a rate by a law with parameters, and by one in the folder one stands in."""
    a, b = "r=4,alpha=4,fan_in=64", "r=64,alpha=64"
    done = CliRunner().invoke(
        main, ["convert", "1e-3", "--from", a, "--to", b, "--law", text]
    )
    assert done.exit_code == 0, done.output
    wanted = ra.convert_lr(1e-3, from_=a, to=b, law=text)
    assert f"{float(wanted):.4g}" in done.output
