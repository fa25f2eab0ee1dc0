"""How good is an autoencoder? `check_autoencoder`: images and what comes back of them, in numbers and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dic_repa.data.autoencoders import load_autoencoder
from dic_repa.data.look_back import psnr
from dic_repa.errors import UserError
from dic_repa.evaluation.extractors import has_inception
from dic_repa.evaluation.image_sets import ImageSet, open_images
from dic_repa.evaluation.measuring import Measure
from dic_repa.evaluation.metrics import find_metric, title
from dic_repa.evaluation.similarity import LPIPS, ssim, vgg16_file, where_to_get_vgg16
from dic_repa.files.pictures import draw_grid, unit_images
from dic_repa.protocols import Autoencoder
from dic_repa.runtime.precision import gpu_arithmetic
from dic_repa.runtime.progress import progress_bar
from dic_repa.runtime.table import format_rows, number
from dic_repa.samplers.noise import initial_noise

PACKAGE_IMAGES, PACKAGE_COUNT = "emoji:held-out", 64
SHOWN = 6  # images in the picture
AMPLIFIED = 5  # times that it shows the difference
PROTOCOL = "dic_repa.protocols.Autoencoder says what it must give"
# Of normalised latents, what is not said to be wrong: pixels of photos have a deviation of about 0.5, and latents that
# are not scaled at all mostly one of 3 and more.
FAR_MEAN, NEAR_STD = 1.0, (0.4, 2.5)


@dataclass
class Latents:
    """The normalised latents of a set of images, over all places: what the denoiser would be trained on.

    Those drawn from the posterior: its noise is counted in, without being drawn. `posterior_share` is the noise's part
    of their variance, None for an autoencoder without a posterior.
    """

    shape: tuple[int, int, int]  # (C, h, w)
    mean: float
    std: float
    posterior_share: float | None
    channel_means: list[float]
    channel_stds: list[float]


@dataclass
class RoundTrip:
    """How `count` images of `size` pixels come back from an autoencoder; it prints as a table.

    `psnr` (dB), `ssim` and `lpips` (None without its weights) are means over the images; `scores` are Fréchet distances
    and the like between the images and what comes back, by metric. `exact` images come back to the bit, for which PSNR
    is infinite: each counts as 120 dB.
    """

    autoencoder: str
    images: str
    count: int
    size: int
    sampled: bool  # latents drawn from the posterior were decoded; else its mean
    psnr: float
    ssim: float
    lpips: float | None
    exact: int
    scores: dict[str, float]
    latents: Latents
    notes: list[str]
    shown: Tensor = field(repr=False)  # (2, N, 3, H, W): some images, and what comes back

    def to_dict(self) -> dict[str, Any]:
        """All but the picture, for a record."""
        return {key: value for key, value in vars(self).items() if key != "shown"} | {"latents": asdict(self.latents)}

    def picture(self) -> Image.Image:
        """A row of images, below each what comes back, and below that the difference, black where there is none."""
        images, decoded = self.shown
        difference = (AMPLIFIED * (decoded - images).abs()).clamp(0, 1)
        rows = torch.arange(3).repeat_interleave(len(images))
        names = ("image", "round trip", f"difference x {AMPLIFIED}")
        headings = [f"{value:.1f} dB" for value in psnr(images, decoded).tolist()]
        return draw_grid(torch.cat([images, decoded, difference]), rows, names, len(images), headings)

    def __repr__(self) -> str:
        found, shape = self.latents, "x".join(map(str, self.latents.shape))
        how = "drawn from the posterior" if self.sampled else "the posterior's mean"
        decoded = "" if found.posterior_share is None else f"; decoded: {how}"
        head = [
            f"{self.autoencoder}: {self.count} images from {self.images}",
            f"from 3x{self.size}x{self.size} pixels to latents of {shape}{decoded}",
        ]
        rows = [
            ("", "value", "better", ""),
            ("PSNR", number(self.psnr), "higher", "dB, mean over the images"),
            ("SSIM", number(self.ssim), "higher", "Gaussian window of 11 px, on RGB"),
        ]
        if self.lpips is not None:
            rows.append(("LPIPS", number(self.lpips), "lower", "version 0.1, VGG16"))
        for name, value in self.scores.items():
            better = getattr(find_metric(name), "better", "")
            heading = "rFID" if name == "fid" else title(name)
            rows.append((heading, number(value), better, "what comes back, to the images"))
        for what, value, near, parts in (
            ("latents' mean", found.mean, "near 0", found.channel_means),
            ("latents' deviation", found.std, "near 1", found.channel_stds),
        ):
            rows.append((what, number(value), near, f"normalised; of channels {min(parts):.2f} to {max(parts):.2f}"))
        if found.posterior_share is not None:
            rows.append(("posterior's noise", f"{found.posterior_share:.2%}", "", "of the latents' variance"))
        return "\n".join([*head, format_rows(rows, left=(0, 2, 3))])


@gpu_arithmetic(tf32=False)
@torch.no_grad()
def check_autoencoder(
    autoencoder: str | Autoencoder,
    images: Any = None,
    size: int = 256,
    num: int | None = None,
    *,
    sample: bool = False,
    metrics: Sequence[str] | None = None,
    inception_weights: str | Path | None = None,
    lpips_weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 8,
) -> RoundTrip:
    """Encode and decode images and compare; what comes back is rounded to 8 bits first, as an image file would be.

    Args:
        autoencoder: a name of `dic-repa autoencoders`, a local folder or hub id of diffusers, or an autoencoder.
        images: what `open_images` takes, or the id of a data set on the hub; by default emoji of the package.
        size: of the centre crop, in pixels; smaller images are enlarged.
        num: at most so many images, evenly over the set; by default all, but 64 of the package's.
        sample: decode latents that are drawn from the posterior, instead of its mean. An image's noise depends on its
            place in the set alone.
        metrics: those of `dic-repa evaluate`, of what comes back against the images; by default `fid` where Inception's
            weights are at hand, and else `fd-lite2`.
        inception_weights: a file of torch-fidelity's format, for `fid`.
        lpips_weights: torchvision's file of VGG16's weights. Without it, and if it is not in torch's hub folder either,
            there is no LPIPS, and a note says what to fetch.
        batch_size: images in the autoencoder at once.

    Raises:
        UserError: what the images, the weights or the autoencoder lack.
    """
    found, notes = _open(images, size, num)
    network = load_autoencoder(autoencoder, device) if isinstance(autoencoder, str) else autoencoder.to(device)
    lpips = None
    if lpips_weights or vgg16_file().is_file():
        lpips = LPIPS(lpips_weights).to(network.device)
        notes += lpips.notes
    else:
        notes.append(
            f"no LPIPS without the weights of VGG16: {where_to_get_vgg16()}, or give its path (--lpips-weights)"
        )
    trips = _RoundTrips(network, found, size, sample, lpips, batch_size)
    if metrics is None and not (inception_weights or has_inception()):
        metrics = ["fd-lite2"]
        notes.append(
            "no rFID without Inception's weights: `--metrics fid` fetches them, --inception-weights takes a file"
        )
    options = {"inception": {"weights": inception_weights}} if inception_weights else {}
    scores, more = _measured(trips, metrics or ["fid"], options, device)
    latents = trips.latents()
    notes += more + _doubts(latents)
    if trips.exact:
        notes.append(f"{trips.exact} of {len(found)} images come back to the bit; each counts as 120 dB of PSNR")
    means = {name: torch.cat(parts).double().mean().item() for name, parts in trips.values.items()}
    return RoundTrip(
        autoencoder=network.spec.name,
        images=found.source,
        count=len(found),
        size=size,
        sampled=sample,
        psnr=means["psnr"],
        ssim=means["ssim"],
        lpips=means.get("lpips"),
        exact=trips.exact,
        scores=scores,
        latents=latents,
        notes=list(dict.fromkeys(notes)),
        shown=trips.shown(),
    )


def _open(images: Any, size: int, num: int | None) -> tuple[ImageSet, list[str]]:
    """The images, and what a reader of the numbers should know of them."""
    found = open_images(PACKAGE_IMAGES if images is None else images, size, hub=True)
    found = found.spread(num or (PACKAGE_COUNT if images is None else len(found)))
    notes, (height, width) = list(found.notes), found.load(0).shape[:2]
    if min(height, width) < size:
        smooth = f"{width}x{height} and was enlarged to {size} px: such smooth pictures come back better than photos do"
        notes.append(f"the first image is {smooth}" + "; give photos with --images" * (images is None))
    return found, notes


def _measured(
    trips: _RoundTrips, metrics: Sequence[str], options: dict, device: str | torch.device
) -> tuple[dict[str, float], list[str]]:
    """Run the round trips; their scores against the images, and notes on these."""
    images, names = trips.images, ", ".join(map(title, metrics))
    if len(images) < 2:
        for _ in trips:
            pass
        return {}, [f"no {names} of a single image"]
    with progress_bar(desc="reading the images", total=len(images), unit="image", delay=0.5, leave=False) as bar:
        measure = Measure(
            metrics,
            images,
            device,
            extractor_options=options,
            resize=trips.size,
            cache=False,
            progress=bar.update,
        )
    notes = [note for extractor in measure.extractors.values() for note in extractor.notes]
    try:
        measured = measure(trips)
    except UserError as error:
        if trips.count < len(images):
            raise
        return {}, [f"no {names}: {error}"]  # since all that comes back is of one colour
    return measured.values, [*measured.warnings, *notes]


def _doubts(latents: Latents) -> list[str]:
    """A note if the normalised latents are far from what a denoiser expects."""
    if abs(latents.mean) <= FAR_MEAN and NEAR_STD[0] <= latents.std <= NEAR_STD[1]:
        return []
    what = f"the normalised latents have mean {latents.mean:.2g} and deviation {latents.std:.2g}"
    return [f"{what}, where a denoiser expects about 0 and 1: look at the autoencoder's scaling factor"]


class _RoundTrips:
    """Iterates over batches of what comes back, uint8 (B, 3, H, W), and keeps what is compared as they pass."""

    def __init__(
        self, autoencoder: Autoencoder, images: ImageSet, size: int, sample: bool, lpips: LPIPS | None, batch_size: int
    ):
        self.autoencoder, self.images, self.size, self.sample, self.lpips = autoencoder, images, size, sample, lpips
        spec, indices = autoencoder.spec, range(len(images))
        step = spec.downsample
        if size % step:
            sides = [side for side in (size // step * step, size // step * step + step) if side]
            near = " or ".join(map(str, sides))
            raise UserError(f"{size} px are not a multiple of {step}, the reduction of {spec.name}; take {near}")
        if sample and not spec.stochastic:
            raise UserError(f"{spec.name} has no posterior to draw from: its latents are certain; leave --sample out")
        self.batches = [indices[start : start + batch_size] for start in indices[::batch_size]]
        self.chosen = {i * len(images) // SHOWN for i in range(SHOWN)} if len(images) > SHOWN else set(indices)
        self.count, self.exact = 0, 0
        self.values: dict[str, list[Tensor]] = {name: [] for name in ("psnr", "ssim", *["lpips"] * bool(lpips))}
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.sums = torch.zeros(3, spec.channels, dtype=torch.float64)  # means, their squares, noise's

    def __iter__(self) -> Iterator[Tensor]:
        with progress_bar(
            desc="encoding and decoding", total=len(self.images), unit="image", delay=0.5, leave=False
        ) as bar:
            for indices, batch in zip(self.batches, self.images.batches(self.batches)):
                levels = batch.to(self.autoencoder.device)
                images = unit_images(levels)
                decoded = (self._decode(images, indices) * 255).round().to(torch.uint8)
                self._compare(images, unit_images(decoded), indices)
                self.exact += int((decoded == levels).flatten(1).all(dim=1).sum())
                self.count += len(indices)
                bar.update(len(indices))
                yield decoded

    def _decode(self, images: Tensor, indices: Sequence[int]) -> Tensor:
        spec, side = self.autoencoder.spec, self.size // self.autoencoder.spec.downsample
        moments = self.autoencoder.encode(images)
        self._check("encode", moments, (len(images), spec.moments, side, side))
        mean = spec.mean(moments)
        z = mean
        if self.sample:
            z = spec.draw(moments, lambda like: initial_noise(like.shape[1:], 0, indices).to(like))
        noise = moments.chunk(2, dim=1)[1] if spec.stochastic else torch.zeros_like(mean)
        parts = [part.cpu().double() for part in (mean, noise)]
        self.sums += torch.stack([part.sum(dim=(0, 2, 3)) for part in (parts[0], *(each.square() for each in parts))])
        decoded = self.autoencoder.decode(spec.normalise(z))
        self._check("decode", decoded, tuple(images.shape))
        if decoded.min() < 0 or decoded.max() > 1:
            low, high = decoded.min(), decoded.max()
            raise UserError(f"{spec.name}: decode gives values from {low:.3g} to {high:.3g}, not in [0, 1]; {PROTOCOL}")
        return decoded

    def _check(self, what: str, given: Tensor, shape: tuple[int, ...]) -> None:
        name = self.autoencoder.spec.name
        if tuple(given.shape) != shape:
            images = (len(given), 3, self.size, self.size)
            raise UserError(f"{name}: {what} gives {tuple(given.shape)} for images {images}, not {shape}; {PROTOCOL}")
        if not given.isfinite().all():
            raise UserError(f"{name}: {what} gives NaN or infinity; look at its weights")

    def _compare(self, images: Tensor, decoded: Tensor, indices: Sequence[int]) -> None:
        self.values["psnr"].append(psnr(images, decoded).cpu())
        self.values["ssim"].append(ssim(images, decoded).cpu())
        if self.lpips:
            self.values["lpips"].append(self.lpips(images, decoded).cpu())
        self.pairs += [(images[k].cpu(), decoded[k].cpu()) for k, i in enumerate(indices) if i in self.chosen]

    def latents(self) -> Latents:
        """What the normalised latents of all images are like."""
        spec, side = self.autoencoder.spec, self.size // self.autoencoder.spec.downsample
        mean, square, noise = self.sums / (self.count * side**2)
        scale = torch.tensor(spec.scale, dtype=torch.float64).expand(spec.channels)
        variance = (square - mean**2).clamp(min=0) + noise
        means = spec.normalise(mean.view(1, -1, 1, 1)).flatten()
        stds = variance.sqrt() * scale.abs()
        whole = (stds**2).mean() + means.var(correction=0)
        share = ((noise * scale**2).mean() / (stds**2).mean().clamp(min=1e-30)).item() if spec.stochastic else None
        shape = (spec.channels, side, side)
        return Latents(shape, means.mean().item(), whole.sqrt().item(), share, means.tolist(), stds.tolist())

    def shown(self) -> Tensor:
        """Some images, and what comes back of each: (2, N, 3, H, W)."""
        return torch.stack([torch.stack(parts) for parts in zip(*self.pairs)])
