"""How alike the features at each place in the denoiser are to an encoder's, at several levels of noise.

The denoiser sees real images with noise and the null class, since a linear probe would else read the label that went
in. Features at a tap are averaged over the positions, the encoder's over its tokens.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from dic_repa.alignment.alignment import Alignment
from dic_repa.alignment.taps import feature_map, find_tap
from dic_repa.conditions import ClassLabels, condition_of_data
from dic_repa.data.latents import denoiser_data
from dic_repa.data.registry import datasets
from dic_repa.errors import UserError
from dic_repa.evaluation.cka import cknna, linear_cka, linear_probe
from dic_repa.files.atomic import write_whole
from dic_repa.files.lock import locked
from dic_repa.files.outputs import begin_folder, check_folder
from dic_repa.files.pictures import new_figure, save_figure, unit_images
from dic_repa.files.shards import tensor_files
from dic_repa.files.weights import load_weights, read_tensors
from dic_repa.models.cost import forward_on_meta
from dic_repa.models.pretrained import Pretrained
from dic_repa.recipe import AlignmentSection, Recipe
from dic_repa.recipe.build import build_alignment, build_dataset, build_encoder, build_objective
from dic_repa.runtime.precision import gpu_arithmetic
from dic_repa.samplers import StepNoise, initial_noise
from dic_repa.sampling.load import load
from dic_repa.sampling.weights import checkpoint_of, home_of

TIMES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
NEIGHBOURS = 10
TITLES = {
    "cka": "linear CKA",
    "cknna": "CKNNA",
    "linear_probe": "linear probe: accuracy",
    "cosine": "cosine through the head",
}


def probe_checkpoint(
    path: str | Path,
    encoder: str | None = None,
    num: int = 1000,
    times: Sequence[float] = TIMES,
    taps: Sequence[str] | None = None,
    per_stage: int = 4,
    batch_size: int = 64,
    seed: int = 0,
    out: str | Path | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[int], object] = lambda count: None,
) -> tuple[dict, list[Path]]:
    """Compare each tap of the denoiser at `path` (a run, one of its checkpoints) with an encoder, over noise levels.

    Args:
        encoder: its name; by default that of the recipe's first alignment.
        num: images, of the held-out split if the data has one; half of them train the linear probe.
        times: noise levels in [0, 1].
        taps: names of submodules; by default `per_stage` of each stage and those that were trained to align.
        out: folder for probe.json and the pictures; by default RUN/probe.
        progress: called with the number of images done, `num` for each time in all.

    Returns:
        The record and the files that were written. The record's `scores` has, for each measure, a list of taps of lists
        over times: `cka`, `cknna` (k = 10) and `linear_probe` on the averaged weights' pooled features; `cosine` of the
        trained head's tokens, None for taps without a head to this encoder.
    """
    loaded = load(path, device)
    recipe, denoiser = loaded.recipe, loaded.denoiser
    checkpoint = checkpoint_of(loaded.source)
    folder = Path(out) if out else home_of(loaded.source) / "probe"
    check_folder(folder, "probe")
    taught = [section for section in recipe.alignments if section.encoder]
    section = next((section for section in taught if encoder in (None, section.encoder)), None)
    if section is None and encoder is None:
        raise UserError("this model was aligned to no encoder; name one to compare with, such as --encoder digits-vit")
    section = section or AlignmentSection(encoder=encoder)
    network = build_encoder(section, torch.device(device))
    data, split = _dataset(recipe, num)
    if loaded.data and loaded.data.beside:
        data.dataset.encode_by(loaded.data.autoencoder)
    condition = condition_of_data(data.dataset)
    if not isinstance(condition, ClassLabels):
        raise UserError(f"{loaded.source} is conditioned on {condition.describe()}; a probe needs data with labels")
    heads = _trained_heads(recipe, section, checkpoint, denoiser, network, data, device)
    aligned = [entry.tap for entry in recipe.alignments if entry.encoder == section.encoder]
    taps = list(taps or ()) or stage_taps(denoiser, (recipe.data.size, recipe.data.size), per_stage, aligned)
    for tap in taps:
        find_tap(denoiser, tap)

    field = build_objective(recipe.objective).velocity_model(denoiser)
    features, cosines, tokens, labels = _collect(
        denoiser, field, network, heads, data, taps, times, batch_size, seed, device, progress
    )
    table, itself = _scores(features, tokens, labels, taps, times, condition.num_classes)
    if cosines:
        table["cosine"] = [[cosines.get((tap, t)) for t in times] for tap in taps]
    step = checkpoint.name.removeprefix("step_")
    record = {
        "checkpoint": str(checkpoint),
        "step": int(step) if step.isdecimal() else None,
        "encoder": section.encoder,
        "num": len(labels),
        "split": split,
        "seed": seed,
        "times": list(times),
        "taps": taps,
        "aligned": [tap for tap in taps if tap in aligned],
        "scores": {name: [[v and round(v, 6) for v in row] for row in rows] for name, rows in table.items()},
        "reference": {"linear_probe": itself},
    }
    with locked(folder):
        if check_folder(folder, "probe") is None:
            begin_folder(folder, "probe")
        write_whole(folder / "probe.json", json.dumps(record, indent=1) + "\n")
        return record, [folder / "probe.json", *save_pictures(record, folder)]


def _scores(features: dict, tokens: Tensor, labels: Tensor, taps, times, num_classes: int) -> tuple[dict, float]:
    """Each measure as rows of taps over times, and the linear probe on the encoder's own tokens."""
    half, k = len(labels) // 2, min(NEIGHBOURS, len(labels) - 1)

    def probe(x: Tensor) -> float:
        return linear_probe(x[:half], labels[:half], x[half:], labels[half:], num_classes)

    measures = {"cka": lambda x: linear_cka(x, tokens), "cknna": lambda x: cknna(x, tokens, k), "linear_probe": probe}
    table = {name: [[measure(features[tap, t]) for t in times] for tap in taps] for name, measure in measures.items()}
    return table, probe(tokens)


