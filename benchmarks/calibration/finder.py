"""What are four short trials by `ra.calibrate` at the model's own rank worth?

    python benchmarks/calibration/finder.py         # runs, resumable: results/finder.jsonl
    python benchmarks/calibration/finder_page.py    # results/finder.md, without training

**Rules**, which were written before the runs.

*Searches.* The searches use the five tasks of `frontier/runs.py`. The run that the search prepares has
N = 400 or 800 steps. Four trials with a quarter or an eighth of the steps of this run are made on an existing
model. The model has LoRA of rank 16 with Init[A] and alpha = rank, or is trained by full finetuning. A search
tries learning rates around the suggested learning rate (the default), or in the default range, as it does for
an optimizer without a suggested learning rate. There are five search seeds, which determine the model's init
and its data. No sweep has used these seeds. The package's search runs in place in the study's training loop,
and its score is the held-out loss of the task. If time is short, the last seeds are left out for all tasks.
On two tasks and two seeds, an existing transformers trainer makes the same search with its own loop, schedule
and optimizer. For comparison, Lightning's range test is run with its own code and defaults, in 100 steps, on
two seeds, and also at rank 128.

*Where a search is scored.* A search at rank 16 is scored at rank 16, and after a conversion by its recipe
also at rank 128 and in full finetuning. A search in full finetuning is scored in full finetuning. The
*regret* of a learning rate is the share of the gain that it loses compared with the best learning rate of the
stored sweep (`study/longer.py`), by the study's spline. A *band* is the 90 % interval of a search. The score
of the bands is how often they contain the best learning rate of the sweep, which is the vertex of a parabola.

*Goals.* (1) Trials of a quarter around the suggestion lose at most 0.5 % on average and 2 % at the 95th
percentile, where they were tuned. (2) Trials of an eighth lose at most 2 % and 6 %. (3) 90 % of all bands
contain the best learning rate. (4) The mean regret of the trainer is within half a percentage point of the
mean regret of the study's loop. (5) The mean regret of the search is below that of the range test. The page
says which goals are missed.

*Longer or tuned.* The comparison uses the stored sweeps of six tasks, with all numbers of steps and all
configurations. A run of 2 N steps at the suggested learning rate costs as much as a search with four trials
of a quarter and a run of N steps at the tuned learning rate. A run of 1.5 N steps costs as much as a search
with four trials of an eighth and a run of N steps. The loss of a run of 1.5 N steps is interpolated between N
and 2 N steps, linearly in the logarithm of the steps. The tuned run uses the best learning rate of its sweep,
which is an advantage for the search. If the tuned run has the higher loss, the longer run is better.
Differences are shares of the gain of the best run in the longer sweep.

*Extrapolation.* The best learning rate changes between trials of L / 2 steps and trials of L steps. Should a
share s of this change be added to the best learning rate at L steps, for a run of 4 L or 8 L steps? The share
s is chosen from 0, 1/4, 1/3, 1/2, 3/4 and 1. The choice is the share with the least mean regret on the longer
sweeps of audio, language and time_series with their exact optima. The chosen share is judged on
image_generation, super_resolution and vision_language. It wins if three conditions hold: its mean regret is
lower by a tenth both for trials of a quarter and of an eighth, no 95th percentile is higher, and it is not
worse on the real searches.

*When not to trust a search.* A cell counts as one whose best learning rate rises if the best learning rate at
N steps is more than half an octave above the best learning rate at the steps of the trial. The page shows the
regret and the coverage of the bands for cells whose best learning rate rises, falls and stays the same.
"""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections.abc import Generator, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from calibration.make_recipes import rate_of
from calibration.searches import seeds_of
from recording import RESULTS, commit
from study.configurations import ADAMW, CLIP, TUNED, built
from study.domains import Domain, get_domain
from study.grids import FULL
from study.longer import AT_A
from study.training import FINAL, WARMUP, shape, trained
from torch import nn

import rankaware_optim as ra

RESTS_ON = ()
STORE = RESULTS / "finder.jsonl"
# the cheapest first
TASKS = ("time_series", "audio", "vision_language", "image_generation", "language")
# steps of the run, and of how many trials' steps it consists; runs of one length follow each other
PLANS = ((400, 4), (800, 8), (400, 8), (800, 4))
SEEDS, FEWER = 5, 2
SCORED = {TUNED: (TUNED, 128, FULL), FULL: (FULL,)}
AROUND, WIDE = "around the suggestion", "over the default range"
TRAINER, RANGE_TEST = "a built trainer", "Lightning's range test"
BY_TRAINER = ("image_generation", "language")


