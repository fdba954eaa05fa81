"""A Ray cluster of two nodes, one of which is killed during a calibration: is anything lost, and what does Ray cost?

    python benchmarks/calibration/two_nodes.py     # results/ray_two_nodes.json and .md, two minutes

Both nodes are on this machine, with one core each (`ray.cluster_utils.Cluster`), and each runs one worker. The trials
are made up and take 2 s. One calibration is left alone. In the other, the second node's raylet is killed as soon as
both workers have ended four trials, and Ray starts its worker again. Runs are the trials that count. Points are
distinct ranks, seeds and rates among the runs. Again counts trials that were run once more, at the rank, seed and rate
of a killed one. Kept: whether all trials that had ended when the node was killed are unchanged. Ray's start and memory
(proportional set size) are the cluster's, without workers.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import optuna
import ray
from made_up import train
from ray.cluster_utils import Cluster
from recording import machine, record

import rankaware_optim as ra
from rankaware_optim.calibration import RayExecutor
from rankaware_optim.calibration._storage import open_storage
from rankaware_optim.calibration._trials import Trials

RESTS_ON = ()  # times: made again at a release
TRIALS, STEPS, PAUSE, KILL_AFTER = 24, 20, 0.1, 4
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@click.command(help=(__doc__ or "").splitlines()[0])
def main() -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    rows = [calibrated(kills) for kills in (False, True)]
    record(
        "ray_two_nodes",
        "A calibration on two Ray nodes, one killed on the way",
        rows,
        {**machine(1), "ray": ray.__version__},
        (__doc__ or "").split("\n\n")[2:],
    )
    sys.exit(
        any(
            row["runs"] != TRIALS or row["points"] != TRIALS or row["kept"] is False
            for row in rows
        )
    )


def calibrated(kills: bool) -> dict[str, Any]:
    """A row of the table: one calibration on a new cluster; `kills` says whether a node is killed."""
    start = time.perf_counter()
    cluster = Cluster(
        initialize_head=True, head_node_args={**NODE, "include_dashboard": False}
    )
    second = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    started, memory = time.perf_counter() - start, sum(ray_memory())
    with tempfile.TemporaryDirectory() as folder:
        storage = f"{folder}/study.journal"
        ended: list[list[Any]] = []
        killer = threading.Thread(target=kill, args=(cluster, second, storage, ended))
        if kills:
            killer.start()
        start = time.perf_counter()
        ra.calibrate(
            partial(train, pause=PAUSE), "AdamW", ranks=(4, 64), steps=STEPS, trials=TRIALS, storage=storage,
            warmup=1, executor=RayExecutor(address=cluster.address),
        )  # fmt: skip
        took = time.perf_counter() - start
        if kills:
            killer.join()
        trials = trials_in(storage)
    cluster.shutdown()
    records = Trials.read(trials)
    return {
        "second node": "killed" if kills else "left alone",
        "runs": len(ran := records.counted()),
        "points": len({(*t.setting, t.x) for t in ran}),
        "again": sum(t.retry_of is not None for t in records),
        "ended before": len(ended[0]) if kills else None,
        "kept": all(t in trials for t in ended[0]) if kills else None,
        "workers": len({t.worker for t in ran if t.worker}),
        "calibration, s": took,
        "Ray's start, s": started,
        "Ray's memory, MB": memory / 1e6,
    }


def kill(cluster: Cluster, node: Any, storage: str, ended: list[list[Any]]) -> None:
    """Kill a node once each of two workers has ended `KILL_AFTER` trials. Append all ended trials to `ended`."""
    while True:
        time.sleep(0.2)
        workers = [
            t.worker for t in Trials.read(trials_in(storage)).counted() if t.worker
        ]
        if len(set(workers)) == 2 and min(map(workers.count, workers)) >= KILL_AFTER:
            break
    cluster.remove_node(node, allow_graceful=False)
    ended.append([t for t in trials_in(storage) if t.state.is_finished()])


def trials_in(storage: str) -> list[optuna.trial.FrozenTrial]:
    """The trials of the study in a storage; none before the study exists."""
    opened = open_storage(storage)
    if "calibration" not in optuna.get_all_study_names(opened):
        return []
    return optuna.load_study(study_name="calibration", storage=opened).trials


def ray_memory() -> Iterator[int]:
    """Bytes of memory of every process of Ray's; shared memory is divided among the processes."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            if b"/ray/" in command or command.startswith(b"ray::"):
                lines = (folder / "smaps_rollup").read_text().splitlines()
                yield from (
                    1024 * int(line.split()[1])
                    for line in lines
                    if line.startswith("Pss:")
                )
        except OSError:
            continue


if __name__ == "__main__":
    main()
