"""The autoencoder trained together with the denoiser: REPA-E (arXiv 2504.10483), `latent.end_to_end` of a recipe.

Of the denoiser's losses, the autoencoder gets the gradient of the alignment alone: the diffusion loss would make the
latents easy to denoise, and empty. Besides, it has losses of its own:

    L = |r - x|_1 + LPIPS(r, x) + 1e-6 KL(q(z | x) || N(0, 1)) + 1.5 alignment,    r = decode(z), z ~ q(z | x)

The denoiser's data are the latents, normalised by the batch's own mean and deviation of each channel. What it samples
is brought back by their running means, as batch norm has them.

The paper runs the denoiser twice in a step, in eval mode for the autoencoder and in training mode for itself. Here the
gradient is taken from the one training pass, and the autoencoder runs twice: first without gradients for the latents of
the whole step, from which the batch's statistics are, then for its own losses. There is no GAN loss.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.data.autoencoders import AutoencoderSpec, KLAutoencoder
from dic_repa.data.autoencoders.places import WEIGHTS
from dic_repa.data.latents import ENCODE_BATCH
from dic_repa.data.saved import BESIDE
from dic_repa.errors import UserError, first_line
from dic_repa.files.pictures import unit_images
from dic_repa.files.weights import save_tensors
from dic_repa.recipe import EndToEndSection
from dic_repa.runtime.progress import warn
from dic_repa.training.ema import EMA
from dic_repa.training.optimizers import clip_gradients
from dic_repa.training.sharding import to_cpu

STATE = "autoencoder.pt"  # of a checkpoint: plain tensors, never unpickled
EPS = 1e-4  # added to a variance, the paper's
COLLAPSED = 0.1  # of the latents' deviation over an image at the start


class TrainedAutoencoder(nn.Module):
    """`diffusers.AutoencoderKL` with the running mean and variance of its latents' channels, which begin as `spec` has
    them."""

    def __init__(self, model: nn.Module, spec: AutoencoderSpec):
        super().__init__()
        self.model: Any = model.train().requires_grad_(True)
        # Parameters, since those are averaged.
        self.mean = nn.Parameter(torch.tensor(spec.shift), requires_grad=False)
        self.variance = nn.Parameter(torch.tensor(spec.scale).pow(-2), requires_grad=False)

    def posterior(self, images: Tensor) -> Any:
        """The distribution of the latents of images (B, 3, H, W) in [-1, 1], in float32 whatever the precision."""
        found = self.model.encode(images).latent_dist
        return type(found)(found.parameters.float())

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From images (B, 3, H, W) in [-1, 1] to latents z, drawn with `noise` (B, C, h, w), the decoded images, and
        each image's KL divergence (B,)."""
        posterior = self.posterior(images)
        z = posterior.mean + posterior.std * noise
        return z, self.model.decode(z).sample, posterior.kl()

    def decode(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of the denoiser's data."""
        z = x.float() * (self.variance + EPS).sqrt().view(-1, 1, 1) + self.mean.view(-1, 1, 1)
        return (self.model.decode(z).sample.float() / 2 + 0.5).clamp(0, 1)


class EndToEnd:
    """The autoencoder of a run with `latent.end_to_end`, its optimizer and its average.

        x = joint.encode(images, noise_like)      # the denoiser's data of a step, which joint.pull asks gradients of
        joint.pull(aligned, x)                    # in each pass, before the denoiser's backward pass
        norm, terms = joint.gradients(images)     # after all passes
        joint.update(step)

    Args:
        weight: of the recipe's alignments, all together.
        average: makes the average of the autoencoder's weights.
        lpips: from two batches of images (B, 3, H, W) in [0, 1] to their distances (B,); None if that has no weight.

    Raises:
        UserError: the autoencoder is not one that can be trained.
    """

    def __init__(
        self,
        autoencoder: Any,
        section: EndToEndSection,
        weight: float,
        passes: int,
        average: Callable[[nn.Module], EMA],
        accelerator: Accelerator,
        lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        if type(autoencoder) is not KLAutoencoder:
            raise UserError(
                f"latent.end_to_end trains an AutoencoderKL of diffusers, and {autoencoder.spec.name} is another kind; "
                "name one as data.autoencoder, or leave latent.end_to_end out"
            )
        self.section, self.passes, self.accelerator, self.spec = section, passes, accelerator, autoencoder.spec
        self.lpips = lpips
        self.share = section.alignment_weight / weight  # of the alignments' own weight
        config, weights = dict(autoencoder.model.config), autoencoder.model.state_dict()
        model = type(autoencoder.model).from_config(config)
        model.load_state_dict(weights)
        self.trained = TrainedAutoencoder(model, self.spec).to(accelerator.device)
        self.average = average(self.trained)
        parameters = [p for p in self.trained.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, section.learning_rate, weight_decay=0.0, fused=True)
        self.network, self.optimizer = accelerator.prepare(self.trained, optimizer)
        self.noise = self.scale = torch.zeros(())
        self.pulled: list[Tensor | None] = []
        self.first: float | None = None  # the latents' deviation over an image, when it was first logged
        self.told: dict[str, Tensor] = {}
        self.warned = False

    @torch.no_grad()
    def encode(self, images: Tensor, noise_like: Callable[[Tensor], Tensor]) -> Tensor:
        """The denoiser's data (B, C, h, w) of this process's images of a step: z = mean + std * noise, normalised by
        the mean and variance of the global batch, which the running ones are moved towards."""
        moments = [self._moments(unit_images(part) * 2 - 1) for part in images.split(ENCODE_BATCH)]
        mean, std = torch.cat(moments).chunk(2, dim=1)
        self.noise = noise_like(mean)
        z = mean + std * self.noise
        count = z.numel() // z.shape[1]
        sums = torch.stack([z.double().sum(dim=(0, 2, 3)), z.double().square().sum(dim=(0, 2, 3))])
        sums, every = self.accelerator.reduce(sums, "sum"), count * self.accelerator.num_processes
        centre = sums[0] / every
        variance = (sums[1] / every - centre.square()).clamp(min=0)
        kept, unbiased = self.trained, variance * every / max(1, every - 1)
        for running, new in ((kept.mean, centre.float()), (kept.variance, unbiased.float())):
            running.lerp_(new.where(new.isfinite(), running), self.section.momentum)
        self.scale = (variance + EPS).rsqrt().float().view(-1, 1, 1)
        self.told = {"latent.std": variance.sqrt().mean().float(), "latent.spatial_std": z.std(dim=(2, 3)).mean()}
        self.pulled = []
        return (z - centre.float().view(-1, 1, 1)) * self.scale

    def _moments(self, images: Tensor) -> Tensor:
        with self.accelerator.autocast():
            posterior = self.trained.posterior(images)
        return torch.cat([posterior.mean, posterior.std], dim=1)

    def pull(self, aligned: Tensor, x: Tensor) -> None:
        """Keep the gradient of a pass's alignment loss with respect to the latents of its data `x`: the statistics that
        `x` was normalised by are taken as constants."""
        gradient = None
        if aligned.requires_grad and self.share:
            (gradient,) = torch.autograd.grad(aligned, x, retain_graph=True, allow_unused=True)
        self.pulled.append(None if gradient is None else self.share * gradient.float() * self.scale)

    def gradients(self, images: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Leave the autoencoder's gradients with its parameters, for `update`, which may clip them: their norm before
        that, and the terms of each pass by their names in the log."""
        terms: list[dict[str, Tensor]] = []
        passes = zip(images.chunk(self.passes), self.noise.chunk(self.passes), self.pulled)
        for k, (image, noise, gradient) in enumerate(passes):
            last = k == self.passes - 1
            with nullcontext() if last else self.accelerator.no_sync(self.network):
                losses = self.losses(unit_images(image) * 2 - 1, noise)
                z = losses.pop("z")
                loss = sum((getattr(self.section, name) * value for name, value in losses.items()), z.new_zeros(()))
                if gradient is not None:
                    loss = loss + (z * gradient).sum()  # whose gradient with respect to z is `gradient`
                self.accelerator.backward(loss / self.passes)
            terms.append({f"autoencoder.{name}": value.detach() for name, value in losses.items()} | self.told)
        norm = clip_gradients(self.network, self.section.gradient_clip, self.optimizer, self.accelerator)
        return norm, terms

    def losses(self, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The mean losses of images in [-1, 1], by the keys of their weights, and the latents `z`."""
        z, decoded, kl = (value.float() for value in self.network(images, noise))
        losses = {"z": z, "l1": F.l1_loss(decoded, images), "kl": kl.mean()}
        if self.lpips is not None:
            losses["lpips"] = self.lpips(decoded / 2 + 0.5, images / 2 + 0.5).mean()
        return losses

    def update(self, step: int) -> None:
        """Change the weights by their gradients, and the average by the weights, after `step` steps."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.trained, step)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """The averaged autoencoder's images (B, 3, H, W) in [0, 1] of the denoiser's data."""
        averaged: Any = self.average.model
        return averaged.decode(x)

    def watch(self, record: dict[str, Any]) -> None:
        """Warn, once, if a log's record shows latents that hardly differ over an image any more."""
        now = record.get("latent.spatial_std")
        if now is None:
            return
        self.first = self.first or now
        if now < COLLAPSED * self.first and not self.warned:
            self.warned = True
            warn(
                f"step {record['step']}: the latents of an image differ by {now:.2g}, by {self.first:.2g} at the "
                "start: they collapse; lower latent.end_to_end.learning_rate or alignment_weight"
            )

    def state(self) -> AutoencoderState:
        """A copy of all that a checkpoint holds of the autoencoder, in CPU memory."""
        averaged: Any = self.average.model
        std = (averaged.variance + EPS).sqrt().tolist()
        spec = replace(
            self.spec, name=BESIDE, fingerprint="", shift=tuple(averaged.mean.tolist()), scale=tuple(1 / s for s in std)
        )
        config = {key: value for key, value in averaged.model.config.items() if not key.startswith("_")}
        config |= {
            "latents_mean": averaged.mean.tolist(),
            "latents_std": std,
            "scaling_factor": 1.0,
            "shift_factor": None,
        }
        return AutoencoderState(
            spec,
            {"_class_name": type(averaged.model).__name__, **config},
            to_cpu(averaged.model.state_dict(), True),
            {
                "trained": to_cpu(self.trained.state_dict(), True),
                "average": to_cpu(self.average.model.state_dict(), True),
                "optimizer": to_cpu(self.optimizer.state_dict()["state"], True),
                "first": self.first,
            },
        )

    def load(self, folder: Path) -> None:
        """Go on from the checkpoint in `folder`; a UserError where it has no autoencoder, or a damaged one."""
        try:
            state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
            self.trained.load_state_dict(state["trained"])
            self.average.model.load_state_dict(state["average"])
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
            self.first = state["first"]
        except Exception as error:  # torch.load raises anything from EOFError to UnpicklingError
            what = f"the state of the trained autoencoder, {STATE}, cannot be read ({first_line(error)})"
            raise UserError(f"{folder}: {what}; begin a new run, or remove the checkpoint") from None


@dataclass
class AutoencoderState:
    """What a checkpoint holds of a trained autoencoder."""

    spec: AutoencoderSpec  # of the average, by which samples are decoded
    config: dict[str, Any]  # for diffusers
    averaged: dict[str, Tensor]
    resumed: dict[str, Any]  # for the run to go on

    def write(self, folder: Path) -> None:
        """The averaged autoencoder as a folder of diffusers."""
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        save_tensors(self.averaged, folder / WEIGHTS, {"format": "pt"})

    def write_resumed(self, folder: Path) -> None:
        """What a resumed run reads."""
        with (folder / STATE).open("wb") as file:  # given its path, torch would not report a full disk
            torch.save(self.resumed, file)
