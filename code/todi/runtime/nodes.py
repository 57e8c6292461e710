"""The nodes of a job meet before any of them starts its processes, and see that all of them mean the same.

A launcher runs one checking process on each node. These meet in a store that node 0 keeps at MASTER_ADDR:MASTER_PORT,
where each says what it is about to do. Whoever differs is named on every node, and nothing has been started.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore

from todi.errors import InputError
from todi.runtime.distributed import World
from todi.runtime.versions import code_checksum, git_commit, versions

logger = logging.getLogger(__name__)

TIMEOUT = 900  # seconds that a node waits for the others, unless RENDEZVOUS_TIMEOUT says otherwise
_REPORT = 30  # seconds between two lines about who is missing
_LOOK = 0.5  # seconds between two looks


@dataclass(frozen=True)
class Nodes:
    """This node among its fellows; `timeout` in seconds."""

    count: int
    rank: int
    address: str
    port: int
    timeout: float = TIMEOUT


def nodes_from_environment() -> Nodes | None:
    """What a launcher says of the nodes; None where there is only one, or no launcher."""
    count = int(os.environ.get("NNODES", 1))
    if count == 1 or "RANK" in os.environ:  # a rank has a process group to ask
        return None
    return Nodes(count, int(os.environ["NODE_RANK"]), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                 float(os.environ.get("RENDEZVOUS_TIMEOUT") or TIMEOUT))


def agree(nodes: Nodes, description: Mapping[str, str]) -> None:
    """Waits for all nodes, and compares what each is about to do.

    Args:
        description: what must be the same everywhere, by name.

    Raises:
        InputError: a node does not come in time, or is about to do something else; names it, and every difference.
    """
    started = time.monotonic()
    store = _open_store(nodes, started)
    mine = {"host": socket.gethostname(), "description": dict(description)}
    store.set(f"node {nodes.rank}", json.dumps(mine))
    _wait(nodes, started, lambda: [rank for rank in range(nodes.count) if not store.check([f"node {rank}"])])
    everyone = [json.loads(store.get(f"node {rank}")) for rank in range(nodes.count)]
    store.set(f"node {nodes.rank} has read", "")
    if nodes.rank == 0:  # the store is there for as long as this process keeps it
        _wait(nodes, started, lambda: [rank for rank in range(nodes.count)
                                       if not store.check([f"node {rank} has read"])])
    differences = [difference for rank in range(1, nodes.count)
                   for difference in differing(everyone[0]["description"], everyone[rank]["description"],
                                               "node 0", f"node {rank} ({everyone[rank]['host']})")]
    if differences:
        raise InputError(f"the nodes differ: {'; '.join(differences)}")
    logger.info("all %d nodes are there and agree", nodes.count)


def what_must_agree(settings: Mapping[str, Any], files: Mapping[str, str], world: World) -> dict[str, str]:
    """A description for `agree`: settings, checksums of files by path, and what computes, each as text."""
    said = {name: repr(value) for name, value in settings.items()}
    return {"number of ranks": str(world.size), **said, **files, **versions(), "the code's commit": str(git_commit()),
            "the code": code_checksum()}


def check_ranks(world: World, description: Mapping[str, str]) -> None:
    """Compares what all ranks are about to do, for those that no launcher started. Raises InputError on every rank.

    What a rank says nothing of, it leaves to the first of its node: checksums of weights.
    """
    first, *others = world.gather(dict(description))
    for rank, other in enumerate(others, 1):
        if different := differing(first, {**first, **other}, "rank 0", f"rank {rank}"):
            raise InputError(f"the ranks differ: {'; '.join(different)}")


def differing(first: Mapping[str, str], second: Mapping[str, str], one: str, other: str) -> list[str]:
    """A sentence for each name that two descriptions have otherwise.

    Args:
        one, other: what to call the two.
    """
    return [f"{name} is {first.get(name, 'not there')} on {one}, {second.get(name, 'not there')} on {other}"
            for name in {**first, **second} if first.get(name) != second.get(name)]


def _open_store(nodes: Nodes, started: float) -> TCPStore:
    """The store of node 0, as soon as it is there. TCPStore itself tells of every failed try in a page."""
    if nodes.rank == 0:
        _check_free(nodes)
    else:
        _wait(nodes, started, lambda: [] if _answers(nodes) else [0])
    return TCPStore(nodes.address, nodes.port, is_master=nodes.rank == 0, wait_for_workers=False,
                    timeout=timedelta(seconds=nodes.timeout))


def _check_free(nodes: Nodes) -> None:
    try:
        with socket.create_server(("", nodes.port)):
            pass
    except OSError as error:
        raise InputError(f"node 0 cannot listen at port {nodes.port}: {error.strerror}; MASTER_PORT must be a free one "
                         "there") from None


def _answers(nodes: Nodes) -> bool:
    try:
        with socket.create_connection((nodes.address, nodes.port), timeout=_LOOK):
            return True
    except OSError:
        return False


def _wait(nodes: Nodes, started: float, missing: Callable[[], list[int]]) -> None:
    reported = time.monotonic()
    while absent := missing():
        if time.monotonic() - reported > _REPORT or time.monotonic() - started > nodes.timeout:
            _report(nodes, started, absent)
            reported = time.monotonic()
        time.sleep(_LOOK)


def _report(nodes: Nodes, started: float, absent: list[int]) -> None:
    """Says who is missing. Raises InputError when the time is over."""
    seconds, names = time.monotonic() - started, ", ".join(map(str, absent))
    place = f"{nodes.address}:{nodes.port}"
    if seconds > nodes.timeout:
        raise InputError(f"node {names} of {nodes.count} did not come to {place} within {nodes.timeout:.0f} s "
                         "(RENDEZVOUS_TIMEOUT)")
    logger.info("node %d of %d waits for node %s at %s, %.0f s so far", nodes.rank, nodes.count, names, place, seconds)
