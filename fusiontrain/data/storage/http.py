"""Ranges of files over HTTP, with connections that are kept open. A server that does not keep to the range is an error, never other bytes."""

from __future__ import annotations

import functools
import re
import time
from typing import NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

import urllib3

from fusiontrain.data.storage.retry import FinalError, TransientError, Unreachable
from fusiontrain.data.storage.shard import scrubbed

MAY_PASS = frozenset({408, 425, 429, 500, 502, 503, 504})
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
KEPT_CONNECTIONS = 32
REDIRECTS = 5


class Part(NamedTuple):
    """Bytes of a file, the size of the whole file where the server tells it, and its ETag or time of change, or ""."""

    data: bytes
    total: int | None
    tag: str


def read_range(url: str, first: int, size: int, timeout: float) -> Part:
    """`size` > 0 bytes from byte `first` on, within `timeout` seconds. Raises TransientError or FinalError."""
    deadline = time.monotonic() + timeout
    url, headers = _split_login(url)
    headers |= {"Range": f"bytes={first}-{first + size - 1}", "Accept-Encoding": "identity"}
    redirects = urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=REDIRECTS)
    try:
        response = _pool().request("GET", url, headers=headers, preload_content=False, timeout=timeout, retries=redirects)
        try:
            total = _check(response, first, size)
            data = _body(response, size, deadline)
            response.release_conn()
        except BaseException:
            response.close()
            raise
    except urllib3.exceptions.HTTPError as error:
        cause = getattr(error, "reason", None) or error
        kind = Unreachable if isinstance(cause, urllib3.exceptions.NewConnectionError) else TransientError
        raise kind(scrubbed(cause)) from error
    return Part(data, total, (response.headers.get("ETag") or response.headers.get("Last-Modified") or "").removeprefix("W/"))


def describe(url: str, timeout: float) -> tuple[int, str]:
    """(size, tag) of a file, from its first byte: so what is found out here is also that ranges work. Raises TransientError or FinalError."""
    part = read_range(url, 0, 1, timeout)
    if part.total is None:
        raise FinalError("the server does not tell its size, which random access needs; read it by `pipe:curl -sf URL`")
    return part.total, part.tag


@functools.cache
def _pool() -> urllib3.PoolManager:
    """The process's connections; safe in threads, and a spawned process makes its own."""
    return urllib3.PoolManager(maxsize=KEPT_CONNECTIONS)


def _split_login(url: str) -> tuple[str, dict[str, str]]:
    """The URL without `user:password@`, and the header that says the same."""
    parts = urlsplit(url)
    login, _, host = parts.netloc.rpartition("@")
    headers = urllib3.make_headers(basic_auth=unquote(login)) if login else {}
    return urlunsplit(parts._replace(netloc=host)), dict(headers)


def _check(response: urllib3.BaseHTTPResponse, first: int, size: int) -> int | None:
    """The size of the whole file, after the answer was found to be the range that was asked for."""
    if response.status == 200:
        raise TransientError("the server answers with the whole file (status 200) where a range was asked for (206); without ranges use `pipe:curl -sf URL`")
    if response.status == 416:
        raise FinalError("the file ends before this place (status 416)")
    if response.status != 206:
        kind = TransientError if response.status in MAY_PASS else FinalError
        raise kind(f"the server answers with status {response.status} {scrubbed(response.reason or '')}".rstrip())
    found = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    length = response.headers.get("Content-Length", str(size))
    if found is None or (int(found[1]), int(found[2])) != (first, first + size - 1) or length != str(size):
        said = scrubbed(response.headers.get("Content-Range"))
        raise TransientError(f"the server answers with another range ({said}, {length} bytes) than bytes {first}-{first + size - 1}")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise TransientError("the server compresses a range, so its bytes are not those of the file")
    return None if found[3] == "*" else int(found[3])


def _body(response: urllib3.BaseHTTPResponse, size: int, deadline: float) -> bytes:
    """The whole answer. A server that sends a byte now and then runs into the deadline too."""
    parts, missing = [], size
    while missing:
        part = response.read1(missing)
        if not part:
            raise TransientError(f"the connection ended after {size - missing} of {size} bytes")
        parts.append(part)
        missing -= len(part)
        if missing and time.monotonic() > deadline:
            raise TransientError(f"only {size - missing} of {size} bytes came in time (data.storage.timeout_seconds)")
    return b"".join(parts)
