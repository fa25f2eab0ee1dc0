"""Tables of text on standard output."""

from __future__ import annotations

import click


def number(value: float) -> str:
    """To two digits behind the point, as the papers give FID; what is below 1, such as a share, to three that count."""
    return f"{value:.2f}" if abs(value) >= 0.9995 or not value else f"{value:#.3g}"


def print_rows(rows: list[tuple[str, ...]], left: tuple[int, ...]) -> None:
    """The first row is the heading; the columns `left` begin at their left edge, the others end at their right one."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        click.echo("  ".join(cells).rstrip())
