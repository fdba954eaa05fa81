"""A table of adapters that the libraries themselves build, with what inspection must read from
each.

Libraries are imported inside the builders, so that the table can be read where no library is
installed.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from rankaware_optim import InspectionError, inspect_model
from rankaware_optim.inspection import initialize, other_kind
from rankaware_optim.testing import check_convention

from .oracle import check_initialize, oracle, output_of

# the error for layers that draw both A and B, or that have an init of their own
NO_START = "requires a special init|with nonzero A and B"
MODULES = {
    "lycoris-lora": "lycoris.modules",
    "torchtune": "torchtune.modules.peft",
    "litgpt": "litgpt.lora",
}
IN, OUT = 12, 20
DENSE = ((IN, OUT),)


def per_rank(rank: int, alpha: float) -> float:
    return alpha / rank


def rslora(rank: int, alpha: float) -> float:
    return alpha / math.sqrt(rank)


@dataclass(frozen=True)
class Case:
    """A layer of a library, and what the survey must say about it.

    package: the package that must be installed. make: builds the layer from rank and alpha. fans: fan-in and fan-out
    of each pair, in the model's order. probed: whether check_convention can probe it, which it cannot if several
    layers are adapted. other: the kind of the other parameters that train, if there are any.
    """

    name: str
    package: str
    convention: str
    make: Callable[[int, float], nn.Module]
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    fans: tuple[tuple[float, float], ...]
    kind: str = "linear"
    init: str = "A"
    scaling: Callable[[int, float], float] = per_rank
    probed: bool = True
    other: str | None = None

    def expected(self, rank: int, alpha: float) -> dict[str, Any]:
        """Return what `read` must return for the layer of this rank and alpha."""
        return {
            "convention": {self.convention},
            "rank": {rank},
            "scaling": {self.scaling(rank, alpha)},
            "init": {self.init},
            "kind": {self.kind},
            "fans": self.fans,
            "other": {self.other} - {None},
        }


def rows(package: str, title: str, convention: str) -> Callable[..., Case]:
    """Return a function that makes the cases of one package, which by default are linear layers of
    one convention.
    """

    def case(
        name: str, make: Any, inputs: Any = None, fans: Any = DENSE, **own: Any
    ) -> Case:
        named = {"name": f"{title} {name}", "package": package, "make": make}
        seen = {"inputs": inputs or drawn(4, IN), "fans": fans}
        return Case(**{**named, **seen, "convention": convention, **own})

    return case


def check_layer(case: Case) -> None:
    """Check that a library's layer is read as declared, computes and trains as read, and can be initialised."""
    module = MODULES.get(case.package, case.package)
    pytest.importorskip(module, exc_type=ImportError)
    for rank, alpha in ((2, 3.0), (4, 8.0)):
        torch.manual_seed(0)
        assert read(case.make(rank, alpha)) == case.expected(rank, alpha)
    error = check_convention(case.make, *case.inputs(), run=output_of)
    assert (error is not None) is (case.probed and case.other is None)
    assert oracle(case.make, *case.inputs()) < 1e-9
    for init in "AB":
        if case.init == "other":
            with pytest.raises(InspectionError, match=NO_START):
                initialize(case.make(4, 12.0), init)
        else:
            check_initialize(case.make(4, 12.0), case.inputs(), init)


