"""Tables of text."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def number(value: float) -> str:
    """To two digits behind the point, as the papers give FID; what is below 1, such as a share, to three that count."""
    return f"{value:.2f}" if abs(value) >= 0.9995 or not value else f"{value:#.3g}"


def format_rows(rows: Sequence[Sequence[str]], left: Collection[int]) -> str:
    """The rows, the first of which is the heading, in columns: those of `left` begin at their left edge, the others end
    at their right one."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    cells = [[c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)
