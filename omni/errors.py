"""The one error type a user ever sees."""

__all__ = ["DamagedError", "OmniError"]


class OmniError(ValueError):
    """Bad input or environment: one sentence saying what, where, and what to do.

    The command line prints the message and exits with code 2, without a traceback.
    """


class DamagedError(OmniError):
    """A file of a run folder is not as it was written; the stage that made it can make it again."""
