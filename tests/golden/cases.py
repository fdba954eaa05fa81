"""The contents of the golden files: for each part of the package, tables of numbers that its public
names return.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import rankaware_optim as ra
from rankaware_optim.laws import get_law
from rankaware_optim.sweeps import fit_sweep

from ..helpers.calibrations import bowl
from ..helpers.models import ContainerLoRA, KohyaLoRA, PlainLoRA, TuneLoRA

Table = dict[str, Any]
Tables = dict[str, Table]
RECIPES = Path(__file__).parents[2] / "recipes"
AdamW = torch.optim.AdamW
RANKS = (1, 8, 64, 256)
AT_16 = ra.Reference(rank=16, alpha=16, fan_in=1024)


class ByGradient(torch.optim.Optimizer):
    """An optimizer that steps along the gradient, and whose name belongs to no optimizer family."""

    def __init__(self, params: Any, lr: float = 0.01, **settings: Any) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0, **settings})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.add_(param.grad, alpha=-group["lr"])


def class_named(name: str) -> type[torch.optim.Optimizer]:
    """Return an optimizer class of this name, by which laws know its family."""
    return type(name, (ByGradient,), {})


# --- laws -------------------------------------------------------------------------------


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("AdamW", {}),
    "SGD": ("SGD", {"momentum": 0.9}),
    "Muon": ("Muon", {}),
    "Muon, match_rms_adamw": ("Muon", {"adjust_lr_fn": "match_rms_adamw"}),
    "Lamb": ("Lamb", {}),
    "Adafactor": ("Adafactor", {}),
    "LARS": ("LARS", {"weight_decay": 0.01}),
    "LoRA-Muon": ("LoRAMuon", {}),
    "unknown": ("Unheard", {}),
}
LAWS: dict[str, ra.Law] = {
    "mua": ra.MuA(),
    "mua of 64 tokens": ra.MuA(tokens=64.0),
    "mua-paper": get_law("mua-paper"),
    "falling by 1/2 above 4": ra.Falling(power=0.5, knee=4.0),
    "power of -1/4": ra.Power(exponent=-0.25),
    "loraplus": ra.LoRAPlus(),
}
ORIGINS = {
    "r=16 alpha=16": AT_16,
    "r=4 alpha=16 Init[B]": ra.Reference(rank=4, alpha=16, init="B", fan_in=256),
    "full": ra.Reference(method="full", fan_in=1024),
}


def factors(init: str, kept: bool) -> list[ra.Factor]:
    """Return the factor A at each of RANKS, with alpha equal to the rank, or with alpha fixed at 16
    if `kept`.
    """
    scalings = [16.0 / rank if kept else 1.0 for rank in RANKS]
    return [
        ra.Factor("w", "A", rank, 1024, 1024, scaling, init)
        for rank, scaling in zip(RANKS, scalings, strict=True)
    ]


TARGETS = {
    "alpha=r": factors("A", kept=False),
    "alpha=16": factors("A", kept=True),
    "Init[B] alpha=r": factors("B", kept=False),
    "Init[B] alpha=16": factors("B", kept=True),
    "full, B": [
        ra.Factor("w", "full", None, 1024, 1024),
        ra.Factor("w", "B", 64, 1024, 1024, 1.0, "A"),
    ],
}


def multipliers(law: ra.Law, origin: ra.Reference) -> Iterator[tuple[str, Any]]:
    """Yield the name of every target, and the law's multipliers from the origin to this target."""
    for target, listed in TARGETS.items():
        yield target, [outcome(law.multiplier, each, origin) for each in listed]


def laws() -> Tables:
    """Return AdamW's multipliers at ranks 1, 8, 64 and 256, for full finetuning and for B."""
    tables: Tables = {}
    for title, law in LAWS.items():
        tables[title] = dict(multipliers(law.bind(AdamW, {}), AT_16))
    default = get_law("falling").bind(AdamW, {})
    for title, origin in ORIGINS.items():
        tables[f"default law, from {title}"] = dict(multipliers(default, origin))
    return tables


def families() -> Tables:
    """Return the default law's multipliers for other optimizers, and every family's multiplier for
    a batch four times as large.
    """
    tables: Tables = {}
    for family, (name, settings) in FAMILIES.items():
        if family != "AdamW":
            bound = get_law("falling").bind(class_named(name), settings)
            tables[f"default law, {family}"] = dict(multipliers(bound, AT_16))
    tables["four times the batch"] = {
        family: get_law("falling")
        .bind(class_named(name), settings)
        .batch_multiplier(4.0)
        for family, (name, settings) in FAMILIES.items()
    }
    return tables


# --- inspection -------------------------------------------------------------------------


