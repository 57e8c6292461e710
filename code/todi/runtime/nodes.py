"""The nodes of a job meet before any of them starts its processes, and see that all of them mean the same.

A launcher runs one checking process on each node. These meet in a store that node 0 keeps at MASTER_ADDR:MASTER_PORT,
where each says what it is about to do. Whoever differs is named on every node, and nothing has been started.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from torch.distributed import DistNetworkError, DistStoreError, TCPStore

from todi.errors import InputError
from todi.runtime.distributed import World
from todi.runtime.versions import code_checksum, git_commit, versions

logger = logging.getLogger(__name__)

TIMEOUT = 900  # seconds that a node waits for the others, unless RENDEZVOUS_TIMEOUT says otherwise
_REPORT = 30  # seconds between two lines about who is missing
_LOOK = 0.5  # seconds between two looks
_TELL = 30  # seconds for which a node that refuses its input waits for the others to hear it
_CONNECT = 5  # seconds that a node needs at most to reach itself


@dataclass(frozen=True)
class Nodes:
    """This node among its fellows; `timeout` in seconds, `token` what all nodes of one job have and no other job."""

    count: int
    rank: int
    address: str
    port: int
    timeout: float = TIMEOUT
    token: str = ""


def nodes_from_environment() -> Nodes | None:
    """What a launcher says of the nodes; None where there is only one, or no launcher."""
    count = int(os.environ.get("NNODES", 1))
    if count == 1 or "RANK" in os.environ:  # a rank has a process group to ask
        return None
    return Nodes(count, int(os.environ["NODE_RANK"]), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                 float(os.environ.get("RENDEZVOUS_TIMEOUT") or TIMEOUT), os.environ.get("RENDEZVOUS_ID", ""))


class Meeting:
    """Where the nodes of a job tell one another things, as the ranks of a `World` do.

    Attributes:
        rank, size: of this node among them.

    Raises:
        InputError: node 0 does not come in time, is elsewhere, or is of another job.
    """

    def __init__(self, nodes: Nodes):
        self.nodes, self.rank, self.size = nodes, nodes.rank, nodes.count
        self._gathered = 0
        with _naming_node_0(nodes):
            self._store = _open_store(nodes, time.monotonic())
            if nodes.rank == 0:
                self._store.set("job", nodes.token)
            else:
                self._check_job(self._store.get("job").decode())

    def gather(self, value: Any) -> list[Any]:
        """`value`, as JSON can hold it, of every node, in their order, on every node.

        Raises:
            InputError: a node does not come in time, or node 0 has ended.
        """
        self._gathered += 1
        with _naming_node_0(self.nodes):
            self._store.set(self._place(self.rank), json.dumps(value))
            self._wait_for_all("")
            values = [json.loads(self._store.get(self._place(rank))) for rank in range(self.size)]
            self._store.set(f"{self._place(self.rank)} has read", "")
            if self.rank == 0:  # the store is there for as long as this process keeps it
                self._wait_for_all(" has read")
        return values

    def _place(self, rank: int) -> str:
        return f"{self._gathered} of node {rank}"

    def _wait_for_all(self, what: str) -> None:
        _wait(self.nodes, time.monotonic(), lambda: [rank for rank in range(self.size)
                                                     if not self._store.check([f"{self._place(rank)}{what}"])],
              self._strangers)

    def _check_job(self, job: str) -> None:
        """Whether node 0 is of this node's job; where it is not, node 0 hears who came."""
        if job == self.nodes.token:
            return
        me = f"node {self.rank} ({socket.gethostname()}) of job {self.nodes.token!r}"
        self._store.set(f"stranger {self._store.add('strangers', 1)}", me)
        raise InputError(f"{me} came to {self.nodes.address}:{self.nodes.port}, where job {job!r} meets "
                         "(RENDEZVOUS_ID); two jobs at once need two values of MASTER_PORT")

    def _strangers(self) -> str:
        """Who came and was refused, for the lines about who is missing."""
        places = [f"stranger {number + 1}" for number in range(self._store.add("strangers", 0))]
        known = [self._store.get(place).decode() for place in places if self._store.check([place])]
        return f"; refused: {', '.join(known)}" if known else ""


def agree(nodes: Nodes, description: Mapping[str, str]) -> Meeting:
    """Waits for all nodes, and compares what each is about to do; where they met, for what else they have to say.

    Args:
        description: what must be the same everywhere, by name.

    Raises:
        InputError: a node does not come in time, refuses its input, or is about to do something else; names it, and
            every difference.
    """
    meeting = Meeting(nodes)
    everyone = meeting.gather({"host": socket.gethostname(), "description": dict(description)})
    if refused := [f"node {rank} ({said['host']}) refuses its input: {problem}"
                   for rank, said in enumerate(everyone) for problem in said.get("problems", ())]:
        raise InputError(refused)
    differences = [difference for rank in range(1, nodes.count)
                   for difference in differing(everyone[0]["description"], everyone[rank]["description"],
                                               "node 0", f"node {rank} ({everyone[rank]['host']})")]
    if differences:
        raise InputError(f"the nodes differ: {'; '.join(differences)}")
    logger.info("all %d nodes are there and agree", nodes.count)
    return meeting


