"""A limit of time for many measurements: what is not begun any more has a row that says so, as what fails has."""

import time
from collections.abc import Callable
from typing import Any

from dic_repa.errors import UserError, first_line


class Budget:
    """`seconds` from now on; None or 0 is without limit."""

    def __init__(self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic):
        self.clock, self.end = clock, clock() + seconds if seconds else float("inf")

    def left(self) -> float:
        return self.end - self.clock()

    def left_out(self, need: float) -> str:
        """Why something that takes about `need` seconds is not begun; nothing if there is time."""
        if (left := self.left()) >= need:
            return ""
        return f"left out: {max(0.0, left):.0f} s left of the budget, it takes about {need:.0f}"

    def row(self, facts: dict[str, Any], need: float, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The `facts` with what `measure` returns, or with why there is nothing (`failed`): it takes about `need`
        seconds and there are fewer, or it fails. What has begun is not interrupted."""
        if why := self.left_out(need):
            return facts | {"failed": why}
        try:
            return facts | measure()
        except Exception as error:  # no memory, no compiler, no such file: the others do not wait for it
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            return facts | {"failed": kind + first_line(error)}
