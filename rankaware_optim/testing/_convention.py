"""Conformance of a convention: whether its layers are read correctly, checked by their outputs and
their training.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._types import Factor, Survey
from ..errors import InspectionError
from ..inspection import (
    Convention,
    Pair,
    conventions,
    inspect_model,
    other_kind,
    pairs_of,
    reading_of,
    register_convention,
    scaling_of,
    survey_of,
    walk,
)

_LR, _EPS, _DECAY, _STEPS = 1e-2, 1e-3, 0.1, 5
_SPLIT = 1.5
"""p, the share of a change of scaling that A₀ undoes. B₀ undoes the rest."""
# AdaLoRA divides by rank + 1e-5; a wrong rank, fan-in or scaling gives a much larger error
_PROBE_BAR = 1e-5
_ORACLE_BAR = 1e-9

Make = Callable[[int, float], nn.Module]
Run = Callable[..., torch.Tensor]


def output_of(model: nn.Module, *inputs: Any) -> torch.Tensor:
    """Return a model's output tensor: the output itself, or its logits or last hidden state as in
    transformers.
    """
    out: Any = model(*inputs)
    if isinstance(out, torch.Tensor):
        return out
    for name in ("logits", "last_hidden_state"):
        value = getattr(out, name, None)
        if isinstance(value, torch.Tensor):
            return value
    raise InspectionError(
        f"The module returns a {type(out).__name__}, which is not a tensor.",
        "Give run=, a function of module and inputs that returns one.",
    )


@dataclass(frozen=True)
class Conformance:
    """The result of `check_convention`.

    Args:
        factors: the factors of the first build.
        builds: the number of builds.
        probe: relative error of the ones-probe against scaling × rank × inner × fan_in. None if
            several layers are adapted, or if the output is not linear in B or does not depend on
            ones.
        oracle: the largest relative difference between two trainings that must be equal.
    """

    factors: tuple[Factor, ...]
    builds: int
    probe: float | None
    oracle: float

    def __str__(self) -> str:
        names = ", ".join(
            dict.fromkeys(f"{f.convention} ({f.kind})" for f in self.factors)
        )
        probe = "does not apply" if self.probe is None else f"off by {self.probe:.1e}"
        return (
            f"{names}: {len(self.factors)} factors found in each of {self.builds} builds. "
            f"Ones-probe: {probe}. Reparametrised training: off by {self.oracle:.1e}."
        )


def check_convention(
    make: Make,
    *inputs: Any,
    convention: Convention | str | None = None,
    run: Run | None = None,
    ranks: Sequence[int] = (2, 4),
    alphas: Sequence[float] = (3.0, 8.0),
) -> Conformance:
    """Check in float64 that inspection reads a layer correctly.

    1. Every pair is found at the right rank, and by `convention` if one is given.
    2. With all entries of inputs, A and B equal to 1, B·A moves the output by scaling × rank ×
       inner × fan_in (fan-in 1 for an embedding), compared with B = 0. This checks rank, scaling
       and fan-in, if fan-in and fan-out differ.
    3. Two alphas train equally if A₀, B₀, rates, eps and decays of the second are scaled by p, q
       and their inverses, with p·q = s/s′. This checks roles and scalings. Other parameters keep
       their rates. Biases of A and B are held at 0.

    The global random state is restored.

    Args:
        make: `make(rank, alpha)` returns a new module at every call.
        *inputs: the module's inputs.
        convention: the convention that must find the pairs. One that is not registered, or the name
            of an optional one, is registered for the call.
        run: `run(module, *inputs)` returns the output tensor, by default `module(*inputs)`.
        ranks: the ranks to build.
        alphas: the alphas to compare, at least two.

    Returns:
        The factors and the errors of the checks.

    Raises:
        InspectionError: a check fails. The message names the first one.
    """
    if not ranks or len(alphas) < 2:
        raise InspectionError(
            f"Ranks {ranks} and alphas {alphas} are too few.",
            "Give at least one rank and two alphas.",
        )
    doubled = tuple(v.double() if _is_floating(v) else v for v in inputs)
    layer = _Layer(make, doubled, run or output_of)
    builds = list(itertools.product(ranks, alphas))
    with _registered(convention) as name, torch.random.fork_rng(devices=[]):
        surveys = [layer.survey(rank, alpha, name) for rank, alpha in builds]
        probes = [error for build in builds for error in layer.probe(*build)]
        pairs = itertools.product(ranks, itertools.combinations(alphas, 2))
        errors = [layer.oracle(rank, pair) for rank, pair in pairs]
    return Conformance(
        surveys[0].factors, len(surveys), max(probes, default=None), max(errors)
    )


@contextmanager
def _registered(convention: Convention | str | None) -> Iterator[str | None]:
    """Register the convention and yield its name. Remove it afterwards if it was not registered
    before.
    """
    name = convention.name if isinstance(convention, Convention) else convention
    rows = conventions()
    if convention is None or convention in (*rows, *(row.name for row in rows)):
        yield name
        return
    register_convention(convention)
    try:
        yield name
    finally:
        register_convention(convention, remove=True)


def _failed(check: str, cause: str, cure: str) -> InspectionError:
    return InspectionError(f"The check {check!r} fails: {cause}", cure)


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@dataclass(frozen=True)
class _Layer:
    """The layer to check: how to build it, its inputs, and how to run it."""

    make: Make
    inputs: tuple[Any, ...]
    run: Run

    def build(self, rank: int, alpha: float) -> nn.Module:
        """Build the module with the same random numbers at every call."""
        torch.default_generator.manual_seed(0)
        module = self.make(rank, alpha).double()
        for name, param in module.named_parameters():
            if other_kind(name) == "LoRA bias":
                nn.init.zeros_(param.requires_grad_(False))
        return module

    def survey(self, rank: int, alpha: float, name: str | None) -> Survey:
        """Return the survey of a build. Raise if its rank or its convention is wrong."""
        try:
            survey = inspect_model(self.build(rank, alpha))
        except InspectionError as error:
            raise _failed("found", error.cause, error.cure) from error
        if not survey.factors:
            raise _failed(
                "found",
                "No pair is found, only other adapters.",
                "Register a Convention for it.",
            )
        for f in survey.factors:
            if name not in (None, f.convention):
                raise _failed(
                    "found",
                    f"{f.name} is read as {f.convention}, not as {name}.",
                    "Change the order of the rows, or make them more specific.",
                )
            if f.rank != rank:
                raise _failed(
                    "rank",
                    f"{f.name} has rank {f.rank} instead of {rank}.",
                    "Give the attribute that holds the rank.",
                )
        return survey

    @torch.no_grad()
    def probe(self, rank: int, alpha: float) -> list[float]:
        """Return the relative errors of the ones-probe by pair, [] if it does not apply."""
        module = self.build(rank, alpha)
        pairs = [pair for pair in pairs_of(walk(module).modules) if pair.trains]
        if len({pair.layer for pair in pairs}) > 1:
            return []
        _set_to_units(pairs)
        errors = []
        for pair in pairs:
            moved = self._moved_by_ones(module, pair)
            if moved is None:
                return []
            reading = reading_of(pair)
            scaling = scaling_of(pair, reading.rank_a) or 1.0
            fan_in = 1.0 if reading.kind == "embedding" else reading.fan_in
            expected = scaling * reading.rank_a * reading.inner * fan_in
            errors.append(abs(moved - expected) / expected)
            if not errors[-1] < _PROBE_BAR:
                raise _failed(
                    "ones-probe",
                    f"with ones everywhere {pair.where} moves the output by {moved:g}, and scaling"
                    f" {scaling:g} × rank {reading.rank_a:g} × inner {reading.inner} × fan-in"
                    f" {fan_in:g} is {expected:g}.",
                    "Check the convention's layout and its attributes for rank and scaling.",
                )
        return errors

    def _moved_by_ones(self, module: nn.Module, pair: Pair) -> float | None:
        """Return how far B = 1 moves the output from B = 0, None if it is not linear in B."""
        ones = [torch.ones_like(v) if _is_floating(v) else v for v in self.inputs]
        outputs = []
        for value in (1.0, 2.0, 0.0):
            pair.b.tensor.fill_(value)
            outputs.append(self.run(module, *ones).clone())
        once, twice = outputs[0] - outputs[2], outputs[1] - outputs[2]
        tolerance = 1e-9 * float(twice.abs().max())
        if not once.any() or not torch.allclose(
            twice, 2 * once, rtol=1e-9, atol=tolerance
        ):
            return None
        return float(once.abs().max())

    def oracle(self, rank: int, alphas: tuple[float, float]) -> float:
        """Return the difference of two trainings that must be equal, relative to the largest
        output.

        An adapter with another scaling trains equally if rates, eps, decays and initial values
        compensate for it (Chen, Villar, Hayou, arXiv 2602.06204).
        """
        first, second = (self.build(rank, alpha) for alpha in alphas)
        same = {"A": 1.0, "B": 1.0}
        outputs = []
        for module, scales in ((first, same), (second, _move(first, second))):
            settings = {
                role: {"lr": _LR * by, "eps": _EPS / by, "weight_decay": _DECAY / by}
                for role, by in scales.items()
            }
            settings["other"] = {"lr": _LR}
            outputs.append(
                trained(module, self.inputs, settings, steps=_STEPS, answer=self.run)
            )
        walked = walk(first)
        gradients = {name: param.grad for name, param in walked.parameters}
        for f in survey_of(walked).factors:
            gradient = gradients[f.name]
            if gradient is None or not gradient.any():
                raise _failed(
                    "oracle",
                    f"the output does not depend on {f.name}.",
                    "Use the adapter in the output.",
                )
        error = distance(*outputs)
        if not error < _ORACLE_BAR:
            raise _failed(
                "oracle",
                f"at rank {rank}, trainings with alphas {alphas[0]:g} and {alphas[1]:g} differ by"
                f" {error:.1e} although rates, eps, decays and initial values compensate for the"
                " scalings that were read.",
                "Check that scaling and roles are read correctly, and that the layer is a pair"
                " without randomness.",
            )
        return error


def _set_to_units(pairs: Sequence[Pair]) -> None:
    """Set every A to 1, every B to 0, and a square core to the identity."""
    halves = {id(half.tensor) for pair in pairs for half in (pair.a, pair.b)}
    for pair in pairs:
        for param in pair.owner.parameters():
            if param.requires_grad and id(param) not in halves:
                param.fill_(1.0)
                if param.dim() > 1 and param.shape[0] == param.shape[1]:
                    param.zero_().diagonal().fill_(1.0)
        pair.a.tensor.fill_(1.0)
        pair.b.tensor.fill_(0.0)


@torch.no_grad()
def _move(first: nn.Module, second: nn.Module) -> dict[str, float]:
    """Draw `first`'s factors, copy `first` into `second` with factors scaled by p and q, and return
    p and q by role.
    """
    factors, others = (survey_of(walk(module)).factors for module in (first, second))
    ratios = {f.scaling / g.scaling for f, g in zip(factors, others, strict=True)}
    ratio = max(ratios)
    if ratio - min(ratios) > 1e-12 * ratio:
        raise _failed(
            "oracle",
            f"the two alphas change the scalings by {sorted(ratios)}.",
            "Use one alpha for all.",
        )
    roles = {f.name: f.role for f in factors}
    p = _SPLIT
    if "B" not in roles.values():  # a frozen factor is kept
        p = ratio
    elif "A" not in roles.values():
        p = 1.0
    scales = {"A": p, "B": ratio / p}
    draw = torch.Generator().manual_seed(0)
    copies = dict(walk(second).parameters)
    for name, param in walk(first).parameters:
        if name in roles:
            param.copy_(
                torch.randn(param.shape, generator=draw, dtype=torch.float64) / 4
            )
        if param.is_floating_point():
            copies[name].copy_(param * scales.get(roles.get(name, ""), 1.0))
    return scales


def trained(
    model: nn.Module,
    inputs: tuple[Any, ...],
    settings: Mapping[str, Mapping[str, float]],
    *,
    steps: int = 10,
    answer: Run = output_of,
) -> list[torch.Tensor]:
    """Train a model in place by AdamW towards a random target, and return the outputs before and
    after every step.

    The loss is the mean square. Gradients are not clipped, decays are decoupled, and the global
    random state is kept.

    Args:
        model: the model, with factors as `inspect_model` finds them.
        inputs: the model's inputs.
        settings: AdamW's settings for the factors "A" and "B", and for "other" parameters. Those
            without settings stay as they are.
        steps: number of steps.
        answer: returns the output tensor of the model.
    """
    roles = {f.name: str(f.role) for f in inspect_model(model).factors}
    params: dict[str, list[nn.Parameter]] = {role: [] for role in ("A", "B", "other")}
    for name, param in walk(model).parameters:
        if param.requires_grad:
            params[roles.get(name, "other")].append(param)
    groups = [{"params": params[role], **own} for role, own in settings.items()]
    optimizer = torch.optim.AdamW(groups, foreach=False)
    outputs = [answer(model, *inputs)]
    source = torch.Generator().manual_seed(0)
    target = torch.randn(outputs[0].shape, generator=source, dtype=torch.float64)
    target = target.to(outputs[0])
    for _ in range(steps):
        optimizer.zero_grad()
        (outputs[-1] - target).square().mean().backward()
        optimizer.step()
        outputs.append(answer(model, *inputs))
    return [output.detach() for output in outputs]


def distance(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """Return the largest difference between two lists of outputs, relative to the largest."""
    scale = max(float(t.abs().max()) for t in first)
    return (
        max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))
        / scale
    )
