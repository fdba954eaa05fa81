"""Which rate for what is neither A nor B: heads, embeddings, new tokens, norms and biases, DoRA's magnitudes?

    python benchmarks/laws/rest.py sweep --part "norms and biases"   # resumable: results/rest/norms-and-biases.jsonl
    python benchmarks/laws/rest.py table                             # results/rest.md

A part is what trains beside the adapters, in a task of the study: with its network, its steps, its optimizer. The
adapters are at Init[A], at ranks 4 and 64, with alpha = rank (s = 1) and with alpha kept at 16 (s = 16/r). The plane:
adapters' rates an octave apart, three to begin with, around the study's best, and rates of the rest two octaves apart,
five to begin with, around the study's best of full finetuning, on seed 0. It grows at an edge. At its best rate of the
adapters, the rates of the rest are then run an octave apart around the best, on seeds 0 and 1. A regret is the share of
the attainable gain that a rate of the rest loses, at that rate of the adapters, by the spline through the mean losses.

PiSSA, OLoRA and DoRA's own A and B are swept in one rate for all, an octave apart, on language, at ranks 4 and 64, on
two seeds.

**Rules**, committed before any run.

*The default.* A user has a rate that is best at rank 16 with alpha = 16. The rest can train at

* the base rate, whatever the rank: the package as it is;
* the adapters' rate at the rank that trains;
* the law's rate of full finetuning, from that base rate;
* the same multiples of the base rate for every part: a quarter, or four times.

The package takes the way with the lowest mean regret over all parts, ranks and scalings, if that is more than .2 points
below that of the base rate, and no part loses more than a point more by it. Otherwise it stays as it is.

*The rank.* The best rate of a part does not depend on the rank if it moves by less than half an octave from rank 4 to 64
with alpha = rank, and less with alpha kept, or if what it moves by costs less than half a point of regret.

*DoRA follows LoRA's law* if the ratio of its best rate at rank 64 to that at rank 4 is LoRA's within half an octave, in
both scalings. *The largest eigenvalue of the Hessian predicts PiSSA's and OLoRA's rate*, as arXiv 2602.04998 says, if
LoRA's best rate times the ratio of LoRA's eigenvalue to theirs, before training, is within an octave of theirs in all
four cells. (The eigenvalue is of the training loss in A and B, by power iteration on one batch.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import click
import torch
from recording import RESULTS
from study.configurations import ADAMW, CLIP, START, TUNED, starts
from study.domains import (
    Domain,
    _dit,
    _llama,
    get_domain,
    image_generation,
)
from study.domains._adapters import adapt
from study.grids import FULL, Cell, Job, Losses, Together, curve, lowest, or_inf
from study.optima import best_rates
from study.runs_on_file import complete, read
from study.suite import STORES, provenance
from study.training import WARMUP, train
from torch import nn

import rankaware_optim as ra

RESTS_ON = ("laws.adam", "optimizer.common", "scores")
STORE = RESULTS / "rest"
RANKS, SEEDS = (4, 64), 2
# alpha by rank
SCALINGS: dict[str, Callable[[int], float]] = {
    "s = 1": float,
    "s = 16/r": lambda rank: float(TUNED),
}
NEW_TOKENS = 128  # tokens of the code whose embeddings are forgotten
MOST = 9  # rates that an axis may have


class Part(NamedTuple):
    """What trains beside the adapters.

    Args:
        name: in words.
        task: the study's domain.
        build: (rank, alpha, seed) -> the model. What is neither A nor B is the part.
    """

    name: str
    task: str
    build: Callable[[int, float, int], nn.Module]

    @property
    def domain(self) -> Domain:
        return get_domain(self.task)

    def cell(self, scaling: str, rank: int, y: float | None = None) -> Cell:
        """Runs of a scaling and rank. y: log2 of the rest's rate, None for one rate for all."""
        rest = "" if y is None else f" | {y:g}"
        return self.name, f"{scaling}{rest}", rank


