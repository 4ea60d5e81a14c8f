"""Shards to batches. Nothing here imports torch but `collate.py` and `loader.py`, so `pack_documents` is fetched on first use."""

from __future__ import annotations

from typing import Any

__all__ = ["pack_documents"]


def __getattr__(name: str) -> Any:
    if name == "pack_documents":
        from fusiontrain.data.collate import pack_documents

        return pack_documents
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
