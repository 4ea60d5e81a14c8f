"""An HTTP server of a folder that keeps to ranges, and misbehaves when told to."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from urllib.parse import urlsplit

from fusiontrain.testing.local_server import Handler, serving

RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass
class RangeServer:
    """url: of the folder, without a slash at the end. requests: (path, first byte, bytes) of each, in order; refused ones too. headers: of the
    last one, names in lower case.

    fault: asked before each answer with the number of the request from 0 on and its path; the name of a fault, or None for none: a status such
    as "503", "short" (half of the bytes, then the end), "reset" (nothing, then the end), "whole" (status 200 and the whole file), "other" (a range
    one byte further on), "gzip" (said to be compressed), "drip" (a byte every 20 ms). latency_seconds: before each answer. etag: sent with each;
    None for a time of change alone.
    """

    folder: Path
    url: str = ""
    requests: list[tuple[str, int, int]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    fault: Callable[[int, str], str | None] = lambda number, path: None
    latency_seconds: float = 0.0
    etag: str | None = '"one"'
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def range_server(folder: Path) -> Iterator[RangeServer]:
    """Serves `folder` on a free port of this machine until the end of the context."""
    server = RangeServer(folder)

    class Bound(_Handler):
        about = server

    with serving(Bound) as server.url:
        yield server


class _Handler(Handler):
    about: RangeServer

    def do_GET(self) -> None:
        about, path = self.about, urlsplit(self.path).path
        match = RANGE.fullmatch(self.headers.get("Range", ""))
        file = about.folder / path.lstrip("/")
        data = file.read_bytes() if file.is_file() else None
        first, last = (int(match[1]), int(match[2])) if match else (0, len(data or b"") - 1)
        with about.lock:
            number = len(about.requests)
            about.requests.append((path, first, last - first + 1))
            about.headers = {name.lower(): value for name, value in self.headers.items()}
        time.sleep(about.latency_seconds)
        fault = about.fault(number, path)
        if fault == "reset":
            self.close_connection = True
        elif fault is not None and fault.isdigit():
            self._answer(int(fault), b"busy")
        elif data is None:
            self._answer(404, b"")
        elif fault == "whole" or match is None:
            self._answer(200, data)
        elif first >= len(data):
            self._answer(416, b"")
        else:
            shift = fault == "other"
            part = data[first + shift : last + 1 + shift]
            self._answer(206, part, f"bytes {first + shift}-{first + shift + len(part) - 1}/{len(data)}", fault)

    def _answer(self, status: int, body: bytes, content_range: str | None = None, fault: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if content_range is not None:
            self.send_header("Content-Range", content_range)
            self.send_header("Last-Modified", formatdate(0, usegmt=True))
            if self.about.etag is not None:
                self.send_header("ETag", self.about.etag)
        if fault == "gzip":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        if fault == "short":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif fault == "drip":
            self._drip(body)
        else:
            self.wfile.write(body)

    def _drip(self, body: bytes) -> None:
        for place in range(len(body)):
            try:
                self.wfile.write(body[place : place + 1])
            except OSError:  # whom it is for has given up
                self.close_connection = True
                return
            time.sleep(0.02)
