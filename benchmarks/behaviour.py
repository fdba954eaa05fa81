"""What the fingerprints are taken of: numbers that the package gives on fixed inputs, through its public names.

`BEHAVIOUR` has a function for each fingerprint. It returns cases, each a list of numbers, texts or None by its name.
Nothing here depends on the machine's threads, random generators or optional packages: models and losses are made up by
formula, and steps are taken in float64. A call that the package refuses counts as the name of its error.
"""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fingerprints import Value
from safetensors.torch import save_file
from torch import nn

import rankaware_optim as ra
from rankaware_optim.laws import (
    bound_law,
    checked_batch_multiplier,
    checked_multiplier,
    get_law,
)
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
    "lars": (("LARS", {"weight_decay": 0.01}),),
    "unknown": (("Unheard", {}),),
}
DEFAULTS = ("falling", "mua", "mua-paper")
LAWS = (
    *DEFAULTS,
    "mua?tokens=2",
    "mua?tokens=64",
    "falling?knee=4,power=0.5",
    "constant",
    "loraplus",
    "power?exponent=-0.5,law=constant",
    "power?exponent=0.1,full_factor=0.8",
    "power?exponent=-0.2,to_full=true",
)
ORIGINS = {
    "r=16 alpha=16 Init[A] n=1024": ra.Reference(rank=16, alpha=16, fan_in=1024),
    "r=4 alpha=16 Init[B] n=256": ra.Reference(rank=4, alpha=16, init="B", fan_in=256),
    "full n=1024": ra.Reference(method="full", fan_in=1024),
}
RANKS, WIDTHS = (1, 8, 64, 256), (256, 4096)


def named(name: str) -> type[torch.optim.Optimizer]:
    """An optimizer class of this name, which steps as SGD does."""
    return type(name, (torch.optim.SGD,), {})


