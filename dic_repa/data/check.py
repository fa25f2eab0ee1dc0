"""The look back at a prepared data set: counts, classes, and what the autoencoder makes of some images."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid

from dic_repa.data.autoencoders import Autoencoder, decode_in_batches
from dic_repa.data.prepare import write_json
from dic_repa.data.prepared import Prepared, read_settings
from dic_repa.data.sources import ImageSource
from dic_repa.files.pictures import save_side_by_side, to_pil, unit_images

PREVIEW = 64


@dataclass
class Report:
    """What `check_prepared` found; the classes are None if there are none, `psnr` (dB) without an autoencoder."""

    images: int
    expected: int
    classes: int
    smallest_class: tuple[str, int] | None
    largest_class: tuple[str, int] | None
    empty_classes: list[str]
    skipped: list[str]
    enlarged: int
    psnr: float | None
    preview: str


def check_prepared(path: str | Path, source: ImageSource, autoencoder: Autoencoder) -> Report:
    """Read all labels back, decode up to 64 images, and write preview.png and check.json into the folder."""
    import datasets

    path = Path(path)
    settings = read_settings(path)
    data = Prepared(path, settings["size"] // autoencoder.spec.downsample, flip=False)
    rows = datasets.load_from_disk(str(path)).select_columns(["label", "name", "width", "height"])
    table = rows.with_format("arrow")[:].to_pydict()
    counts = Counter(table["label"])
    names = data.class_names
    by_size = sorted((counts[k], k) for k in range(len(names)))
    stored = set(table["name"])
    sides = zip(table["width"], table["height"])
    preview = path / "preview.png"
    report = Report(
        images=len(data),
        expected=len(source),
        classes=len(names),
        smallest_class=(names[by_size[0][1]], by_size[0][0]) if names else None,
        largest_class=(names[by_size[-1][1]], by_size[-1][0]) if names else None,
        empty_classes=[names[k] for count, k in by_size if count == 0],
        skipped=sorted([name for name in source.names if name not in stored] + list(source.rejected)),
        enlarged=sum(min(side) < settings["size"] for side in sides),
        psnr=_preview(data, autoencoder, preview) if len(data) else None,
        preview=str(preview),
    )
    write_json(path / "check.json", vars(report))
    return report


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images (B, C, H, W) in [0, 1]: 10 log10(1 / mean squared error), (B,)."""
    return -10 * (a - b).square().flatten(1).mean(dim=1).clamp_min(1e-12).log10()


def _preview(data: Prepared, autoencoder: Autoencoder, path: Path) -> float | None:
    chosen = torch.linspace(0, len(data) - 1, min(PREVIEW, len(data))).round().long().tolist()
    samples = [data[index] for index in chosen]
    images = unit_images(torch.stack([sample["image"] for sample in samples]))
    if autoencoder.spec.name == "none":
        _save(images[None], path, "stored images")
        return None
    means = torch.stack([sample["moments"] for sample in samples]).float().chunk(2, dim=1)[0]
    decoded = decode_in_batches(autoencoder, autoencoder.spec.normalise(means)).cpu()
    _save(torch.stack([images, decoded]), path, "stored images, below each its round trip")
    return float(psnr(images, decoded).mean())


def _save(versions: Tensor, path: Path, caption: str, columns: int = 8) -> None:
    """(V, N, 3, H, W) in [0, 1] as a picture in which the V versions of an image stand above each other."""
    columns = min(columns, versions.shape[1])
    count = versions.shape[1]
    blank = torch.ones_like(versions[:, :1]).expand(-1, -count % columns, -1, -1, -1)
    rows = torch.cat([versions, blank], dim=1).unflatten(1, (-1, columns)).transpose(0, 1)
    save_side_by_side({caption: to_pil(make_grid(rows.flatten(0, 2), nrow=columns, padding=4, pad_value=1))}, path)
