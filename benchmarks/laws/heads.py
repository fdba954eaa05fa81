"""Does a new classifier's head train better at four times the base rate than at the base rate?

    python benchmarks/laws/heads.py run --task "glosses"    # resumable: results/heads/glosses.jsonl
    python benchmarks/laws/heads.py table                   # results/heads.md

Four tasks with a newly drawn head, 500 steps of 8 examples each, 5 % warm-up, AdamW, clipping at norm 1, a cosine to a
tenth. LoRA of rank 16 at Init[A] with alpha = rank, which is where a user tunes:

* *glosses*: the study's text classification. MiniLM, 26 classes of nouns.
* *verbs*: the lower two of MiniLM's six layers, WordNet's glosses of verbs, 15 classes.
* *digits of MNIST*: the study's vision classification, EfficientNet-lite0.
* *digits of scikit-learn*: the same network on the smaller digits.

The base rate is that of the adapters. The head has it times 1 and times 4, and times 16 where time allows. Seed 0 runs
base rates an octave apart, three to begin with around the study's best rate, more where the best is at an edge. Seed 1
runs each multiple's best base rate.

**Rules**, committed before any run. A multiple's loss in a task is that of its best base rate, on both seeds. Its
difference from × 1 is in shares of what × 1 gains from before training. × 4 wins if the mean difference over the four
tasks is below 0 by more than twice its standard error, which is the larger of two: that from the spread between tasks,
and that from the spread between seeds, where each task's two differences are taken at the same rates. If it wins it is
the default where a head is known to be new. Else nothing changes. What × 4 loses or gains at the base rate that is best
for × 1 is shown, and judges nothing.

**Outcome.** × 4 does not win, so nothing changes but the report's note, which now speaks of text only: the classifier of
verbs gains a quarter by it, as that of glosses did in 60 steps, and the two of digits nothing or less. *Glosses* were not
run, for want of time. They could not change the verdict: whatever their difference, the mean of four is not twice its
standard error below 0.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import click
import torch
from recording import RESULTS, block, machine, number, percent, write_explained
from study.configurations import ADAMW, CLIP, START, built, start_of, starts
from study.domains import Domain, get_domain, text_classification
from study.domains._adapters import adapt
from study.domains._assets import debian_files
from study.domains._batches import drawn
from study.domains._wordnet import WORDNET
from study.grids import Job, Losses, Together, around, grown, or_inf
from study.runs_on_file import complete, made_by, read
from study.suite import provenance, study_rates
from study.training import train
from torch import Tensor, nn

import rankaware_optim as ra
from rankaware_optim.calibration import seeded

RESTS_ON = ("optimizer.common", "scores")
STORE = RESULTS / "heads"
CONFIG, RANK, STEPS, BATCH, SEEDS = "Init[A], s = 1", 16, 500, 8, 2
MULTIPLES = (1, 4, 16)
JUDGED = 4


# --- the tasks ------------------------------------------------------------------------------------------------------


VERBS, LAYERS = 15, 2


@cache
def verbs() -> tuple[Tensor, Tensor]:
    """Token ids (n, 24) of verbs with their glosses, shuffled with a fixed seed, and their classes (n,)."""
    (file,) = debian_files(WORDNET, "/wordnet/data.verb")
    lines = [line for line in file.decode().splitlines() if line[:2] != "  "]
    texts, classes = zip(*map(gloss_and_class, lines), strict=True)
    ids, numbers = text_classification.encoded(texts), torch.tensor(classes)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    return ids[order], numbers[order] - int(numbers.min())


def gloss_and_class(line: str) -> tuple[str, int]:
    fields, _, gloss = line.partition(" | ")
    _, number_of_file, _, _, word, *_ = fields.split()
    meaning = gloss.partition('; "')[0].strip()
    return f"{word.replace('_', ' ')}: {meaning}", int(number_of_file)


def lower_layers(rank: int | None, alpha: float, init: str, seed: int) -> nn.Module:
    """MiniLM's lower two layers with a new classifier of 15 classes."""
    model: Any = copy.deepcopy(text_classification.pretrained())
    model.bert.encoder.layer = model.bert.encoder.layer[:LAYERS]
    with seeded(seed):
        model.classifier = nn.Linear(model.config.hidden_size, VERBS)
    model.num_labels = VERBS
    return adapt(
        model,
        rank,
        alpha,
        init,
        seed,
        text_classification.LAYERS,
        saved=["classifier"],
    ).eval()