class Ask(NamedTuple):
    """A search that is wanted.

    Args:
        task: the task.
        tuned: the rank at which trials are run.
        way: how it is searched.
        target: the steps of the run to come.
        parts: a trial has one of so many parts of them. A range test has 100 steps of its own.
        seed: of the search, which picks the seeds of its runs.
    """

    task: str
    tuned: int
    way: str
    target: int
    parts: int
    seed: int

    @property
    def steps(self) -> int:
        return self.target // self.parts

    @property
    def first_seed(self) -> int:
        """The seed of four trials, and of the model that is built."""
        return seeds_of(self.seed)[0]

    def model(self) -> nn.Module:
        config = "full" if self.tuned == FULL else AT_A
        return built(get_domain(self.task), config, self.tuned, self.first_seed)


def wanted() -> Iterator[Ask]:
    """All searches, so that what there is when time ends is balanced over tasks."""
    turns = [(seed, way) for seed in range(SEEDS) for way in (AROUND, WIDE)]
    # the default range is a seed and a half behind
    for seed, way in sorted(turns, key=lambda turn: turn[0] + 1.5 * (turn[1] == WIDE)):
        for task in TASKS:
            is_first = way == AROUND and seed < FEWER
            for tuned in SCORED:
                yield from (Ask(task, tuned, way, *plan, seed) for plan in PLANS)
            if is_first:
                tested = (TUNED, 128, FULL)
                yield from (Ask(task, r, RANGE_TEST, 100, 1, seed) for r in tested)
            if is_first and task in BY_TRAINER:
                yield Ask(task, TUNED, TRAINER, *PLANS[0], seed)


# --- in place, in the study's loop ----------------------------------------------------------------------------------

Known = dict[tuple[Any, ...], list[float]]  # losses of steps, then the score, by run


def in_loop(ask: Ask, known: Known) -> ra.Recipe:
    """The recipe of a search in the study's loop. known: the runs that were made, which are not trained again."""
    in_place, domain = ask.model(), get_domain(ask.task)

    def train(trial: ra.Trial) -> Generator[float, None, float]:
        model = in_place if ask.way == AROUND else ask.model()
        opt = trial.optimizer(model, rates=domain.head_rates, **ADAMW)
        assert trial.lr is not None
        rate = round(math.log2(trial.lr), 6)
        key = (ask.task, ask.tuned, trial.steps, rate, trial.seed)
        losses = known.setdefault(key, [])
        if len(losses) > trial.steps:
            return (yield from replayed(losses, model, opt, trial.steps))
        losses.clear()
        own = replace(domain, steps=trial.steps)
        schedule = partial(shape, steps=trial.steps)
        run = trained(own, model, opt, trial.seed, schedule, CLIP)
        score = yield from noted(run, losses)
        losses.append(score)
        return score

    at: dict[str, Any] = {"model": in_place}
    if ask.way == WIDE:  # a function of the trial has no suggested rate
        at = {"ranks": (ask.tuned or None,), "trials": 4}
    options = {"steps": ask.steps, "target_steps": ask.target}
    options |= {"seeds": seeds_of(ask.seed), "batch": domain.batch}
    return ra.calibrate(train, "adamw", **at, **options, progress=False)


def noted(run: Generator[float, None, float], losses: list[float]) -> Any:
    """The same run, whose losses are noted."""
    while True:
        try:
            losses.append(next(run))
        except StopIteration as end:
            return end.value
        yield losses[-1]


def replayed(losses: list[float], model: nn.Module, opt: Any, steps: int) -> Any:
    """A run that is known, whose losses are yielded; a calibration wants steps and weights that move."""
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, partial(shape, steps=steps))
    for param in model.parameters():
        param.grad = torch.ones_like(param) if param.requires_grad else None
    for loss in losses[:steps]:
        opt.step()
        schedule.step()
        yield loss
    return losses[steps]


# --- by trainers ----------------------------------------------------------------------------------------------------


class Batch:
    """A batch that trainers pass on as it is; None stands for what is held out."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows


class Batches(torch.utils.data.IterableDataset[Batch]):
    """A task's batches from a seed, from the first one at each `iter`."""

    def __init__(self, domain: Domain, seed: int) -> None:
        self.domain, self.seed = domain, seed

    def __iter__(self) -> Iterator[Batch]:
        return map(Batch, self.domain.batches(self.seed, self.domain.batch))


