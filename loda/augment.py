"""Random views of a batch of images, drawn per image and applied in one resampling on the images' device.

Ours, because library transforms work on one image at a time from Python and draw from the global generator: on
small images they cost more than the network, and their draws can't be named.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from loda.strict import StrictModel

CROP_TRIES = 10  # as torchvision's


class AugmentationSettings(StrictModel):
    """How training images vary. The published set-up is ``crop_scale: 0.05, flip: true``; all zero shows them as is."""

    crop_scale: float = Field(1.0, gt=0, le=1, description="smallest area of a random resized crop, as a share")
    crop_ratio: float = Field(4 / 3, ge=1, le=4, description="largest aspect ratio of the crop")
    stretch: float = Field(
        1.0, ge=1, le=4, description="random stretch: one side shows 1/sqrt(r) of the image, r up to this"
    )
    flip: bool = Field(False, description="mirror half of the images")
    rotation: float = Field(0.0, ge=0, le=180, description="largest rotation, degrees either way")
    shear: float = Field(0.0, ge=0, le=45, description="largest shear, degrees either way")
    zoom: float = Field(0.0, ge=0, lt=1, description="size varies by this share either way")
    shift: float = Field(0.0, ge=0, lt=1, description="largest shift, share of the image's side")
    fill: float = Field(0.0, ge=0, le=1, description="brightness beyond the border: 0 black, 1 white (ink on paper)")

    @model_validator(mode="after")
    def _stretch_or_crop(self) -> AugmentationSettings:
        if self.stretch > 1 and self.crop_scale < 1:
            raise ValueError("stretch: crops have crop_ratio instead; set stretch to 1 or crop_scale to 1")
        return self


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _ratios(count: int, largest: float, generator: torch.Generator) -> Tensor:
    """Aspect ratios from 1/largest to largest, uniform in the logarithm."""
    return torch.exp(_uniform(count, -math.log(largest), math.log(largest), generator))


def _window(count: int, settings: AugmentationSettings, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Half-widths and centres of what is shown, in the image's [-1, 1] coordinates.

    Crops are drawn as RandomResizedCrop draws them: up to ten tries, the whole image if none fits.
    """
    area = _uniform(count, settings.crop_scale, 1.0, generator)
    if settings.crop_scale == 1:
        ratio = _ratios(count, settings.stretch, generator)
        width, height = ratio.sqrt().clamp_max(1), (1 / ratio).sqrt().clamp_max(1)
    else:
        width, height = torch.ones(count), torch.ones(count)
        fits = torch.zeros(count, dtype=torch.bool)
        for attempt in range(CROP_TRIES):
            if attempt:
                area = _uniform(count, settings.crop_scale, 1.0, generator)
            ratio = _ratios(count, settings.crop_ratio, generator)
            wide, high = (area * ratio).sqrt(), (area / ratio).sqrt()
            taken = ~fits & (wide <= 1) & (high <= 1)
            width, height = torch.where(taken, wide, width), torch.where(taken, high, height)
            fits |= taken
    centre_x = (1 - width) * _uniform(count, -1, 1, generator)
    centre_y = (1 - height) * _uniform(count, -1, 1, generator)
    return width, height, centre_x, centre_y


def augment(images_BCHW: Tensor, settings: AugmentationSettings, generator: torch.Generator) -> Tensor:
    """One random view of each image.

    Args:
        images_BCHW: (B, C, H, W) float in [0, 1].
        settings: which changes, and how far.
        generator: a CPU generator; the same draws whatever the device.

    Returns:
        (B, C, H, W), bilinear.
    """
    if settings == AugmentationSettings(fill=settings.fill):
        return images_BCHW
    count = len(images_BCHW)
    width, height, shift_x, shift_y = _window(count, settings, generator)
    angle = torch.deg2rad(_uniform(count, -settings.rotation, settings.rotation, generator))
    shear = torch.tan(torch.deg2rad(_uniform(count, -settings.shear, settings.shear, generator)))
    zoom = 1 + _uniform(count, -settings.zoom, settings.zoom, generator)
    shift_x = shift_x + 2 * _uniform(count, -settings.shift, settings.shift, generator)
    shift_y = shift_y + 2 * _uniform(count, -settings.shift, settings.shift, generator)
    mirror = torch.ones(count)
    if settings.flip:
        mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -mirror, mirror)
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    theta = torch.stack(
        [
            torch.stack([mirror * width * cos, width * (shear * cos - sin), shift_x], dim=1),
            torch.stack([mirror * height * sin, height * (shear * sin + cos), shift_y], dim=1),
        ],
        dim=1,
    ).to(images_BCHW)
    grid = F.affine_grid(theta, list(images_BCHW.shape), align_corners=False)
    if not any((settings.rotation, settings.shear, settings.zoom, settings.shift)):
        # The window lies inside the image: only interpolation at its very edge could mix in what lies beyond.
        return F.grid_sample(images_BCHW, grid, padding_mode="border", align_corners=False)
    shifted_BCHW = images_BCHW - settings.fill  # what lies outside is sampled as zero
    return F.grid_sample(shifted_BCHW, grid, padding_mode="zeros", align_corners=False) + settings.fill
