"""What there is to show, as HTML; all that a checkpoint names is escaped, since it may come from a stranger."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from torch import Tensor

from dic_repa.demo.play import Shown, Trail
from dic_repa.files.pictures import to_pil

SMALL = 64  # pixels up to which each one is shown as a square
STATES = {"waiting": "waiting", "sampling": "sampling", "stopped": "stopped", "done": ""}


def draw_page(shown: Sequence[Shown]) -> str:
    """The samples of all checkpoints, side by side where there is room."""
    return f'<div class="dic-models">{"".join(map(draw_model, shown))}</div>'


def draw_model(shown: Shown) -> str:
    """One checkpoint: its samples, what they took, and the way of the first ones from noise."""
    tiles, pending = [], len(shown.images) + len(shown.estimates)
    for i, caption in enumerate(shown.captions):
        if i < pending:
            image = shown.images[i] if i < len(shown.images) else shown.estimates[i - len(shown.images)]
            picture = picture_tag(image, caption or f"sample {i}", live=i >= len(shown.images))
        else:
            picture = '<span class="dic-empty"></span>'
        text = escape(caption)
        tiles.append(f'<figure>{picture}<figcaption title="{text}">{text}</figcaption></figure>')
    size = "small" if shown.width <= SMALL else "large"
    return (
        f'<section class="dic-model dic-{shown.state}"><h2>{escape(shown.title)}</h2><p class="dic-cost">{cost(shown)}'
        f'</p><div class="dic-bar"><div style="width:{100 * shown.done:.1f}%"></div></div>'
        f'<div class="dic-grid dic-{size}">{"".join(tiles)}</div>{draw_trail(shown.trail) if shown.trail else ""}'
        "</section>"
    )


def cost(shown: Shown) -> str:
    """'39 evaluations an image, 16 images in 2.3 s'."""
    parts = [STATES[shown.state]]
    if shown.evaluations:
        count = len(shown.images)
        parts.append(f"{shown.evaluations} network evaluation{'s' * (shown.evaluations != 1)} an image")
        parts.append(f"{count} image{'s' * (count != 1)} in {shown.seconds:.{1 if shown.seconds < 99 else 0}f} s")
    return " · ".join(filter(None, parts))


def draw_trail(trail: Trail) -> str:
    """For each of the images two strips from noise at the left to the image at the right."""
    head = "".join(f"<th>{t:.2f}</th>" for t in trail.times)
    rows = []
    for states, estimates in zip(trail.states, trail.estimates):
        for name, strip in (("state", states), ("expected", estimates)):
            cells = "".join(f"<td>{picture_tag(image, name)}</td>" for image in strip)
            rows.append(f'<tr class="dic-{name}"><th>{name}</th>{cells}</tr>')
    return (
        '<details class="dic-trail" open><summary>From noise to image</summary><p>The solver\'s state at the time t, '
        'and the image that the model expects from it.</p><div class="dic-scroll"><table>'
        f"<thead><tr><th>t</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def picture_tag(image: Tensor, text: str, live: bool = False) -> str:
    """An image (C, H, W) in [0, 1] that a click enlarges, without a script."""
    buffer = io.BytesIO()
    to_pil(image[: 3 if len(image) >= 3 else 1]).save(buffer, "PNG", compress_level=1)
    kind = " ".join(["dic-pixels"] * (image.shape[-1] <= SMALL) + ["dic-live"] * live)
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    tag = f'<img class="{kind}" alt="{escape(text)}" src="{source}">'
    return f'<label class="dic-zoom"><input type="checkbox" aria-label="enlarge">{tag}</label>'
