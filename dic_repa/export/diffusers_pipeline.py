"""A pipeline of diffusers that samples as dic-repa does. An exported folder has this file as pipeline.py; it needs
dic-repa, and calls its samplers."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dic_repa.conditions import ClassLabels, Condition, class_labels
from dic_repa.data.autoencoders import AutoencoderSpec
from dic_repa.data.autoencoders.diffusers_models import KINDS
from dic_repa.data.saved import SavedData, unpack
from dic_repa.errors import UserError
from dic_repa.files.pictures import to_pil
from dic_repa.recipe import DataSection, ObjectiveSection, SampleSection
from dic_repa.recipe.build import build_decoder, build_objective
from dic_repa.sampling import override_sampling
from dic_repa.sampling.sampler import Sampler


class DicRepaPipeline(DiffusionPipeline):
    """Images from a denoiser, and the autoencoder behind which it was trained.

        pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        images = pipeline(class_labels=[3, 7], num_inference_steps=20, guidance_scale=1.5).images

    Args:
        denoiser: a `DicRepaDenoiser`.
        vae: None for a model of pixels, or for an autoencoder that the settings name and that is loaded when needed.
        settings: what `dic-repa export` wrote: objective, size, autoencoder, class names, and how to sample by default.
    """

    denoiser: Any
    vae: Any
    _optional_components = ["vae"]  # noqa: RUF012 - diffusers' own attribute

    def __init__(self, denoiser: torch.nn.Module, vae: torch.nn.Module | None = None, settings: dict | None = None):
        super().__init__()
        self.register_modules(denoiser=denoiser, vae=vae)
        self.register_to_config(settings=settings)

    @property
    def condition(self) -> Condition:
        """What the denoiser is conditioned on, with the names of classes."""
        taken = self.denoiser.conditioned_on
        return class_labels(taken.count, self.config["settings"]["class_names"]) if taken.names else taken

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str | None] | Tensor | np.ndarray | None = None,
        num_images: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        solver: str | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **settings: Any,
    ) -> ImagePipelineOutput | tuple:
        """Sample images. What is None is as the model's recipe has it.

        Args:
            class_labels: the class of each image, by name or number; or a row (N, ...) for each, for a model that is
                conditioned on vectors. By default the classes in turn.
            num_images: how many, where no labels are given.
            num_inference_steps: of the solver.
            guidance_scale: 1 for none.
            guidance_interval: (low, high) within [0, 1], when guidance acts; 0 is data, 1 is noise.
            solver: a name that `dic-repa solvers` lists.
            latents: (N, C, H, W), the noise to start from, in place of the generator's.
            output_type: 'pil'; 'np' (N, H, W, C) or 'pt' (N, C, H, W) in [0, 1]; 'latent': not decoded.
            settings: further keys of a recipe's `sample` section: `rtol`, `batch_size`, `precision`, ...
        """
        labels, condition = self._labels(class_labels, num_images)
        size, device = self.config["settings"]["size"], next(self.denoiser.parameters()).device
        shape = (self.denoiser.in_channels, size, size)
        if latents is None:
            latents = randn_tensor((len(labels), *shape), generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != (len(labels), *shape):
            raise UserError(f"latents are {tuple(latents.shape)}, and this takes {(len(labels), *shape)}")
        one = generator[0] if isinstance(generator, list) else generator
        seed = int(torch.randint(2**31, (1,), generator=one, device=one.device if one else "cpu"))
        given = {"solver": solver, "steps": num_inference_steps}
        given = {key: value for key, value in given.items() if value is not None}
        guidance = {"scale": guidance_scale, "interval": guidance_interval}
        guidance = {key: value for key, value in guidance.items() if value is not None}
        base = SampleSection(**self.config["settings"]["sample"])
        chosen = override_sampling(base, guidance, **{"seed": seed, **given, **settings})
        if chosen.guidance and chosen.guidance.scale != 1 and not self.config["settings"]["guides"]:
            raise UserError("the model was trained without label dropout or classes: it cannot be guided; take scale 1")
        objective = build_objective(ObjectiveSection(**self.config["settings"]["objective"]))
        if "data_mean" in self.config["settings"]:
            objective.data_mean = unpack(self.config["settings"]["data_mean"])
        decode = (lambda x: x) if output_type == "latent" else self._decoder(device)
        sampler = Sampler(
            self.denoiser, objective, chosen, shape, decode=decode, condition=condition, noise=latents.float()
        )
        images: Any = torch.cat(list(sampler(labels)))
        if output_type == "pil":
            images = [to_pil(image) for image in images]
        elif output_type == "np":
            images = images.permute(0, 2, 3, 1).numpy()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(self, save_directory: Any, *arguments: Any, **options: Any) -> None:
        """As diffusers has it, with the code of pipeline and denoiser, so that `from_pretrained` opens the folder."""
        if options.get("push_to_hub"):
            raise UserError("save the folder first, then upload it: huggingface_hub.upload_folder")
        super().save_pretrained(save_directory, *arguments, **options)
        folder, denoiser = Path(save_directory), type(getattr(self.denoiser, "_orig_mod", self.denoiser))
        shutil.copyfile(inspect.getfile(type(self)), folder / "pipeline.py")
        shutil.copyfile(inspect.getfile(denoiser), folder / "denoiser" / "denoiser.py")
        index = folder / self.config_name
        content = json.loads(index.read_text(encoding="utf-8"))
        content |= {"_class_name": ["pipeline", type(self).__name__], "denoiser": ["denoiser", denoiser.__name__]}
        index.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _labels(self, given: Any, num_images: int) -> tuple[Tensor, Condition]:
        condition = self.condition
        if not isinstance(condition, ClassLabels):
            if given is None:
                raise UserError(f"the model is conditioned on {condition.describe()}: give a row for each image")
            condition = condition.with_examples(given)
            return torch.arange(condition.count), condition
        if given is None:
            return torch.arange(num_images) % max(condition.count, 1), condition
        names = [given] if isinstance(given, int | str) else given.tolist() if hasattr(given, "tolist") else given
        return torch.tensor([condition.label(name) for name in names]), condition

    def _decoder(self, device: torch.device) -> Any:
        """From the denoiser's data to images in [0, 1]."""
        spec = AutoencoderSpec.from_dict(self.config["settings"]["autoencoder"])
        if self.vae is None:
            return build_decoder(DataSection(), device, SavedData(spec, self.condition))
        kind = KINDS[type(self.vae).__name__]
        return lambda x: kind.decode_by(self.vae, spec.denormalise(x.float()))
