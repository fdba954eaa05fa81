"""The oracle: two trainings that must give equal outputs.

An adapter with another scaling trains in the same way if learning rates, eps, weight decays and
initial values compensate for the scaling (Chen, Villar, Hayou, arXiv 2602.06204).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from rankaware_optim import Survey, initialize, inspect_model
from rankaware_optim.inspection import other_kind, survey_of, walk

LR, EPS, DECAY, STEPS = 1e-2, 1e-3, 0.1, 5
SPLIT = 1.5  # p: A is multiplied by p, and B by the ratio of the scalings over p

Run = Callable[..., torch.Tensor]


def output_of(model: nn.Module, *inputs: Any) -> torch.Tensor:
    """Return a model's output tensor: the output itself, or its logits as in transformers."""
    out: Any = model(*inputs)
    return out if isinstance(out, torch.Tensor) else out.logits


def trained(
    model: nn.Module,
    inputs: tuple[Any, ...],
    settings: Mapping[str, Mapping[str, float]],
    steps: int = 10,
) -> list[torch.Tensor]:
    """Train with AdamW towards a random target, and return the outputs before the first step and
    after every step.

    The loss is the mean square error. `settings` are the options of AdamW for the roles "A", "B"
    and "other". Parameters of a role without settings do not train.
    """
    roles = {f.name: str(f.role) for f in inspect_model(model).factors}
    params: dict[str, list[nn.Parameter]] = {role: [] for role in ("A", "B", "other")}
    for name, param in walk(model).parameters:
        if param.requires_grad:
            params[roles.get(name, "other")].append(param)
    groups = [{"params": params[role], **own} for role, own in settings.items()]
    optimizer = torch.optim.AdamW(groups, foreach=False)
    outputs = [output_of(model, *inputs)]
    source = torch.Generator().manual_seed(0)
    target = torch.randn(outputs[0].shape, generator=source, dtype=torch.float64)
    target = target.to(outputs[0])
    for _ in range(steps):
        optimizer.zero_grad()
        (outputs[-1] - target).square().mean().backward()
        optimizer.step()
        outputs.append(output_of(model, *inputs))
    return [output.detach() for output in outputs]


def distance(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """Return the largest difference between two lists of outputs, relative to the largest output."""
    scale = max(float(t.abs().max()) for t in first)
    pairs = zip(first, second, strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs) / scale


def oracle(make: Callable[[int, float], nn.Module], *inputs: Any) -> float:
    """Return the largest difference between two trainings of `make`'s layer, at alphas 3 and 8,
    over ranks 2 and 4.

    The difference is large if roles or scalings are read wrongly. Other parameters keep their
    learning rates, and biases of A and B stay 0. If the output does not depend on A or B, an
    AssertionError names that matrix.
    """
    inputs = tuple(
        v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for v in inputs
    )
    errors = []
    with torch.random.fork_rng(devices=[]):
        for rank in (2, 4):
            first, second = (_build(make, rank, alpha) for alpha in (3.0, 8.0))
            by = _move(first, second)
            plain = dict.fromkeys(by, 1.0)
            outputs = [
                trained(module, inputs, _settings(scales), STEPS)
                for module, scales in ((first, plain), (second, by))
            ]
            _require_gradients(first)
            errors.append(distance(*outputs))
    return max(errors)


def _settings(scales: Mapping[str, float]) -> dict[str, dict[str, float]]:
    settings = {
        role: {"lr": LR * by, "eps": EPS / by, "weight_decay": DECAY / by}
        for role, by in scales.items()
    }
    return {**settings, "other": {"lr": LR}}


def _require_gradients(model: nn.Module) -> None:
    walked = walk(model)
    gradients = {name: param.grad for name, param in walked.parameters}
    for f in survey_of(walked).factors:
        gradient = gradients[f.name]
        assert gradient is not None, f"the output does not depend on {f.name}"
        assert gradient.any(), f"the output does not depend on {f.name}"


def _build(make: Callable[[int, float], nn.Module], rank: int, alpha: float) -> Any:
    """Return the module with the same random numbers at every call, and with the biases of A and B
    zero and frozen.
    """
    torch.default_generator.manual_seed(0)
    module = make(rank, alpha).double()
    for name, param in module.named_parameters():
        if other_kind(name) == "LoRA bias":
            nn.init.zeros_(param.requires_grad_(False))
    return module


@torch.no_grad()
def _move(first: nn.Module, second: nn.Module) -> dict[str, float]:
    """Draw A and B of `first`, copy all values into `second` with A multiplied by p and B by q, and
    return p and q by role.
    """
    factors, others = (survey_of(walk(module)).factors for module in (first, second))
    ratios = [f.scaling / g.scaling for f, g in zip(factors, others, strict=True)]
    ratio = max(ratios)
    assert ratio - min(ratios) <= 1e-12 * ratio, ratios
    roles = {f.name: f.role for f in factors}
    p = SPLIT
    if "B" not in roles.values():  # a frozen matrix keeps its values
        p = ratio
    elif "A" not in roles.values():
        p = 1.0
    scales = {"A": p, "B": ratio / p}
    draw = torch.Generator().manual_seed(0)
    copies = dict(walk(second).parameters)
    for name, param in walk(first).parameters:
        if name in roles:
            drawn = torch.randn(param.shape, generator=draw, dtype=torch.float64)
            param.copy_(drawn / 4)
        if param.is_floating_point():
            copies[name].copy_(param * scales.get(roles.get(name, ""), 1.0))
    return scales


def check_initialize(model: nn.Module, inputs: tuple[Any, ...], init: Any) -> Survey:
    """Initialise a model, check that its output keeps every bit and that its init is known after
    some steps, and return its survey.
    """
    before = output_of(model, *inputs).clone()
    survey = initialize(model, init)
    assert torch.equal(before, output_of(model, *inputs))
    assert {f.init for f in survey.factors} == {init}
    start = {f.name: model.get_parameter(f.name).clone() for f in survey.factors}
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    for _ in range(3):
        (output_of(model, *inputs) - 1).square().mean().backward()
        opt.step()
        opt.zero_grad()
    assert {f.init for f in inspect_model(model).factors} == {init}
    moved = [not torch.equal(model.get_parameter(name), start[name]) for name in start]
    assert all(moved)
    return survey
