"""The look back at what `dic-repa prepare` has written: counts, a preview, the round trip through the autoencoder."""

import itertools
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid

from dic_repa.data.files import by_reason
from dic_repa.data.latents import LatentDataset
from dic_repa.data.sources import ImageSource
from dic_repa.files.pictures import save_side_by_side, to_pil, unit_images
from dic_repa.protocols import Autoencoder

CHECK_FILE, PREVIEW_FILE = "check.json", "preview.png"
PREVIEW = 64  # images at most
DECODE_BATCH = 16  # images decoded at once: at 256 px these take about 3 GB


def look_back(
    data: LatentDataset, rows: dict[str, list], folder: Path, source: ImageSource, autoencoder: Autoencoder, size: int
) -> dict:
    """Decode up to 64 of the prepared images, and write preview.png; what was found.

    `data` is what the prepared `folder` holds, without mirrored images; `rows` has the label, name, width and height of
    each.

    The smallest and largest class are None without classes, `psnr` (dB) and `latents` without an autoencoder.
    """
    counts, stored = Counter(rows["label"]), set(rows["name"])
    by_size = sorted((counts[k], k) for k in range(data.num_classes))
    classes = [(data.class_names[k], count) for count, k in by_size]
    damaged = [name for name in source.names if name not in stored]
    left_out = by_reason(source.rejected | dict.fromkeys(damaged, "no whole image"))
    preview = folder / PREVIEW_FILE
    latents = autoencoder.spec.name != "none" and len(data)
    return {
        "images": len(data),
        "expected": len(source),
        "classes": len(classes),
        "smallest_class": classes[0] if classes else None,
        "largest_class": classes[-1] if classes else None,
        "empty_classes": [name for name, count in classes if count == 0],
        "skipped": sorted(itertools.chain(*left_out.values())),
        "reasons": left_out,
        "notes": list(source.notes),
        "enlarged": sum(min(sides) < size for sides in zip(rows["width"], rows["height"])),
        "latents": asdict(data.statistics) if latents else None,
        "psnr": _preview(data, autoencoder, preview) if len(data) else None,
        "preview": str(preview),
    }


def _preview(data: LatentDataset, autoencoder: Autoencoder, path: Path) -> float | None:
    """Draw some of the stored images, each above its round trip; the PSNR of the round trip."""
    chosen = torch.linspace(0, len(data) - 1, min(PREVIEW, len(data))).round().long().tolist()
    samples = [data[index] for index in chosen]
    images = unit_images(torch.stack([sample["image"] for sample in samples]))
    versions, caption, quality = [images], "stored images", None
    if autoencoder.spec.name != "none":
        moments = torch.stack([sample["moments"] for sample in samples]).float()
        x = autoencoder.spec.normalise(autoencoder.spec.mean(moments))
        decoded = torch.cat([autoencoder.decode(part) for part in x.split(DECODE_BATCH)]).cpu()
        versions, caption = [images, decoded], "stored images, below each its round trip"
        quality = float(psnr(images, decoded).mean())
    columns = min(8, len(images))
    blank = images.new_ones(-len(images) % columns, *images.shape[1:])
    rows = torch.stack([torch.cat([version, blank]).unflatten(0, (-1, columns)) for version in versions], dim=1)
    save_side_by_side({caption: to_pil(make_grid(rows.flatten(0, 2), columns, padding=4, pad_value=1))}, path)
    return quality


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images (B, C, H, W) in [0, 1]: 10 log10(1 / mean squared error), (B,)."""
    return -10 * (a - b).square().flatten(1).mean(dim=1).clamp_min(1e-12).log10()