def verb_batches(seed: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    ids, classes = verbs()
    for chosen in drawn(len(ids) - text_classification.HELD_OUT, batch, seed):
        yield ids[chosen], classes[chosen]


@torch.no_grad()
def verb_score(model: nn.Module) -> float:
    ids, classes = verbs()
    held = slice(-text_classification.HELD_OUT, None)
    return float(text_classification.loss(model, (ids[held], classes[held])))


def tasks() -> dict[str, Domain]:
    """The four tasks, by the names of their stores."""
    glosses = get_domain("text_classification")
    found = {
        "glosses": glosses,
        "verbs": replace(
            glosses, build=lower_layers, batches=verb_batches, evaluate=verb_score
        ),
        "digits of MNIST": get_domain("vision_classification"),
        "digits of scikit-learn": get_domain("digits_vision"),
    }
    return {
        name: replace(domain, steps=STEPS, batch=BATCH)
        for name, domain in found.items()
    }


NAMES = ("glosses", "verbs", "digits of MNIST", "digits of scikit-learn")
STUDIED = {
    "glosses": "text_classification",
    "verbs": "text_classification",
    "digits of MNIST": "vision_classification",
    "digits of scikit-learn": "vision_classification",
}


# --- the runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Base rates of a multiple: all on seed 0, the best one on seed 1 too."""

    task: str
    multiple: int
    centre: int

    def job(self, x: int, seed: int) -> Job:
        return Job(self.task, f"head × {self.multiple}", RANK, float(x), seed)

    def wanted(self, done: Losses) -> list[Job]:
        axis = around(self.centre, 1, 1)
        while True:
            jobs = [self.job(x, 0) for x in axis]
            if missing := [job for job in jobs if job not in done]:
                return missing
            best = min(axis, key=lambda x: or_inf(done[self.job(x, 0)]))
            wider = grown(axis, best)
            if wider == axis:
                break
            axis = wider
        again = self.job(best, 1)
        return [] if again in done else [again]


@click.group()
def main() -> None:
    """Run what is missing of a task, or write the page."""


@main.command()
@click.option("--task", type=click.Choice(NAMES), required=True)
@click.option("--most", default=JUDGED, show_default=True, help="The largest multiple.")
def run(task: str, most: int) -> None:
    """Run what is missing of a task."""
    torch.set_num_threads(1)
    grid = grid_of(task, most)
    on = provenance(tasks()[task])
    complete(grid, run_one, store_of(task), 1, click.echo, on)


def grid_of(task: str, most: int = JUDGED) -> Together:
    studied = STUDIED[task]
    centre = round(study_rates(studied, CONFIG)[RANK])
    # the verbs, which ran first, were best an octave lower
    centre -= studied == "text_classification"
    chosen = [Rates(task, each, centre) for each in MULTIPLES if each <= most]
    return Together([starts(task, range(SEEDS)), *chosen])


def store_of(task: str) -> Any:
    return STORE / f"{task.replace(' ', '-')}.jsonl"


def run_one(job: Job) -> float | None:
    """The held-out loss of a run; None where it diverged."""
    domain = tasks()[job.domain]
    model = built(domain, CONFIG, RANK, job.seed)
    if job.scheme == START:
        return domain.evaluate(model)
    lr = 2.0**job.x
    head = {"*classifier*": lr * multiple_of(job)}
    opt = ra.RankAwareOptimizer(
        model, "adamw", lr=lr, rates=head, law="constant", **ADAMW
    )
    return train(domain, model, opt, job.seed, CLIP)


def multiple_of(job: Job) -> int:
    return int(job.scheme.removeprefix("head × "))


# --- the page -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Swept:
    """A task's runs.

    Args:
        task: its name.
        losses: the losses of seed 0, and of seed 1 where it was run, by multiple and log2 of the base rate.
        start: the loss before training.
    """

    task: str
    losses: dict[int, dict[int, Sequence[float]]]
    start: float

    def best(self, multiple: int) -> int:
        """log2 of the base rate that is best on seed 0."""
        rates = self.losses[multiple]
        return min(rates, key=lambda x: rates[x][0])

    def at_best(self, multiple: int) -> Sequence[float]:
        return self.losses[multiple][self.best(multiple)]

    @property
    def gain(self) -> float:
        return self.start - statistics.fmean(self.at_best(1))

    def differences(self, multiple: int) -> list[float]:
        """The loss beyond that of × 1, of each seed, as a share of the gain."""
        pairs = zip(self.at_best(multiple), self.at_best(1), strict=True)
        return [(a - b) / self.gain for a, b in pairs]

    def at_base(self, multiple: int) -> float | None:
        """The same on seed 0 at the base rate that is best for × 1; None where it was not run."""
        x = self.best(1)
        there = self.losses[multiple].get(x)
        return None if there is None else (there[0] - self.at_best(1)[0]) / self.gain


def swept(task: str) -> Swept:
    done = read(store_of(task))
    losses: dict[int, dict[int, Sequence[float]]] = {}
    for job in sorted(done):
        if job.scheme != START:
            rates = losses.setdefault(multiple_of(job), {})
            rates[round(job.x)] = [*rates.get(round(job.x), ()), or_inf(done[job])]
    return Swept(task, losses, start_of(task, done))


def standard_errors(each: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Those of the mean over tasks: from the spread between tasks, and from that between seeds."""
    means = [statistics.fmean(pair) for pair in each]
    between_tasks = statistics.stdev(means) / math.sqrt(len(means))
    variance = statistics.fmean(statistics.variance(pair) for pair in each)
    return between_tasks, math.sqrt(variance / (SEEDS * len(each)))


@main.command()
def table() -> None:
    """Write results/heads.md."""
    done = {task: read(store_of(task)) for task in NAMES}
    finished = [task for task in NAMES if not grid_of(task).wanted(done[task])]
    found = [swept(task) for task in finished]
    heads = ["task", "× 1's loss", *HEADS]
    write_explained(
        "heads",
        "A new head's rate",
        __doc__,
        block("Losses", heads, [row for each in found for row in rows(each)]),
        verdict(found),
        made_by(machine(1), *(store_of(task) for task in finished)),
    )


HEADS = [
    "multiple",
    "best base rate, log2",
    "its loss, by seed",
    "beyond × 1, share of the gain",
    "seed 0 at × 1's base rate",
]


def rows(each: Swept) -> Iterator[list[str]]:
    for multiple in sorted(each.losses):
        at_base = each.at_base(multiple)
        yield [
            each.task,
            number(statistics.fmean(each.at_best(1)), 4),
            f"× {multiple}",
            f"{each.best(multiple)}",
            ", ".join(number(loss, 4) for loss in each.at_best(multiple)),
            percent(statistics.fmean(each.differences(multiple))),
            "–" if at_base is None else percent(at_base),
        ]


def verdict(found: Sequence[Swept]) -> str:
    differences = [each.differences(JUDGED) for each in found]
    mean = statistics.fmean(statistics.fmean(pair) for pair in differences)
    tasks_error, seeds_error = standard_errors(differences)
    wins = mean < -2 * max(tasks_error, seeds_error)
    return (
        f"× {JUDGED} beyond × 1: {percent(mean)} in the mean, with a standard error of {percent(tasks_error)} from the "
        f"spread between tasks and {percent(seeds_error)} from that between seeds. By the rule × {JUDGED} "
        f"{'wins' if wins else 'does not win'}."
    )


if __name__ == "__main__":
    main()