def words(factor: ra.Factor) -> str:
    """Return a factor as one line of text, without its role."""
    return (
        f"{factor.convention or factor.role}, rank {factor.rank}, "
        f"scaling {factor.scaling:g}, Init[{factor.init}], {factor.kind}, "
        f"{factor.fan_in:g} to {factor.fan_out:g}"
    )


def table_of(survey: ra.Survey) -> Table:
    """Return a survey as a table of its widths and of the roles of each kind of factor."""
    roles: Table = {}
    for factor in survey.factors:
        roles.setdefault(words(factor), []).append(factor.role)
    widths = {"width": survey.width, "full_width": survey.full_width()}
    return {**widths, "other": len(survey.other), **roles}


def inspection() -> Tables:
    """Return the surveys of small models as tables."""
    linear, conv, table = nn.Linear(12, 20), nn.Conv2d(3, 8, 3), nn.Embedding(30, 8)
    models = {
        "loralib": PlainLoRA(linear, 4, 2.0),
        "loralib, Init[B]": PlainLoRA(linear, 4, 2.0, "B"),
        "torchtune": TuneLoRA(linear, 4, 0.5),
        "kohya": KohyaLoRA(linear, 4, 2.0),
        "kohya, convolution": KohyaLoRA(conv, 2, 2.0),
        "PEFT": ContainerLoRA(linear, 4, 2.0),
        "PEFT, embedding": ContainerLoRA(table, 4, 2.0),
        "two widths": nn.Sequential(
            PlainLoRA(linear, 4), PlainLoRA(nn.Linear(200, 20), 4), nn.Linear(3, 3)
        ),
    }
    tables = {
        name: table_of(ra.inspect_model(nn.Sequential(model)))
        for name, model in models.items()
    }
    full = nn.Sequential(linear, nn.LayerNorm(20), conv, table).requires_grad_(True)
    tables["full finetuning"] = table_of(ra.inspect_model(full, method="full"))
    return tables


def inspection_of_files(folder: Path) -> Tables:
    """Return the surveys of adapter files as three tools write them."""
    a, b = torch.ones(4, 12), torch.zeros(20, 4)
    alpha = torch.tensor(8.0)
    files = {
        "file of PEFT": {"base_model.model.q.lora_A.weight": a,
                         "base_model.model.q.lora_B.weight": b},
        "file of kohya": {"lora_q.lora_down.weight": a, "lora_q.lora_up.weight": b,
                          "lora_q.alpha": alpha},
        "file of diffusers": {"unet.q.lora.down.weight": a,
                              "unet.q.lora.up.weight": b},
    }  # fmt: skip
    tables = {}
    for name, tensors in files.items():
        path = folder / f"{name}.safetensors"
        save_file(tensors, path)
        survey = outcome(ra.inspect_file, path)
        named = isinstance(survey, ra.Survey)
        tables[name] = table_of(survey) if named else {"refused": survey}
    return tables


# --- the optimizer ----------------------------------------------------------------------


def network(init: str = "A") -> nn.Module:
    """Return two adapted layers of two ranks and scalings, and a head, with the same values on
    every machine.
    """
    torch.manual_seed(0)
    layers = [
        PlainLoRA(nn.Linear(16, 16, bias=False), rank, scaling, init)
        for rank, scaling in ((4, 1.0), (8, 2.0))
    ]
    return nn.Sequential(*layers, nn.Linear(16, 3, bias=False)).double()


WRAPPED: dict[str, dict[str, Any]] = {
    "tuned elsewhere": {},
    "by mua": {"law": "mua"},
    "by loraplus": {"law": "loraplus"},
    "rate of the head": {"rates": {"2.weight": 1e-3}},
    "rate of the others": {"other_lr": 5e-3},
    "four times the batch": {
        "tuned_at": ra.Reference(rank=16, alpha=16, batch=8),
        "batch": 32,
    },
    "with decay": {"weight_decay": 0.1},
}


def optimizer() -> Tables:
    """Return the learning rate, multiplier and weight decay of every group, and the norms of the
    weights after three steps.
    """
    tables: Tables = {}
    for init in ("A", "B"):
        for title, options in WRAPPED.items():
            table = stepped(init, AdamW, options)
            tables[f"AdamW, Init[{init}], {title}"] = table
    for name in ("SGD", "Lamb", "Unheard"):
        tables[name] = stepped("A", class_named(name), {})
    groups = ra.rank_aware_param_groups(network(), lr=0.01, tuned_at="r=16,alpha=16")
    tables["rank_aware_param_groups"] = {"lr": [group["lr"] for group in groups]}
    return tables


