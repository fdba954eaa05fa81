"""What the fingerprints are taken of: numbers that the package gives on fixed inputs, through its public names.

`BEHAVIOUR` has a function for each fingerprint that a script names in `RESTS_ON`. It returns cases, each a list of
numbers, texts or None by its name. Calibrations say how many trials they make: no default changes a case. Nothing here depends on the machine's threads, random generators or optional packages: models and losses are made up by
formula, and steps are taken in float64. A call that the package refuses counts as the name of its error.
"""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fingerprints import Value
from safetensors.torch import save_file
from torch import nn

import rankaware_optim as ra
from rankaware_optim.laws import get_law
from rankaware_optim.sweeps import fit_sweep

Cases = dict[str, list[Value]]
HERE = Path(__file__).parent
RECIPES, SWEEPS = HERE.parent / "recipes", HERE / "results" / "suite"


def tried(ask: Callable[[], Any]) -> Any:
    """What a call gives, or the name of the package's error that it raises."""
    try:
        return ask()
    except ra.RankAwareError as error:
        return type(error).__name__


# --- laws -----------------------------------------------------------------------------------------------------------

# The classes are made up: a law knows an optimizer by the name of its class and its settings.
FAMILIES: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "adam": (("AdamW", {}),),
    "sgd": (("SGD", {"momentum": 0.9}),),
    "muon": (("Muon", {}), ("Muon", {"adjust_lr_fn": "match_rms_adamw"})),
    "lamb": (("Lamb", {}),),
    "adafactor": (("Adafactor", {}), ("Adafactor", {"scale_parameter": False})),
    "unknown": (("Unheard", {}),),
}
DEFAULTS: dict[str, ra.Law] = {"falling": ra.Falling(), "mua": ra.MuA()}
LAWS: dict[str, ra.Law] = {
    **DEFAULTS,
    "mua-paper": get_law("mua-paper"),
    "mua of 2 tokens": ra.MuA(tokens=2.0),
    "mua of 64 tokens": ra.MuA(tokens=64.0),
    "falling by 1/2 above 4": ra.Falling(knee=4.0, power=0.5),
    "constant": ra.Constant(),
    "loraplus": ra.LoRAPlus(),
    "one rate, to the power of -1/2": ra.Power(exponent=-0.5, law=ra.Constant()),
    "to the power of 0.1, full at 0.8": ra.Power(exponent=0.1, full_factor=0.8),
    "to the power of -0.2, to full too": ra.Power(exponent=-0.2, to_full=True),
}
ORIGINS = {
    "r=16 alpha=16 Init[A] n=1024": ra.Reference(rank=16, alpha=16, fan_in=1024),
    "r=4 alpha=16 Init[B] n=256": ra.Reference(rank=4, alpha=16, init="B", fan_in=256),
    "full n=1024": ra.Reference(method="full", fan_in=1024),
}
RANKS, WIDTHS = (1, 8, 64, 256), (256, 4096)


def laws(family: str) -> Cases:
    """Multipliers of the laws, bound to the family's optimizers, over ranks, alphas, inits and widths."""
    cases: Cases = {}
    for name, settings in FAMILIES[family]:
        words = ", ".join(
            [name, *(f"{key}={value}" for key, value in settings.items())]
        )
        # of a base that no family knows
        kind = type(name, (torch.optim.Optimizer,), {})
        for title, law in (LAWS if family == "adam" else DEFAULTS).items():
            bound = law.bind(kind, settings)
            ratios = [bound.batch_multiplier(ratio) for ratio in (0.5, 16.0)]
            cases[f"{words}: {title}, batch"] = ratios
            for origin, reference in ORIGINS.items():
                for target, factors in targets().items():
                    case = f"{words}: {title}, {origin} to {target}"
                    cases[case] = [
                        bound.multiplier(factor, reference) for factor in factors
                    ]
    return cases