def with_head(task: str) -> Callable[[int, float, int], nn.Module]:
    """A task's own model: its new classifier is the rest."""

    def build(rank: int, alpha: float, seed: int) -> nn.Module:
        return get_domain(task).build(rank, alpha, "A", seed)

    return build


def labels(rank: int, alpha: float, seed: int) -> nn.Module:
    """Image generation, and the embeddings of its labels."""
    model = _dit.DiT()
    model.load_state_dict(image_generation.pretrained())
    frozen = model.requires_grad_(False)
    return adapt(frozen, rank, alpha, "A", seed, _dit.LAYERS, saved=["label"])


def norms_and_biases(rank: int, alpha: float, seed: int) -> nn.Module:
    """Image generation, and all its norms and biases."""
    model = image_generation.DOMAIN.build(rank, alpha, "A", seed)
    for name, param in model.named_parameters():
        if name.endswith(".bias") or "norm" in name:
            param.requires_grad_(True)
    return model


def llama(rank: int, alpha: float, seed: int, **options: Any) -> nn.Module:
    """Language, with further options of PEFT's LoRA."""
    return adapt(_llama.llama(), rank, alpha, "A", seed, _llama.LAYERS, **options)


def tied(rank: int, alpha: float, seed: int) -> nn.Module:
    """Language, and its embeddings, which are its head too."""
    return llama(rank, alpha, seed, saved=["embed_tokens"], ensure_weight_tying=True)


def untied(rank: int, alpha: float, seed: int) -> nn.Module:
    """Language, its embeddings, and a head that begins as a copy of them."""
    model: Any = _llama.llama()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    saved = ["embed_tokens", "lm_head"]
    return adapt(model, rank, alpha, "A", seed, _llama.LAYERS, saved=saved)


def new_tokens(rank: int, alpha: float, seed: int) -> nn.Module:
    """Language, and the embeddings of tokens that begin as the mean of all, as new tokens do."""
    model: Any = _llama.llama()
    counts = torch.bincount(_llama.tokens("code"), minlength=_llama.VOCABULARY)
    new = counts.topk(NEW_TOKENS).indices
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[new] = weight.mean(0)
    trained = {"embed_tokens": new.tolist()}
    return adapt(
        model, rank, alpha, "A", seed, _llama.LAYERS, trainable_token_indices=trained
    )


def dora(rank: int, alpha: float, seed: int) -> nn.Module:
    """Language with DoRA: its magnitudes are the rest."""
    return llama(rank, alpha, seed, use_dora=True)


PARTS = {
    part.name: part
    for part in (
        Part("norms and biases", "image_generation", norms_and_biases),
        Part("labels", "image_generation", labels),
        Part(
            "vision head", "vision_classification", with_head("vision_classification")
        ),
        Part("tied embeddings", "language", tied),
        Part("new tokens", "language", new_tokens),
        Part("untied embeddings and head", "language", untied),
        Part("DoRA's magnitudes", "language", dora),
        Part("text head", "text_classification", with_head("text_classification")),
    )
}


def initialised(kind: str) -> Callable[[int, float, int], nn.Module]:
    """Language with another init of PEFT."""

    def build(rank: int, alpha: float, seed: int) -> nn.Module:
        return llama(rank, alpha, seed, init_lora_weights=kind)

    return build


LINES = {
    part.name: part
    for part in (
        Part("LoRA", "language", llama),
        Part("PiSSA", "language", initialised("pissa")),
        Part("OLoRA", "language", initialised("olora")),
        Part("DoRA", "language", dora),
    )
}


