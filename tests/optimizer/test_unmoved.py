"""Steps that rounding loses in low-precision weights: the measured share of unchanged weights, and
when the user is warned.
"""

from __future__ import annotations

import warnings
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, lr_scheduler

from rankaware_optim import RankAwareOptimizer, RankAwareWarning
from rankaware_optim.optimizer._rates import EPSILON_AT
from rankaware_optim.optimizer._unmoved import (
    ENTRIES,
    STD,
    SameRate,
    rounding,
    unmoved_share,
)

from ..helpers.models import mlp
from ..helpers.optimizers import called

BF16 = torch.bfloat16

# --- the share of unchanged weights ---------------------------------------------------------------------------------

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def stays(bits: int, step: Fraction, dtype: torch.dtype) -> list[bool]:
    """Return whether the non-negative number with these bits stays unchanged by a step up, and by a step down."""
    kind = BITS[dtype.itemsize]

    def value(number: int) -> Fraction:
        return Fraction(torch.tensor(number, dtype=kind).view(dtype).double().item())

    here, even = value(bits), bits % 2 == 0
    gaps = [value(bits + 1) - here, here - value(bits - 1) if bits else value(1)]
    return [step < gap / 2 or (even and step == gap / 2) for gap in gaps]


def by_fractions(values: torch.Tensor, step: float) -> float:
    """Return the share of unchanged entries, computed in exact fractions from the neighbouring numbers."""
    positive = values.double().abs().to(values.dtype)
    bits = positive.view(BITS[values.dtype.itemsize]).tolist()
    of_each = [stays(number, Fraction(step), values.dtype) for number in bits]
    return sum(map(sum, of_each)) / (2 * len(of_each))


def normal(count: int = 200) -> torch.Tensor:
    return STD * torch.randn(count, generator=torch.Generator().manual_seed(1))


VALUES = {
    "normal": normal(),
    "ones": torch.ones(3),
    "zeros": torch.zeros(3),
    "powers of two": 2.0 ** -torch.arange(12.0),
    "small": 1e-4 * normal(),
    "large": 20 / STD * normal(),
}
DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", VALUES)
def test_the_share_is_that_of_exact_fractions(kind, dtype):
    """The share of unchanged weights is exact: a weight stays if the step is below half the
    distance to its neighbour, or exactly half and the weight is even.
    """
    values = VALUES[kind].to(getattr(torch, dtype))
    # In bfloat16, 2^-9 is half of the distance from 1 to the number below, and 2^-8 to the one above.
    for step in (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 2.0**-9, 2.0**-8, 0.1):
        step = torch.tensor(step).item()
        assert unmoved_share(values, step) == by_fractions(values, step), step
        assert unmoved_share(values, torch.tensor(step)) == by_fractions(values, step)


# --- the warning ----------------------------------------------------------------------------------------------------


def network(dtype: torch.dtype = BF16) -> nn.Sequential:
    """Return two layers of standard deviation 0.02 with a norm between them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.weight, std=STD)
    return model.to(dtype)


def full(params, lr: float, kind=AdamW, **settings):
    return RankAwareOptimizer(params, kind, lr=lr, method="full", **settings)


def steps(opt, model: nn.Module, count: int = 3, scheduler=None) -> list[str]:
    """Run `count` steps and return the warnings that they gave."""
    dtype = next(model.parameters()).dtype
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RankAwareWarning)
        for _ in range(count):
            model(x).square().mean().backward()
            opt.step()
            opt.zero_grad()
            if scheduler is not None:
                scheduler.step()
    return [str(w.message) for w in caught if w.category is RankAwareWarning]


def test_a_bfloat16_model_that_learns_nothing_is_said_once():
    """If a bfloat16 model learns nothing, the report and the first step say so with three remedies,
    and later steps are silent.
    """
    model = network()
    opt = full(model, 1e-5)
    (line,) = opt.report().unmoved
    share = unmoved_share(torch.cat([model[0].weight, model[2].weight]), 1e-5)
    assert line.startswith(
        f"At a learning rate of 1e-05, {100 * share:.0f} % of the weights in 0.weight and 1 more do"
        " not change in a step, because the change is too small for bfloat16 and is rounded"
        " to zero. "
    )
    cures = ("float32 and train under autocast", "Kahan summation", "stochastic round")
    assert [cure for cure in cures if cure not in line] == []
    printed = str(opt.report())
    assert "check: At a learning rate of 1e-05" in printed
    assert steps(opt, model) == [line]
    assert steps(opt, model) == []


def adapters(dtype: torch.dtype) -> nn.Module:
    return mlp((4, 8), width=64, head=False, dtype=dtype)


def frozen_by_rate():
    """Return an optimizer of a bfloat16 layer at learning rate zero, beside one in float32."""
    still, moving = network(), network(torch.float32)
    groups = [{"params": [model[0].weight]} for model in (still, moving)]
    opt = full(groups, 1e-5, model=[still, moving])
    opt.param_groups[0]["lr"] = 0.0
    return opt


SILENT = {
    "a rate that moves bfloat16": lambda: full(network(), 1e-3),
    "float32": lambda: full(network(torch.float32), 1e-6),
    "float16 has three bits more": lambda: full(network(torch.float16), 1e-4),
    "gradients, not signs": lambda: full(network(), 1e-5, SGD),
    "a rate of zero": frozen_by_rate,
    "adapters in float32": lambda: RankAwareOptimizer(
        adapters(torch.float32), AdamW, lr=1e-5
    ),
}


@pytest.mark.parametrize("case", SILENT)
def test_what_moves_is_silent(case):
    """There is no warning if the weights move, or if the size of a step does not follow from the
    learning rate, as with SGD.
    """
    opt = SILENT[case]()
    assert opt.report().unmoved == ()
    for group in opt.param_groups:
        for param in group["params"]:
            param.grad = torch.randn_like(param)
    opt.step()


def test_the_rate_is_the_groups_own():
    """The warning names the group's learning rate after multiplication, and ignores frozen weights."""
    model = adapters(BF16)
    model.layer1.lora_A.requires_grad_(False)
    params = [model.layer0.lora_A, model.layer1.lora_A]
    opt = RankAwareOptimizer(
        params, AdamW, model=model, lr=1e-5, tuned_at="r=256,alpha=256"
    )
    rate = opt.rates.groups[0].lr
    assert rate > 2e-5
    (line,) = opt.report().unmoved
    assert line.startswith(f"At a learning rate of {rate:.3g}, ")
    assert " in layer0.lora_A do not change in a step" in line


