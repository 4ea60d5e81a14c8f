"""Ranges of objects in S3, Google Cloud Storage and whatever else fsspec knows."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import fsspec
import fsspec.asyn

from fusiontrain.data.storage.retry import CHANGED, FinalError, TransientError, Unreachable
from fusiontrain.data.storage.shard import scrubbed, without_secrets
from fusiontrain.utils.errors import UserError

TAGS = ("generation", "ETag", "etag", "LastModified", "mtime", "updated", "created")
"""Names under which the stores tell what changes with the content, the best first: Google's etag changes with an object's labels too."""

NO_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"})
"""Of botocore and google.auth, which need not be installed."""

NOBODY_THERE = frozenset({"EndpointConnectionError", "ClientConnectorError", "ClientConnectorDNSError"})
"""Of botocore and aiohttp."""

REFUSALS = (401, 403)

logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of the errors that it raises


def read_range(url: str, first: int, size: int, timeout: float, tag: str) -> bytes:
    """`size` bytes from byte `first` on, within `timeout` seconds, of the object that `describe` gave that tag: S3 compares its ETag and GCS its
    generation, other stores nothing. Raises TransientError or FinalError."""
    filesystem, _ = _filesystem(url)
    protocols = (filesystem.protocol,) if isinstance(filesystem.protocol, str) else filesystem.protocol
    where = {"start": first, "end": first + size}
    if tag and "s3" in protocols:
        data = _call(_s3_range, url, timeout, **where, tag=tag)
    else:
        data = _call("cat_file", url, timeout, **where, **({"generation": tag} if tag and "gs" in protocols else {}))
    if len(data) != size:
        raise TransientError(f"the store answers with {len(data)} of {size} bytes")
    return data


async def _s3_range(filesystem: Any, path: str, start: int, end: int, tag: str) -> bytes:
    """As `cat_file` of s3fs, which knows no If-Match."""
    bucket, key, version = filesystem.split_path(path)
    wanted = {"Range": f"bytes={start}-{end - 1}", "IfMatch": f'"{tag}"'} | ({"VersionId": version} if version else {})
    response = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, **wanted)
    async with response["Body"] as body:
        return await body.read()


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
    # gcsfs would ask for the kind of the bucket by gRPC at every read, and for long where that is shut or not allowed. Zonal buckets need it.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        return fsspec.core.url_to_fs(url, use_listings_cache=False)  # a listing from before would hide what has changed
    except ImportError as error:
        raise UserError(f"{without_secrets(url)}: needs a package ({error}); pip install 'fusiontrain[s3]' or 'fusiontrain[gcs]'") from error
    except ValueError as error:
        raise UserError(f"{without_secrets(url)}: no such kind of store ({scrubbed(error)}); expected http, https, s3 or gs") from error


def _call(method: str | Callable[..., Any], url: str, timeout: float, **kwargs: Any) -> Any:
    """A method of the file system that the URL belongs to, or a coroutine that is given it, with the library's errors sorted into those that may
    pass and those that stay."""
    filesystem, path = _filesystem(url)
    try:
        if callable(method):
            return fsspec.asyn.sync(filesystem.loop, method, filesystem, path, timeout=timeout, **kwargs)
        if filesystem.async_impl:
            return fsspec.asyn.sync(filesystem.loop, getattr(filesystem, f"_{method}"), path, timeout=timeout, **kwargs)
        return getattr(filesystem, method)(path, **kwargs)
    except fsspec.exceptions.FSTimeoutError as error:
        raise TransientError(f"no whole answer within {timeout:g} seconds (data.storage.timeout_seconds)") from error
    except Exception as error:  # each store has exceptions of its own
        raise _sorted_error(error, of_a_version="tag" in kwargs or "generation" in kwargs) from error


def _sorted_error(error: Exception, of_a_version: bool) -> Exception:
    """of_a_version: one version of the object was asked for, so that another one there counts as none."""
    said, status = scrubbed(error), getattr(error, "code", None)
    if isinstance(error, FileNotFoundError):
        return FinalError(f"is gone, or {CHANGED}" if of_a_version else "is not there")
    if "PreconditionFailed" in repr(error.__cause__):
        return FinalError(CHANGED)
    if isinstance(error, PermissionError) or said.startswith("Forbidden") or status in REFUSALS:  # the latter two of gcsfs
        return FinalError(f"may not be read with the credentials of this process ({said})")
    if type(error).__name__ in NO_CREDENTIALS:
        return FinalError(f"there are no credentials for it ({said})")
    kind = Unreachable if type(error).__name__ in NOBODY_THERE else TransientError
    return kind(f"{type(error).__name__}: {said}")
