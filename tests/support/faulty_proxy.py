"""A TCP proxy between a client and a server that misbehaves at a chosen byte.

    with FaultyProxy(server.port) as proxy:
        proxy.plan(Fault("reset", at=1000))
        ...  # a client of proxy.port

Replies are forwarded in pieces of random size. Bytes are counted over all connections,
from the last call of ``plan`` on.
"""

from __future__ import annotations

import random
import select
import socket
import struct
import threading
from dataclasses import dataclass
from types import TracebackType

from typing_extensions import Self

_RECEIVE_BYTES = 1 << 16
_LOOK_MS = 20  # how often a thread looks whether the proxy was closed
_NO_LINGER = struct.pack("ii", 1, 0)  # closing resets the connection


@dataclass(frozen=True)
class Fault:
    """What happens to the replies once ``at`` bytes of them were forwarded.

    ``close`` and ``reset`` end the connection, ``stall`` keeps it and forwards no more,
    ``insert`` sends ``data`` together with the byte before it, or, if ``late``, with
    the byte behind it, should that be of the same connection.
    """

    kind: str
    at: int
    data: bytes = b""
    late: bool = False


class FaultyProxy:
    """Forwards connections to a server on loopback, each by a thread.

    Parameters
    ----------
    to
        The server's port.
    seed
        Of the sizes of pieces.
    largest
        Most bytes of a piece.
    """

    def __init__(self, to: int, *, seed: int = 0, largest: int = 700) -> None:
        self._to = to
        self._random = random.Random(seed)
        self._largest = largest
        self._lock = threading.Lock()
        self._faults: list[Fault] = []  # guarded by _lock
        self.n_bytes = 0  # of replies since plan; guarded by _lock
        self.n_connections = 0  # guarded by _lock
        self._last: socket.socket | None = None  # got the last byte; guarded by _lock
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._acceptor = threading.Thread(target=self._accept)

    @property
    def port(self) -> int:
        """Where clients connect."""
        return int(self._listener.getsockname()[1])

    @property
    def address(self) -> str:
        """The port with its host."""
        return f"127.0.0.1:{self.port}"

    def plan(self, *faults: Fault) -> None:
        """Forget what was planned, count bytes from here on, and do this."""
        with self._lock:
            self.n_bytes, self._faults = 0, list(faults)

    @property
    def pending(self) -> int:
        """How many faults have not happened yet."""
        with self._lock:
            return len(self._faults)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.n_connections += 1
            try:
                server = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                client.close()
                continue
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            thread = threading.Thread(target=self._serve, args=(client, server))
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        """Forward both ways, until one end or a fault ends it."""
        poller = select.poll()
        with client, server:
            for end in (client, server):
                poller.register(end, select.POLLIN)
            try:
                while not self._closed:
                    ready = {fileno for fileno, _ in poller.poll(_LOOK_MS)}
                    if client.fileno() in ready:
                        if not (data := client.recv(_RECEIVE_BYTES)):
                            return
                        server.sendall(data)
                    if server.fileno() in ready:
                        if not (data := server.recv(_RECEIVE_BYTES)):
                            return
                        fault = self._forward(data, client)
                        if fault == "stall":
                            poller.unregister(server)
                        elif fault is not None:
                            return
            except OSError:
                return  # an end that is gone; so is the other one now

    def _forward(self, data: bytes, client: socket.socket) -> str | None:
        """Send data in pieces; return how that ended, if it was by a fault."""
        while data:
            with self._lock:
                piece, fault = self._piece_locked(data, self._last is client)
                self._last = client
            data = data[len(piece.taken) :]
            client.sendall(piece.sent)
            if fault == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            if fault is not None:
                return fault
        return None

    def _piece_locked(self, data: bytes, same: bool) -> tuple[_Piece, str | None]:
        """Return what to send next, and how the connection ends after it."""
        taken = data[: self._random.randint(1, self._largest)]
        before, after = b"", b""
        for fault in sorted(self._faults, key=lambda fault: fault.at):
            at = fault.at - self.n_bytes
            if fault.kind == "insert" and fault.late and at == 0:
                before += fault.data if same else b""
            elif at > len(taken) or (fault.late and at == len(taken)):
                break
            else:
                taken = taken[:at]
                if fault.kind != "insert":
                    self._faults.remove(fault)
                    self.n_bytes += at
                    return _Piece(taken, before + taken), fault.kind
                after += fault.data
            self._faults.remove(fault)
            if after:
                break
        self.n_bytes += len(taken)
        return _Piece(taken, before + taken + after), None

    def close(self) -> None:
        """End all connections; returns when all threads are gone."""
        self._closed = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._acceptor.join()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        """Begin to forward."""
        self._acceptor.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End all connections."""
        self.close()


@dataclass(frozen=True)
class _Piece:
    taken: bytes  # of what the server sent
    sent: bytes  # with what was inserted