# --- the sweeps -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plane:
    """The rates of a part at a rank and scaling: a plane of seed 0, then a line of both seeds at its best column.

    Args:
        part, scaling, rank: where.
        x, y: log2 of the rates at the centre, of the adapters and of the rest.
    """

    part: Part
    scaling: str
    rank: int
    x: int
    y: int

    def job(self, x: int, y: int, seed: int = 0) -> Job:
        return Job(*self.part.cell(self.scaling, self.rank, y), float(x), seed)

    def wanted(self, done: Losses) -> list[Job]:
        xs, ys = around(self.x, 1, 1), around(self.y, 2, 2)
        while True:
            jobs = {(x, y): self.job(x, y) for x in xs for y in ys}
            missing = [job for job in jobs.values() if job not in done]
            if missing:
                return missing
            losses = {at: or_inf(done[job]) for at, job in jobs.items()}
            x, y = min(losses, key=losses.__getitem__)
            wider = grown(xs, x), grown(ys, y)
            if wider == (xs, ys):
                break
            xs, ys = wider
        line = [
            self.job(x, at, seed) for at in around(y, 2, 1) for seed in range(SEEDS)
        ]
        return [job for job in line if job not in done]


def around(centre: int, count: int, apart: int) -> range:
    """`count` rates on either side."""
    return range(centre - count * apart, centre + count * apart + 1, apart)


def grown(axis: range, best: int) -> range:
    """The axis with one rate more where the best is at an edge."""
    if len(axis) >= MOST:
        return axis
    low = axis.start - axis.step * (best == axis[0])
    return range(low, axis.stop + axis.step * (best == axis[-1]), axis.step)


@dataclass(frozen=True)
class Line:
    """One rate for all, an octave apart, growing at an edge, on both seeds."""

    cell: Cell
    x: int

    def wanted(self, done: Losses) -> list[Job]:
        axis = around(self.x, 1, 1)
        while True:
            jobs = [
                Job(*self.cell, float(x), seed) for x in axis for seed in range(SEEDS)
            ]
            missing = [job for job in jobs if job not in done]
            if missing:
                return missing
            wider = grown(axis, round(lowest(curve(done, self.cell, SEEDS))))
            if wider == axis:
                return []
            axis = wider


def planes(part: Part) -> list[Plane]:
    """One a scaling and rank, around the study's best rates."""
    done = read(STORES / f"{part.task}.jsonl")
    lora = best_rates(done, part.task, "Init[A], s = 1")
    full = round(best_rates(done, part.task, "full")[FULL])
    centres = {"s = 1": lora, "s = 16/r": dict.fromkeys(RANKS, lora[TUNED])}
    return [
        Plane(part, scaling, rank, round(centres[scaling][rank]), full)
        for scaling in SCALINGS
        for rank in RANKS
    ]


def lines(part: Part) -> list[Line]:
    """One rate for all, from the centres of the planes."""
    return [Line(part.cell(each.scaling, each.rank), each.x) for each in planes(part)]


def store_of(part: Part) -> Any:
    return STORE / f"{part.name.replace(' ', '-').replace(chr(39), '').lower()}.jsonl"


def run_one(job: Job) -> float | None:
    """The held-out loss of a run. A job has the part's name in place of the domain's."""
    part = {**LINES, **PARTS}[job.domain]
    if job.scheme == START:
        return part.domain.evaluate(part.build(RANKS[0], 1.0, job.seed))
    scaling, _, rest = job.scheme.partition(" | ")
    model = part.build(job.rank, SCALINGS[scaling](job.rank), job.seed)
    lr = 2.0**job.x
    other = 2.0 ** float(rest) if rest else lr
    opt = ra.RankAwareOptimizer(
        model, "adamw", lr=lr, other_lr=other, law="constant", **ADAMW
    )
    return train(part.domain, model, opt, job.seed, CLIP, WARMUP)


@click.group()
def main() -> None:
    """Sweep the rates of the rest, and judge where they should follow."""


@main.command()
@click.option("--part", "name", type=click.Choice([*PARTS, *LINES]), required=True)
@click.option("--workers", default=2, show_default=True)
def sweep(name: str, workers: int) -> None:
    """Run what is missing of a part's plane, or of an init's line."""
    torch.set_num_threads(1)
    part = {**LINES, **PARTS}[name]
    grids = lines(part) if name in LINES else planes(part)
    grid = Together([starts(name, range(SEEDS)), *grids])
    made = provenance(part.task)
    complete(grid, run_one, store_of(part), workers, click.echo, made)


if __name__ == "__main__":
    main()
