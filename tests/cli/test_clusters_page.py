"""The commands of docs/clusters.md do what the page says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rankaware_optim as ra
from rankaware_optim.calibration import TRIALS_PER_RANK

from .test_calibrate import LOOP, assert_shared, trials_of

PAGE = Path(__file__).parents[2] / "docs" / "clusters.md"


@pytest.mark.processes
def test_two_tasks_of_the_array_share_the_trials(tmp_path):
    """The script of the page, run as SLURM would run two of its tasks: one study, and each writes its recipe."""
    [script] = re.findall(
        r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S
    )
    (tmp_path / "finetune.sh").write_text(script)
    (tmp_path / "finetune.py").write_text(LOOP.replace("PAUSE", "0"))
    paths = {
        "PYTHONPATH": sys.path,
        "PATH": [str(Path(sys.executable).parent), os.environ["PATH"]],
    }
    common = {
        **os.environ,
        **{name: os.pathsep.join(filter(None, parts)) for name, parts in paths.items()},
    }
    tasks = [
        subprocess.Popen(
            ["bash", "finetune.sh"],
            cwd=tmp_path,
            env={**common, "PROCESSES": "2", "SLURM_ARRAY_TASK_ID": str(i), "SLURM_CPUS_PER_TASK": "1",
                 "CUDA_VISIBLE_DEVICES": str(i)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    assert [
        (task.communicate(timeout=300)[1], task.returncode)[1] for task in tasks
    ] == [0, 0]
    assert_shared(
        trials_of(str(tmp_path / "finetune.journal"), "finetune"), 2 * TRIALS_PER_RANK
    )
    first, second = (
        ra.Recipe.load(tmp_path / "recipes" / f"task-{i}.toml") for i in range(2)
    )
    assert first.fitted_lr == second.fitted_lr
    seen = [json.loads(path.read_text()) for path in tmp_path.glob("seen-*")]
    assert sorted((one["CUDA_VISIBLE_DEVICES"], one["threads"]) for one in seen) == [
        ("0", 1),
        ("1", 1),
    ]
