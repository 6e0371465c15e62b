"""A client of containerd's snapshots service, and a containerd of the tests' own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from snapfs.containerd import snapshots_pb2 as wire
from snapfs.kernel.mounttable import mount_table
from tests.containerds import binaries
from tests.processes import die_with_parent

SERVICE = wire.DESCRIPTOR.services_by_name["Snapshots"]
SECONDS = 20.0

CONFIG = """version = 2
root = "{base}/root"
state = "{base}/state"
disabled_plugins = [
  "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt",
]
[grpc]
  address = "{base}/c.sock"
[ttrpc]
  address = "{base}/c.ttrpc"
[plugins."io.containerd.gc.v1.scheduler"]
  startup_delay = "1h"  # a view that nothing refers to is to stay until a test has it collected
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "snapfs"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "overlayfs"
[proxy_plugins.snapfs]
  type = "snapshot"
  address = "{snapfs}"
  capabilities = {capabilities}
"""


class Client:
    """Every method of the service by its name, with the request's fields as arguments."""

    def __init__(self, path: Path) -> None:
        self.channel = grpc.insecure_channel(f"unix:{path}")

    def close(self) -> None:
        self.channel.close()

    def method(self, name: str) -> tuple[Any, type[Message]]:
        described = SERVICE.methods_by_name[name]
        request, response = GetMessageClass(described.input_type), GetMessageClass(described.output_type)
        make = self.channel.unary_stream if described.server_streaming else self.channel.unary_unary
        path = f"/{SERVICE.full_name}/{name}"
        return make(path, request_serializer=request.SerializeToString, response_deserializer=response.FromString), request

    def call(self, method: str, /, *, timeout: float = SECONDS, **fields: Any) -> Any:
        call, request = self.method(method)
        return call(request(snapshotter="snapfs", **fields), timeout=timeout)

    def start(self, method: str, /, *, timeout: float = SECONDS, **fields: Any) -> Any:
        """The same, as a future."""
        call, request = self.method(method)
        return call.future(request(snapshotter="snapfs", **fields), timeout=timeout)

    def pages(self, *filters: str) -> list[list[wire.Info]]:
        return [list(page.info) for page in self.call("List", filters=filters)]

    def names(self, *filters: str) -> list[str]:
        return [info.name for page in self.pages(*filters) for info in page]

    def layer(self, name: str, parent: str = "") -> None:
        self.call("Prepare", key=f"extract {name}", parent=parent)
        self.call("Commit", name=name, key=f"extract {name}")


@contextlib.contextmanager
def connected(path: Path) -> Iterator[Client]:
    client = Client(path)
    try:
        yield client
    finally:
        client.close()


class Containerd:
    """The containerd of a Debian suite, on directories and a socket of its own, with snapfs as a proxy snapshotter.

    ``capabilities`` are declared for it.
    """

    def __init__(self, base: Path, suite: str, snapfs: Path, capabilities: Sequence[str] = ()) -> None:
        self.base = base
        self.binaries = binaries(suite)
        self.environment = {**os.environ, "PATH": f"{self.binaries}:{os.environ['PATH']}"}  # so that it finds its own shim
        self.namespace = f"snapfs-{os.getpid()}"  # part of the names of its cgroups, which all containerds share
        self.process: subprocess.Popen[bytes] | None = None
        base.mkdir()
        config = CONFIG.format(base=base, snapfs=snapfs, capabilities=json.dumps(list(capabilities)))
        (base / "config.toml").write_text(config)

    def start(self) -> Containerd:
        log = (self.base / "log").open("ab")
        with log:
            self.process = subprocess.Popen(
                [self.binaries / "containerd", "--config", str(self.base / "config.toml")],
                stdout=log,
                stderr=log,
                env=self.environment,
                preexec_fn=die_with_parent,
            )
        deadline = time.monotonic() + SECONDS
        while not self.answers():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)
        return self

    def answers(self) -> bool:
        return subprocess.run(self.command("version"), capture_output=True, check=False).returncode == 0

    def log(self) -> str:
        return (self.base / "log").read_text()

    def command(self, *arguments: str) -> list[str]:
        return [str(self.binaries / "ctr"), "--address", str(self.base / "c.sock"), "--namespace", self.namespace, *arguments]

    def ctr(self, *arguments: str, fails: bool = False) -> str:
        done = subprocess.run(self.command(*arguments), capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode != 0) == fails, f"{arguments}: {done.stdout}{done.stderr}\n{self.log()}"
        return done.stderr if fails else done.stdout

    def snapshots(self, *arguments: str, fails: bool = False) -> str:
        return self.ctr("snapshots", "--snapshotter", "snapfs", *arguments, fails=fails)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        assert self.process is not None
        with self.process:
            self.process.send_signal(how)

    def cleanup(self) -> None:
        """End it and its containers, whose shims outlive it."""
        runc = self.base / "runc" / self.namespace
        for container in os.listdir(runc) if runc.is_dir() else ():
            subprocess.run(["runc", "--root", str(runc), "delete", "--force", container], check=False)
        for command in Path("/proc").glob("[0-9]*/cmdline"):  # the shims say whose they are
            with contextlib.suppress(OSError):
                if str(self.base / "c.sock").encode() in command.read_bytes().split(b"\0"):
                    os.kill(int(command.parent.name), signal.SIGKILL)
        if self.process is not None:
            with self.process:
                self.process.kill()
        for mount in reversed(list(mount_table())):
            if mount.target.startswith(f"{self.base}/"):
                subprocess.run(["umount", "-l", mount.target], check=False)
        for cgroup in Path("/sys/fs/cgroup").glob(f"**/{self.namespace}"):
            with contextlib.suppress(OSError):
                cgroup.rmdir()
