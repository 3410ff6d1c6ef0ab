"""A Ray cluster on this machine, whose nodes come and go, and the processes on it: for `cluster_faults.py`."""

from __future__ import annotations

import random
import time
from typing import Any

NODE = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}


class Cluster:
    """A cluster whose head runs no trial."""

    def __init__(self, nodes: int) -> None:
        import ray
        from ray.cluster_utils import Cluster

        self.ray = ray
        self.cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "num_gpus": 0})
        self.nodes = [self.cluster.add_node(**NODE) for _ in range(nodes)]
        self.address = self.cluster.address
        # Ray tells of every node that is killed; here that is the point.
        ray.init(address=self.address, log_to_driver=False, logging_level="critical")

    def add(self) -> None:
        self.nodes.append(self.cluster.add_node(**NODE))

    def remove(self, node: Any) -> None:
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def busy_node(self, chance: random.Random, pids: list[int]) -> Any:
        """A node that runs a trial, if one does."""
        raylets = {node.all_processes["raylet"][0].process.pid: node for node in self.nodes}
        busy = [raylets[pid] for trial in pids for pid in ancestors(trial) if pid in raylets]
        return chance.choice(busy or self.nodes)

    def free_gpus(self) -> tuple[float, float]:
        return self.ray.available_resources().get("GPU", 0.0), self.ray.cluster_resources().get("GPU", 0.0)

    def close(self) -> None:
        self.ray.shutdown()
        self.cluster.shutdown()


def ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        try:
            with open(f"/proc/{pid}/status") as file:
                pid = int(next(line for line in file if line.startswith("PPid")).split()[1])
        except OSError:
            break
        found.append(pid)
    return found


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Any, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
