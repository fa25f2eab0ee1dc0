"""The networks whose features the metrics compare: Inception as ADM has it, DINOv2, the judge of digits,
EfficientNet-Lite2, any encoder; `spaces` has those of FDr^6.

An extractor turns uint8 images (B, 3, H, W) into a dict of features by layer, (B, D) float32. It says what its features
depend on: `fingerprint` (of the weights) and `resizing`, which go into the key of cached statistics.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.errors import UserError
from dic_repa.files.hashing import file_sha256, fingerprint
from dic_repa.files.weights import load_weights, read_tensors
from dic_repa.protocols import FeatureExtractor
from dic_repa.registry import Registry

extractors = Registry("feature extractor", modules=["dic_repa.evaluation.digits", "dic_repa.evaluation.spaces"])
INCEPTION_SHA256 = "6726825d"  # the first digits, which torch-fidelity's file has in its name
SPATIAL_CHANNELS = 7
LITE2 = "efficientnet-lite2"


@extractors.register("inception")
class Inception(nn.Module):
    """Inception v3 of 2015-12-05, the network of FID, by torch-fidelity.

    - `pool` (2048): the average pool, for FID, KID, precision and recall;
    - `spatial` (2023): for sFID, the first 7 channels of TensorFlow's `mixed_6/conv:0` (torchvision's 1x1 branch of
      Mixed_6d behind its ReLU, 17x17), flattened rows first and channels last, so that statistics stored by ADM fit;
    - `logits` (1008): without the bias, as ADM and torch-fidelity take them for the Inception Score.

    Args:
        weights: a file in torch-fidelity's format; by default its download in torch's hub folder, fetched if missing.
    """

    layers = ("pool", "spatial", "logits")
    resizing = "bilinear to 299, as TensorFlow 1"

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        path = Path(weights) if weights else _inception_file()
        self.model = _torch_fidelity_inception()
        own = self.model.state_dict()
        counts = {name: own[name] for name in own if name.endswith("num_batches_tracked")}  # older files lack them
        tensors = counts | read_tensors(path)[0]
        load_weights(self.model, tensors, f"{path} (Inception weights)")
        official = file_sha256(path).startswith(INCEPTION_SHA256)
        self.notes = () if official else (f"{path} is not torch-fidelity's file: its scores compare to no others",)
        self.fingerprint = tensors_fingerprint(tensors)
        self.seen: list[Tensor] = []
        branch = self.model.get_submodule("Mixed_6d.branch1x1")
        branch.register_forward_hook(lambda _module, _inputs, output: self.seen.append(output))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        pool, logits = self.model(images)
        spatial = self.seen.pop()[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return {"pool": pool, "spatial": spatial.float(), "logits": logits}


def _torch_fidelity_inception() -> nn.Module:
    from torch_fidelity import FeatureExtractorInceptionV3

    class InceptionV3(FeatureExtractorInceptionV3):
        # Its constructor would unpickle any file it is given, or fetch one: it gets an empty one, and loads nothing.
        def load_state_dict(self, state, *args, **kwargs):
            return super().load_state_dict(state, *args, **kwargs) if state else None

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    return InceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=nothing)


def _inception_file() -> Path:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = in_torch_hub(URL_INCEPTION_V3)
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256)
        except (OSError, RuntimeError):  # URLError is an OSError
            raise UserError(
                f"the Inception weights cannot be fetched from here; fetch {URL_INCEPTION_V3} on a machine that can, "
                f"put it at {path}, or give its path with --inception-weights"
            ) from None
    return path


def has_inception() -> bool:
    """Whether Inception's weights are in torch's hub folder, where they are looked for."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return in_torch_hub(URL_INCEPTION_V3).is_file()