def stage_taps(denoiser: Pretrained, size: tuple[int, int], per_stage: int, also: Sequence[str] = ()) -> list[str]:
    """The names of `per_stage` submodules of each stage, evenly spread from its first to its last, in running order.

    A stage is a list of modules which all give feature maps (B, C, h, w), or tokens (B, N, D), of one shape; taps
    named in `also` join them. A denoiser without such lists has its direct children that give either.
    """
    with _outputs({name: module for name, module in denoiser.named_modules() if name}) as seen:
        forward_on_meta(denoiser, *size)
    shapes = {name: tuple(getattr(output, "shape", ())) for name, output in seen.items()}
    order = {name: i for i, (name, shape) in enumerate(shapes.items()) if len(shape) in (3, 4)}
    chosen = {name for name in also if name in order}
    stages = [
        [f"{name}.{i}" for i in range(len(module))]
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and "." not in name.partition(".")[2]
    ]
    stages = [s for s in stages if s and all(name in order for name in s) and len({shapes[n] for n in s}) == 1]
    for stage in stages or [[name for name, _ in denoiser.named_children() if name in order]]:
        count = min(per_stage, len(stage))
        chosen |= {stage[round(i * (len(stage) - 1) / max(1, count - 1))] for i in range(count)}
    if not chosen:
        raise UserError("this denoiser has no stages to choose taps from; name submodules with --taps")
    return sorted(chosen, key=order.__getitem__)


@contextlib.contextmanager
def _outputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """A dict that gets what each of the modules gives, in running order, as long as the context lasts."""
    seen: dict[str, Any] = {}

    def keep(name: str, _module, _inputs, output) -> None:
        seen[name] = output

    hooks = [module.register_forward_hook(partial(keep, name)) for name, module in modules.items()]
    yield seen
    for hook in hooks:
        hook.remove()


def _dataset(recipe: Recipe, num: int) -> tuple[Any, str]:
    """The first `num` of the images in a fixed random order, held out if the data set has a split of that name."""
    split = "held-out" if "held-out" in getattr(datasets.find(recipe.data.name), "splits", ()) else "train"
    data = build_dataset(recipe.data, split=split)
    if "image" not in data[0]:
        raise UserError("the data has latents but no images, which an encoder needs")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return Subset(data, order[:num].tolist()), split


def _trained_heads(
    recipe: Recipe, section: AlignmentSection, checkpoint: Path, denoiser: Pretrained, network, data: Any, device
) -> dict[str, Alignment]:
    """By tap, the alignments to this encoder with their trained heads; none if only the averaged weights are there."""
    file = checkpoint / "model.safetensors"
    if (checkpoint / "config.json").is_file() or not tensor_files(file):
        return {}
    state, heads = read_tensors(file)[0], {}
    for i, entry in enumerate(recipe.alignments):
        if (entry.encoder, entry.encoder_options) == (section.encoder, section.encoder_options):
            alignment = build_alignment(entry, network, denoiser, data.dataset, device).to(device).eval()
            start = f"alignments.{i}."
            mine = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
            load_weights(alignment, mine, file)
            heads[entry.tap] = alignment
    return heads


