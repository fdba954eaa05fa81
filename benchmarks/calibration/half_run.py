"""Is half a run enough? Four trials of an eighth of a run at one rank, from a rate that may be far off.

    python benchmarks/calibration/half_run.py    # results/half_run.md, some minutes on two cores

A user has a guess of the rate, moved from elsewhere or suggested. `calibrate(ranks=(r,), steps=N / 8, target_steps=N,
trials=4)` costs half of a run of N steps. The recipe's rates are scored at r, and at other ranks. Regret is a share of
the gain. Nothing is trained: losses come from stored sweeps, by the study's spline.

**Rules**, written before any way was scored.

*Two sets of cells.* (1) "An eighth": the six tasks of `study/longer.py`, N of 200, 400 and 800 steps, tuned at each of
its three LoRA arms. A trial's loss is that of a run of N / 8 steps. The rate is scored on the mean loss of runs of N
steps, at the rank tuned and, at Init[A], at the other rank (16 and 128). (2) "One length": nine tasks of the study
in three configurations, tuned at rank 64, a trial as long as the run. The rate is scored at every rank on file, and in
full finetuning. The goal counts the rank tuned and LoRA's ranks within a factor of 16 of it. Rank 1 and full
finetuning are shown.

*Draws.* 30 a cell. The guess is the sweep's best rate at the tuned rank (in the set "an eighth", at N steps), wrong by
up to three octaves: one uniform draw in each thirtieth of −3 to 3. Seeds come in an order that is drawn.

*Ways*, the simplest first, each with 3, 4, 5, 6 and 8 trials. "As it is": the package's search, whose first trial lies
two octaves above the guess, as it lies above the usual rate where no guess is given. "From the guess": the first trial
is the guess. "Three at once": the guess and two octaves on either side, one round for three workers; the rest as the
package refines. Each of them with the study's prior on the shape of the loss, which is fitted to the surfaces of the
choosing tasks only.

*Which tasks choose and which judge.* Image generation, language, vision-language and SmolLM2 choose. Vision
classification, reinforcement, text classification, super resolution, audio and time series judge. Nothing is looked at
on these before the choice is made. A way's score is the mean over tasks of its mean regret with four trials at the
ranks that the goal counts, both sets of cells alike; a regret counts as 1 at most, since no more than the gain is lost.
The way with the lowest score on the choosing tasks is chosen; within .1 points the simpler one.

*A win beyond the spread*: on the judging tasks the chosen way's score lies below that of "as it is", by a paired
difference whose 95 % interval, over 10,000 bootstraps of the tasks, is below 0. Then it enters the package, if the
calibrations of 16 runs in `simulated.py` do not lose more by it. Otherwise nothing does.

*The goal*: a median of at most 1 % and a 95th percentile of at most 6 %, in each of the two sets over all its tasks,
by the package as it is left. If four trials do not reach it, the page says how many do.
"""