def test_norms_do_not_count_beside_matrices():
    """Norm weights that do not change in bfloat16 give a warning only if nothing but norms trains."""
    model = network()
    assert full(model, 1e-3).report().unmoved == ()
    norms = {"norm.weight": torch.ones(8, dtype=BF16)}
    assert rounding([SameRate(norms, 1e-3)]).startswith(
        "At a learning rate of 0.001, 100 %"
    )
    weight = {"weight": normal(64).view(8, 8).to(BF16)}
    assert rounding([SameRate(norms, 1e-3), SameRate(weight, 1e-3)]) == ""


def test_the_reading_is_a_sample_of_all():
    """Only a sample of a large tensor is read, and the share in the sample agrees with the share in
    the whole tensor.
    """
    wide = STD * torch.randn(
        257, 64 * ENTRIES // 257, generator=torch.Generator().manual_seed(3)
    )
    wide[:, 0] = 1.0  # one column of ones among many normal columns
    parts = {"wide": wide.to(BF16), "small": torch.ones(2, 2, dtype=BF16)}
    said = rounding([SameRate(parts, 1e-5)])
    share = unmoved_share(parts["wide"], 1e-5)
    assert abs(int(said.split("1e-05, ")[1].split(" %")[0]) / 100 - share) < 0.02
    width = 4096  # a stride as wide as a row would read one column only
    column = torch.zeros(ENTRIES // 2, width)
    column[:, 0] = 1.0
    assert rounding([SameRate({"column": column.to(BF16)}, 1e-5)]) == ""


class Stored(torch.Tensor):
    """A parameter whose values cannot be read as ordinary numbers, like those of a quantized
    parameter.
    """

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Stored:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, requires_grad=True
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(func)


class Sharded(Stored):
    def to_local(self) -> torch.Tensor:
        return self.inner


def test_what_cannot_be_read_is_left_out():
    """Quantized, integer, empty and meta tensors are skipped, and of a sharded tensor the local
    values are read.
    """
    weight = torch.ones(4, 4, dtype=BF16)
    unread = {
        "stored": Stored(weight),
        "whole": torch.ones(4, 4, dtype=torch.int8),
        "empty": torch.ones(0, 4, dtype=BF16),
        "meta": weight.to("meta"),
    }
    assert rounding([SameRate(unread, 1e-5)]) == ""
    sharded = SameRate({**unread, "sharded": Sharded(weight)}, 1e-5)
    assert " 100 % of the weights in sharded do not change" in rounding([sharded])


# --- warm-up --------------------------------------------------------------------------------------------------------


def linear(opt):
    return lr_scheduler.LinearLR(opt, start_factor=1e-4, total_iters=50)


def one_cycle(peak):
    return lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=peak, total_steps=100)


def by_hand(opt):
    """Start a warm-up that the training loop writes itself, without a scheduler."""
    for group in opt.param_groups:
        group["lr"] = group["lr"] / 1000


