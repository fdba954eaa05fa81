"""Measures how far an optimizer moves each LoRA matrix under constant gradients, and in which form.

The form says what the entries of a displacement have in common: equal sizes (sign-like), equal
singular values (spectral), or the direction of the gradient (gradient-like).
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, ClassVar, NamedTuple

import numpy
import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from torch.optim import Optimizer

from rankaware_optim import Law, RankAwareOptimizer

from ...helpers.models import mlp, same
from .by_hand import Case, parts
from .cases import CASES, CLASSES, NO_STEP, P

# Some versions of Muon train matrices as thin as rank 2 with Adam.
TIMES = {2: 0.25, 8: 1.0, 16: 4.0}  # of the base learning rate, by rank
WIDTH, STEPS, GRADIENT = 32, 12, 0.1
MOST = 0.1  # the largest error of a displacement, as a fraction of it
# The largest relative spread of values that count as equal. Muon's iteration leaves a spread
# of 0.2 in its singular values.
ALIKE = 0.3

# Classes whose steps are not proportional to the learning rates of their groups, and why.
NOT_BY_RATE = {
    **dict.fromkeys(
        (
            *("torch_optimizer.MADGRAD", P + "MADGRAD", "timm.optim.MADGRAD"),
            "madgrad.MADGRAD",
        ),
        "moves by the rate to the power 2/3",
    ),
    P + "AdaGO": "its step is never below its eps",
    "heavyball.HyperBallAdamW": "keeps the weights' norm, of zeros too",
    "heavyball.LaPropOrtho": "steps at right angles to the weights",
    "heavyball.MSAMLaProp": "its perturbation stays in the weights",
    "heavyball.Scion": "puts the weights on a ball first",
    "torchium.optimizers.AdamP": "projects what is along the weights out of a step",
    "torchium.optimizers.FTRL": "makes the weights from its sums, not by steps",
    P + "AvaGrad": "divides by a norm over its group",
    P + "BSAM": "its perturbation stays in the weights",
    P + "Gravity": "draws a first velocity by one over the rate",
    P + "Nero": "projects the weights on a sphere first",
    P + "SRMM": "takes the weights' average for them, which starts at zero",
    P + "SaRA": "trains the smallest weights only",
    **dict.fromkeys(
        (
            f"bitsandbytes.optim.{name}{bits}"
            for name in ("LAMB", "LARS")
            for bits in ("", "8bit", "32bit")
        ),
        "never moves a factor of zeros",
    ),
}
# Classes whose steps under constant gradients do not have the form of their family, and why.
_FACTORED = "estimates the second moment by rows and columns"
_STARTS = "starts as SGD, until its second moment is well known"
_PRECONDITIONED = (
    "is spectral here; in real steps the coordinate check finds Adam's form"
)
OF_ANOTHER_FORM = {
    **dict.fromkeys(
        (P + "CAME", "came_pytorch.CAME", P + "SM3", "adv_optm.SinkSGD_adv"), _FACTORED
    ),
    **dict.fromkeys(
        (
            "torch.optim.RAdam",
            "timm.optim.RAdamLegacy",
            "torch_optimizer.Ranger",
            P + "Ranger",
        ),
        _STARTS,
    ),
    **dict.fromkeys(
        (
            P + "Alice",
            P + "Conda",
        ),
        _PRECONDITIONED,
    ),
    P + "AdaSmooth": "has a second moment of a length that it measures",
    "timm.optim.AdaBelief": "a constant gradient has no variance",
    "torch_optimizer.RangerVA": "passes second moments through a softplus",
    P + "DeMo": "sends the largest entries of a cosine transform",
    **dict.fromkeys(
        (P + "Kron", "kron_torch.Kron"),
        "learns its preconditioner from the identity on",
    ),
    P + "ROSE": "normalises by rows",
    P + "SpectralSphere": "steps along a sphere of the weights' spectral norm",
    P + "SaRA": NOT_BY_RATE[P + "SaRA"],
    "torchium.optimizers.AdamP": NOT_BY_RATE["torchium.optimizers.AdamP"],
}
# The classes of all packages, and some of them with other settings.
JUDGED = {key: CASES[key] for key in CASES.keys() & CLASSES.keys() - NO_STEP}
for key, settings in {
    "adv_optm.Muon_adv": {},
    P + "MARS": {"mars_type": "shampoo"},
}.items():
    if key in CASES:
        JUDGED[f"{key} {settings}"] = Case(CASES[key].kind, settings)


@dataclass(frozen=True)
class ByRank(Law):
    """A scaling law that has the multipliers of `TIMES` for every family of optimizers."""

    name: ClassVar[str] = "by-rank"

    def multiplier(self, factor: Any, reference: Any) -> float:
        return TIMES[factor.rank]


def ours(case: Case, model: nn.Module) -> Any:
    params = model if case.groups != "muon" else case.own(model)
    options = case.rate | case.settings
    return RankAwareOptimizer(
        params, case.kind, model=model, law=ByRank(), tuned_at="r=8,alpha=8", **options
    )


def plain(case: Case, model: nn.Module) -> Any:
    """Return the native class at a single learning rate."""
    return case.kind(case.own(model), **case.rate, **case.settings)


def by_hand(case: Case, model: nn.Module) -> Any:
    """Return the native class with one group for each rank and role, at its multiplied learning rate."""
    cut = parts(case, model)
    opt = case.kind([group for _, group in cut], **case.rate, **case.settings)
    for group, (rank, _) in zip(opt.param_groups, cut, strict=True):
        group["lr"] = group["lr"] * TIMES.get(rank, 1.0)
    return opt


def model_of(case: Case) -> nn.Module:
    return mlp(tuple(TIMES), width=WIDTH, head=case.groups != "matrices", seed=3)


def displaced(case: Case, model: nn.Module, opt: Any) -> dict[str, torch.Tensor]:
    """Return how far each LoRA matrix moves in a few steps of a constant gradient."""
    factors = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    start = {name: param.detach().clone() for name, param in factors.items()}
    seeded(opt)
    closure = closure_of(case, model, opt)
    for _ in range(STEPS):
        closure()
        opt.step(*[closure] * case.closure)
    return {name: param.detach() - start[name] for name, param in factors.items()}


def seeded(opt: Any) -> None:
    """Seed all random generators, and put the optimizer into its training mode if it has one."""
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    if hasattr(opt, "train"):
        opt.train()


def closure_of(case: Case, model: nn.Module, opt: Any) -> Callable[[], torch.Tensor]:
    """Return a closure that sets the gradients of all parameters to constants."""
    gradients = gradients_of(model)

    @torch.enable_grad()
    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = torch.zeros(())
        for name, param in model.named_parameters():
            if name in gradients:
                loss = loss + (param * gradients[name]).sum()
                loss = loss + 1e-30 * param.square().sum()  # so that there is a Hessian
        loss.backward(create_graph=case.graph)
        for param in model.parameters() if case.sparse else ():
            if param.grad is not None:
                param.grad = param.grad.to_sparse()
        return loss.detach()

    return closure


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a gradient for each trainable parameter.

    The largest singular value of a matrix is 10 times the smallest.
    """
    source = torch.Generator().manual_seed(5)
    gradients = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        drawn = torch.randn(param.shape, generator=source)
        if param.dim() == 2:
            u, s, v = torch.linalg.svd(drawn, full_matrices=False)
            drawn = u @ torch.diag(torch.logspace(0, 1, len(s))) @ v
        gradients[name] = GRADIENT * drawn
    return gradients


