"""Ranges of objects in S3, Google Cloud Storage and whatever else fsspec knows."""

from __future__ import annotations

from typing import Any

import fsspec
import fsspec.asyn

from fusiontrain.data.storage.retry import FinalError, TransientError
from fusiontrain.data.storage.shard import scrubbed, without_secrets
from fusiontrain.utils.errors import UserError

TAGS = ("ETag", "etag", "generation", "LastModified", "mtime", "updated", "created")
"""Names under which the stores tell what changes with the content, the best first."""

NO_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"})
"""Of botocore and google.auth, which need not be installed."""


def read_range(url: str, first: int, size: int, timeout: float) -> bytes:
    """`size` bytes from byte `first` on, within `timeout` seconds. Raises TransientError or FinalError."""
    data = _call("cat_file", url, timeout, start=first, end=first + size)
    if len(data) != size:
        raise TransientError(f"the store answers with {len(data)} of {size} bytes")
    return data


def describe(url: str, timeout: float) -> tuple[int, str]:
    """(size, tag) of an object. Raises TransientError or FinalError."""
    return _size_and_tag(_call("info", url, timeout))


def listing(url: str, timeout: float) -> dict[str, tuple[int, str]]:
    """(size, tag) by URL of the objects that a glob matches or that lie in a folder. Raises TransientError or FinalError."""
    filesystem, _ = _filesystem(url)
    found = _call("glob", url, timeout, detail=True) if has_magic(url) else {entry["name"]: entry for entry in _call("ls", url, timeout, detail=True)}
    return {filesystem.unstrip_protocol(name): _size_and_tag(info) for name, info in found.items() if info["type"] == "file"}


def has_magic(url: str) -> bool:
    return any(letter in url for letter in "*?[")


def _size_and_tag(info: dict[str, Any]) -> tuple[int, str]:
    if info.get("type") != "file" or info.get("size") is None:
        raise FinalError("is no object with a size; a folder ends with a slash")
    return int(info["size"]), next((str(info[name]).strip('"') for name in TAGS if info.get(name)), "")


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(url, use_listings_cache=False)  # a listing from before would hide what has changed
    except ImportError as error:
        raise UserError(f"{without_secrets(url)}: needs a package ({error}); pip install 'fusiontrain[s3]' or 'fusiontrain[gcs]'") from error
    except ValueError as error:
        raise UserError(f"{without_secrets(url)}: no such kind of store ({scrubbed(error)}); expected http, https, s3 or gs") from error


def _call(method: str, url: str, timeout: float, **kwargs: Any) -> Any:
    """A method of the file system that the URL belongs to, with the library's errors sorted into those that may pass and those that stay."""
    filesystem, path = _filesystem(url)
    try:
        if filesystem.async_impl:
            return fsspec.asyn.sync(filesystem.loop, getattr(filesystem, f"_{method}"), path, timeout=timeout, **kwargs)
        return getattr(filesystem, method)(path, **kwargs)
    except FileNotFoundError as error:
        raise FinalError("is not there") from error
    except PermissionError as error:
        raise FinalError(f"may not be read with the credentials of this process ({scrubbed(error)})") from error
    except fsspec.exceptions.FSTimeoutError as error:
        raise TransientError(f"no whole answer within {timeout:g} seconds (data.storage.timeout_seconds)") from error
    except Exception as error:  # each store has exceptions of its own
        if type(error).__name__ in NO_CREDENTIALS:
            raise FinalError(f"there are no credentials for it ({scrubbed(error)})") from error
        raise TransientError(f"{type(error).__name__}: {scrubbed(error)}") from error