def read(model: nn.Module) -> dict[str, Any]:
    """Return a survey in short: the values that A and B have in common, the fans of each pair, and the kinds of other
    parameters.
    """
    survey = inspect_model(model)
    roles = [f.role for f in survey.factors]
    assert roles == ["A", "B"] * (len(roles) // 2), roles
    said = ("convention", "rank", "scaling", "init", "kind")
    seen = {name: {getattr(f, name) for f in survey.factors} for name in said}
    fans = tuple((f.fan_in, f.fan_out) for f in survey.factors if f.role == "A")
    others = {other_kind(name) for name in survey.other}
    return {**seen, "fans": fans, "other": others}


def drawn(*shape: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Return a function that returns one random input of this shape, the same at every call."""
    return lambda: (torch.randn(*shape, generator=torch.Generator().manual_seed(1)),)


def tokens() -> tuple[torch.Tensor, ...]:
    return (torch.randint(30, (4, 5), generator=torch.Generator().manual_seed(1)),)


# --- PEFT -----------------------------------------------------------------------------------------------------------


class One(nn.Module):
    """A model with one layer `q`, and a `head` that does not change the output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.q = layer
        self.head = nn.Linear(2, 2)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.q(*inputs)


class Attention(nn.Module):
    """A model with torch's attention over a single input."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(IN, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


class Experts(nn.Module):
    """A model with a stack of matrices, of shape (experts, in, out) if `transposed`, else (experts,
    out, in).
    """

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        shape = (IN, OUT) if transposed else (OUT, IN)
        self.up = nn.Parameter(torch.randn(3, *shape) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.up if self.is_transposed else self.up.mT)


def peft(
    layer: Callable[[], nn.Module], **options: Any
) -> Callable[[int, float], nn.Module]:
    """Return a builder of PEFT's adapter on the layer `q`. An option may be a function of rank and
    alpha.
    """

    def make(rank: int, alpha: float) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        own = {k: v(rank, alpha) if callable(v) else v for k, v in options.items()}
        settings = {"r": rank, "lora_alpha": alpha, "target_modules": ["q"]} | own
        return get_peft_model(One(layer()), LoraConfig(**settings))

    return make


def peft_attention(rank: int, alpha: float) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["attn"])
    return get_peft_model(Attention(), config)


def peft_experts(transposed: bool) -> Callable[[int, float], nn.Module]:
    targets = {"target_modules": [], "target_parameters": ["q.up"]}
    return peft(lambda: Experts(transposed), **targets)


def peft_adalora(rank: int, alpha: float) -> nn.Module:
    from peft import AdaLoraConfig, get_peft_model

    sizes = {"init_r": rank, "lora_alpha": alpha, "total_step": 100}
    config = AdaLoraConfig(target_modules=["q"], **sizes)
    return get_peft_model(One(nn.Linear(IN, OUT)), config)


def peft_kasa(rank: int, alpha: float) -> nn.Module:
    from peft import KasaConfig

    return peft(dense, kasa_config=KasaConfig())(rank, alpha)


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(OUT, IN)


def dense() -> nn.Module:
    return nn.Linear(IN, OUT)


def legacy(rank: int, alpha: float) -> nn.Module:
    """Return diffusers' deprecated LoRA layer, which loaders of old checkpoints still use."""
    from diffusers.models.lora import LoRALinearLayer

    return LoRALinearLayer(IN, OUT, rank=rank, network_alpha=alpha)


WAVES, IMAGES, CLOUDS = drawn(2, 4, 9), drawn(2, 4, 6, 6), drawn(2, 4, 4, 4, 4)
HEADS, STACKS = drawn(2, 5, IN), drawn(3, 4, IN)
CONV1, CONV2, CONV3 = ((12, 8),), ((36, 8),), ((108, 8),)  # fans


def conv(dimensions: int, **options: Any) -> Callable[[], nn.Module]:
    """Return a builder of a convolution from 4 to 8 channels with kernel size 3."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    return lambda: kind(4, 8, 3, **options)


def embedding() -> nn.Module:
    return nn.Embedding(30, 8)


def _peft_cases() -> list[Case]:
    case = rows("peft", "PEFT", "peft")
    bias, dora, whole = "LoRA bias", "DoRA magnitude", "whole copy (modules_to_save)"
    ranks = {"r": 1, "rank_pattern": lambda rank, _: {"q": rank}}
    alphas = {"lora_alpha": 1, "alpha_pattern": lambda _, alpha: {"q": alpha}}
    wide = conv(2, padding=1)
    of_embedding = {"convention": "peft-embedding", "kind": "embedding", "init": "B"}
    singular = {
        "kind": "adalora",
        "init": "other",
        "other": "AdaLoRA's singular values",
    }
    diagonal = {"kind": "kasa", "init": "other", "other": "KaSA's singular values"}
    experts = {"convention": "peft-experts", "kind": "experts"}
    conv_dora = {"kind": "conv", "other": dora}
    of_attention = ((IN, 36), (IN, IN))
    grouped = conv(2, padding=1, groups=2)
    drawn_twice = (False, "pissa", "olora", "orthogonal")
    return [
        case("Linear", peft(dense)),
        case("Linear, rsLoRA", peft(dense, use_rslora=True), scaling=rslora),
        case("Linear, rank_pattern", peft(dense, **ranks)),
        case("Linear, alpha_pattern", peft(dense, **alphas)),
        case("Linear, lora_bias", peft(dense, lora_bias=True), other=bias),
        case(
            "Linear, a saved head", peft(dense, modules_to_save=["head"]), other=whole
        ),
        case("Linear, gaussian", peft(dense, init_lora_weights="gaussian")),
        *(
            case(f"Linear, {name}", peft(dense, init_lora_weights=name), init="other")
            for name in drawn_twice
        ),
        case("Linear, DoRA", peft(dense, use_dora=True), other=dora),
        case("Conv1D of transformers", peft(conv1d, fan_in_fan_out=True)),
        case("Embedding", peft(embedding), tokens, ((30, 8),), **of_embedding),
        case("Conv1d", peft(conv(1)), WAVES, CONV1, kind="conv"),
        case("Conv2d", peft(wide), IMAGES, CONV2, kind="conv"),
        case("Conv2d, two groups", peft(grouped), IMAGES, CONV2, kind="conv"),
        case("Conv2d, DoRA", peft(conv(2), use_dora=True), IMAGES, CONV2, **conv_dora),
        case("Conv3d", peft(conv(3)), CLOUDS, CONV3, kind="conv"),
        case("attention", peft_attention, HEADS, of_attention, probed=False),
        case("AdaLoRA", peft_adalora, convention="peft-adalora", **singular),
        case("KaSA", peft_kasa, convention="peft-kasa", **diagonal),
        case("experts (E, in, out)", peft_experts(True), STACKS, **experts),
        case("experts (E, out, in)", peft_experts(False), STACKS, **experts),
    ]


# --- loralib --------------------------------------------------------------------------------------------------------


def loralib(
    name: str, *sizes: int, **options: Any
) -> Callable[[int, float], nn.Module]:
    def make(rank: int, alpha: float) -> nn.Module:
        import loralib as lora

        layer: nn.Module = getattr(lora, name)(
            *sizes, r=rank, lora_alpha=alpha, **options
        )
        lora.mark_only_lora_as_trainable(layer)
        return layer

    return make


def _loralib_cases() -> list[Case]:
    case = rows("loralib", "loralib", "lora_A/lora_B")
    merged = {"convention": "merged"}
    of_conv = {"convention": "loralib-conv", "kind": "conv"}
    of_embedding = {"kind": "embedding", "init": "B"}
    q = loralib("MergedLinear", IN, 30, enable_lora=[True, False, False])
    qv = loralib("MergedLinear", IN, 30, enable_lora=[True, False, True])
    grouped = loralib("Conv2d", 4, 8, 3, groups=2)
    return [
        case("Linear", loralib("Linear", IN, OUT)),
        case("MergedLinear, q", q, None, ((IN, 10),), **merged),
        case("MergedLinear, qv", qv, None, ((IN, 20),), **merged),
        case(
            "Embedding", loralib("Embedding", 30, 8), tokens, ((30, 8),), **of_embedding
        ),
        case("Conv2d", loralib("Conv2d", 4, 8, 3), IMAGES, CONV2, **of_conv),
        case("Conv2d, two groups", grouped, IMAGES, ((18, 8),), **of_conv),
    ]


# --- LyCORIS --------------------------------------------------------------------------------------------------------


class Beside(nn.Module):
    """A frozen layer together with LyCORIS's module, which replaces the layer's forward."""

    def __init__(
        self, base: nn.Module, module: str, rank: int, alpha: float, **options: Any
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.adapter = getattr(importlib.import_module("lycoris.modules"), module)(
            "lora_q", base, 1.0, rank, alpha, **options
        )
        self.adapter.apply_to()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x)


def lycoris(
    module: str, base: Callable[[], nn.Module] = dense, **options: Any
) -> Callable[[int, float], nn.Module]:
    return lambda rank, alpha: Beside(base(), module, rank, alpha, **options)


def _lycoris_cases() -> list[Case]:
    case = rows("lycoris-lora", "LyCORIS LoCon,", "lora_down/lora_up")

    def locon(base: Callable[[], nn.Module] = dense, **options: Any) -> Any:
        return lycoris("LoConModule", base, **options)

    scalar = {"init": "other", "other": "LyCORIS scalar"}
    dora = {"other": "DoRA magnitude"}
    of_conv = {"kind": "conv"}
    conv_dora = of_conv | dora
    tucker = of_conv | {"convention": "locon-tucker", "other": "Tucker core"}
    wide, grouped = conv(2, padding=1), conv(2, groups=2)
    images = (IMAGES, CONV2)
    return [
        case("linear", locon()),
        case("linear, rs_lora", locon(rs_lora=True), scaling=rslora),
        case("linear, use_scalar", locon(use_scalar=True), **scalar),
        case("linear, DoRA", locon(weight_decompose=True), **dora),
        case("Conv1d", locon(conv(1)), WAVES, CONV1, **of_conv),
        case("Conv2d", locon(wide), *images, **of_conv),
        case("Conv2d, two groups", locon(grouped), IMAGES, ((18, 8),), **of_conv),
        case("Conv2d, Tucker", locon(wide, use_tucker=True), *images, **tucker),
        case("Conv2d, DoRA", locon(wide, weight_decompose=True), *images, **conv_dora),
    ]


# --- torchtune, litgpt, DeepSpeed, diffusers -----------------------------------------------------------------------------------


def torchtune(name: str) -> Callable[[int, float], nn.Module]:
    def make(rank: int, alpha: float) -> nn.Module:
        from torchtune.modules import peft as tune

        layer: nn.Module = getattr(tune, name)(IN, OUT, rank=rank, alpha=alpha)
        if hasattr(layer, "initialize_dora_magnitude"):
            layer.initialize_dora_magnitude()
        tune.set_trainable_params(layer, tune.get_adapter_params(layer))
        return layer

    return make


def litgpt(name: str, *sizes: int, **options: Any) -> Callable[[int, float], nn.Module]:
    def make(rank: int, alpha: float) -> nn.Module:
        from litgpt import lora

        layer: nn.Module = getattr(lora, name)(
            *sizes, r=rank, lora_alpha=alpha, **options
        )
        if isinstance(layer, lora.LoRAQKVLinear):
            layer.reset_parameters()
        lora.mark_only_lora_as_trainable(layer)
        return layer

    return make


def deepspeed(rank: int, alpha: float) -> nn.Module:
    from deepspeed.linear.config import LoRAConfig
    from deepspeed.linear.optimized_linear import LoRAOptimizedLinear

    config = LoRAConfig(lora_r=rank, lora_alpha=alpha)
    return LoRAOptimizedLinear(
        IN, OUT, lora_config=config, device="cpu", dtype=torch.float32
    )


def _other_cases() -> list[Case]:
    tune = rows("torchtune", "torchtune", "lora_a/lora_b")
    own = rows("deepspeed", "DeepSpeed", "deepspeed-linear")
    lit = rows("litgpt", "litgpt", "lora_A/lora_B")
    old = rows("diffusers", "diffusers", "diffusers-legacy")
    # two heads of 5, and two groups of keys and values
    qkv = litgpt("LoRAQKVLinear", IN, 30, 5, 2, 2, enable_lora=(True, False, True))
    of_qkv = {"inputs": HEADS, "fans": ((IN, 20),), "convention": "merged"}
    dora = {"other": "DoRA magnitude"}
    return [
        tune("LoRALinear", torchtune("LoRALinear")),
        tune("DoRALinear", torchtune("DoRALinear"), **dora),
        own("LoRAOptimizedLinear", deepspeed),
        lit("LoRALinear", litgpt("LoRALinear", IN, OUT)),
        lit("LoRAQKVLinear, qv, query groups: 2", qkv, **of_qkv),
        old("LoRALinearLayer (legacy)", legacy),
    ]


# --- adapters that are no LoRA pair ---------------------------------------------------------------------------------

# By PEFT's name of a method: the kind that its parameters have, and the settings that it needs for
# a layer of 64 × 64.
OTHER_TUNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LOHA": ("LoHa", {}),
    "LOKR": ("LoKr", {}),
    "VERA": ("VeRA", {}),
    "PVERA": ("PVeRA", {}),
    "IA3": ("IA³", {"feedforward_modules": []}),
    "OFT": ("OFT", {"oft_block_size": 4, "r": 0}),
    "BOFT": ("BOFT", {"boft_block_size": 4}),
    "PSOFT": ("PSOFT", {}),
    "HRA": ("HRA", {}),
    "VBLORA": ("VB-LoRA", {"num_vectors": 8, "vector_length": 4, "topk": 2}),
    "RANDLORA": ("RandLoRA", {"r": 2}),
    "MISS": ("MiSS", {"r": 8}),
    "SHIRA": ("SHiRA", {"r": 2}),
    "C3A": ("C³A", {"block_size": 4}),
    "FOURIERFT": ("FourierFT", {"n_frequency": 10}),
    "WAVEFT": ("WaveFT", {"n_frequency": 10}),
    "POLY": ("Poly", {}),
    "GLORA": ("GLoRA", {}),
    "GRALORA": ("GraLoRA", {}),
    "DELORA": ("DeLoRA", {}),
    "HIRA": ("HiRA", {}),
    "LILY": ("Lily", {}),
    "TINYLORA": ("TinyLoRA", {}),
    "UNILORA": ("Uni-LoRA", {}),
    "PEANUT": ("PEANuT", {}),
    "FROD": ("FRoD", {}),
    "DEFT": ("DEFT", {}),
    "OSF": ("OSF", {}),
    "SUPERTUNING": ("SuperTuning", {}),
    "ROAD": ("RoAd", {}),
    "BEFT": ("BEFT", {}),
    "LN_TUNING": ("LN tuning", {}),
}
OTHER_MODULES = {
    "LohaModule": "LoHa",
    "LokrModule": "LoKr",
    "DyLoraModule": "DyLoRA",
    "GLoRAModule": "GLoRA",
    "DiagOFTModule": "OFT",
    "ButterflyOFTModule": "OFT",
    "TLoraModule": "T-LoRA",
}


def other_tuner(name: str) -> nn.Module:
    """Return a layer with an adapter of the PEFT method of this name."""
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS

    config = next(config for kind, config in CONFIGS.items() if kind.value == name)
    model = One(nn.Linear(64, 64))
    return get_peft_model(model, config(target_modules=["q"], **OTHER_TUNERS[name][1]))


CASES = [
    *_peft_cases(),
    *_loralib_cases(),
    *_lycoris_cases(),
    *_other_cases(),
]


def each_case(packages: Collection[str]) -> pytest.MarkDecorator:
    """Return a parametrization of a test by the cases of these packages."""
    cases = [case for case in CASES if case.package in packages]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)