def stepped(init: str, kind: Any, options: dict[str, Any]) -> Table:
    model = network(init)
    given = {"tuned_at": ra.Reference(rank=16, alpha=16), **options}
    opt = ra.RankAwareOptimizer(model, kind, lr=0.01, **given)
    x = torch.linspace(-1.0, 1.0, 128, dtype=torch.float64).reshape(8, 16)
    for _ in range(3):
        opt.zero_grad()
        model(x).sub(1.0).square().mean().backward()
        opt.step()
    trained = [each for each in model.parameters() if each.requires_grad]
    return {
        "lr": [group.base_lr for group in opt.rates.groups],
        "multiplier": [group.multiplier for group in opt.rates.groups],
        "weight_decay": [
            opt.param_groups[group.user_group]["weight_decay"]
            for group in opt.rates.groups
        ],
        "norms": [float(each.detach().norm()) for each in trained],
    }


# --- recipes ----------------------------------------------------------------------------


ASKED: dict[str, dict[str, Any]] = {
    "r=1": {"rank": 1},
    "r=32": {"rank": 32},
    "r=32 alpha=16": {"rank": 32, "alpha": 16},
    "the other init": {"rank": 16, "init": "B"},
    "another model's width": {"rank": 16, "fan_in": 2048.0},
    "batch 256": {"rank": 16, "batch": 256},
    "4000 steps": {"rank": 16, "steps": 4000},
    "full": {"method": "full"},
}


def rates(recipe: ra.Recipe, asked: dict[str, dict[str, Any]]) -> Table:
    """Return a recipe's learning rate, the ends of its interval and its ceiling, at each
    configuration.
    """
    table = {}
    for name, options in asked.items():
        rate = outcome(recipe.at, **options)
        named = isinstance(rate, ra.Rate)
        table[name] = (
            [float(rate), rate.low, rate.high, rate.ceiling] if named else rate
        )
    return table


def recipe() -> Tables:
    """Return the learning rates of shipped recipes, each with the ends of its interval and its
    ceiling.
    """
    names = (
        "efficientnet-lite0-digits",
        "language-b",
        "language-smollm2-a-inverse-rank",
        "reinforcement-a",
        "text-classification-b",
        "vision-classification-a-inverse-rank",
        "vision-language-a",
    )
    tables = {}
    for name in names:
        shipped = ra.Recipe.load(RECIPES / f"{name}.toml")
        wider = {"rank": 16, "fan_in": 1.5 * (shipped.reference.fan_in or 0.0)}
        tables[name] = rates(shipped, {**ASKED, "half as wide again": wider})
    return tables


# --- fits and calibrations --------------------------------------------------------------


PLACES: dict[str, dict[str, Any]] = {
    "r=4": {"rank": 4},
    "r=16": {"rank": 16},
    "r=64": {"rank": 64},
    "full": {"method": "full"},
}


def rows(
    drift: float, *, kept: bool = False, full: bool = True, init: str = "A"
) -> list[Table]:
    """Return a sweep of bowls whose best learning rate depends on the rank, with a cliff above it."""
    listed = []
    for rank in (4, 16, 64, None) if full else (4, 64):
        best = -8.0 + drift * math.log2((rank or 256) / 16)
        place: Table = {"rank": "full", "fan_in": 1024}
        if rank:
            place = {"rank": rank, "alpha": 16 if kept else rank, "fan_in": 256}
        place |= {"init": init, "steps": 100}
        listed += [
            {"lr": 2.0**x, "loss": bowl(x - best), **place} for x in range(-13, -3)
        ]
    return listed


def fitting() -> Tables:
    """Return the learning rates of recipes that are fitted to made-up sweeps, each with the ends of
    its interval and its ceiling.
    """
    sweeps = {
        "as the law": (rows(-0.5), {}),
        "falls less than the law": (rows(-0.2), {}),
        "alpha kept": (rows(0.1, kept=True), {}),
        "Init[B]": (rows(-0.3, init="B"), {}),
        "without full runs": (rows(-0.5, full=False), {}),
        "by SGD": (rows(-0.5), {"optimizer": "SGD"}),
    }
    return {
        title: rates(fit_sweep(listed, full_fan_in=1024.0, **more), PLACES)
        for title, (listed, more) in sweeps.items()
    }


def made_up(
    tried: list[float], best: float, drift: float, init: str
) -> Callable[[Any], Iterator[float]]:
    """Return a loop without training, whose loss falls gradually into a bowl around the best
    learning rate, and which appends each learning rate to `tried`.
    """

    def train(trial: Any) -> Iterator[float]:
        rank = trial.rank
        layer = nn.Linear(64, 64, bias=False)
        trial.optimizer(PlainLoRA(layer, rank, 1.0, init) if rank else layer)
        tried.append(trial.lr)
        end = bowl(math.log2(trial.lr) - best - drift * math.log2((rank or 64) / 16))
        for step in range(trial.steps):
            rough = 0.005 * math.sin(78.233 * step + 37.719 * trial.seed)
            yield 2.3 + (end - 2.3) * (step + 1) / trial.steps + rough

    return train


