"""Progress with rate and time left: a moving line in a terminal, plain lines elsewhere."""

import sys
import time

_EVERY = 5.0  # seconds between plain lines


class Progress:
    """One task's progress; call it with how much is done.

    Parameters
    ----------
    task : str
        What is being done, in a word.
    unit : str
        What is counted, in the plural.
    """

    def __init__(self, task: str, unit: str) -> None:
        self.task, self.unit = task, unit
        self.started = self.last = time.monotonic()
        self.counted, self.before, self.resuming = self.started, 0, False
        self.total: int | None = None
        self.terminal = sys.stderr.isatty()
        self.ended = False

    def resumed(self) -> None:
        """Say that what the next call counts was done before: it is no part of the rate."""
        self.resuming = True

    def __call__(self, done: int, total: int, text: str = "") -> None:
        """Say that ``done`` of ``total`` units are done; ``text`` is the objective, say.

        Calls in quick succession are passed over; the end is told once, however often it is said.
        """
        now, finished = time.monotonic(), done >= total
        if self.total not in (None, total):  # another part of the task, with a count of its own
            self.resuming = True
        self.total = total
        if self.resuming:
            self.counted, self.before, self.resuming = now, done, False
        repeated, self.ended = finished and self.ended, finished
        if repeated:
            return
        if not finished and now - self.last < (0.2 if self.terminal else _EVERY):
            return
        self.last = now
        line = self._line(done, total, now, text)
        if self.terminal:
            print(f"\r\x1b[K{line}", end="\n" if finished else "", file=sys.stderr, flush=True)
        else:
            print(line, flush=True)

    def _line(self, done: int, total: int, now: float, text: str) -> str:
        seconds = now - self.counted
        rate = (done - self.before) / seconds if seconds > 0 else 0.0
        left = (total - done) / rate if rate else float("inf")
        parts = [f"{self.task} {done}/{total} {self.unit}", _rate(rate, self.unit)]
        if done < total and rate:
            parts.append(f"{_duration(left)} left")
        if done >= total:
            parts.append(f"took {_duration(now - self.started)}")
        return ", ".join([*parts, text] if text else parts)


def _rate(rate: float, unit: str) -> str:
    if rate and rate < 1:
        return f"{1 / rate:.1f} s a {unit.rstrip('s')}"
    return f"{rate:.1f} {unit}/s"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