def targets() -> dict[str, list[ra.Factor]]:
    """Factors by what they have in common: ranks within widths, alpha as the rank and kept, both inits; then full."""
    found = {}
    for init in ("A", "B"):
        for alpha, scaling in (
            ("alpha=r", lambda rank: 1.0),
            ("alpha=16", lambda rank: 16.0 / rank),
        ):
            found[f"Init[{init}] {alpha}"] = [
                ra.Factor("w", "A", rank, width, width, scaling(rank), init)
                for width in WIDTHS
                for rank in RANKS
            ]
    found["B's rate"] = [
        ra.Factor("w", "B", 64, 1024, 1024, 1.0, init) for init in ("A", "B")
    ]
    found["full"] = [ra.Factor("w", "full", None, width, width) for width in WIDTHS]
    return found


# --- models ---------------------------------------------------------------------------------------------------------


def drawn(*shape: int) -> nn.Parameter:
    """Numbers that look random and are the same everywhere."""
    count = torch.arange(math.prod(shape), dtype=torch.float64)
    return nn.Parameter((torch.sin(12.9898 * (count + 1.0)) * 0.5).reshape(shape))


def zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, dtype=torch.float64))


class Owner(nn.Module):
    """A module with these members. Tensors that are no parameters become buffers."""

    def __init__(self, **members: Any) -> None:
        super().__init__()
        for name, value in members.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)


def held(**adapters: nn.Parameter) -> nn.ModuleDict:
    """Adapters by name, each as the weight of a module."""
    return nn.ModuleDict({name: weight(value) for name, value in adapters.items()})


def weight(value: nn.Parameter) -> Owner:
    return Owner(weight=value)


def owners() -> dict[str, nn.Module]:
    """Adapted layers as libraries store them, mostly of rank 4 and alpha 8, with 12 inputs and 20 outputs."""
    a, b = drawn(4, 12), zeros(20, 4)
    said = {"r": {"default": 4}, "scaling": {"default": 2.0}}
    two = {"r": {"one": 4, "two": 2}, "scaling": {"one": 2.0, "two": 0.5}}
    kernel, beside = drawn(4, 3, 3, 3), zeros(8, 4, 1, 1)
    kohya = {"lora_dim": 4, "scale": 2.0, "alpha": torch.tensor(8.0)}
    merged = {"r": 4, "scaling": 2.0, "enable_lora": [True, False, True]}
    turned = {"lora_right_weight": drawn(12, 4), "lora_left_weight": zeros(4, 20)}
    return {
        "peft": Owner(lora_A=held(default=a), lora_B=held(default=b), **said),
        "peft, Init[B]": Owner(
            lora_A=held(default=zeros(4, 12)), lora_B=held(default=drawn(20, 4)), **said
        ),
        "peft, two adapters": Owner(
            lora_A=held(one=a, two=drawn(2, 12)),
            lora_B=held(one=b, two=zeros(20, 2)),
            **two,
        ),
        "peft, convolution": Owner(
            lora_A=held(default=kernel), lora_B=held(default=beside), **said
        ),
        "loralib, merged": Owner(lora_A=drawn(8, 12), lora_B=b, **merged),
        "torchtune": Owner(lora_a=weight(a), lora_b=weight(b), rank=4, alpha=8.0),
        "kohya": Owner(lora_down=weight(a), lora_up=weight(b), **kohya),
        "megatron": Owner(linear_in=weight(a), linear_out=weight(b), dim=4, alpha=8),
        "deepspeed-chat": Owner(**turned, lora_scaling=2.0),
    }


def described(survey: ra.Survey) -> list[Value]:
    """What a survey says of its factors and of the model, flat."""
    lists = (survey.other, survey.frozen, survey.notes)
    said: list[Value] = [survey.width, survey.full_width(), *map(len, lists)]
    for each in survey.factors:
        said += [each.convention, each.role, each.rank, each.scaling, each.init]
        said += [each.kind, each.fan_in, each.fan_out]
    return said


def inspection() -> Cases:
    """Surveys of made-up models and files: convention, role, rank, scaling, init, kind and fans of every factor."""
    cases: Cases = {}
    for name, owner in owners().items():
        survey = ra.inspect_model(nn.Sequential(owner))
        cases[f"model: {name}"] = described(survey)
    full = nn.Sequential(
        nn.Linear(12, 20), nn.LayerNorm(20), nn.Conv2d(3, 8, 3), nn.Embedding(30, 8)
    )
    cases["model: full finetuning"] = described(ra.inspect_model(full, method="full"))
    with tempfile.TemporaryDirectory() as folder:
        for name, names in FILES.items():
            path = Path(folder) / f"{name}.safetensors"
            save_file(dict(zip(names, tensors(), strict=False)), path)
            cases[f"file: {name}"] = described(ra.inspect_file(path))
    return cases


