"""The part of Google Cloud Storage's JSON API that reading needs: buckets that are listed page by page, objects with generations, ranges."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

from fusiontrain.testing.local_server import Handler, serving

PAGE = 2
"""Objects and folders in an answer, whatever is asked for, so that a listing takes several."""

ROUTE = re.compile(r"(/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?")
RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass
class GcsServer:
    """url: what STORAGE_EMULATOR_HOST names. requests: path and query of each, in order. fault: asked before each answer with its path; a status
    such as 503, or None for none."""

    url: str = ""
    requests: list[str] = field(default_factory=list)
    fault: Callable[[str], int | None] = lambda path: None
    _objects: dict[str, dict[str, tuple[int, bytes]]] = field(default_factory=dict)
    _generation: int = 1_700_000_000_000_000

    def put(self, bucket: str, name: str, data: bytes) -> str:
        """Write an object, in the place of an older one of that name; its generation."""
        self._generation += 1
        self._objects.setdefault(bucket, {})[name] = (self._generation, data)
        return str(self._generation)


@contextmanager
def gcs_server() -> Iterator[GcsServer]:
    """Serves buckets on a free port of this machine until the end of the context."""
    server = GcsServer()

    class Bound(_Handler):
        about = server

    with serving(Bound) as server.url:
        yield server


class _Handler(Handler):
    about: GcsServer

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.about.requests.append(self.path)
        fault = self.about.fault(url.path)
        match = ROUTE.fullmatch(url.path)
        if fault is not None or match is None:
            self._refuse(fault or 404)
            return
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        download, bucket, name = match[1], match[2], unquote(match[3] or "")
        objects = self.about._objects.get(bucket)
        if objects is None or (name and (name not in objects or query.get("generation", str(objects[name][0])) != str(objects[name][0]))):
            self._refuse(404)
        elif download:
            self._send(objects[name][1])
        elif name:
            self._json(_resource(bucket, name, *objects[name]))
        elif url.path.endswith("/o"):
            self._json(_page(bucket, objects, query))
        else:
            self._json({"kind": "storage#bucket", "name": bucket})

    def _send(self, data: bytes) -> None:
        match = RANGE.fullmatch(self.headers.get("Range", ""))
        if match is None:
            self._answer(200, data)
        elif int(match[1]) >= len(data):
            self._refuse(416)
        else:
            part = data[int(match[1]) : int(match[2]) + 1]
            self._answer(206, part, f"bytes {match[1]}-{int(match[1]) + len(part) - 1}/{len(data)}")

    def _json(self, content: object) -> None:
        self._answer(200, json.dumps(content).encode())

    def _refuse(self, status: int) -> None:
        self._answer(status, json.dumps({"error": {"code": status, "message": f"refused with {status}"}}).encode())

    def _answer(self, status: int, body: bytes, content_range: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if content_range is not None:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        self.wfile.write(body)


def _resource(bucket: str, name: str, generation: int, data: bytes) -> dict[str, str]:
    return {
        "kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(data)), "generation": str(generation),
        "metageneration": "1", "etag": f"tag-of-{generation}", "updated": "2026-01-01T00:00:00.000Z",
    }  # fmt: skip


def _page(bucket: str, objects: dict[str, tuple[int, bytes]], query: dict[str, str]) -> dict[str, object]:
    """Objects behind the prefix, those of deeper folders as one entry of `prefixes` each."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    entries: dict[str, bool] = {}
    for name in sorted(objects):
        if name.startswith(prefix):
            folder, slash, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            entries[prefix + folder + slash if slash else name] = bool(slash)
    first = int(query.get("pageToken", 0))
    names = list(entries)[first : first + PAGE]
    return {
        "kind": "storage#objects",
        "items": [_resource(bucket, name, *objects[name]) for name in names if not entries[name]],
        "prefixes": [name for name in names if entries[name]],
        **({"nextPageToken": str(first + PAGE)} if first + PAGE < len(entries) else {}),
    }
