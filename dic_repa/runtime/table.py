"""Tables of text, and of HTML for notebooks."""

import html
from collections.abc import Collection, Sequence

from dic_repa.errors import printable


def number(value: float) -> str:
    """Two decimals, as the papers give FID; below 1, such as a share, three significant digits."""
    return f"{value:.2f}" if abs(value) >= 0.9995 or not value else f"{value:#.3g}"


def format_rows(rows: Sequence[Sequence[str]], left: Collection[int]) -> str:
    """The rows, the heading first, in columns: those in `left` aligned at the left, the others at the right."""
    rows = [[printable(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    cells = [[c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """The rows, the heading first, as HTML; what a cell says is text, whatever it holds."""
    lines = []
    for row, tag in zip(rows, ["th"] + ["td"] * len(rows)):
        cells = (f'<{tag} style="text-align: left">{html.escape(printable(cell, 400))}</{tag}>' for cell in row)
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"
