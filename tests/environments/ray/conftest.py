"""One Ray cluster for all tests here: two nodes of one core each, both on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from ray.cluster_utils import Cluster

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Its workers import what this process imports; a run waits until two of them are at work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PROCESSES", "2")
        made = Cluster(
            initialize_head=True, head_node_args={**NODE, "include_dashboard": False}
        )
        made.add_node(**NODE)
        yield made
        made.shutdown()
