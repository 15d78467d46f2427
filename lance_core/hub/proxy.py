"""Proxies of the environment or the system, for urllib: HTTP ones as it knows them, and SOCKS5 (RFC 1928)."""

from __future__ import annotations

import http.client
import socket
import ssl
import urllib.request
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

HTTP_KINDS = ("http", "https")
SOCKS_KINDS = ("socks5", "socks5h", "socks")
REFUSALS = {
    1: "it failed",
    2: "its rules do not allow it",
    3: "the network is unreachable",
    4: "the host is unreachable",
    5: "the connection was refused",
    6: "it took too long",
}


@dataclass(frozen=True)
class Proxies:
    """The proxy's address for each scheme of a request; "" for none."""

    http: str = ""
    https: str = ""

    @classmethod
    def from_environment(cls) -> Proxies:
        """HTTP_PROXY and HTTPS_PROXY, or else ALL_PROXY, each in either case; or the system's setting.

        Raises:
            ValueError: an address is of no known kind; says which.
        """
        known = urllib.request.getproxies()
        chosen = {kind: known.get(kind) or known.get("all") or "" for kind in HTTP_KINDS}
        for address in chosen.values():
            if address:
                split(address)
        return cls(**chosen)


def split(address: str) -> SplitResult:
    """A proxy's address in its parts; without a scheme it is an HTTP proxy.

    Raises:
        ValueError: it is of no known kind.
    """
    parts = urlsplit(address if "://" in address else f"http://{address}")
    if parts.scheme not in (*HTTP_KINDS, *SOCKS_KINDS) or not parts.hostname or (parts.port or 1) < 1:
        raise ValueError(
            f"the proxy {parts.scheme}://{parts.hostname or ''} is not one of http and socks5; set "
            "HTTPS_PROXY or ALL_PROXY to such as http://127.0.0.1:7890"
        )
    return parts


def handlers(proxies: Proxies, context: ssl.SSLContext) -> list[urllib.request.BaseHandler]:
    """What an opener needs to go through them. NO_PROXY holds for both kinds."""
    plain = {k: a for k, a in vars(proxies).items() if a and split(a).scheme in HTTP_KINDS}
    socks = {k: split(a) for k, a in vars(proxies).items() if a and split(a).scheme in SOCKS_KINDS}
    return [
        urllib.request.ProxyHandler(plain),
        _Http(socks.get("http")),
        _Https(socks.get("https"), context),
    ]


class _Http(urllib.request.HTTPHandler):
    """http, through a SOCKS proxy where there is one."""

    def __init__(self, proxy: SplitResult | None) -> None:
        super().__init__()
        self.proxy = proxy

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        if self.proxy is None or urllib.request.proxy_bypass(req.host):
            return super().http_open(req)
        return self.do_open(partial(_HttpThroughSocks, proxy=self.proxy), req)


class _Https(urllib.request.HTTPSHandler):
    """https, through a SOCKS proxy where there is one."""

    def __init__(self, proxy: SplitResult | None, context: ssl.SSLContext) -> None:
        super().__init__(context=context)
        self.proxy, self.context = proxy, context

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        if self.proxy is None or urllib.request.proxy_bypass(req.host):
            return super().https_open(req)
        made = partial(_HttpsThroughSocks, proxy=self.proxy, tls=self.context, context=self.context)
        return self.do_open(made, req)


class _HttpThroughSocks(http.client.HTTPConnection):
    def __init__(self, *args: Any, proxy: SplitResult, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.proxy = proxy

    def connect(self) -> None:
        self.sock = connect(self.proxy, self.host, self.port, self.timeout)


class _HttpsThroughSocks(http.client.HTTPSConnection):
    def __init__(self, *args: Any, proxy: SplitResult, tls: ssl.SSLContext, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.proxy, self.tls = proxy, tls

    def connect(self) -> None:
        raw = connect(self.proxy, self.host, self.port, self.timeout)
        self.sock = self.tls.wrap_socket(raw, server_hostname=self.host)


def connect(proxy: SplitResult, host: str, port: int, timeout: float | None) -> socket.socket:
    """A connection to host and port through a SOCKS5 proxy, which looks the name up.

    Raises:
        OSError: the proxy cannot be reached, is none, or refuses.
    """
    sock = socket.create_connection((proxy.hostname or "", proxy.port or 1080), timeout)
    try:
        _greet(sock, unquote(proxy.username or ""), unquote(proxy.password or ""))
        name = host.encode("idna") if not host.isascii() else host.encode()
        if len(name) > 255:
            raise OSError("the host's name is too long for a SOCKS proxy")
        sock.sendall(b"\x05\x01\x00\x03" + bytes([len(name)]) + name + port.to_bytes(2, "big"))
        version, reply, _, kind = _exactly(sock, 4)
        if version != 5 or reply:
            raise OSError(f"the SOCKS proxy did not connect: {REFUSALS.get(reply, f'error {reply}')}")
        # The address it connects from, which nobody needs: IPv4, IPv6 or a name.
        _exactly(sock, {1: 4, 4: 16}.get(kind) or _exactly(sock, 1)[0])
        _exactly(sock, 2)
    except BaseException:
        sock.close()
        raise
    return sock


def _greet(sock: socket.socket, user: str, password: str) -> None:
    """Agree on how to log in: with a name (RFC 1929), or not at all."""
    sock.sendall(b"\x05\x02\x00\x02" if user else b"\x05\x01\x00")
    version, method = _exactly(sock, 2)
    if version != 5 or method not in (0, 2) or (method == 2 and not user):
        raise OSError("the proxy is no SOCKS5 proxy, or wants another login")
    if method == 2:
        name, word = user.encode()[:255], password.encode()[:255]
        sock.sendall(bytes([1, len(name)]) + name + bytes([len(word)]) + word)
        if _exactly(sock, 2)[1]:
            raise OSError("the SOCKS proxy refuses this name and password")


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        got = sock.recv(count - len(data))
        if not got:
            raise OSError("the SOCKS proxy ended the connection")
        data += got
    return data
