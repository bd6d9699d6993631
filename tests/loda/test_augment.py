"""Random views: none asked, none given; crops inside the image, mirrors exact, draws named by their generator."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

import loda.vision  # noqa: F401  (lets torchvision import beside a CPU build of torch)
from loda.augment import AugmentationSettings, augment

SIDE = 16


def _images(count: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def _augment(images_BCHW: Tensor, seed: int = 0, fill: float = 0.0, **settings: object) -> Tensor:
    chosen = AugmentationSettings(fill=fill, **settings)  # type: ignore[arg-type]
    return augment(images_BCHW, chosen, torch.Generator().manual_seed(seed))


def test_zero_settings_show_images_as_they_are() -> None:
    images_BCHW = _images()
    assert torch.equal(_augment(images_BCHW), images_BCHW)
    assert torch.equal(_augment(images_BCHW, fill=1.0), images_BCHW)  # nothing lies beyond a border that isn't crossed


def test_flip_alone_gives_the_image_or_its_mirror() -> None:
    images_BCHW = _images(64)
    views_BCHW = _augment(images_BCHW, flip=True)
    mirrored = 0
    for image, view in zip(images_BCHW, views_BCHW, strict=True):
        same = torch.allclose(view, image, atol=1e-5)
        flipped = torch.allclose(view, image.flip(-1), atol=1e-5)
        assert same != flipped
        mirrored += flipped
    assert 16 < mirrored < 48


def test_flip_mirrors_left_and_right_whatever_the_crop() -> None:
    images_BCHW = _images(32)
    views_BCHW = _augment(images_BCHW, flip=True, crop_ratio=1.0)
    for image, view in zip(images_BCHW, views_BCHW, strict=True):
        assert torch.allclose(view, image, atol=1e-5) or torch.allclose(view, image.flip(-1), atol=1e-5)


@pytest.mark.parametrize("name", ["rotation", "shear", "zoom", "shift"])
def test_a_change_that_is_not_asked_for_does_not_happen(name: str) -> None:
    """A vanishing amount of one change leaves the image, to interpolation: no hidden crop comes with it."""
    images_BCHW = _images()
    torch.testing.assert_close(_augment(images_BCHW, **{name: 1e-7}), images_BCHW, rtol=0, atol=1e-4)


def _windows(count: int, seed: int = 0, **settings: object) -> tuple[Tensor, Tensor]:
    """Half-sizes and centres (count, 2: x, y) of crops in [-1, 1], read back from coordinates painted into images."""
    ramp = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    painted = torch.stack([ramp.expand(SIDE, SIDE), ramp[:, None].expand(SIDE, SIDE)]).expand(count, 2, SIDE, SIDE)
    views = _augment(painted.contiguous(), seed=seed, **settings)
    low, high = SIDE // 4, 3 * SIDE // 4 - 1  # off the border, where interpolation has both neighbours
    span = float(ramp[high] - ramp[low])
    x_low, x_high = views[:, 0, low, low], views[:, 0, low, high]
    y_low, y_high = views[:, 1, low, low], views[:, 1, high, low]
    torch.testing.assert_close(views[:, 0, high], views[:, 0, low], rtol=0, atol=1e-4)  # an axis-parallel window
    torch.testing.assert_close(views[:, 1, :, high], views[:, 1, :, low], rtol=0, atol=1e-4)
    halves = torch.stack([x_high - x_low, y_high - y_low], dim=1) / span
    centres = torch.stack([x_low + x_high, y_low + y_high], dim=1) / 2
    return halves, centres


@pytest.mark.parametrize("crop_scale", [0.05, 0.3, 0.9])
def test_crops_stay_inside_the_image(crop_scale: float) -> None:
    halves, centres = _windows(3000, crop_scale=crop_scale)
    assert float((centres.abs() + halves).max()) <= 1 + 1e-4
    assert float(halves.min()) > 0


@pytest.mark.parametrize("crop_scale", [0.05, 0.5])
def test_crops_mix_nothing_from_beyond_the_border_into_the_view(crop_scale: float) -> None:
    views_BCHW = _augment(torch.ones(512, 3, SIDE, SIDE), crop_scale=crop_scale, flip=True, fill=0.0)
    torch.testing.assert_close(views_BCHW, torch.ones_like(views_BCHW), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"crop_scale": 0.05, "flip": True}, {"rotation": 10.0, "shear": 5.0, "zoom": 0.1, "shift": 0.1}],
)
def test_views_repeat_with_the_generator_and_only_with_it(options: dict[str, object]) -> None:
    images_BCHW = _images()
    torch.manual_seed(0)
    first = _augment(images_BCHW, seed=3, **options)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(first, _augment(images_BCHW, seed=3, **options))
    assert not torch.equal(first, _augment(images_BCHW, seed=4, **options))
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())  # nothing was drawn from the global generator


def test_each_image_has_its_own_view() -> None:
    views_BCHW = _augment(_images(1).expand(6, 3, SIDE, SIDE).contiguous(), crop_scale=0.05)
    assert all(not torch.allclose(views_BCHW[0], view) for view in views_BCHW[1:])


def test_fill_is_what_lies_beyond_the_border() -> None:
    views_BCHW = _augment(torch.full((64, 3, SIDE, SIDE), 0.25), shift=0.9, fill=0.75)
    assert float(views_BCHW.min()) >= 0.25 - 1e-5 and float(views_BCHW.max()) <= 0.75 + 1e-5
    assert bool((views_BCHW > 0.74).any()) and bool((views_BCHW < 0.26).any())


@pytest.mark.parametrize("flip", [False, True])
def test_rotation_turns_about_the_centre_by_up_to_its_angle(flip: bool) -> None:
    ramp = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    images_BCHW = torch.stack([ramp.expand(SIDE, SIDE), ramp[:, None].expand(SIDE, SIDE)]).expand(300, 2, SIDE, SIDE)
    views = _augment(images_BCHW.contiguous(), rotation=30.0, flip=flip)
    # Slopes of the read-back coordinates along a view's middle row and column are the turn's cosine and sine.
    middle, step = SIDE // 2, 2 / SIDE
    along_row = (views[:, :, middle, middle] - views[:, :, middle, middle - 1]) / step
    along_column = (views[:, :, middle, middle] - views[:, :, middle - 1, middle]) / step
    for slope in (along_row, along_column):
        torch.testing.assert_close(slope.norm(dim=1), torch.ones(300), rtol=0, atol=1e-3)
    torch.testing.assert_close((along_row * along_column).sum(1), torch.zeros(300), rtol=0, atol=1e-3)
    mirrored = along_row[:, 0] < 0
    assert bool(mirrored.any()) == flip and not bool(mirrored.all())
    angles = torch.rad2deg(torch.atan2(-along_column[:, 0], along_column[:, 1]))  # a mirror leaves columns alone
    assert float(angles.abs().max()) <= 30.01 and float(angles.min()) < -25 and float(angles.max()) > 25
    centre = views[:, :, middle - 1 : middle + 1, middle - 1 : middle + 1].mean((-2, -1))
    torch.testing.assert_close(centre, torch.zeros(300, 2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("crop_scale", [0.05, 0.5])
def test_crop_areas_and_ratios_are_spread_as_torchvisions(crop_scale: float) -> None:
    from torchvision.transforms import RandomResizedCrop

    count, side = 3000, 512
    halves, _ = _windows(count, crop_scale=crop_scale)
    image = torch.zeros(1, side, side)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [RandomResizedCrop.get_params(image, [crop_scale, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    areas = np.array([h * w / side**2 for _, _, h, w in drawn])
    ratios = np.array([math.log(w / h) for _, _, h, w in drawn])
    our_areas, our_ratios = halves.prod(1).numpy(), (halves[:, 0] / halves[:, 1]).log().numpy()
    assert our_areas.mean() == pytest.approx(areas.mean(), abs=0.015)
    assert our_areas.min() >= crop_scale * 0.99
    assert scipy.stats.ks_2samp(our_areas, areas).statistic < 0.05
    assert scipy.stats.ks_2samp(our_ratios, ratios).statistic < 0.05


def test_a_stretch_changes_the_aspect_ratio_inside_the_image() -> None:
    halves, centres = _windows(2000, stretch=1.5)
    log_ratios = (halves[:, 0] / halves[:, 1]).log()
    assert float((centres.abs() + halves).max()) <= 1 + 1e-4
    assert float(log_ratios.abs().max()) <= math.log(1.5)
    assert float(log_ratios.min()) < -0.15 < 0.15 < float(log_ratios.max())
    with pytest.raises(ValueError, match="stretch"):
        AugmentationSettings(stretch=1.5, crop_scale=0.5)


def test_crop_centres_fill_what_room_there_is() -> None:
    halves, centres = _windows(4000, crop_scale=0.05)
    for axis in range(2):
        room = halves[:, axis] < 0.95
        share = (centres[room, axis] / (1 - halves[room, axis])).numpy()
        assert scipy.stats.kstest(share, scipy.stats.uniform(-1, 2).cdf).statistic < 0.04


@pytest.mark.parametrize("options", [{"crop_scale": 0.0}, {"crop_scale": 1.5}, {"rotation": -1.0}, {"blur": 1.0}])
def test_impossible_settings_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        AugmentationSettings(**options)  # type: ignore[arg-type]
