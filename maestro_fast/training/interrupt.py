"""Ctrl-C, and the SIGTERM of job schedulers, end a run as a failing reward does: what it has done is saved first.

Where a run may be stopped depends on what it does. While responses are sampled, scored and judged, and during an
evaluation, nothing of the run changes that could not be put back, so a signal stops it at once. An optimiser step, the
learning of the weight policy and a checkpoint come to their end first. With several processes the run stops only
between two optimiser steps, because all have to stop at the same place, and the signal may reach them at different
times, or only one of them.

A second signal ends the process at once, by the signal itself, whatever the process does; then nothing is saved.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

from maestro_fast.training.batches import Processes

_SIGNALS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}  # with their default handlers
_SAME = 1.0  # seconds in which another signal is the same one: launchers and schedulers may deliver one twice


class Interrupted(KeyboardInterrupt):
    """A signal has stopped the run. Its notes say where the run was saved and how to go on.

    Attributes:
        signal: the signal; a command that ends because of it exits with 128 plus its number.
    """

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(f"stopped by {received.name}{' (Ctrl-C)' if received is signal.SIGINT else ''}")
        self.signal = received


class Interrupts:
    """Keeps the first signal until the run can stop, and raises ``Interrupted`` there.

    Attributes:
        received: the signal; None if none has come.
    """

    def __init__(self, *, alone: bool, speaks: bool) -> None:
        """
        Args:
            alone: whether this is the only process of the run; otherwise no signal stops the run at once.
            speaks: whether this process tells the user what happens.
        """
        self.received: signal.Signals | None = None
        self._alone, self._speaks = alone, speaks
        self._at_once = False
        self._when = 0.0
        self._caught = False
        self._process = os.getpid()

    @contextlib.contextmanager
    def caught(self, too_late: str) -> Iterator[None]:
        """Catches the signals inside the context, and puts the old handlers back after it.

        It catches nothing outside the main thread, where Python allows no handlers, nor a signal that the program
        handles itself or ignores. A context inside another does nothing of its own.

        Args:
            too_late: the note of the error if a signal came when there was nothing left to stop.

        Raises:
            Interrupted: a signal came, and nothing inside has raised it.
        """
        if self._caught or threading.current_thread() is not threading.main_thread():
            yield
            return
        self.received, self._at_once = None, False
        old: dict[signal.Signals, Any] = {
            number: signal.getsignal(number) for number, usual in _SIGNALS.items() if signal.getsignal(number) is usual
        }
        try:
            self._caught = True
            for number in old:
                signal.signal(number, self._receive)
            yield
        finally:
            self._caught = False
            for number, handler in old.items():
                signal.signal(number, handler)
        try:
            self.check()
        except Interrupted as stopped:
            stopped.add_note(too_late)
            raise

    @contextlib.contextmanager
    def may_stop(self) -> Iterator[None]:
        """Inside the context a signal stops the run at once, and one that has come already does so at its beginning."""
        if not self._alone:
            yield
            return
        self.check()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False
        self.check()  # The body may have swallowed the error, as a bare ``except`` in a reward does.

    def agreed(self, processes: Processes) -> bool:
        """Whether a signal has come to any process; all call it together. Afterwards each of them has it received."""
        number = int(self.received or 0)
        if processes.count > 1:
            number = int(processes.gather(torch.tensor([number], device=processes.device)).max())
        if number and self.received is None:
            self.received = signal.Signals(number)
        return bool(number)

    def check(self) -> None:
        """Raises ``Interrupted`` if a signal has come."""
        if self.received is not None:
            raise Interrupted(self.received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # A forked child inherits this handler, but not the run.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if self.received is None:
            self.received, self._when = signal.Signals(number), now
            at_once, self._at_once = self._at_once, False
            self._say("the run is saved" if at_once else "the run stops after what it is doing now, and is saved")
            if at_once:
                raise Interrupted(self.received)
        elif now - self._when >= _SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _say(self, what: str) -> None:
        if self._speaks:
            assert self.received is not None
            # Python's own streams may be in the middle of a write when a signal comes; the descriptor is not.
            with contextlib.suppress(OSError):
                os.write(2, f"\n{self.received.name}: {what}; a second one ends it at once\n".encode())
