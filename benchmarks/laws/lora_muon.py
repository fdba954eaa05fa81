"""Does LoRA-Muon's best rate stay when the rank changes, and how good is its best loss?

    python benchmarks/laws/lora_muon.py run --domain image_generation    # resumable: results/lora_muon/...
    python benchmarks/laws/lora_muon.py table                            # results/lora_muon.md

Cesista, Crowson, Simal and Biderman (arXiv 2606.12921) take Muon's step for the product of the factors. With W = B·A,
momenta M of the factors' gradients and R = (A·A^T)^(-1/2), the step of B is -η/2 · msign(M_B·R)·R, where msign has all
singular values 1. That of A is the same with the factors exchanged. The product moves by at most η in the spectral
norm, whatever the rank, the scale of the factors or alpha. So the best rate should stay at every rank.

It was written here from the paper: momentum .9, the weight decay split between the factors, msign and the inverse root
from eigenvalues in double precision, with 1e-9 and 1e-5 of the largest added. Heads have AdamW at the study's fixed
rates.

Two tasks of the study, Init[A] with alpha = rank, ranks 4, 16 and 64. Rates are an octave
apart, three to begin with, more where the best is at an edge, on two seeds. AdamW is run again at the study's best rate
of each rank, on the same machine and seeds, since pretrained networks depend on the processor.

**Rules**, committed before any run. The best rate stays if the vertices over ranks differ by less than half an octave in
both tasks, over which AdamW's falls by 2. Keeping the rate of rank 16 at the other
ranks is scored as the study scores a moved rate, beside AdamW's by the default law. Its loss is better or worse than
AdamW's where the difference is above the larger standard deviation between seeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import torch
from recording import RESULTS, block, machine, number, percent, write_explained
from study.best_rates import best_rate
from study.configurations import ADAMW, CLIP, START, TUNED, built, start_of, starts
from study.domains import Domain, get_domain
from study.grids import Job, Line, Listed, Losses, Together, curve, losses_at, lowest
from study.moving import by_law
from study.regret import best_at, lost, share_lost
from study.runs_on_file import complete, made_by, read
from study.suite import STORES, finished_in, provenance, study_rates
from study.training import train
from torch import Tensor, nn

import rankaware_optim as ra
from rankaware_optim import Falling

RESTS_ON = ("laws.adam", "scores")
STORE = RESULTS / "lora_muon"
CONFIG, SEEDS, START_AT = "Init[A], s = 1", 2, -5
RANKS = (4, 16, 64)
TASKS = ("image_generation", "vision_classification")
MUON, ADAM = "LoRA-Muon", "AdamW"
MOMENTUM, ROOT_EPS, SIGN_EPS = 0.9, 1e-5, 1e-9


# --- the optimizer --------------------------------------------------------------------------------------------------


class LoRAMuon(torch.optim.AdamW):
    """LoRA-Muon on groups with `pair`, which hold A and B of a layer; AdamW on all others."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            if group.get("pair"):
                self.move_pair(group)
        return super().step(closure)  # skips the pairs, which have no gradient now

    def move_pair(self, group: dict[str, Any]) -> None:
        a, b = group["params"]
        lr, shrink = group["lr"], (1 - group["weight_decay"] * group["lr"]) ** 0.5
        down, up = a.flatten(1), b.flatten(1)
        of_a, of_b = self.momentum(a).flatten(1), self.momentum(b).flatten(1)
        step_a = spectral_step(of_a.T, up.T @ up).T
        step_b = spectral_step(of_b, down @ down.T)
        for param, step in ((a, step_a), (b, step_b)):
            param.mul_(shrink).add_(step.view_as(param), alpha=-lr / 2 / shrink)
            param.grad = None

    def momentum(self, param: nn.Parameter) -> Tensor:
        """The running mean of a factor's gradients."""
        state = self.state[param]
        kept: Tensor = state.setdefault("momentum", torch.zeros_like(param))
        return kept.lerp_(param.grad, 1 - MOMENTUM)


def spectral_step(momentum: Tensor, gram: Tensor) -> Tensor:
    """msign(M·R)·R, with R the inverse root of the other factor's Gram matrix (r, r)."""
    root = inverse_root(gram.double(), ROOT_EPS)
    seen = momentum.double() @ root
    return (seen @ inverse_root(seen.T @ seen, SIGN_EPS) @ root).to(momentum.dtype)