def form_of(moved: torch.Tensor, gradient: torch.Tensor) -> str:
    """Return the form of a displacement.

    It is sign-like if all entries have about the same size, spectral if all singular values are
    about equal, gradient-like if it has the direction of the gradient, and otherwise "another".
    """
    if _spread(moved.abs()) < ALIKE:
        return "sign-like"
    if _spread(torch.linalg.svdvals(moved)) < ALIKE:
        return "spectral"
    along = cosine_similarity(moved.flatten(), gradient.flatten(), dim=0)
    return "gradient-like" if abs(float(along)) > 0.99 else "another"


def _spread(values: torch.Tensor) -> float:
    return float(values.std() / values.mean())


def wrong_rates(
    moved: Mapping[str, torch.Tensor], native: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Return the LoRA matrices that did not move in proportion to their learning rates.

    The value of each is the ratio of its displacement to the expected one.
    """
    wrong = {}
    for name, time in zip(
        moved, (t for t in TIMES.values() for _ in "AB"), strict=True
    ):
        ratio = float(moved[name].norm() / native[name].norm()) / time
        if not abs(ratio - 1) < MOST:
            wrong[name] = round(ratio, 3)
    return wrong


def other_forms(
    families: Mapping[str, str], native: Mapping[str, torch.Tensor], model: nn.Module
) -> dict[str, str]:
    """Return the LoRA matrices whose displacement does not have the form of their family, with the form
    that it has.
    """
    gradients, others = gradients_of(model), {}
    for name, moved in native.items():
        form = form_of(moved, gradients[name])
        judged = families[name] in ("sign-like", "spectral", "gradient-like")
        if judged and form != families[name]:
            others[name] = form
    return others


class Judged(NamedTuple):
    """How a class moves LoRA matrices.

    wrong_rates: the matrices whose displacements are not proportional to their learning rates.
    other_forms: the matrices whose displacements do not have the form of their family. as_by_hand:
    whether our optimizer moves all of them exactly as the native class with groups by hand.
    """

    wrong_rates: dict[str, float]
    other_forms: dict[str, str]
    as_by_hand: bool


def judged(case: Case) -> Judged:
    ends = {}
    for make in (plain, by_hand, ours):
        model = model_of(case)
        opt = make(case, model)
        ends[make] = displaced(case, model, opt)
    families = {name: row.family for row in opt.report().rows for name in row.names}
    return Judged(
        wrong_rates(ends[ours], ends[plain]),
        other_forms(families, ends[plain], model),
        same(ends[ours], ends[by_hand]),
    )


# --- another way to step --------------------------------------------------------------------------------------------


def ways_to_step(case: Case) -> dict[str, float]:
    """Return the public methods other than `step` that move a LoRA matrix by the learning rate.

    The value of each is how far it moves with our optimizer, divided by how far with groups by
    hand.
    """
    ways = {}
    for name in dir(case.kind):
        if name.startswith("_") or hasattr(Optimizer, name):
            continue
        try:
            once, twice = (moved_by(case, plain, name, times) for times in (1.0, 2.0))
            if twice > 1.5 * once:
                hand = moved_by(case, by_hand, name)
                ways[name] = moved_by(case, ours, name) / hand
        except Exception:  # not a method, or it takes other arguments
            continue
    return ways


def moved_by(case: Case, make: Any, name: str, times: float = 1.0) -> float:
    """Return how far a method moves the LoRA matrix of rank 2 after one step, at a multiple of the
    learning rate.
    """
    model = model_of(case)
    opt = make(case, model)
    seeded(opt)
    closure = closure_of(case, model, opt)
    closure()
    opt.step(*[closure] * case.closure)
    for group in opt.param_groups:
        group["lr"] = group["lr"] * times
    closure()
    param = model.get_parameter("layer0.lora_A")
    before = param.detach().clone()
    getattr(opt, name)(**arguments_of(getattr(opt, name), opt, param))
    return float((param.detach() - before).norm())


def arguments_of(method: Any, opt: Any, param: nn.Parameter) -> dict[str, Any]:
    """Return the arguments of a method that steps one parameter, by the names that packages use for them."""
    gindex, pindex, group = next(
        (gindex, pindex, group)
        for gindex, group in enumerate(opt.param_groups)
        for pindex, each in enumerate(group["params"])
        if each is param
    )
    known = {"p": param, "param": param, "group": group, "gindex": gindex}
    known |= {"pindex": pindex, "i": pindex}
    asked = inspect.signature(method).parameters
    return {name: known[name] for name in asked if name in known}


# --- dependence on the rank -----------------------------------------------------------------------------------------------------

# A pair in which B or A is zero, on a square layer, at alpha = rank and one learning rate. The
# more tokens a batch has, the less their gradients agree. Every step has the same batch or
# another one.
FROM, TO, SIDE, BATCHES, DRAWS, SHORT = 4, 64, 128, (1, 8, 128), 4, 6
REGIMES = tuple(product("AB", BATCHES, (True, False)))
SAME, TIMES_NEARER = (
    0.25,
    2.0,
)  # the first in octaves of output per octave of rank (rms)


class Regime(NamedTuple):
    """The matrix that starts at random values, the tokens in a batch, and whether all steps have
    the same batch.
    """

    drawn: str
    tokens: int
    agree: bool


@cache
def forms_over_rank() -> dict[str, list[float]]:
    """Return how the displacement of the output depends on the rank in each form.

    The values are measured with torch's own optimizers.
    """
    optim: Any = torch.optim
    by_form = {
        "sign-like": Case(optim.AdamW),
        "gradient-like": Case(optim.SGD),
        "spectral": Case(optim.Muon),
        "spectral, with match_rms_adamw": Case(
            optim.Muon, {"adjust_lr_fn": "match_rms_adamw"}
        ),
    }
    return {form: slopes_over_rank(case) for form, case in by_form.items()}


def distances_over_rank(case: Case) -> dict[str, float]:
    """Return how far a class is from each form, the nearest first.

    The unit is octaves of output per octave of rank (rms).
    """
    slopes, distances = slopes_over_rank(case), {}
    for form, others in forms_over_rank().items():
        pairs = zip(slopes, others, strict=True)
        squares = [(a - b) ** 2 for a, b in pairs if not math.isnan(a)]
        if len(squares) < len(slopes) / 2:
            raise ValueError("most regimes cannot be stepped")
        distances[form] = math.sqrt(sum(squares) / len(squares))
    return dict(sorted(distances.items(), key=lambda pair: pair[1]))


def family_of_distances(distances: Mapping[str, float]) -> str:
    """Return the family whose form is nearest.

    If it is more than 0.25 away, or not at least twice as near as the next one, return "unknown".
    """
    by_family: dict[str, float] = {}
    for form, distance in distances.items():
        by_family.setdefault(form.partition(",")[0], distance)
    (family, nearest), (_, next_one), *_ = by_family.items()
    is_found = nearest <= SAME and next_one >= TIMES_NEARER * nearest
    return family if is_found else "unknown"


def slopes_over_rank(case: Case) -> list[float]:
    """Return by how many octaves the displacement of the output grows per octave of rank, in every regime.

    The value is nan where the class cannot step.
    """
    octaves = math.log2(TO / FROM)
    slopes = []
    for regime in map(Regime._make, REGIMES):
        try:
            low, high = (output_moved(case, regime, rank) for rank in (FROM, TO))
            slopes.append(math.log2(high / low) / octaves)
        except TimeoutError:
            raise
        except Exception:  # for example an SVD of a gradient of rank 1
            slopes.append(math.nan)
    return slopes


def output_moved(case: Case, regime: Regime, rank: int) -> float:
    """Return the rms change of the output for the first batch, after a few steps."""
    squares = []
    for seed in range(DRAWS):
        source = torch.Generator().manual_seed(seed)
        a, b = pair_drawn(regime.drawn, rank, source)
        before = b.detach() @ a.detach()
        params = {
            "params": [a, b],
            **({"use_muon": True} if case.groups == "muon" else {}),
        }
        opt = case.kind([params], lr=1e-5, **case.settings)
        seeded(opt)
        for group in opt.param_groups:
            group["weight_decay"] = 0.0
        first = batch_drawn(regime.tokens, source)
        for _ in range(SHORT):
            x, g = first if regime.agree else batch_drawn(regime.tokens, source)
            a.grad, b.grad = b.detach().T @ g @ x.T, g @ (a.detach() @ x).T
            opt.step()
        moved = (b.detach() @ a.detach() - before) @ first[0]
        squares.append(float(moved.square().mean()))
    return math.sqrt(sum(squares) / len(squares))


def pair_drawn(
    drawn: str, rank: int, source: torch.Generator
) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A and B, one of them drawn as PEFT does it and the other zero."""
    a, b = torch.zeros(rank, SIDE), torch.zeros(SIDE, rank)
    param, fan_in = (a, SIDE) if drawn == "A" else (b, rank)
    param.normal_(std=fan_in**-0.5, generator=source)
    return nn.Parameter(a), nn.Parameter(b)


def batch_drawn(
    tokens: int, source: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random inputs, and random gradients of the outputs."""
    x, g = (torch.randn(SIDE, tokens, generator=source) for _ in "xg")
    return x, g
