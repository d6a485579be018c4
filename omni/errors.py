"""The one error type a user ever sees."""

__all__ = ["OmniError"]


class OmniError(ValueError):
    """Bad input or environment: one sentence saying what, where, and what to do.

    The command line prints the message and exits with code 2, without a traceback.
    """
