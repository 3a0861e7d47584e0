"""A Ray cluster: joining or starting it, and how many runs it has room for.

    connect("10.0.0.1:6379")                       # None: one of this machine alone is started
    room_for(resources_of(request, needs), nodes)
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from typing import Any

from bench.ask.plan import RunRequest
from bench.errors import UserError
from bench.probe.machine import usable_cores
from bench.run.executors import Needs
from bench.run.ranks import processes_of

CONNECT_SECONDS = 5.0
STORE_BYTES = 200 * 10**6
"""Ray's shared memory on this machine: records are a few hundred kilobytes each."""
OWN_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to anybody
    "RAY_memory_monitor_refresh_ms": "0",  # a run that fills the memory is a result, and not to be prevented
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Of a cluster that is started here, unless the person has set them."""


def connect(address: str | None) -> None:
    """Join the cluster, or start one. Raises UserError."""
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        for name, value in OWN_SETTINGS.items():
            os.environ.setdefault(name, value)
        ray.init(
            address="local",
            num_cpus=usable_cores(),
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            **quiet,
        )
        return
    missing = UserError(
        f"no Ray cluster answers at '{address}'",
        "start one with: ray start --head --port 6379, or leave --ray-address out to use this machine alone",
    )
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
        except (OSError, OverflowError):
            raise missing from None
    try:
        ray.init(address=address, **quiet)
    except ConnectionError:
        raise missing from None
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the Ray cluster at '{address}' cannot be used: {first_line(error)}") from None


def resources_of(request: RunRequest, needs: Needs) -> dict[str, float]:
    """What a run takes of its node, by Ray's names.

    On the CPU that are its threads; on cards a processor for each process, whose threads wait for the card.
    """
    processes = processes_of(request)
    on_cards = request.device == "cuda"
    return {
        "CPU": needs.cpus or (processes if on_cards else processes * request.cpu_threads),
        "GPU": (needs.gpus or request.device_count) if on_cards else 0,
        "memory": needs.memory_bytes or 0,
    }


def room_for(needed: Mapping[str, float], nodes: Iterable[Mapping[str, float]]) -> int:
    """How many runs that need this fit on nodes that have that."""
    return sum(
        min(int(node.get(name, 0) // amount) for name, amount in needed.items() if amount) for node in nodes
    )


def no_room_message(needed: Mapping[str, float], nodes: Iterable[Mapping[str, float]]) -> str:
    """One line: what a run needs, and what the nodes have."""
    have = "; ".join(_in_words({name: node.get(name, 0) for name in needed}) for node in nodes)
    return f"no node of the cluster has the {_in_words(needed)} that a run needs (nodes: {have or 'none'})"


def _in_words(resources: Mapping[str, float]) -> str:
    amounts = {name: amount for name, amount in resources.items() if amount or name == "CPU"}
    return ", ".join(
        f"{amount / 1e9:.1f} GB memory" if name == "memory" else f"{amount:g} {name}"
        for name, amount in amounts.items()
    )


def first_line(error: Exception) -> str:
    """Of what an error says, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