def inverse_root(gram: Tensor, eps: float) -> Tensor:
    """P^(-1/2) of a symmetric matrix without negative eigenvalues; zero of zero."""
    values, vectors = torch.linalg.eigh(gram)
    largest = values[-1]
    if largest <= 0:
        return torch.zeros_like(gram)
    scaled = (values.clamp_min(0) + eps * largest).rsqrt()
    return vectors * scaled @ vectors.T


def lora_muon(model: nn.Module, domain: Domain, lr: float) -> LoRAMuon:
    """The optimizer of a model: a group a pair of factors, and the heads at their fixed rates."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups: list[dict[str, Any]] = []
    for name, a in trained.items():
        if ".lora_A." in name:
            b = trained[name.replace(".lora_A.", ".lora_B.")]
            groups.append({"params": [a, b], "pair": True})
    heads = [param for name, param in trained.items() if ".lora_" not in name]
    if heads:
        (rate,) = domain.head_rates.values()
        groups.append({"params": heads, "lr": rate})
    return LoRAMuon(groups, lr=lr, **ADAMW)


# --- the runs -------------------------------------------------------------------------------------------------------


@click.group()
def main() -> None:
    """Run what is missing of a task, or write the page."""


@main.command()
@click.option("--domain", "task", type=click.Choice(TASKS), required=True)
def run(task: str) -> None:
    """Run what is missing of a task."""
    lines = [Line((task, MUON, rank), START_AT, SEEDS) for rank in RANKS]
    again = Listed(
        [
            Job(task, ADAM, rank, float(round(study_rates(task, CONFIG)[rank])), seed)
            for rank in RANKS
            for seed in range(SEEDS)
        ]
    )
    grid = Together([starts(task, range(SEEDS)), again, *lines])
    store = STORE / f"{task}.jsonl"
    complete(grid, run_one, store, 1, click.echo, provenance(task))


def run_one(job: Job) -> float | None:
    """The held-out loss of a run; None where it diverged."""
    domain = get_domain(job.domain)
    if job.scheme == START:
        return domain.evaluate(built(domain, "full", job.rank, job.seed))
    model, lr = built(domain, CONFIG, job.rank, job.seed), 2.0**job.x
    opt: Any = None
    if job.scheme == MUON:
        opt = lora_muon(model, domain, lr)
    else:
        rates = domain.head_rates
        opt = ra.RankAwareOptimizer(
            model, "adamw", lr=lr, rates=rates, law="constant", **ADAMW
        )
    return train(domain, model, opt, job.seed, CLIP)


# --- the page -------------------------------------------------------------------------------------------------------


HEADS = [
    "task",
    "rank",
    "LoRA-Muon's best rate, log2",
    "rank 16's rate loses",
    "AdamW's best rate, log2",
    "AdamW's of rank 16 loses, moved",
    "LoRA-Muon's loss, by seed",
    "AdamW's loss, by seed",
]


@main.command()
def table() -> None:
    """Write results/lora_muon.md."""
    stores = [STORE / f"{task}.jsonl" for task in TASKS]
    found = [row for task in TASKS for row in rows(task)]
    write_explained(
        "lora_muon",
        "LoRA-Muon",
        __doc__,
        block("Best rates and losses", HEADS, found),
        made_by(machine(1), *stores),
    )


def rows(task: str) -> Iterator[list[str]]:
    done = read(STORE / f"{task}.jsonl")
    study = finished_in([STORES / f"{task}.jsonl"], "full")
    moved = by_law(task, CONFIG, Falling())
    tuned = vertex(done, task, TUNED)
    for rank in RANKS:
        means = curve(done, (task, MUON, rank), SEEDS)
        start = start_of(task, done)
        x = lowest(means)
        cell = (task, CONFIG, rank)
        at = best_at(study, (task, CONFIG, TUNED)) + moved(TUNED, rank)
        adam = [
            job
            for job in done
            if job[:3] == (task, ADAM, rank) and done[job] is not None
        ]
        yield [
            task,
            f"{rank}",
            number(vertex(done, task, rank), 1),
            percent(share_lost(means, min(means.values()), start, tuned)),
            number(best_at(study, cell), 1),
            percent(lost(study, cell, cell, at)),
            ", ".join(
                number(loss, 4)
                for loss in losses_at(done, (task, MUON, rank), x, SEEDS)
            ),
            ", ".join(number(done[job], 4) for job in adam),
        ]


def vertex(done: Losses, task: str, rank: int) -> float:
    """log2 of LoRA-Muon's best rate, the grid's where the vertex lies outside."""
    means = curve(done, (task, MUON, rank), SEEDS)
    found = best_rate(means, start_of(task, done))
    return lowest(means) if found is None else found


if __name__ == "__main__":
    main()
