"""Random samples of given shapes: to try out memory and speed without the data."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dic_repa.conditions import create_condition
from dic_repa.data.registry import register_dataset

COUNT = 64  # distinct samples; the data set repeats them


@register_dataset("random")
class RandomData(Dataset):
    """Samples of `x` (channels, size, size), standard normal, `image` (image_channels, image_size, image_size), uint8,
    and `label`; or standard normal vectors or tokens, if `condition` (`Condition.to_dict`) asks for them.
    """

    def __init__(
        self,
        size: int,
        split: str = "train",
        channels: int = 4,
        num_classes: int = 1000,
        condition: dict | None = None,
        image_size: int = 256,
        image_channels: int = 3,
        length: int = 10_000,
    ):
        generator = torch.Generator().manual_seed(0)
        self.size, self.channels, self.length = size, channels, length
        self.condition = create_condition(num_classes, condition)
        self.num_classes, self.class_names = num_classes, self.condition.names
        shape = (COUNT, image_channels, image_size, image_size)
        self.x = torch.randn(COUNT, channels, size, size, generator=generator)
        self.images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        self.rows = (
            torch.randn(COUNT, *self.condition.shape, generator=generator)
            if self.condition.dtype.is_floating_point
            else torch.randint(max(1, num_classes), (COUNT,), generator=generator)
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = index % COUNT
        return {"x": self.x[index], "image": self.images[index], self.condition.key: self.rows[index]}