def by_hand_from_zero(opt):
    for group in opt.param_groups:
        group["lr"] = 0.0


WARM_UPS = [
    # the learning rate of the optimizer, the warm-up, and whether there is a warning
    (1e-3, linear, False),
    (1e-5, one_cycle(1e-3), False),
    (1e-3, by_hand, False),
    (1e-3, by_hand_from_zero, False),
    (1e-5, linear, True),
    (1e-3, one_cycle(1e-5), True),
    (1e-5, by_hand, True),
    (1e-5, by_hand_from_zero, True),
]


@pytest.mark.parametrize(("lr", "warm_up", "is_said"), WARM_UPS)
def test_a_warm_up_is_judged_by_its_peak(lr, warm_up, is_said):
    """During a warm-up, the warning depends on the learning rate to which the warm-up leads, not on
    the small ones at its start.
    """
    model = network()
    opt = full(model, lr)
    scheduler = warm_up(opt)
    assert len(steps(opt, model, scheduler=scheduler)) == is_said
    if scheduler is not None:
        assert len(opt.report().unmoved) == is_said


# --- remedies -------------------------------------------------------------------------------------------------------

CURES = [
    # a setting, its value, the weights' dtype, and whether there is a warning
    ("kahan_sum", None, BF16, False),
    ("kahan_sum", None, torch.float16, False),
    ("kahan_sum", False, BF16, True),
    ("bf16_stochastic_round", True, BF16, False),
    ("bf16_stochastic_round", True, torch.float16, True),
    ("stochastic_rounding", True, BF16, False),
    ("master_byte_width", 3, BF16, False),
]


@pytest.mark.parametrize(("setting", "value", "dtype", "is_said"), CURES)
@pytest.mark.parametrize("holder", ["group", "optimizer"])
def test_an_optimizer_that_keeps_small_steps_is_not_warned_of(
    setting, value, dtype, is_said, holder
):
    """Kahan summation, stochastic rounding and float32 master weights prevent the warning, whether
    a group or the optimizer has the setting.
    """
    model = network(dtype)
    kind = type("AdamW", (AdamW,), {setting: value} if holder == "optimizer" else {})
    own = {setting: value} if holder == "group" else {}
    groups = [{"params": list(model.parameters()), **own}]
    opt = full(groups, 1e-6, kind, model=model)
    assert len(opt.report().unmoved) == is_said
    assert len(steps(opt, model)) == is_said


@pytest.mark.parametrize(("name", "is_said"), [("Lion", True), ("Lamb", False)])
def test_other_sign_like_optimizers_are_read_too(name, is_said):
    """Lion is checked, because its step is its learning rate, but Lamb is not, because its step is
    a share of the weight.
    """
    opt = full(network(), 1e-5, called(name))
    assert len(opt.report().unmoved) == is_said


# --- Adam's epsilon -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True])
def test_gradients_as_small_as_epsilon_are_said(amsgrad):
    """If gradients are as small as Adam's epsilon, which halves the steps, the report says so at
    once, and one warning follows at step 100.
    """
    model = network(torch.float32)
    opt = full(model, 1e-3, amsgrad=amsgrad)
    assert opt.report().unmoved == ()
    said = []
    for _ in range(2 * EPSILON_AT):
        for param in model.parameters():
            param.grad = torch.full_like(param, 1e-8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RankAwareWarning)
            opt.step()
        said.append(len(caught))
        (line,) = opt.report().unmoved
        assert line.startswith(
            "Adam's epsilon of 1e-08 makes the steps of 0.weight and 5 more smaller by 50 %,"
        )
    assert "eps=1e-12" in line
    again = full(model, 1e-3, amsgrad=amsgrad)
    again.load_state_dict(opt.state_dict())
    again.step()  # a resumed run has moments at its first step
    assert [number for number, count in enumerate(said, 1) if count] == [EPSILON_AT]


def test_epsilon_of_another_rule_is_not_read():
    """Optimizers that use epsilon in another way than Adam, such as CAME, are not checked for small
    gradients.
    """
    model = network(torch.float32)
    kind = type("CAME", (AdamW,), {"__module__": "came_pytorch"})
    opt = full(model, 1e-3, kind, eps=1.0)
    assert steps(opt, model, 1) == []
    assert opt.report().unmoved == ()


def test_usual_gradients_are_no_matter_of_epsilon():
    """Gradients of the usual size give no warning about epsilon, and neither does A, whose first
    gradients are zero.
    """
    model = network(torch.float32)
    opt = full(model, 1e-3)
    assert steps(opt, model, EPSILON_AT) == []
    assert opt.report().unmoved == ()
    model = adapters(torch.float32)
    opt = RankAwareOptimizer(model, AdamW, lr=1e-3)
    assert steps(opt, model, 1) == []
    assert opt.report().unmoved == ()
