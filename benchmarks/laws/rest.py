"""Which rate for what is neither A nor B: heads, embeddings, new tokens, norms and biases, DoRA's magnitudes?

    python benchmarks/laws/rest.py sweep --part "norms and biases"   # resumable: results/rest/norms-and-biases.jsonl
    python benchmarks/laws/rest.py table                             # results/rest.md

A part is what trains beside the adapters, in a task of the study: with its network, its steps, its optimizer. The
adapters are at Init[A], at ranks 4 and 64, with alpha = rank (s = 1) and with alpha kept at 16 (s = 16/r). The plane:
adapters' rates an octave apart, three to begin with, around the study's best, and rates of the rest two octaves apart,
five to begin with, around the study's best of full finetuning, on seed 0. It grows at an edge. At its best rate of the
adapters, the rates of the rest are then run an octave apart around the best, on seeds 0 and 1. A regret is the share of
the attainable gain that a rate of the rest loses, at that rate of the adapters, by the spline through the mean losses,
and beyond that line through the plane's runs of seed 0. (Beyond the line the spline was continued at first, which made a
rate at eight octaves from the best one lose all. This was changed when the last part, the text head, had been seen.)

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

**Outcome.** The default stays as it is. Four times the base rate has the lowest mean, 3.4 % against the base rate's 5.5, but
embeddings lose 6 to 7 points more by it, which the rule forbids. Without the text head the base rate loses .8 % in the
mean, four times it 2.6. The law's rate of full finetuning loses most, 13 %: what trains beside the adapters is not full
finetuning in this sense. The adapters' own rate loses 7 %, most of it in the text head.

**The new text classifier is the exception.** Its best rate is 16 times the base rate, which loses 38 % of the gain in these
60 steps. The vision head's is three times the base rate.

By its rule the best rate of a part does not depend on the rank, in all parts but the vision head: there it costs 3.4 % with
alpha = rank to keep rank 4's rate, in a line whose best rate lies at its edge. (The line of DoRA's magnitudes with alpha
kept has no vertex. It is flat to .1 %.) The best rate has more to do with what the part is: half the base rate for
embeddings and a language model's head, twice for new tokens and for norms and biases, four times for DoRA's magnitudes,
16 times for the labels of image generation.

**DoRA follows LoRA's law**: from rank 4 to 64 its best rate moves as LoRA's does, to .1 octaves. It lies half an octave
above LoRA's, where a published model of 0.6 billion parameters has it at LoRA's divided by 1.8.

**The eigenvalue does not predict PiSSA's and OLoRA's rate.** It asks for 1.8 to 4.3 octaves less than LoRA's, and their best
rates are .8 octaves less to .1 more. The published model has LoRA's divided by 10 and 18. This network shows nothing of
that, so `suggest_lr` takes the middle, and its band holds both. From rank 4 to 64 PiSSA's rate moves as LoRA's to .4
octaves, OLoRA's to .9. Keeping it would be 2.1 and 2.5 octaves off with alpha = rank. With one task this is no rule, so
the package still moves neither unless their init is given.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from calibration.surfaces import Gap, gap_of
from recording import RESULTS, block, machine, number, percent, write_explained
from study.best_rates import best_rate
from study.configurations import ADAMW, CLIP, START, TUNED, start_of, starts
from study.domains import (
    Domain,
    _dit,
    _llama,
    audio,
    get_domain,
    image_generation,
)
from study.domains._adapters import adapt
from study.grids import (
    FULL,
    Cell,
    Job,
    Line,
    Losses,
    Together,
    around,
    curve,
    grown,
    or_inf,
)
from study.moving import by_default
from study.regret import score
from study.runs_on_file import complete, made_by, read
from study.suite import provenance, study_rates
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


def with_norms(task: str) -> Callable[[int, float, int], nn.Module]:
    """A task's model, and all its norms and biases."""

    def build(rank: int, alpha: float, seed: int) -> nn.Module:
        model = get_domain(task).build(rank, alpha, "A", seed)
        for name, param in model.named_parameters():
            if name.endswith(".bias") or "norm" in name:
                param.requires_grad_(True)
        return model

    return build


def audio_head(rank: int, alpha: float, seed: int) -> nn.Module:
    """Audio, and the layer that says the levels."""
    model = audio.Waveform()
    model.load_state_dict(audio.weights())
    frozen = model.requires_grad_(False)
    return adapt(frozen, rank, alpha, "A", seed, audio.LAYERS, saved=["leave"])


