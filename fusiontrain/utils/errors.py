"""The error that a user caused and can mend."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: config, shard, sample, checkpoint or environment.

    The message is one sentence (or one line per problem): what, where, what to do. The command line prints it on stderr without
    a traceback and exits with code 2.
    """
