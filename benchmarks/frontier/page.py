"""What do I get for what price? What a way to a learning rate costs, and what it loses.

    python benchmarks/frontier/runs.py --domain language         # real runs, resumable
    python benchmarks/frontier/searches.py --domain language     # real searches, resumable
    python benchmarks/frontier/page.py                           # results/frontier.md and its picture, README's table

**Rules**, committed before the real runs.

* *Cost* is what is trained before the real run, in real runs: steps, over the steps of one real run. A way that needs a
  rate which was tuned at rank 16 has that rate for nothing. An optimizer that finds its own rate costs nothing.
* *Loss* is the share of the attainable gain that is lost at every rank but the tuned one, and in full finetuning: the
  loss less the lowest mean loss of any rate that was swept there, over the loss before training less that. It is scored
  on seeds that the way has not seen. A diverged run loses 500 %.
* *A rate* is scored by the study's spline through the sweep's runs (`study/loss_curves.py`). *An optimizer* that finds
  its own rate is run, on two seeds of the sweep. *A search* at a price of 1 or 2 is run, on other seeds than the
  sweep's. At 16 runs and more searches are simulated on the sweeps, as in `simulated.md`.
* *Where people disagree* on a setting, the way is run with each, and the better mean of a column counts.
* Means are over tasks, each the mean over its cells; the 95th percentile is over cells. Real runs have fewer cells than
  the sweeps, so a second table has all ways on the cells of the real runs.
"""