def llama(
    rank: int, alpha: float, seed: int, model: Any = None, **options: Any
) -> nn.Module:
    """Language, or a changed model of it, with further options of PEFT's LoRA."""
    frozen = _llama.llama() if model is None else model
    return adapt(frozen, rank, alpha, "A", seed, _llama.LAYERS, **options)


def tied(rank: int, alpha: float, seed: int) -> nn.Module:
    """Language, and its embeddings, which are its head too."""
    return llama(rank, alpha, seed, saved=["embed_tokens"], ensure_weight_tying=True)


def untied(rank: int, alpha: float, seed: int) -> nn.Module:
    """Language, its embeddings, and a head that begins as a copy of them."""
    model: Any = _llama.llama()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    saved = ["embed_tokens", "lm_head"]
    return llama(rank, alpha, seed, model, saved=saved)


def new_tokens(rank: int, alpha: float, seed: int) -> nn.Module:
    """Language, and the embeddings of tokens that begin as the mean of all, as new tokens do."""
    model: Any = _llama.llama()
    counts = torch.bincount(_llama.tokens("code"), minlength=_llama.VOCABULARY)
    new = counts.topk(NEW_TOKENS).indices
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[new] = weight.mean(0)
    trained = {"embed_tokens": new.tolist()}
    return llama(rank, alpha, seed, model, trainable_token_indices=trained)


def dora(rank: int, alpha: float, seed: int) -> nn.Module:
    """Language with DoRA: its magnitudes are the rest."""
    return llama(rank, alpha, seed, use_dora=True)


PARTS = {
    part.name: part
    for part in (
        Part("norms and biases", "image_generation", with_norms("image_generation")),
        Part("labels", "image_generation", labels),
        Part(
            "vision head", "vision_classification", with_head("vision_classification")
        ),
        Part("tied embeddings", "language", tied),
        Part("new tokens", "language", new_tokens),
        Part("untied embeddings and head", "language", untied),
        Part("DoRA magnitudes", "language", dora),
        Part("text head", "text_classification", with_head("text_classification")),
    )
}