FILES = {  # the names of A, B and, where a tool writes it, alpha
    "kohya": ("lora_q.lora_down.weight", "lora_q.lora_up.weight", "lora_q.alpha"),
    "diffusers": ("q.lora.down.weight", "q.lora.up.weight", "q.alpha"),
}


def tensors() -> tuple[torch.Tensor, ...]:
    a, b = drawn(4, 12).detach(), torch.zeros(20, 4, dtype=torch.float64)
    return a, b, torch.tensor(8.0)


# --- the wrapper ----------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A frozen square layer plus s·B·A."""

    def __init__(self, width: int, rank: int, scaling: float, init: str) -> None:
        super().__init__()
        self.weight = drawn(width, width).requires_grad_(False)
        self.lora_A = drawn(rank, width) if init == "A" else zeros(rank, width)
        self.lora_B = zeros(width, rank) if init == "A" else drawn(width, rank)
        self.r, self.scaling = rank, scaling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight + self.scaling * self.lora_B @ self.lora_A).T


def two_layers(init: str = "A") -> nn.Module:
    """Two adapted layers of 16 inputs, and a head that trains whole."""
    head = nn.Linear(16, 3, bias=False, dtype=torch.float64)
    head.weight = drawn(3, 16)
    return nn.Sequential(Layer(16, 4, 1.0, init), Layer(16, 8, 2.0, init), head)


AT = ra.Reference(rank=16, alpha=16)
WRAPPED: dict[str, dict[str, Any]] = {
    "at r=16": {"tuned_at": AT},
    "at its own": {},
    "by loraplus": {"tuned_at": AT, "law": "loraplus"},
}
STEPPED: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.01}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
}


def optimizer() -> Cases:
    """Groups, rates and three steps of AdamW and SGD."""
    cases: Cases = {}
    for init in ("A", "B"):
        for name, options in WRAPPED.items():
            case, model = f"AdamW, Init[{init}], {name}", two_layers(init)
            cases |= stepped(case, model, torch.optim.AdamW, options)
        for name, (kind, settings) in STEPPED.items():
            options = {"tuned_at": AT, **settings}
            cases |= stepped(f"{name}, Init[{init}]", two_layers(init), kind, options)
    return cases


def stepped(
    name: str, model: nn.Module, kind: Any, options: Mapping[str, Any]
) -> Cases:
    """Rates as trained with, and parameters after three steps, the second at half the base rate."""
    opt: Any = tried(lambda: ra.RankAwareOptimizer(model, kind, lr=0.01, **options))
    if isinstance(opt, str):
        return {name: [opt]}
    groups: list[Value] = []
    for group in opt.rates.groups:
        options = opt.param_groups[group.user_group]
        groups += [group.base_lr, group.multiplier]
        groups += [len(group.params), options.get("weight_decay")]
    train(model, opt)
    return {f"{name}: groups": groups, f"{name}: after three steps": norms(model)}


def train(model: nn.Module, opt: Any) -> None:
    x = drawn(8, 16).detach()
    for share in (1.0, 0.5, 1.0):
        for group in opt.param_groups:
            group["lr"] = 0.01 * share
        opt.zero_grad()
        model(x).sub(1.0).square().mean().backward()
        opt.step()


def norms(model: nn.Module) -> list[Value]:
    return [
        float(each.detach().norm()) for each in model.parameters() if each.requires_grad
    ]


# --- recipes --------------------------------------------------------------------------------------------------------


def rates(recipe: ra.Recipe, asked: Mapping[str, dict[str, Any]]) -> Cases:
    """A recipe's rate and band at each configuration asked for."""
    return {
        name: ends(tried(partial(recipe.at, **options)))
        for name, options in asked.items()
    }


def ends(rate: Any) -> list[Value]:
    """A rate and its band, or the name of an error."""
    return [rate] if isinstance(rate, str) else [rate.lr, rate.low, rate.high]