def in_torch_hub(url: str) -> Path:
    """Where torch's hub keeps what it has fetched from an address."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


@extractors.register("dinov2")
class DINOv2(nn.Module):
    """A DINOv2 vision transformer: `cls`, the class token behind the final norm.

    By default ViT-L/14 at 224 px (bicubic, antialiased, ImageNet's mean and deviation), as Stein et al., arXiv
    2306.04675. `encoder` may name another ViT with a class token; `options`, such as a file of `weights`, go to it.
    """

    layers = ("cls",)

    def __init__(self, encoder: str = "dinov2-vit-l", **options):
        from dic_repa.encoders import create_encoder
        from dic_repa.encoders.timm_vit import FrozenViT

        super().__init__()
        self.encoder: Any = create_encoder(encoder, **options)
        model: Any = getattr(self.encoder, "model", None)
        if not isinstance(self.encoder, FrozenViT) or getattr(model, "cls_token", None) is None:
            raise UserError(f"encoder '{encoder}' has no class token; choose a DINOv2, such as dinov2-vit-l")
        patch = model.patch_embed.patch_size[0]
        self.size = 224 // patch * patch
        self.resizing = f"bicubic, antialiased, to {self.size}"
        self.fingerprint = tensors_fingerprint(model.state_dict())
        self.notes = () if encoder == "dinov2-vit-l" else (f"{encoder} is not the ViT-L/14 that others report",)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        images = F.interpolate(images.float(), (self.size, self.size), mode="bicubic", antialias=True)
        images = images.round().clamp(0, 255) / 255  # 8 bits again, as a resized picture has
        features = self.encoder.model.forward_features((images - self.encoder.mean) / self.encoder.std)
        return {"cls": features[:, 0].float()}


@extractors.register("encoder")
class PooledTokens(nn.Module):
    """`pooled`: the mean of an encoder's tokens, float32, for those who have no weights of Inception.

    `encoder` is a name from `dic-repa encoders`, by default the run's own first one; `options` go to it.
    """

    layers = ("pooled",)
    resizing = "the encoder's own"

    def __init__(self, encoder: str | None = None, **options):
        from dic_repa.alignment.cache import encoder_hash
        from dic_repa.encoders import create_encoder

        super().__init__()
        if encoder is None:
            raise UserError(
                "fd-encoder and its like take the encoder that a run was aligned to, and there is none; name one with "
                "--encoder"
            )
        self.encoder = create_encoder(encoder, **options)
        self.fingerprint = encoder_hash(encoder, options, self.encoder).hexdigest()[:24]
        self.made_of = {"encoder": encoder, "options": options}
        self.notes: tuple[str, ...] = (no_fid(encoder), judged_by_its_teacher(encoder))
        self._name, self._checked = encoder, False

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        from dic_repa.encoders import check_tokens

        images = images.float() / 255
        tokens = self.encoder(images) if self._checked else check_tokens(self._name, self.encoder, images)
        self._checked = True
        return {"pooled": tokens.float().mean(dim=1)}


@extractors.register("lite2")
class Lite2(PooledTokens):
    """`pooled` (120): the mean over EfficientNet-Lite2's cells of 16 pixels, images resized to 128; in this package."""

    resizing = "bicubic to 128"

    def __init__(self):
        super().__init__(LITE2, layer=3, input_size=128)
        self.notes = (no_fid(LITE2),)


def no_fid(encoder: str) -> str:
    """The note that goes with every score by an encoder's tokens."""
    return f"scores by the tokens of {encoder} are no FID and compare with no published number"


def judged_by_its_teacher(encoder: str) -> str:
    """The note that goes with scores of a run by the encoder that it was aligned to."""
    return f"a model that was aligned to {encoder} is judged by its own teacher here"


def describe_extractors(extractors: dict[str, FeatureExtractor]) -> dict[str, dict[str, str]]:
    """What the features of each depend on."""
    return {name: {"weights": part.fingerprint, "resizing": part.resizing} for name, part in extractors.items()}


def tensors_fingerprint(tensors: dict[str, Tensor]) -> str:
    """A hash of the tensors' names and values."""
    names = (name for name in sorted(tensors) if not name.endswith("num_batches_tracked"))
    return fingerprint(*(part for name in names for part in (name, tensors[name])))
