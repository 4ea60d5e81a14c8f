"""Trying again: how often, how long between, and the sentence at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import tenacity

from fusiontrain.config.schema import StorageConfig
from fusiontrain.utils.errors import UserError

logger = logging.getLogger(__name__)
T = TypeVar("T")

CHANGED = "the shard has changed since the run began; start again, which indexes it anew"

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.2, 30.0


class TransientError(Exception):
    """A failure that may be over in a moment."""


class Unreachable(TransientError):
    """There is nobody at that address: at the start of a run most likely a mistake, later a server that is started again."""


class FinalError(Exception):
    """A failure that no further try will mend."""


def retried(call: Callable[[], T], where: str, settings: StorageConfig, first_contact: bool = False) -> T:
    """The result of `call`, after up to `data.storage.retries` further tries at random times, twice as far apart each time.

    where: shard and offset, for the sentence. first_contact: an address where nobody is fails at once. Raises UserError with the last cause.
    """

    def warn(state: tenacity.RetryCallState) -> None:
        said = str(state.outcome and state.outcome.exception())  # no exception into a log record: its frames hold the batch that is being built
        logger.warning("%s: %s; trying again (%d of %d)", where, said, state.attempt_number, settings.retries)

    tries = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(settings.retries + 1),
        wait=tenacity.wait_random_exponential(multiplier=FIRST_WAIT_SECONDS, max=LONGEST_WAIT_SECONDS),
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, TransientError) and not (first_contact and isinstance(error, Unreachable))),
        before_sleep=warn,
        reraise=True,
    )
    try:
        return tries(call)
    except TransientError as error:
        if first_contact and isinstance(error, Unreachable):
            raise UserError(f"{where}: nobody answers ({error}); is the address right, and the server up?") from error
        raise UserError(f"{where}: {error}; given up after {settings.retries + 1} tries (data.storage.retries)") from error
    except FinalError as error:
        raise UserError(f"{where}: {error}") from error