def recipes() -> Cases:
    """Rates of the shipped recipes over ranks, alphas and inits, and to full finetuning."""
    asked = {
        "its own": {},
        "r=1": {"rank": 1},
        "r=32": {"rank": 32},
        "r=32 alpha=16": {"rank": 32, "alpha": 16},
        "r=512": {"rank": 512},
        "Init[B]": {"init": "B"},
        "full": {"method": "full"},
    }
    cases: Cases = {}
    for path in sorted(RECIPES.glob("*.toml")):
        cases |= {
            f"{path.stem}, {name}": values
            for name, values in rates(ra.Recipe.load(path), asked).items()
        }
    return cases


# --- the fit and the search -----------------------------------------------------------------------------------------

ASKED = {
    "r=4": {"rank": 4},
    "r=16": {"rank": 16},
    "r=64": {"rank": 64},
    "full": {"method": "full"},
}
FITTED = (  # a sweep, the configuration, its init, and gamma of its effective multiplier r^-gamma
    ("image_generation", "Init[A], s = 1", "A", 0.0),
    ("vision_classification", "Init[A], s = 1/r", "A", 1.0),
    ("language", "Init[B], s = 1", "B", 0.0),
)


def fit() -> Cases:
    """Rates fitted to sweeps of the study, each with its runs of full finetuning."""
    cases: Cases = {}
    for domain, scheme, init, gamma in FITTED:
        rows = list(swept(domain, scheme, init, gamma))
        recipe = fit_sweep(rows, init=init, fan_in=256, full_fan_in=1024, steps=100)
        cases |= {
            f"{domain}, {scheme}, by drift, {name}": values
            for name, values in rates(recipe, ASKED).items()
        }
    return cases


def swept(
    domain: str, scheme: str, init: str, gamma: float
) -> Iterator[dict[str, Any]]:
    """A domain's runs of seed 0, of a configuration and of full finetuning, as rows of a sweep."""
    for line in (SWEEPS / f"{domain}.jsonl").read_text().splitlines():
        run = json.loads(line)
        if run.get("scheme") not in (scheme, "full") or run["seed"]:
            continue
        loss = math.inf if run["loss"] is None else run["loss"]
        place: dict[str, Any] = {"method": "full"}
        if rank := run["rank"]:
            place = {"rank": rank, "alpha": rank ** (1.0 - gamma), "init": init}
        yield {"lr": 2.0 ** run["x"], "loss": loss, **place}


CALIBRATED: dict[str, dict[str, Any]] = {
    "Init[A]": {},
    "Init[A], low best": {"best": -14.0},
    "Init[A], none learns at first": {"best": 3.0, "noise": 0.1},
    "Init[A], full runs in a budget": {"full_trials": 3, "budget": 700, "trials": None},
    "Init[A], three ranks": {"ranks": (4, 16, 64), "seeds": (0,), "trials": 12},
    "Init[B]": {"init": "B", "drift": -1 / 3},
    "Init[B], by falling": {
        "init": "B",
        "drift": -1 / 3,
        "law": ra.Falling(law=ra.MuA(tokens=8.0)),
    },
    "full finetuning": {"ranks": (None,), "trials": 8},
}
LONG: dict[str, dict[str, Any]] = {
    "Init[A], alpha kept, noisy, to 1000 steps": {
        "scaling": lambda rank: 16.0 / rank,
        "drift": 0.1,
        "noise": 0.05,
        "target_steps": 1000,
    },
}


@cache
def calibrated(name: str) -> tuple[ra.Recipe, list[Value]]:
    """The recipe of made-up runs, and the ranks, seeds and rates in the order in which they were tried."""
    options = (CALIBRATED | LONG)[name]
    return calibration_of(**options)


def calibration_of(
    *,
    best: float = -8.0,
    drift: float = -0.3,
    noise: float = 0.005,
    scaling: Callable[[int], float] = lambda rank: 1.0,
    init: str = "A",
    **options: Any,
) -> tuple[ra.Recipe, list[Value]]:
    """One calibration. At u octaves above a rank's best rate a run gains 1/(1 + u²/4). From 2.5 on it rises."""
    order: list[Value] = []

    def train(trial: Any) -> Iterator[float]:
        rank = trial.rank
        model = nn.Sequential(
            Layer(64, rank, scaling(rank), init) if rank else nn.Linear(64, 64)
        )
        trial.optimizer(model)
        order.extend([rank, trial.seed, trial.lr])
        u = math.log2(trial.lr) - best - drift * math.log2((rank or 64) / 16)
        for step in range(trial.steps):
            part = (step + 1) / trial.steps
            rough = noise * math.sin(78.233 * (step + 1) + 37.719 * (trial.seed + 1))
            falls, rises = -(part**0.5) / (1 + u * u / 4), part * (u - 2)
            yield 2.0 + rough + 0.5 * (rises if u > 2.5 else falls)

    given = {"ranks": (4, 64), "steps": 50, "trials": 16, **options}
    return ra.calibrate(train, torch.optim.AdamW, progress=False, **given), order