@gpu_arithmetic(tf32=False)
@torch.no_grad()
def _collect(denoiser, field, network, heads, data, taps, times, batch_size, seed, device, progress):
    """Pooled features {(tap, t): (N, C)}, mean cosines {(tap, t)}, the encoder's pooled tokens (N, D), labels (N,)."""
    features: dict[tuple, list[Tensor]] = {}
    cosines: dict[tuple, list[Tensor]] = {}
    tokens, labels, start = [], [], 0
    with _outputs({tap: find_tap(denoiser, tap) for tap in {*taps, *heads}}) as seen:
        for batch in DataLoader(data, batch_size=batch_size):
            batch = {name: value.to(device) for name, value in batch.items()}
            batch["image"] = unit_images(batch["image"])
            count = len(batch["label"])
            indices = range(start, start + count)  # both noises are the images' own, whatever the batch size
            posterior = StepNoise(seed, indices)
            x = denoiser_data(data.dataset, batch, partial(posterior, 0))
            noise = initial_noise(tuple(x.shape[1:]), seed, indices).to(device)
            y = field.null(batch["label"])
            target = network(batch["image"])
            tokens.append(target.float().mean(dim=1).cpu())
            labels.append(batch["label"].cpu())
            for time in times:
                t = torch.full((count,), float(time), device=device)
                field(field.path.sample(x, noise, t).x_t, t, y)
                maps = dict(seen)
                for tap, hidden in seen.items():
                    with contextlib.suppress(UserError):  # tokens that are no grid are pooled as well
                        maps[tap] = feature_map(denoiser, hidden, (x.shape[-2], x.shape[-1]))
                for tap in taps:
                    features.setdefault((tap, time), []).append(_pooled(maps[tap], tap).cpu())
                for tap, alignment in heads.items():
                    projection, wanted = alignment.head(maps[tap], t).float(), alignment.target(target).float()
                    cosine = F.cosine_similarity(projection, wanted, dim=-1).mean(dim=1)
                    cosines.setdefault((tap, time), []).append(cosine.cpu())
                seen.clear()
                progress(count)
            start += count
    means = {key: torch.cat(parts).mean().item() for key, parts in cosines.items()}
    return {key: torch.cat(parts) for key, parts in features.items()}, means, torch.cat(tokens), torch.cat(labels)


def _pooled(feature: Tensor, tap: str) -> Tensor:
    """A feature map (B, C, h, w) or tokens (B, N, D) averaged over the positions, (B, C) in float32."""
    if getattr(feature, "ndim", 0) not in (3, 4):
        raise UserError(f"tap '{tap}' gives neither a feature map (B, C, h, w) nor tokens (B, N, D)")
    return feature.float().mean(dim=(2, 3) if feature.ndim == 4 else 1)


def save_pictures(record: dict, folder: Path) -> list[Path]:
    """heatmaps.png (taps over noise levels) and taps.png (curves over the taps) of a probe's record."""
    from matplotlib import colormaps

    taps, times, count = record["taps"], record["times"], len(record["scores"])
    heat, heat_axes = new_figure(1, count, (4.2 * count, 1.2 + 0.3 * len(taps)))
    lines, line_axes = new_figure(1, count, (4.2 * count, 3.4))
    marked = [f"● {tap}" if tap in record["aligned"] else tap for tap in taps]
    for (measure, table), above, below in zip(record["scores"].items(), heat_axes[0], line_axes[0]):
        cells = [[float("nan") if value is None else value for value in row] for row in table]
        known = [value for row in table for value in row if value is not None]
        shown = above.imshow(cells, aspect="auto", vmin=min(0, *known), vmax=max(known), cmap="viridis")
        above.set_title(TITLES[measure], fontsize=10)
        above.set_yticks(range(len(taps)), marked, fontsize=8)
        above.set_xticks(range(len(times)), [f"{t:g}" for t in times], fontsize=8)
        above.set_xlabel("t (0 data, 1 noise)", fontsize=8)
        heat.colorbar(shown, ax=above)
        for j, (t, column) in enumerate(zip(times, zip(*cells))):
            color = colormaps["plasma"](0.9 * j / max(1, len(times) - 1))
            below.plot(taps, column, ".-", color=color, label=f"{t:g}")
        below.set_title(TITLES[measure], fontsize=10)
        below.tick_params("x", rotation=60, labelsize=8)
        below.grid(alpha=0.25)
        below.spines[["top", "right"]].set_visible(False)
    style = {"loc": "upper left", "bbox_to_anchor": (1, 1), "fontsize": 8, "title_fontsize": 8}
    line_axes[0][-1].legend(title="t (0 data, 1 noise)", **style)
    files = [folder / "heatmaps.png", folder / "taps.png"]
    for figure, file in zip((heat, lines), files):
        save_figure(figure, file, dpi=120)
    return files