class WithLoss(nn.Module):
    """A task's model whose forward is the task's loss."""

    def __init__(self, ask: Ask) -> None:
        super().__init__()
        self.net, self.domain = ask.model(), get_domain(ask.task)

    def forward(self, number: Any, batch: Batch) -> dict[str, torch.Tensor]:
        if batch.rows is None:
            return {"loss": torch.tensor(self.domain.evaluate(self.net))}
        return {"loss": self.domain.loss(self.net, batch.rows)}


def by_trainer(ask: Ask) -> ra.Recipe:
    """The recipe of a built trainer of transformers, with its own loop and its nearest schedule."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            folder,
            max_steps=ask.target,
            per_device_train_batch_size=1,
            warmup_steps=WARMUP,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": FINAL},
            max_grad_norm=CLIP,
            weight_decay=ADAMW["weight_decay"],
            remove_unused_columns=False,
            use_cpu=True,
            report_to=[],
        )
        trainer = transformers.Trainer(
            WithLoss(ask),
            args,
            lambda rows: {"number": torch.zeros(1), "batch": rows[0]},
            Batches(get_domain(ask.task), ask.first_seed),
            [Batch(None)],
        )
        options = {"seeds": seeds_of(ask.seed), "steps": ask.steps}
        return ra.calibrate(trainer, "adamw", **options)


def lr_find(ask: Ask) -> float | None:
    """log2 of the rate that Lightning's range test suggests; None if it has none."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.tuner import Tuner

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.lr = WithLoss(ask), 1e-3

        def training_step(self, batch: Batch, index: int) -> torch.Tensor:
            return self.inner(index, batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            trained = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.AdamW(trained, self.lr, **ADAMW)

    off = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    data = Batches(get_domain(ask.task), ask.first_seed)
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu", gradient_clip_val=CLIP, default_root_dir=folder, **off
        )
        finder = Tuner(trainer).lr_find(Module(), loader)
        found = finder.suggestion() if finder is not None else None
    return None if found is None else math.log2(found)


# --- the store ------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """A search on file.

    Args:
        ask: what was asked for.
        rates: log2 of its rate and of its band's ends, by rank; of a range test the rate only, if it has one.
        steps: how many it trained.
        notes: what its recipe notes.
    """

    ask: Ask
    rates: dict[int, list[float]]
    steps: int
    notes: list[str]


def on_file() -> Iterator[Found]:
    for line in STORE.read_text().splitlines() if STORE.exists() else ():
        row = json.loads(line)
        ask = Ask(*(row[name] for name in Ask._fields))
        rates = {int(rank): rate for rank, rate in row["rates"].items()}
        yield Found(ask, rates, row["trained"], row["notes"])


def seeds_run() -> dict[str, int]:
    """How many seeds of each way were run on all tasks."""
    done = {found.ask for found in on_file()}
    missing = {(ask.way, ask.seed) for ask in wanted() if ask not in done}
    whole = {(ask.way, ask.seed) for ask in wanted()} - missing
    return {way: seed + 1 for way, seed in sorted(whole)}


def evidence() -> Iterator[Found]:
    """The searches of these seeds, so that tasks count alike."""
    seeds = seeds_run()
    for found in on_file():
        if found.ask.seed < seeds.get(found.ask.way, 0):
            yield found


def searched(ask: Ask, known: Known) -> Found:
    if ask.way == RANGE_TEST:
        x = lr_find(ask)
        return Found(ask, {} if x is None else {ask.tuned: [x]}, ask.steps, [])
    recipe = by_trainer(ask) if ask.way == TRAINER else in_loop(ask, known)
    rates = {rank: rate_of(recipe, AT_A, rank) for rank in SCORED[ask.tuned]}
    return Found(ask, rates, int(recipe.tensors["steps"].sum()), [*recipe.notes])


def main() -> None:
    """Run what is missing, each search appended at its end."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    done, known = {found.ask for found in on_file()}, Known()
    for ask in wanted():
        if ask in done:
            continue
        found = searched(ask, known)
        rounded = {
            rank: [round(x, 4) for x in rate] for rank, rate in found.rates.items()
        }
        row = {**ask._asdict(), "rates": rounded, "trained": found.steps}
        row["notes"] = found.notes
        with STORE.open("a") as file:
            file.write(json.dumps({**row, "commit": commit()}) + "\n")
        print(*ask, rounded, flush=True)


if __name__ == "__main__":
    main()
