"""TLS in front of a plain server: for a redis-server that was built without it."""

from __future__ import annotations

import select
import socket
import ssl
import threading
from contextlib import suppress
from types import TracebackType

from typing_extensions import Self

from tests.support.redis_servers import ServerTls

CHUNK_BYTES = 65_536
PROTOCOLS = {"TLSv1.2": ssl.TLSVersion.TLSv1_2, "TLSv1.3": ssl.TLSVersion.TLSv1_3}


class TlsFront:
    """Listens on a free port, and speaks TLS there for a plain port.

    ``seen_names`` has the server name (SNI) of each handshake.
    """

    def __init__(self, tls: ServerTls, target: int = 0) -> None:
        self.target = target  # may be set later, before the first connection
        self.seen_names: list[str | None] = []
        self._context = self._server_context(tls)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._accept, name="tls-front")]
        self._threads[0].start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listener.getsockname()[1])

    @property
    def address(self) -> str:
        """Where it listens, as a seed."""
        return f"127.0.0.1:{self.port}"

    def close(self) -> None:
        """Close all connections."""
        self._closing.set()
        # Wakes the thread that waits for a connection.
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
            pass
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _server_context(self, tls: ServerTls) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls.certificate, tls.key)
        context.load_verify_locations(tls.ca)
        versions = [PROTOCOLS[name] for name in tls.protocols.split()]
        context.minimum_version, context.maximum_version = min(versions), max(versions)
        if tls.clients == "yes":
            context.verify_mode = ssl.CERT_REQUIRED
        context.sni_callback = lambda _, name, __: self.seen_names.append(name)
        return context

    def _accept(self) -> None:
        while not self._closing.is_set():
            plain, _ = self._listener.accept()
            thread = threading.Thread(target=self._serve, args=[plain])
            self._threads.append(thread)
            thread.start()

    def _serve(self, plain: socket.socket) -> None:
        with plain, suppress(OSError):
            plain.settimeout(5.0)
            with (
                self._context.wrap_socket(plain, server_side=True) as near,
                socket.create_connection(("127.0.0.1", self.target)) as far,
            ):
                self._copy(near, far)

    def _copy(self, near: ssl.SSLSocket, far: socket.socket) -> None:
        while not self._closing.is_set():
            ready, _, _ = select.select([near, far], [], [], 0.05)
            if near in ready or near.pending():
                data = near.recv(CHUNK_BYTES)
                if not data:
                    return
                far.sendall(data)
            if far in ready:
                data = far.recv(CHUNK_BYTES)
                if not data:
                    return
                near.sendall(data)

    def __enter__(self) -> Self:
        """Return the front, which listens already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close all connections."""
        self.close()
