"""A real containerd in directories of its own, and a client of its snapshots service.

It is run as kindly as possible: nothing but what the snapshots service needs, and no garbage collection.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.bench import wire
from tests.bench.place import ALL_CPUS, Place, move, wait_until

SNAPSHOTTER = "overlayfs"
NAMESPACE = "default"

ROOTED = {"containerd.io/gc.root": "2026-01-01T00:00:00Z"}
"""The label that ctr gives to what it prepares, for without it the garbage collector would take it."""

_SERVICE = "/containerd.services.snapshots.v1.Snapshots/"

_CONFIG = """
version = 2
root = "{base}/root"
state = "{base}/state"
disabled_plugins = [
  "io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt", "io.containerd.internal.v1.restart",
  "io.containerd.internal.v1.tracing", "io.containerd.monitor.v1.cgroups", "io.containerd.runtime.v1.linux",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.native", "io.containerd.snapshotter.v1.zfs", "io.containerd.tracing.processor.v1.otlp",
]
[grpc]
  address = "{base}/sock"
[ttrpc]
  address = "{base}/ttrpc"
[plugins."io.containerd.gc.v1.scheduler"]
  mutation_threshold = 0
  deletion_threshold = 0
  startup_delay = "1000h"
"""

_PROXY = """
[proxy_plugins.{name}]
  type = "snapshot"
  address = "{address}"
"""


class Client:
    """One connection to the snapshots service on the socket ``address``, of which it asks for one ``snapshotter``."""

    def __init__(self, address: str, snapshotter: str = SNAPSHOTTER) -> None:
        self.address = address
        self._snapshotter = snapshotter
        self._connection = wire.Connection(address, {"containerd-namespace": NAMESPACE})

    def close(self) -> None:
        self._connection.close()

    def _call(self, method: str, request: bytes) -> bytes:
        return self._connection.call(_SERVICE + method, wire.text(1, self._snapshotter) + request)

    def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] = ROOTED) -> bytes:
        """Prepare; the answer as it came, for ``upper``."""
        return self._call("Prepare", wire.text(2, key) + wire.text(3, parent) + wire.string_map(4, labels))

    def commit(self, name: str, key: str, labels: Mapping[str, str] = ROOTED) -> None:
        self._call("Commit", wire.text(2, name) + wire.text(3, key) + wire.string_map(4, labels))

    def remove(self, key: str) -> None:
        self._call("Remove", wire.text(2, key))

    def mounts(self, key: str) -> bytes:
        return self._call("Mounts", wire.text(2, key))

    def list(self) -> bytes:
        """All snapshots: messages of up to 100 each, as they came."""
        return self._call("List", b"")


def upper(answer: bytes) -> Path:
    """The directory that a Prepare without parent made for the files, from its answer."""
    [message] = wire.messages(answer)
    [(_, mount)] = wire.fields(message)
    assert isinstance(mount, bytes)
    said = {number: value for number, value in wire.fields(mount)}
    assert said[1] == b"bind", said
    source = said[2]
    assert isinstance(source, bytes)
    return Path(source.decode())


class Containerd:
    """A running containerd: its ``address``, the ``pid``, and a ``client``."""

    def __init__(self, base: Path, pid: int) -> None:
        self.address = f"{base}/sock"
        self.pid = pid
        self.client = Client(self.address)

    def run_on(self, cpus: set[int]) -> None:
        """Have it run on these processors from now on."""
        move(self.pid, cpus)


@contextmanager
def containerd(
    place: Place, base: Path | None = None, proxied: Mapping[str, str] | None = None, program: str | Path = "containerd"
) -> Iterator[Containerd]:
    """A containerd for a block; its files are in ``base``, which is left behind, or in a directory that is not.  It has the
    snapshotters on the sockets ``proxied``, by name, besides its own."""
    with place.directory("containerd") as own:
        base = base or own
        more = "".join(_PROXY.format(name=name, address=address) for name, address in (proxied or {}).items())
        (base / "config.toml").write_text(_CONFIG.format(base=base) + more)
        log = base / "log"
        with place.process([str(program), "--config", str(base / "config.toml")], log, ALL_CPUS) as process:

            def answers() -> bool:
                assert process.poll() is None, f"containerd ended: {log.read_text()[-2000:]}"
                with suppress(OSError), socket.socket(socket.AF_UNIX) as attempt:
                    attempt.connect(f"{base}/sock")
                    return True
                return False

            wait_until(answers, "containerd to listen")
            running = Containerd(base, process.pid)
            try:
                yield running
            except wire.Refused as refused:
                raise wire.Refused(f"{refused}; containerd said:\n{log.read_text()[-2000:]}") from refused
            finally:
                running.client.close()


def shared(place: Place) -> Containerd:
    """The containerd of this run, with a committed snapshot called base, on the disk that the roots are on."""

    @contextmanager
    def make() -> Iterator[Containerd]:
        with containerd(place) as running:
            running.client.prepare("making-base")
            running.client.commit("base", "making-base")
            yield running

    return place.shared("containerd", make)
