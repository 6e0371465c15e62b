"""Calls over containerd's socket: what is read beside a server that does nothing, what changes beside containerd's own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from snapfs.containerd import snapshots_pb2 as wire
from tests.bench import containerd
from tests.bench.clients import together
from tests.bench.place import ALL_CPUS, ONE_CPU, Place, on, settle, timed, wait_until
from tests.bench.prepare import each_takes
from tests.bench.rows import Row, at_most, in_turns, p50

_SERVICE = "/containerd.services.snapshots.v1.Snapshots/"

EMPTY = """
import sys
from concurrent import futures
import grpc
from snapfs.containerd import snapshots_pb2 as wire
from tests.bench.socket import ANSWERS, methods
server = grpc.server(futures.ThreadPoolExecutor(8))
handlers = {
    name: grpc.unary_unary_rpc_method_handler(
        lambda request, context, name=name: ANSWERS[name], request.FromString, answer.SerializeToString)
    for name, (request, answer) in methods().items()
}
service = wire.DESCRIPTOR.services_by_name["Snapshots"].full_name
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
server.add_insecure_port("unix:" + sys.argv[1])
server.start()
server.wait_for_termination()
"""
"""A server that knows its answers."""

_LABELS = {"containerd.io/gc.root": "2026-01-01T00:00:00Z"}

ANSWERS = {
    "Stat": wire.StatSnapshotResponse(info=wire.Info(name="base", kind=wire.COMMITTED, labels=_LABELS)),
    "Mounts": wire.MountsResponse(),
    "Usage": wire.UsageResponse(size=4096, inodes=1),
}


def methods() -> dict[str, tuple[Any, Any]]:
    """Of each method that reads: the messages that it takes and gives."""
    return {
        "Stat": (wire.StatSnapshotRequest, wire.StatSnapshotResponse),
        "Mounts": (wire.MountsRequest, wire.MountsResponse),
        "Usage": (wire.UsageRequest, wire.UsageResponse),
    }


@contextmanager
def _served(place: Place, cpus: set[int], *arguments: str) -> Iterator[tuple[str, Path]]:
    """A daemon's socket, and where its tree is."""
    with place.directory("socket") as own, place.snapfs("--containerd", str(own / "s"), *arguments, cpus=cpus) as daemon:
        yield str(own / "s"), daemon.mnt


@contextmanager
def _empty(place: Place, cpus: set[int]) -> Iterator[str]:
    """The socket of a server that does nothing."""
    with place.directory("empty") as own:
        address = own / "s"
        with place.process([sys.executable, "-c", EMPTY, str(address)], own / "log", cpus):
            wait_until(address.exists, "the empty server to listen")
            yield str(address)


@contextmanager
def _python_client(address: str) -> Iterator[Callable[[str, str], object]]:
    """A client of gRPC's for Python: calls the method with a key."""
    with grpc.insecure_channel(f"unix:{address}") as channel:
        calls = {
            name: channel.unary_unary(
                _SERVICE + name, request_serializer=request.SerializeToString, response_deserializer=answer.FromString
            )
            for name, (request, answer) in methods().items()
        }
        yield lambda name, key: calls[name](methods()[name][0](snapshotter="snapfs", key=key))


def reads(place: Place) -> Iterator[Row]:
    """Stat, Mounts and Usage."""
    calls = place.size(1000, 50)
    with ExitStack() as stack:
        stack.enter_context(on(ONE_CPU))
        ours, _ = stack.enter_context(_served(place, ONE_CPU))
        theirs = stack.enter_context(_empty(place, ONE_CPU))
        maker = containerd.Client(ours)
        maker.prepare("making-base")
        maker.commit("base", "making-base")
        maker.prepare("active", "base")
        maker.close()
        us = stack.enter_context(_python_client(ours))
        them = stack.enter_context(_python_client(theirs))
        for name, key in (("Stat", "base"), ("Mounts", "active"), ("Usage", "base")):
            row = Row(
                f"{name} over the socket, p50",
                "the same client's call of an empty grpc.server with threads",
                "us",
                at_most(1.1),
                "gRPC's client for Python; client and server on one CPU, both",
            )

            def side(call: Callable[[str, str], object], name: str = name, key: str = key) -> float:
                return p50(each_takes(calls, lambda: call(name, key))) * 1e6

            side(us), side(them)  # once before it counts
            yield in_turns(place.rounds, row, partial(side, us), partial(side, them))


