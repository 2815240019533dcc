"""Fetch an image behind an address, but never from the network that the server stands in.

A client could otherwise read what only this machine may: services without a password, the metadata
of a cloud (server-side request forgery). The name is resolved once, all of its addresses must be
public, and the connection goes to one of these very addresses, so the name cannot change in
between. Each redirect is checked in the same way.

The timeout of a socket is for each receive, and a server that sends a byte a second keeps to it.
So a timer ends the connection when the time for all of it is over.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from contextlib import suppress
from urllib.parse import SplitResult, urljoin, urlsplit

MAX_REDIRECTS = 3
TIMEOUT = 10.0  # seconds for all addresses of a chat
CHUNK = 1 << 16
PORTS = {"http": 80, "https": 443}
TOO_LATE = "it took too long"


def fetch(address: str, max_bytes: int, private: bool = False, seconds: float = TIMEOUT) -> bytes:
    """The bytes behind an http or https address.

    Args:
        private: allow addresses that are not public, too.
        seconds: for the whole of it.

    Raises:
        ValueError: for what is not allowed or cannot be fetched.
    """
    deadline = time.monotonic() + seconds
    for _ in range(MAX_REDIRECTS + 1):
        try:
            found = _get(urlsplit(address), max_bytes, private, deadline)
        except (OSError, http.client.HTTPException) as error:
            reason = TOO_LATE if time.monotonic() >= deadline else error
            raise ValueError(f"{address:.200}: could not be fetched ({reason})") from error
        if isinstance(found, bytes):
            return found
        address = urljoin(address, found)
    raise ValueError(f"{address:.200}: more than {MAX_REDIRECTS} redirects")


def _get(url: SplitResult, max_bytes: int, private: bool, deadline: float) -> bytes | str:
    """The bytes, or the address that they are at."""
    name = url.geturl()[:200]
    if url.scheme not in PORTS or not url.hostname:
        raise ValueError(f"{name}: expected an http or https address")
    try:
        port = url.port or PORTS[url.scheme]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    ip = _public_address(url.hostname, port, private)
    connection = http.client.HTTPConnection(url.hostname, port)
    opened = socket.create_connection((ip, port), _left(deadline))

    def end() -> None:
        with suppress(OSError):
            # Not the method of the TLS socket, which another thread is reading from.
            socket.socket.shutdown(opened, socket.SHUT_RDWR)

    timer = threading.Timer(deadline - time.monotonic(), end)
    timer.start()
    try:
        if url.scheme == "https":
            context = ssl.create_default_context()
            opened = context.wrap_socket(
                opened, do_handshake_on_connect=False, server_hostname=url.hostname
            )
            opened.do_handshake()
        connection.sock = opened
        target = (url.path or "/") + (f"?{url.query}" if url.query else "")
        connection.request("GET", target, headers={"User-Agent": "multimodal"})
        answer = connection.getresponse()
        if answer.status in (301, 302, 303, 307, 308):
            return answer.headers.get("Location") or ""
        if answer.status != 200:
            raise ValueError(f"{name}: status {answer.status}")
        parts, size = [], 0
        while chunk := answer.read1(CHUNK):
            size += len(chunk)
            if size > max_bytes:
                raise ValueError(f"{name}: more than {max_bytes:,} bytes")
            parts.append(chunk)
        _left(deadline)  # otherwise the timer may have ended it
        return b"".join(parts)
    finally:
        timer.cancel()
        opened.close()


def _left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError(TOO_LATE)
    return seconds


def _public_address(host: str, port: int, private: bool) -> str:
    """An address of a host.

    Raises:
        ValueError: if one of its addresses is not public.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{host:.200}: no such host") from error
    addresses = [str(each[4][0]) for each in found]
    if not private and not all(is_public(address) for address in addresses):
        raise ValueError(f"{host:.200}: is not a public address")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet, seen through its IPv4 form if it has one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast
