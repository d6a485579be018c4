"""Stop signals: Ctrl-C, what schedulers send before they preempt a job, and a closed terminal."""

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Interrupted", "raise_interrupted", "stop_signals"]

log = logging.getLogger(__name__)

_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP")
"""Slurm preempts with SIGTERM, or with what `--signal` requests, commonly SIGUSR1; others announce
the end of the time with SIGUSR2 (Grid Engine) or SIGXCPU."""


class Interrupted(KeyboardInterrupt):
    """A stop signal of this `number` arrived."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def raise_interrupted(number: int, frame: object) -> None:
    """Signal handler for code that may stop anywhere.

    Raises:
        Interrupted: always.
    """
    raise Interrupted(number)


@contextmanager
def stop_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Call `handler(number, frame)` on a stop signal; the previous handlers come back after.

    Under `nohup` SIGHUP stays ignored. Outside the main thread nothing changes.
    """
    previous = {}
    try:
        for name in _NAMES:
            number = getattr(signal, name, None)  # Windows lacks most of them
            nohup = name == "SIGHUP" and number and signal.getsignal(number) is signal.SIG_IGN
            if number is not None and not nohup:
                previous[number] = signal.signal(number, handler)
    except ValueError:
        log.debug("not in the main thread: signals keep their handlers")
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