def laws(family: str) -> Cases:
    """Multipliers of the laws, bound to the family's optimizers, over ranks, alphas, inits and widths."""
    cases: Cases = {}
    for name, settings in FAMILIES[family]:
        words = ", ".join(
            [name, *(f"{key}={value}" for key, value in settings.items())]
        )
        # of a base that no family knows
        kind = type(name, (torch.optim.Optimizer,), {})
        for text in LAWS if family == "adam" else DEFAULTS:
            law = tried(partial(bound_law, get_law(text), kind, settings))
            if isinstance(law, str):
                cases[f"{words}: {text}"] = [law]
                continue
            cases[f"{words}: {text}, batch"] = [
                checked_batch_multiplier(law, ratio) for ratio in (0.5, 16.0)
            ]
            for origin, reference in ORIGINS.items():
                for target, factors in targets().items():
                    case = f"{words}: {text}, {origin} to {target}"
                    cases[case] = [
                        tried(partial(checked_multiplier, law, each, reference))
                        for each in factors
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


def by_name(**adapters: nn.Parameter) -> nn.ModuleDict:
    return nn.ModuleDict(
        {name: Owner(weight=value) for name, value in adapters.items()}
    )


def owners() -> dict[str, nn.Module]:
    """Adapted layers as libraries store them, mostly of rank 4 and alpha 8, with 12 inputs and 20 outputs."""
    frozen = Owner(weight=nn.Parameter(torch.ones(20, 12), requires_grad=False))
    conv = nn.Conv2d(3, 8, 3)
    said = {"r": {"default": 4}, "scaling": {"default": 2.0}}
    return {
        "peft": Owner(
            lora_A=by_name(default=drawn(4, 12)),
            lora_B=by_name(default=zeros(20, 4)),
            **said,
        ),
        "peft, Init[B]": Owner(
            lora_A=by_name(default=zeros(4, 12)),
            lora_B=by_name(default=drawn(20, 4)),
            **said,
        ),
        "peft, both drawn": Owner(
            lora_A=by_name(default=drawn(4, 12)),
            lora_B=by_name(default=drawn(20, 4)),
            **said,
        ),
        "peft, two adapters": Owner(
            lora_A=by_name(one=drawn(4, 12), two=drawn(2, 12)),
            lora_B=by_name(one=zeros(20, 4), two=zeros(20, 2)),
            r={"one": 4, "two": 2},
            scaling={"one": 2.0, "two": 0.5},
        ),
        "peft, convolution": Owner(
            lora_A=by_name(default=drawn(4, 3, 3, 3)),
            lora_B=by_name(default=zeros(8, 4, 1, 1)),
            **said,
        ),
        "peft, embedding": Owner(
            lora_embedding_A=nn.ParameterDict({"default": zeros(4, 30)}),
            lora_embedding_B=nn.ParameterDict({"default": drawn(8, 4)}),
            **said,
        ),
        "adalora": Owner(
            lora_A=nn.ParameterDict({"default": drawn(4, 12)}),
            lora_B=nn.ParameterDict({"default": drawn(20, 4)}),
            lora_E=nn.ParameterDict({"default": zeros(4, 1)}),
            **said,
        ),
        "loralib": Owner(
            frozen=frozen, lora_A=drawn(4, 12), lora_B=zeros(20, 4), r=4, scaling=2.0
        ),
        "loralib, merged": Owner(
            lora_A=drawn(8, 12),
            lora_B=zeros(20, 4),
            r=4,
            scaling=2.0,
            enable_lora=[True, False, True],
        ),
        "loralib, convolution": Owner(
            lora_A=drawn(12, 9), lora_B=zeros(24, 12), conv=conv, r=4, scaling=2.0
        ),
        "torchtune": Owner(
            lora_a=Owner(weight=drawn(4, 12)),
            lora_b=Owner(weight=zeros(20, 4)),
            rank=4,
            alpha=8.0,
        ),
        "kohya": Owner(
            lora_down=Owner(weight=drawn(4, 12)),
            lora_up=Owner(weight=zeros(20, 4)),
            lora_dim=4,
            scale=2.0,
            alpha=torch.tensor(8.0),
        ),
        "tucker": Owner(
            lora_down=Owner(weight=drawn(4, 3, 1, 1)),
            lora_mid=Owner(weight=drawn(4, 4, 3, 3)),
            lora_up=Owner(weight=zeros(8, 4, 1, 1)),
            lora_dim=4,
            scale=2.0,
        ),
        "megatron": Owner(
            linear_in=Owner(weight=drawn(4, 12)),
            linear_out=Owner(weight=zeros(20, 4)),
            dim=4,
            alpha=8,
        ),
        "megatron, experts": Owner(
            linear_in=Owner(weight=drawn(3, 4, 12)),
            linear_out=Owner(weight=zeros(3, 20, 4)),
            dim=4,
            alpha=8,
        ),
        "deepspeed-chat": Owner(
            lora_right_weight=drawn(12, 4),
            lora_left_weight=zeros(4, 20),
            lora_scaling=2.0,
        ),
        "diffusers-legacy": Owner(
            down=Owner(weight=drawn(4, 12)),
            up=Owner(weight=zeros(20, 4)),
            network_alpha=8.0,
            rank=4,
        ),
    }


def described(survey: ra.Survey) -> list[Value]:
    """What a survey says of its factors and of the model, flat."""
    said: list[Value] = [
        survey.width,
        survey.full_width(),
        len(survey.other),
        len(survey.frozen),
        len(survey.notes),
    ]
    for factor in survey.factors:
        said += [
            factor.convention,
            factor.role,
            factor.rank,
            factor.scaling,
            factor.init,
            factor.kind,
        ]
        said += [factor.fan_in, factor.fan_out]
    return said


def inspection() -> Cases:
    """Surveys of made-up models and files: convention, role, rank, scaling, init, kind and fans of every factor."""
    cases: Cases = {}
    for name, owner in owners().items():
        found = tried(partial(ra.inspect_model, nn.Sequential(owner)))
        cases[f"model: {name}"] = (
            described(found) if isinstance(found, ra.Survey) else [found]
        )
    full = nn.Sequential(
        nn.Linear(12, 20), nn.LayerNorm(20), nn.Conv2d(3, 8, 3), nn.Embedding(30, 8)
    )
    cases["model: full finetuning"] = described(ra.inspect_model(full, method="full"))
    with tempfile.TemporaryDirectory() as folder:
        for name, tensors in files().items():
            path = Path(folder) / f"{name}.safetensors"
            save_file(tensors, path)
            found = tried(partial(ra.inspect_file, path))
            cases[f"file: {name}"] = (
                described(found) if isinstance(found, ra.Survey) else [found]
            )
    return cases


def files() -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of adapter files by their names, as tools write them."""
    a, b = drawn(4, 12).detach(), torch.zeros(20, 4, dtype=torch.float64)
    alpha = torch.tensor(8.0)
    q = "transformer.q"
    return {
        "peft": {
            f"base_model.model.{q}.lora_A.weight": a,
            f"base_model.model.{q}.lora_B.weight": b,
        },
        "kohya": {
            "lora_q.lora_down.weight": a,
            "lora_q.lora_up.weight": b,
            "lora_q.alpha": alpha,
        },
        "diffusers": {
            f"{q}.lora.down.weight": a,
            f"{q}.lora.up.weight": b,
            f"{q}.alpha": alpha,
        },
        "lora_A, lora_B": {
            f"{q}.lora_A.weight": a,
            f"{q}.lora_B.weight": b,
            f"{q}.alpha": alpha,
        },
    }


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


def two_layers(
    init: str = "A",
    ranks: Sequence[int] = (4, 8),
    scalings: Sequence[float] = (1.0, 2.0),
) -> nn.Module:
    """Two adapted layers of 16 inputs, and a head that trains whole."""
    layers = [
        Layer(16, rank, scaling, init)
        for rank, scaling in zip(ranks, scalings, strict=True)
    ]
    head = nn.Linear(16, 3, bias=False, dtype=torch.float64)
    head.weight = drawn(3, 16)
    return nn.Sequential(*layers, head)


AT = ra.Reference(rank=16, alpha=16)
WRAPPED: dict[str, dict[str, Any]] = {
    "at r=16": {"tuned_at": AT},
    "at its own": {},
    "by mua": {"tuned_at": AT, "law": "mua"},
    "by loraplus": {"tuned_at": AT, "law": "loraplus"},
    "widths of layers": {
        "tuned_at": ra.Reference(rank=16, alpha=16, fan_in=64),
        "per_layer_width": True,
    },
    "rates of the head": {"tuned_at": AT, "rates": {"2.weight": 1e-3}},
    "rate of the others": {"tuned_at": AT, "other_lr": 5e-3},
    "batch": {"tuned_at": ra.Reference(rank=16, alpha=16, batch=8), "batch": 32},
    "decay": {"tuned_at": AT, "weight_decay": 0.1, "scale_weight_decay": True},
}
STEPPED: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.01}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
}
OF_FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "Muon": (named("Muon"), {}),
    "Lamb": (named("Lamb"), {}),
    "Adafactor": (named("Adafactor"), {}),
    "Unheard": (named("Unheard"), {}),
}


def optimizer() -> Cases:
    """Groups, rates and three steps of AdamW and SGD, some of which continue from a checkpoint."""
    cases: Cases = {}
    for init in ("A", "B"):
        for name, options in WRAPPED.items():
            cases |= stepped(
                f"AdamW, Init[{init}], {name}",
                two_layers(init),
                torch.optim.AdamW,
                options,
            )
    cases |= of_classes(STEPPED)
    cases |= continued()
    groups = ra.rank_aware_param_groups(two_layers(), lr=0.01, tuned_at=AT)
    cases["rank_aware_param_groups"] = [
        value for group in groups for value in (group["lr"], len(group["params"]))
    ]
    return cases


def of_classes(classes: Mapping[str, tuple[Any, dict[str, Any]]]) -> Cases:
    """Groups, rates and three steps of optimizer classes with their settings."""
    cases: Cases = {}
    for init in ("A", "B"):
        for name, (kind, settings) in classes.items():
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
    rates: list[Value] = []
    for group in opt.param_groups:
        rates += [
            group["lr"],
            group["rank_multiplier"],
            len(group["params"]),
            group.get("weight_decay"),
        ]
    train(model, opt)
    return {f"{name}: groups": rates, f"{name}: after three steps": norms(model)}


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


def continued() -> Cases:
    """A checkpoint loaded at the same rank, and at another rank with moments reset."""
    cases: Cases = {}
    for name, ranks in (("the same rank", (4, 8)), ("another rank", (2, 8))):
        first, second = two_layers(), two_layers(ranks=ranks)
        options = {"tuned_at": AT, "on_rank_change": "reset"}
        saved: Any = ra.RankAwareOptimizer(first, torch.optim.AdamW, lr=0.01, **options)
        train(first, saved)
        loaded: Any = ra.RankAwareOptimizer(
            second, torch.optim.AdamW, lr=0.01, **options
        )
        loaded.load_state_dict(saved.state_dict())
        train(second, loaded)
        cases[f"from a checkpoint of {name}"] = norms(second)
    return cases


# --- recipes --------------------------------------------------------------------------------------------------------


def rates(recipe: ra.Recipe, asked: Mapping[str, dict[str, Any]]) -> Cases:
    """A recipe's rate and band at each configuration asked for."""
    cases: Cases = {}
    for name, options in asked.items():
        rate = tried(partial(recipe.at, **options))
        said = isinstance(rate, ra.Rate)
        cases[name] = [rate.lr, rate.low, rate.high] if said else [rate]
    return cases


def recipes() -> Cases:
    """Rates of the shipped recipes over ranks, alphas, inits, widths and batches, and to full finetuning."""
    asked = {
        "its own": {},
        "r=1": {"rank": 1},
        "r=32": {"rank": 32},
        "r=32 alpha=16": {"rank": 32, "alpha": 16},
        "r=32 alpha=16 rslora": {"rank": 32, "alpha": 16, "rslora": True},
        "r=512": {"rank": 512},
        "Init[A]": {"init": "A"},
        "Init[B]": {"init": "B"},
        "four times as wide": {"rank": 16, "fan_in": 2048},
        "batch 256": {"batch": 256},
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
LONGER: dict[str, dict[str, Any]] = {"4000 steps": {"rank": 16, "steps": 4000}}
FITTED = (  # a sweep, the configuration, its init, gamma of its effective multiplier r^-gamma, and what is fitted
    ("image_generation", "Init[A], s = 1", "A", 0.0, "drift"),
    ("vision_classification", "Init[A], s = 1/r", "A", 1.0, "drift"),
    ("language", "Init[B], s = 1", "B", 0.0, "drift"),
    ("language", "Init[A], s = 1", "A", 0.0, "tokens"),
)


def fit() -> Cases:
    """Rates fitted to sweeps of the study, each with its runs of full finetuning."""
    cases: Cases = {}
    for domain, scheme, init, gamma, kind in FITTED:
        rows = list(swept(domain, scheme, init, gamma))
        recipe = fit_sweep(
            rows, fit=kind, init=init, fan_in=256, full_fan_in=1024, steps=100
        )
        cases |= {
            f"{domain}, {scheme}, by {kind}, {name}": values
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
        rank = run["rank"]
        place = (
            {"rank": rank, "alpha": rank ** (1.0 - gamma), "init": init}
            if rank
            else {"method": "full"}
        )
        yield {
            "lr": 2.0 ** run["x"],
            "loss": math.inf if run["loss"] is None else run["loss"],
            **place,
        }


CALIBRATED: dict[str, dict[str, Any]] = {
    "Init[A]": {},
    "Init[A], low best": {"best": -14.0},
    "Init[A], none learns at first": {"best": 3.0, "noise": 0.1},
    "Init[A], full runs in a budget": {"full_trials": 3, "budget": 700},
    "Init[A], three ranks, one seed, until": {
        "ranks": (4, 16, 64),
        "seeds": (0,),
        "until": 1.5,
    },
    "Init[B]": {"init": "B", "drift": -1 / 3},
    "Init[B], by falling": {
        "init": "B",
        "drift": -1 / 3,
        "law": ra.Falling(law=ra.MuA(tokens=8.0)),
    },
    "full finetuning": {"ranks": (None,)},
}
LONG: dict[str, dict[str, Any]] = {
    "Init[A], alpha kept, noisy, to 1000 steps": {
        "scaling": lambda rank: 16.0 / rank,
        "drift": 0.1,
        "noise": 0.05,
        "target_steps": 1000,
    },
}
BY_SGD: dict[str, dict[str, Any]] = {"SGD": {"kind": torch.optim.SGD, "best": 0.0}}


@cache
def calibrated(name: str) -> tuple[ra.Recipe, list[Value]]:
    """The recipe of made-up runs, and the ranks, seeds and rates in the order in which they were tried."""
    options = (CALIBRATED | LONG | BY_SGD)[name]
    return calibration_of(**options)


def calibration_of(
    *,
    kind: Any = torch.optim.AdamW,
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
            yield (
                2.0
                + rough
                + (
                    0.5 * part * (u - 2)
                    if u > 2.5
                    else -0.5 * part**0.5 / (1 + u * u / 4)
                )
            )

    given = {"ranks": (4, 64), "steps": 50, **options}
    return ra.calibrate(train, kind, progress=False, **given), order


def search(names: Iterable[str]) -> Cases:
    """The rank, seed and rate of every trial of made-up calibrations, in their order."""
    return {name: calibrated(name)[1] for name in names}


def calibration(names: Iterable[str]) -> Cases:
    """The rates of the recipes that these calibrations return."""
    cases: Cases = {}
    for name in names:
        recipe = calibrated(name)[0]
        cases[f"{name}, fitted"] = [
            recipe.lr,
            recipe.fitted_lr,
            recipe.lean,
            recipe.ceiling,
        ]
        cases |= {
            f"{name}, {asked}": values for asked, values in rates(recipe, ASKED).items()
        }
    return cases


def horizon() -> Cases:
    """A calibration for a longer target, and the rates of these recipes at another number of steps than their own."""
    made = {name: calibrated(name)[0] for name in (*CALIBRATED, *LONG)}
    made |= {path.stem: ra.Recipe.load(path) for path in sorted(RECIPES.glob("*.toml"))}
    cases = calibration(LONG)
    for name, recipe in made.items():
        cases |= {
            f"{name}, {asked}": values
            for asked, values in rates(recipe, LONGER).items()
        }
    return cases


def ceilings() -> Cases:
    """The ceilings of the shipped recipes and of made-up calibrations, at LoRA's ranks and in full finetuning."""
    made: dict[str, ra.Recipe] = {
        path.stem: ra.Recipe.load(path) for path in sorted(RECIPES.glob("*.toml"))
    }
    made |= {name: calibrated(name)[0] for name in (*CALIBRATED, *LONG)}
    cases: Cases = {}
    for name, recipe in made.items():
        for where, options in ASKED.items():
            rate = tried(partial(recipe.at, **options))
            cases[f"{name}, {where}"] = [
                rate.ceiling if isinstance(rate, ra.Rate) else rate
            ]
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
                    off = (
                        []
                        if best is None
                        else [
                            lost(done, cell, cell, best + octaves)
                            for octaves in (-1.0, 1.0)
                        ]
                    )
                    cases[f"{domain}, {scheme}, rank {rank or 'full'}"] = [
                        best,
                        noise_floor(done, cell),
                        *off,
                    ]
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
            for task in ("chat", "other"):
                found: Any = tried(
                    partial(ra.suggest_lr, site, kind, task=task, method=site.method)
                )
                said = (
                    [found]
                    if isinstance(found, str)
                    else [found.lr, found.low, found.high]
                )
                cases[f"suggested for {name}, {kind}, {task}"] = said
        for other, target in sites.items():
            found = tried(partial(ra.convert_lr, 1e-3, from_=site, to=target))
            said = (
                [found]
                if isinstance(found, str)
                else [found.lr, found.lr_a, found.lr_b]
            )
            cases[f"converted from {name} to {other}"] = said
    return cases


# --------------------------------------------------------------------------------------------------------------------

BEHAVIOUR: dict[str, Callable[[], Cases]] = {
    **{f"laws.{family}": partial(laws, family) for family in FAMILIES},
    "inspection": inspection,
    "optimizer.common": optimizer,
    "optimizer.families": partial(of_classes, OF_FAMILIES),
    "recipes": recipes,
    "fit": fit,
    "search.adam": partial(search, CALIBRATED | LONG),
    "search.sgd": partial(search, BY_SGD),
    "calibration.adam": partial(calibration, CALIBRATED),
    "calibration.sgd": partial(calibration, BY_SGD),
    "horizon": horizon,
    "ceilings": ceilings,
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
