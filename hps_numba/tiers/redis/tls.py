"""TLS to Redis: what is trusted, who we are, and the name that is asked for."""

from __future__ import annotations

import ssl
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import Any

from redis.connection import SSLConnection

from hps_numba.errors import ConfigError
from hps_numba.tiers.redis.errors import NAME


@dataclass(frozen=True)
class RedisTls:
    """Certificates for connections to Redis.

    Parameters
    ----------
    ca
        File, or directory of files, with the certificates that are trusted; nothing
        else is.
    certificate, key
        Files with what a server is shown that asks for a client certificate; both or
        neither. The key must not be encrypted.
    server_name
        The name that is asked for (SNI) and that the certificate must bear. Empty: the
        host or address that is connected to.
    """

    ca: str
    certificate: str | None = None
    key: str | None = None
    server_name: str = ""

    def context(self) -> ssl.SSLContext:
        """Read the files and return what sockets are wrapped with.

        Raises
        ------
        ConfigError
            If a file cannot be read or does not hold what it should.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies chain and name
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.sslsocket_class = ExplainingSocket
        _trust(context, Path(self.ca))
        if self.certificate is not None or self.key is not None:
            _show(context, self.certificate, self.key)
        return context


class ExplainingSocket(ssl.SSLSocket):
    """A socket that says why the server hung up, where it can.

    With TLS 1.3 a server looks at the client's certificate when the client believes
    the handshake over. Its verdict then waits to be read, while the first write fails
    with a broken pipe.
    """

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send all of ``data``; raise the server's alert if that is why it failed."""
        try:
            super().sendall(data, flags)
        except (ssl.SSLEOFError, ConnectionError):
            with suppress(ssl.SSLEOFError, ConnectionError):
                self.recv(1)
            raise


def connection_class(tls: RedisTls) -> type[SSLConnection]:
    """Return redis-py's TLS connection with our context and server name.

    redis-py trusts the system's certificates beside the configured ones, and asks for
    the host that it connects to, which in a cluster is a bare address. It has no
    option for either, and keeps its cluster client from passing arguments of a
    connection class on: hence a class for each set of files, read once.
    """
    context = tls.context()

    class NamedConnection(SSLConnection):
        def _wrap_socket_with_ssl(self, sock: socket) -> ssl.SSLSocket:
            name = tls.server_name or self.host
            return context.wrap_socket(sock, server_hostname=name)

    return NamedConnection


def _trust(context: ssl.SSLContext, ca: Path) -> None:
    try:
        if not ca.is_dir():
            context.load_verify_locations(cafile=ca)
        else:
            for path in sorted(ca.iterdir()):
                # OpenSSL would take only files that are named by their hash.
                with suppress(ssl.SSLError):  # no certificate, a README perhaps
                    context.load_verify_locations(cafile=path)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"{NAME}: tls_ca_certificate {ca} cannot be read ({error}); name a file "
            "or a directory of PEM certificates"
        ) from error
    if not context.get_ca_certs():
        raise ConfigError(f"{NAME}: tls_ca_certificate {ca} has no CA certificate")


def _show(context: ssl.SSLContext, certificate: str | None, key: str | None) -> None:
    if certificate is None or key is None:
        raise ConfigError(
            f"{NAME}: tls_client_certificate and tls_client_key go together; "
            f"{'the certificate' if certificate is None else 'the key'} is missing"
        )
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"{NAME}: tls_client_certificate {certificate} and tls_client_key {key} "
            f"cannot be used together ({error})"
        ) from error


def _no_password() -> str:
    """Refuse to ask on the terminal, which is what OpenSSL would do."""
    raise ConfigError(f"{NAME}: tls_client_key is encrypted; store it without password")