def search(names: Iterable[str]) -> Cases:
    """The rank, seed and rate of every trial of made-up calibrations, in their order."""
    return {name: calibrated(name)[1] for name in names}


def calibration(names: Iterable[str]) -> Cases:
    """The rates of the recipes that these calibrations return."""
    cases: Cases = {}
    for name in names:
        found = rates(calibrated(name)[0], ASKED)
        cases |= {f"{name}, {asked}": values for asked, values in found.items()}
    return cases


# --- the scores of the benchmarks -----------------------------------------------------------------------------------


def scores() -> Cases:
    """Best rates, noise floors and the regret an octave to either side, as the benchmarks read them from the study."""
    from study.optima import domains_in, optimum, ranks_in, schemes_in
    from study.regret import lost, noise_floor
    from study.runs_on_file import read

    cases: Cases = {}
    for store in sorted(SWEEPS.glob("*.jsonl")):
        done = read(store)
        for domain in domains_in(done):
            for scheme in schemes_in(done, domain):
                for rank in ranks_in(done, domain, scheme):
                    cell = (domain, scheme, rank)
                    best = optimum(done, cell).x
                    found = [best, noise_floor(done, cell)]
                    if best is not None:
                        found += [lost(done, cell, cell, best + u) for u in (-1.0, 1.0)]
                    cases[f"{domain}, {scheme}, rank {rank or 'full'}"] = found
    return cases


# --- rates without runs ---------------------------------------------------------------------------------------------


def transfer() -> Cases:
    """Suggested and converted rates."""
    cases: Cases = {}
    sites = {
        "r=16 alpha=32 n=4096": ra.Reference(rank=16, alpha=32, fan_in=4096),
        "r=64 alpha=64 n=1024": ra.Reference(rank=64, alpha=64, fan_in=1024),
        "r=8 alpha=16 Init[B] n=1024": ra.Reference(
            rank=8, alpha=16, init="B", fan_in=1024
        ),
        "full n=4096": ra.Reference(method="full", fan_in=4096),
    }
    for name, site in sites.items():
        for kind in ("adamw", "lion", "muon"):
            for task in ("chat", "other", "rl"):
                ask = partial(ra.suggest_lr, task=task, method=site.method)
                found = tried(partial(ask, site, kind))
                cases[f"suggested for {name}, {kind}, {task}"] = ends(found)
        for other, target in sites.items():
            rate = tried(partial(ra.convert_lr, 1e-3, from_=site, to=target))
            if isinstance(rate, ra.Rate):  # none is moved from one init to the other
                cases[f"the rate of {name} at {other}"] = [rate.lr]
    return cases


# --------------------------------------------------------------------------------------------------------------------

BEHAVIOUR: dict[str, Callable[[], Cases]] = {
    **{f"laws.{family}": partial(laws, family) for family in FAMILIES},
    "inspection": inspection,
    "optimizer.common": optimizer,
    "recipes": recipes,
    "fit": fit,
    "search.adam": partial(search, CALIBRATED | LONG),
    "calibration.adam": partial(calibration, CALIBRATED),
    "transfer": transfer,
    "scores": scores,
}


def taken(name: str) -> Cases:
    """A fingerprint's cases as the code gives them now, with plain numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ra.RankAwareWarning)
        cases = BEHAVIOUR[name]()
    return {case: [plain(value) for value in values] for case, values in cases.items()}


def plain(value: Any) -> Value:
    """A value that JSON can hold. Infinite rates become None, as those that are not there."""
    if value is None or isinstance(value, str):
        return value
    number = float(value)
    return number if np.isfinite(number) else None
