"""Samples that cannot be used: named, counted, and never lost without a word."""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter
from typing import Any

from fusiontrain.types import SourceRef
from fusiontrain.utils.errors import UserError

logger = logging.getLogger(__name__)

FEWEST_BAD_TO_STOP = 10
"""A run does not stop for fewer bad samples than this, whatever their share: the first of ten samples may be the bad one. A share of 0
stops at the first."""


FORMAT, DECODE, CHECKSUM, READ, CHANGED = REASONS = ("format", "decode", "checksum", "read", "changed")
"""Why a sample is bad: its layout; pixels or arrays that do not decode; bytes that are not those indexed; a read that failed; pieces or lengths that
are not those indexed."""

NAMED_IN_FULL = 10
SETTING = re.compile(r"\bdata\.[a-z_.]+=")
"""What a reason holds that names a setting and its value: then that may be what is wrong, and not the shards."""


class BadSample(Exception):
    """A sample that cannot become a document; the message says why, `reason` is one of REASONS."""

    def __init__(self, message: str, reason: str = FORMAT) -> None:
        super().__init__(message)
        self.reason = reason


class BadSampleLog:
    """Counts the samples that were tried and the bad ones, from any thread, and stops the run when there are too many.

    counts: bad samples by (path of the source, reason). Of each of these the first NAMED_IN_FULL are logged, then the 16th, 32nd, 64th, ...

    One of a training step is also kept as a finding (where it lies, why it is bad, the step) until `take` asks for it.
    """

    def __init__(self, max_bad_fraction: float) -> None:
        self.max_bad_fraction = max_bad_fraction
        self.tried = 0
        self.counts: Counter[tuple[str, str]] = Counter()
        self._findings: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    @property
    def bad(self) -> int:
        return self.counts.total()

    def good(self, count: int = 1) -> None:
        with self._lock:
            self.tried += count

    def add(self, source: SourceRef, reason: BaseException | str, quietly: bool = False, step: int = 0, offset: int | None = None) -> None:
        """Count a bad sample and, unless `quietly`, name it. step: the training step it would have been in, else 0; offset: of its
        first member in the shard, in bytes. Raises UserError when their share is above `data.max_bad_fraction`."""
        kind = (source.source, reason.reason if isinstance(reason, BadSample) else FORMAT)
        with self._lock:
            self.tried += 1
            self.counts[kind] += 1
            if step:
                where = {"source": source.source, "shard": source.shard, "sample": source.index, "key": source.key, "offset": offset}
                self._findings.append({"step": step, **where, "reason": kind[1], "message": str(reason)})
            alike, bad, tried = self.counts[kind], self.bad, self.tried
            summary = ", ".join(f"{count} {name}" for name, count in self._by_reason().items())
        if not quietly and (alike <= NAMED_IN_FULL or alike & (alike - 1) == 0):
            logger.warning("skipped %s: %s%s", source, reason, "" if alike < NAMED_IN_FULL else f" ({alike} so far for this reason, not all are named)")
        if (bad >= FEWEST_BAD_TO_STOP or not self.max_bad_fraction) and bad > self.max_bad_fraction * tried:
            remedy = "correct that setting, or mend the shards" if SETTING.search(str(reason)) else "mend the shards or raise data.max_bad_fraction"
            raise UserError(f"{bad} of {tried} samples are unreadable ({summary}), the last being {source}: {reason}; {remedy}")

    def take(self, step: int) -> list[dict[str, Any]]:
        """The findings up to `step` that were not taken before; those of steps that were built ahead wait."""
        with self._lock:
            taken = [finding for finding in self._findings if finding["step"] <= step]
            self._findings = [finding for finding in self._findings if finding["step"] > step]
        return taken

    def _by_reason(self) -> dict[str, int]:
        return {name: total for name in REASONS if (total := sum(n for (_, reason), n in self.counts.items() if reason == name))}