def calibration() -> Tables:
    """Return the learning rates of made-up calibrations, each with the ends of its interval and its
    ceiling.
    """
    cases: dict[str, tuple[tuple[float, float, str], dict[str, Any]]] = {
        "Init[A]": ((-8.0, -0.3, "A"), {}),
        "Init[A], with full runs": ((-8.0, -0.3, "A"), {"full_trials": 3}),
        "Init[A], for a longer run": ((-8.0, -0.5, "A"), {"target_steps": 1000}),
        "Init[B]": ((-7.0, -0.33, "B"), {}),
        "Init[A], a low best rate": ((-14.0, -0.3, "A"), {}),
        "by SGD": ((0.0, -0.3, "A"), {"optimizer": torch.optim.SGD}),
        "full finetuning": ((-10.0, 0.0, "A"), {"ranks": (None,)}),
    }
    tables = {}
    for title, (losses, options) in cases.items():
        given = {"optimizer": AdamW, "ranks": (4, 64), "steps": 40, **options}
        kind, tried = given.pop("optimizer"), []
        recipe = ra.calibrate(made_up(tried, *losses), kind, progress=False, **given)
        order = {"trials": len(tried), "last four tried": tried[-4:]}
        tables[title] = {**order, **rates(recipe, PLACES)}
    return tables


# --- learning rates without runs --------------------------------------------------------


def transfer() -> Tables:
    """Return converted and suggested learning rates."""
    sites = {
        "r=16 alpha=32": ra.Reference(rank=16, alpha=32, fan_in=4096),
        "r=64 alpha=64": ra.Reference(rank=64, alpha=64, fan_in=1024),
        "r=8 alpha=16": ra.Reference(rank=8, alpha=16, fan_in=1024),
        "full": ra.Reference(method="full", fan_in=4096),
    }
    tables: Tables = {}
    for start, origin in sites.items():
        tables[f"1e-3 converted from {start}"] = {
            end: outcome(rate_of, ra.convert_lr, 1e-3, from_=origin, to=site)
            for end, site in sites.items()
            if end != start
        }
    for kind in ("adamw", "lion", "muon", "schedulefree"):
        tables[f"suggested, {kind}"] = {
            place: outcome(suggested, site, kind) for place, site in sites.items()
        }
    site = sites["r=16 alpha=32"]
    tables["suggested, by family"] = {
        family: outcome(suggested, site, class_named(name), settings=settings)
        for family, (name, settings) in FAMILIES.items()
    }
    no_width = outcome(suggested, ra.Reference(rank=16, alpha=32), "adamw")
    special: Tables = {"suggested, adamw, as": {"no width": no_width}}
    for title, options in {
        "a chat": {"task": "chat"},
        "reinforcement learning": {"task": "rl"},
        "PiSSA": {"init": "pissa"},
        "OLoRA": {"init": "olora"},
        "DoRA": {"dora": True},
    }.items():
        special["suggested, adamw, as"][title] = outcome(
            suggested, site, "adamw", **options
        )
    no_rate = outcome(suggested, site, "adamw", task="dpo")
    special["suggested, adamw, as"]["DPO"] = no_rate
    wide = ra.Reference(method="full", fan_in=14336)
    tables["suggested in full finetuning, adamw"] = {
        title: outcome(suggested, wide, "adamw", **options)
        for title, options in {
            "a chat": {"task": "chat"},
            "another task": {"task": "other"},
            "14,670 steps": {"task": "chat", "steps": 14670},
            "reinforcement learning": {"task": "rl"},
            "DPO": {"task": "dpo"},
        }.items()
    }
    tables["1e-3 converted from r=16 alpha=32 to wide full finetuning"] = {
        dtype: outcome(rate_of, ra.convert_lr, 1e-3, from_=site, to=wide, dtype=dtype)
        for dtype in ("float32", "bfloat16")
    }
    return tables | special


def rate_of(ask: Callable[..., Any], *args: Any, **options: Any) -> float:
    return float(ask(*args, **options))


def suggested(
    site: ra.Reference, kind: type[torch.optim.Optimizer] | str, **options: Any
) -> list[float]:
    rate = ra.suggest_lr(site, kind, method=site.method, **options)
    return [float(rate), rate.low, rate.high]


# ----------------------------------------------------------------------------------------


def outcome(ask: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Return what a call returns, or the name of the package's error that it raises."""
    try:
        return ask(*args, **options)
    except ra.RankAwareError as error:
        return type(error).__name__


ROOMS: dict[str, Callable[[], Tables]] = {
    "laws": laws,
    "families": families,
    "inspection": inspection,
    "optimizer": optimizer,
    "recipe": recipe,
    "fitting": fitting,
    "calibration": calibration,
    "transfer": transfer,
}