@contextmanager
def refusals_told(nodes: Nodes | None) -> Iterator[None]:
    """Where this node refuses its input within the block, the others hear why when they meet, and need not wait for it.

    It stays for up to half a minute to tell them.
    """
    try:
        yield
    except InputError as error:
        if nodes:
            logger.info("refused: %s; telling the other nodes, for up to %.0f s", "; ".join(error.problems), _TELL)
            with suppress(InputError):
                Meeting(replace(nodes, timeout=min(_TELL, nodes.timeout))).gather(
                    {"host": socket.gethostname(), "problems": error.problems})
        raise


def what_must_agree(settings: Mapping[str, Any], files: Mapping[str, str], world: World) -> dict[str, str]:
    """A description for `agree`: settings, checksums of files by path, and what computes, each as text."""
    said = {name: repr(value) for name, value in settings.items()}
    return {"number of ranks": str(world.size), **said, **files, **versions(), "the code's commit": str(git_commit()),
            "the code": code_checksum()}


def check_ranks(world: World, description: Mapping[str, str]) -> None:
    """Compares what all ranks are about to do, for those that no launcher started. Raises InputError on every rank.

    What a rank says nothing of, it leaves to another one: checksums of weights.
    """
    first = world.from_main(dict(description))
    mine = differing(first, {**first, **description}, "rank 0", f"rank {world.rank}")
    for different in filter(None, world.gather(mine)):
        raise InputError(f"the ranks differ: {'; '.join(different)}")


def differing(first: Mapping[str, str], second: Mapping[str, str], one: str, other: str) -> list[str]:
    """A sentence for each name that two descriptions have otherwise.

    Args:
        one, other: what to call the two.
    """
    return [f"{name} is {first.get(name, 'not there')} on {one}, {second.get(name, 'not there')} on {other}"
            for name in {**first, **second} if first.get(name) != second.get(name)]


@contextmanager
def _naming_node_0(nodes: Nodes) -> Iterator[None]:
    """What the loss of its store means."""
    try:
        yield
    except (DistNetworkError, DistStoreError):
        raise InputError(f"node 0 of {nodes.count}, at {nodes.address}:{nodes.port}, has ended before all nodes had "
                         "met") from None


def _open_store(nodes: Nodes, started: float) -> TCPStore:
    """The store of node 0, as soon as it is there. TCPStore itself tells of every failed try in a page."""
    if nodes.rank == 0:
        _check_address(nodes)
    else:
        reasons: dict[str, str] = {}
        _wait(nodes, started, lambda: [] if _answers(nodes, reasons) else [0], lambda: f" ({reasons['last']})")
    return TCPStore(nodes.address, nodes.port, is_master=nodes.rank == 0, wait_for_workers=False,
                    timeout=timedelta(seconds=nodes.timeout))


def _check_address(nodes: Nodes) -> None:
    """Whether node 0 can be reached, by itself at least, where the others will look for it."""
    family = socket.AF_INET6 if ":" in nodes.address else socket.AF_INET
    try:
        server = socket.create_server(("", nodes.port), family=family)
    except OSError as error:
        raise InputError(f"node 0 cannot listen at port {nodes.port}: {error.strerror}; MASTER_PORT must be a free one "
                         "there") from None
    with server:
        server.settimeout(_CONNECT)
        try:
            with closing(socket.create_connection((nodes.address, nodes.port), timeout=_CONNECT)) as own:
                arrived, _ = server.accept()
                own.close()  # before the other end, whose port would be busy for a while
                arrived.close()
        except OSError as error:
            raise InputError(f"MASTER_ADDR={nodes.address} does not lead to this machine ({socket.gethostname()}), "
                             f"which is node 0: {error}") from None


def _answers(nodes: Nodes, reasons: dict[str, str]) -> bool:
    """Whether node 0 does. Where it does not, `reasons` has the last reason."""
    try:
        with socket.create_connection((nodes.address, nodes.port), timeout=_LOOK):
            return True
    except OSError as error:
        reasons["last"] = error.strerror or str(error)
        return False


def _wait(nodes: Nodes, started: float, missing: Callable[[], list[int]], why: Callable[[], str]) -> None:
    """Until none is missing. Args: why: what is known of the reason, for the end of a line."""
    reported = time.monotonic()
    while absent := missing():
        if time.monotonic() - reported > _REPORT or time.monotonic() - started > nodes.timeout:
            _report(nodes, started, absent, why())
            reported = time.monotonic()
        time.sleep(_LOOK)


def _report(nodes: Nodes, started: float, absent: list[int], why: str) -> None:
    """Says who is missing. Raises InputError when the time is over."""
    seconds, names = time.monotonic() - started, ", ".join(map(str, absent))
    place = f"{nodes.address}:{nodes.port}"
    if seconds > nodes.timeout:
        raise InputError(f"node {names} of {nodes.count} did not come to {place} within {nodes.timeout:.0f} s "
                         f"(RENDEZVOUS_TIMEOUT){why}")
    logger.info("node %d of %d waits for node %s at %s, %.0f s so far%s", nodes.rank, nodes.count, names, place,
                seconds, why)