def changes(place: Place) -> Iterator[Row]:
    """Prepare, Commit and Remove."""
    calls = place.size(200, 10)
    opponent = containerd.shared(place)
    opponent.run_on(ONE_CPU)
    rows = {
        name: Row(
            f"{name} over the socket, p50",
            f"containerd's {name}{' and one syncfs' * (name == 'Commit')}",
            "ms",
            at_most(1.0),
            "one call after the other over a connection of its own, sent and received; client and daemon on one CPU, both"
            + "; syncfs(2) of the same file system, after each" * (name == "Commit"),
        )
        for name in ("Prepare", "Commit", "Remove")
    }

    def life(client: containerd.Client, syncs: Path | None) -> dict[str, float]:
        took: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(calls):
            key = place.name("life")
            took["Prepare"].append(timed(lambda: client.prepare(key, "base")))  # noqa: B023
            took["Commit"].append(timed(lambda: client.commit(f"{key}-kept", key)))  # noqa: B023
            if syncs is not None:
                took["Commit"][-1] += timed(lambda: settle(syncs))
            took["Remove"].append(timed(lambda: client.remove(f"{key}-kept")))  # noqa: B023
        return {name: p50(values) * 1e3 for name, values in took.items()}

    try:
        with on(ONE_CPU), _served(place, ONE_CPU) as (address, _):
            client = containerd.Client(address)
            client.prepare("making-base")
            client.commit("base", "making-base")
            life(client, None), life(opponent.client, place.base)
            for number in range(place.rounds):
                sides = [("ours", client, None), ("theirs", opponent.client, place.base)]
                for whose, caller, syncs in sides if number % 2 == 0 else reversed(sides):
                    for name, figure in life(caller, syncs).items():
                        getattr(rows[name], whose).append(figure)
            client.close()
    finally:
        opponent.run_on(ALL_CPUS)
    yield from rows.values()


def through_containerd(place: Place) -> Iterator[Row]:
    """Many clients of one containerd, which asks snapfs, or its own overlayfs."""
    clients, each = place.size(64, 4), place.size(10, 2)
    row = Row(
        f"{clients} clients of a whole containerd on snapfs: {each} times Prepare, Mounts, Remove",
        "the same of the same containerd on its overlayfs",
        "s",
        at_most(1.1),
        f"{clients} processes with a connection of their own; nothing is pinned; containerd's garbage collection is off",
    )
    with ExitStack() as stack:
        address, _ = stack.enter_context(_served(place, ALL_CPUS))
        whole = stack.enter_context(containerd.containerd(place, proxied={"snapfs": address}))

        def seconds(snapshotter: str) -> float:
            serial = place.name("through")

            def begin(number: int) -> Callable[[int], object]:
                client = containerd.Client(whole.address, snapshotter)
                client.prepare(f"{serial}-{number}", "base")

                def act(operation: int) -> None:
                    key = f"{serial}-{number}-{operation}"
                    client.prepare(key, "base")
                    client.mounts(key)
                    client.remove(key)

                return act

            return clients * each / together(clients, each, begin).rate

        for snapshotter in ("snapfs", containerd.SNAPSHOTTER):
            maker = containerd.Client(whole.address, snapshotter)
            maker.prepare("making-base")
            maker.commit("base", "making-base")
            maker.close()
            seconds(snapshotter)  # once before it counts
        yield in_turns(place.rounds, row, partial(seconds, "snapfs"), partial(seconds, containerd.SNAPSHOTTER))
