"""Samples that cannot be used: named, counted, and never lost without a word."""

from __future__ import annotations

import logging
import threading

from fusiontrain.types import SourceRef
from fusiontrain.utils.errors import UserError

logger = logging.getLogger(__name__)

FEWEST_BAD_TO_STOP = 10
"""A run does not stop for fewer bad samples than this, whatever their share: the first of ten samples may be the bad one. A share of 0
stops at the first."""


class BadSample(Exception):
    """A sample that cannot become a document; the message is the reason."""


class BadSampleLog:
    """Counts the samples that were tried and the bad ones, from any thread, and stops the run when there are too many."""

    def __init__(self, max_bad_fraction: float) -> None:
        self.max_bad_fraction = max_bad_fraction
        self.tried, self.bad = 0, 0
        self._lock = threading.Lock()

    def good(self, count: int = 1) -> None:
        with self._lock:
            self.tried += count

    def add(self, source: SourceRef, reason: BaseException | str, quietly: bool = False) -> None:
        """Count a bad sample and, unless `quietly`, name it. Raises UserError when their share is above `data.max_bad_fraction`."""
        with self._lock:
            self.tried += 1
            self.bad += 1
            bad, tried = self.bad, self.tried
        if not quietly:
            logger.warning("skipped %s: %s", source, reason)
        if (bad >= FEWEST_BAD_TO_STOP or not self.max_bad_fraction) and bad > self.max_bad_fraction * tried:
            raise UserError(
                f"{bad} of {tried} samples are unreadable, the last being {source}: {reason}; mend the shards or raise data.max_bad_fraction"
            )