# of two tasks that no rule saw, judged by study/held_out.py
HELD_PARTS = {
    part.name: part
    for part in (
        Part("audio head", "audio", audio_head),
        Part(
            "norms and biases of a forecaster", "time_series", with_norms("time_series")
        ),
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


SWEPT = {**LINES, **PARTS, **HELD_PARTS}

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


def planes(part: Part) -> list[Plane]:
    """One a scaling and rank, around the study's best rates."""
    lora = study_rates(part.task, TUNED_IN)
    full = round(study_rates(part.task, "full")[FULL])
    centres = {"s = 1": lora, "s = 16/r": dict.fromkeys(RANKS, lora[TUNED])}
    return [
        Plane(part, scaling, rank, round(centres[scaling][rank]), full)
        for scaling in SCALINGS
        for rank in RANKS
    ]


def lines(part: Part) -> list[Line]:
    """One rate for all, from the centres of the planes."""
    return [Line(part.cell(each.scaling, each.rank), each.x) for each in planes(part)]


def store_of(part: Part) -> Path:
    return STORE / f"{part.name.replace(' ', '-').lower()}.jsonl"


def run_one(job: Job) -> float | None:
    """The held-out loss of a run. A job has the part's name in place of the domain's."""
    part = SWEPT[job.domain]
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
@click.option("--part", "name", type=click.Choice([*SWEPT]), required=True)
@click.option("--workers", default=2, show_default=True)
def sweep(name: str, workers: int) -> None:
    """Run what is missing of a part's plane, or of an init's line."""
    torch.set_num_threads(1)
    part = SWEPT[name]
    grids = lines(part) if name in LINES else planes(part)
    grid = Together([starts(name, range(SEEDS)), *grids])
    made = provenance(part.task)
    complete(grid, run_one, store_of(part), workers, click.echo, made)


# --- the table --------------------------------------------------------------------------------------------------------


class Swept(NamedTuple):
    """A part at a rank and scaling, as its runs show it.

    Args:
        part, scaling, rank: where.
        x: log2 of the adapters' best rate.
        losses: mean loss by log2 of the rest's rate, at that rate of the adapters.
        beyond: the loss of seed 0 at rates below and above these.
        start: the loss before training.
        floor: what the rate that is best on one seed loses on the other.
    """

    part: Part
    scaling: str
    rank: int
    x: int
    losses: Mapping[float, float]
    beyond: Mapping[float, float]
    start: float
    floor: float

    @property
    def every(self) -> dict[float, float]:
        """The losses at all rates, in their order."""
        return dict(sorted({**self.beyond, **self.losses}.items()))

    @property
    def best(self) -> float | None:
        """log2 of the rest's best rate."""
        return best_rate(self.losses, self.start)

    @property
    def regret(self) -> Gap:
        """The share of the gain that rate 2^y of the rest loses, by y."""
        return gap_of(self.every, min(self.losses.values()), self.start)

    @property
    def flat(self) -> float:
        """Octaves over which the rest's rate loses less than 1 %."""
        low, high = min(self.every), max(self.every)
        eighths, regret = range(round(8 * (high - low)) + 1), self.regret
        return sum(regret(low + each / 8) < 0.01 for each in eighths) / 8


def swept(part: Part) -> list[Swept]:
    """The finished planes of a part."""
    done = read(store_of(part))
    if not done:
        return []
    finished = (plane for plane in planes(part) if not plane.wanted(done))
    return [of_plane(plane, done) for plane in finished]


def of_plane(plane: Plane, done: Losses) -> Swept:
    """The line of a plane: the rates of the rest that both seeds ran, at one rate of the adapters."""
    name, prefix, rank = plane.part.cell(plane.scaling, plane.rank)
    by_x: dict[float, dict[float, list[float]]] = {}
    for job, loss in done.items():
        scaling, _, rest = job.scheme.partition(" | ")
        if scaling == prefix and job.rank == rank and rest:
            of_rate = by_x.setdefault(job.x, {}).setdefault(float(rest), [])
            of_rate.append(or_inf(loss))
    x, by_y = max(by_x.items(), key=lambda each: sum(map(len, each[1].values())))
    pairs = {y: losses for y, losses in sorted(by_y.items()) if len(losses) == SEEDS}
    means = {y: statistics.fmean(losses) for y, losses in pairs.items()}
    within = min(pairs), max(pairs)
    beyond = {
        y: losses[0] for y, losses in by_y.items() if not within[0] <= y <= within[1]
    }
    start = start_of(name, done)
    gain = start - min(means.values())
    lost = []
    for seed in range(SEEDS):
        chosen = min(pairs, key=lambda y: pairs[y][seed])
        lost.append((means[chosen] - min(means.values())) / gain)
    return Swept(
        plane.part,
        plane.scaling,
        rank,
        round(x),
        means,
        beyond,
        start,
        statistics.fmean(lost),
    )


def ways(of: Swept) -> dict[str, float]:
    """log2 of the rest's rate by each way, for a user whose rate is best at rank 16."""
    base = study_rates(of.part.task, TUNED_IN)[TUNED]
    return {
        BASE: base,
        "the adapters' rate": float(of.x),
        "the law's full rate": base + by_default(of.part.task, TUNED_IN)(TUNED, FULL),
        "a quarter of the base rate": base - 2,
        "four times the base rate": base + 2,
    }


BASE, TUNED_IN = "the base rate", "Init[A], s = 1"
CELL_HEADS = (
    "part",
    "task",
    "scaling",
    "rank",
    "adapters' best rate, log2",
    "the rest's best rate, log2",
    "full finetuning's, log2",
    "octaves within 1 %",
    "noise floor",
)
WAY_HEADS = ("way", "regret, %: mean / 95th percentile / share above 5 %", *PARTS)
RANK_HEADS = (
    "part",
    "scaling",
    "octaves from rank 4 to 64",
    "rank 4's rate at rank 64 loses",
)


@main.command()
def table() -> None:
    """Write results/rest.md from what is on file."""
    cells = [each for part in PARTS.values() for each in swept(part)]
    on_file = [
        store_of(part)
        for part in {**PARTS, **LINES}.values()
        if store_of(part).exists()
    ]
    write_explained(
        "rest",
        "The rest of the model",
        __doc__,
        block("Ways to choose the rest's rate", WAY_HEADS, list(way_rows(cells))),
        block("Best rates", CELL_HEADS, list(cell_rows(cells))),
        block("From rank 4 to rank 64", RANK_HEADS, list(rank_rows(cells))),
        *init_blocks(),
        made_by(machine(1), *on_file),
    )


def way_rows(cells: Sequence[Swept]) -> Iterator[list[str]]:
    """What each way loses, over all parts and in each."""
    for way in ways(cells[0]):
        by_part: dict[str, list[float]] = {name: [] for name in PARTS}
        for cell in cells:
            by_part[cell.part.name].append(cell.regret(ways(cell)[way]))
        regrets = [regret for each in by_part.values() for regret in each]
        means = [
            percent(statistics.fmean(each)) if each else "–"
            for each in by_part.values()
        ]
        yield [way, score(regrets).words(2), *means]


def cell_rows(cells: Sequence[Swept]) -> Iterator[list[str]]:
    for cell in cells:
        full = study_rates(cell.part.task, "full")
        yield [
            cell.part.name,
            cell.part.task,
            cell.scaling,
            str(cell.rank),
            str(cell.x),
            number(cell.best, 1),
            number(full[FULL], 1),
            number(cell.flat, 1),
            percent(cell.floor),
        ]


def rank_rows(cells: Sequence[Swept]) -> Iterator[list[str]]:
    """How far the rest's best rate moves with the rank, and what it costs not to move it."""
    at = {(cell.part.name, cell.scaling, cell.rank): cell for cell in cells}
    for (name, scaling, rank), low in at.items():
        high = at.get((name, scaling, RANKS[1]))
        if rank != RANKS[0] or high is None:
            continue
        ends = low.best, high.best
        moved = None if None in ends else ends[1] - ends[0]
        lost = "–" if ends[0] is None else percent(high.regret(ends[0]))
        yield [name, scaling, number(moved, 1, sign=True), lost]


# --- PiSSA, OLoRA and DoRA --------------------------------------------------------------------------------------------

INIT_HEADS = (
    "init",
    "scaling",
    "rank",
    "best rate, log2",
    "against LoRA's, octaves",
    "as the eigenvalues say",
    "lowest loss",
)
ITERATIONS = 12  # of the power iteration


def init_blocks() -> list[str]:
    """The table of the inits, if any of them was swept."""
    rows = list(init_rows())
    if not rows:
        return []
    return [block("PiSSA, OLoRA and DoRA, one rate for all", INIT_HEADS, rows)]


def init_rows() -> Iterator[list[str]]:
    """Each init's best rate, LoRA's beside it, and what the Hessian's largest eigenvalue says."""
    plain: dict[tuple[str, int], tuple[float | None, float]] = {}
    for name, part in LINES.items():
        done = read(store_of(part)) if store_of(part).exists() else {}
        for scaling, rank in product(SCALINGS, RANKS):
            means = curve(done, part.cell(scaling, rank), SEEDS)
            if not means:
                continue
            best = best_rate(means, start_of(name, done))
            eigenvalue = sharpness(part, scaling, rank)
            ours = plain.setdefault((scaling, rank), (best, eigenvalue))
            against = None if best is None or ours[0] is None else best - ours[0]
            predicted = math.log2(ours[1] / eigenvalue)
            yield [
                name,
                scaling,
                str(rank),
                number(best, 1),
                number(against, 1, sign=True),
                number(predicted, 1, sign=True),
                number(min(means.values()), 3),
            ]


def sharpness(part: Part, scaling: str, rank: int) -> float:
    """The largest eigenvalue of the Hessian of the loss in A and B before training, on one batch."""
    model: Any = part.build(rank, SCALINGS[scaling](rank), 0)
    model.get_base_model().config._attn_implementation = (
        "eager"  # sdpa has no second derivative here
    )
    params = [p for p in model.parameters() if p.requires_grad]
    loss = part.domain.loss(model, next(part.domain.batches(0, part.domain.batch)))
    slopes = torch.autograd.grad(loss, params, create_graph=True)
    with ra.calibration.seeded(0):
        vector = [torch.randn_like(p) for p in params]
    size = 1.0
    for _ in range(ITERATIONS):
        size = math.sqrt(sum(float((v * v).sum()) for v in vector))
        vector = [v / size for v in vector]
        along = sum((slope * v).sum() for slope, v in zip(slopes, vector, strict=True))
        vector = list(torch.autograd.grad(along, params, retain_graph=True))
    return math.sqrt(sum(float((v * v).sum()) for v in vector))


if __name__ == "__main__":
    main()
