"""PatchBackbone: pooled codes against their definition in loops, and on disk like any backbone."""

import numpy as np
import pytest
import torch

from selfsup_ray.config import build
from selfsup_ray.errors import ConfigError
from selfsup_ray.models.backbones import ResNetConfig, build_backbone
from selfsup_ray.models.encoder import Encoder, EncoderDescription, save_encoder
from selfsup_ray.models.inputs import ImageInput
from selfsup_ray.models.patch_backbone import (
    PIXEL_MEAN,
    PIXEL_STD,
    PatchBackbone,
    PatchBackboneConfig,
)
from selfsup_ray.ops.whitening import code_kernel

CODES = ("hard", "kth", "triangle")


def centroids_and_whitening(size: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    centroids = generator.standard_normal((size, dim)).astype(np.float32)
    return centroids, (generator.standard_normal((dim, dim)) / 3).astype(np.float32)


def made_backbone(code: str = "hard", **values) -> PatchBackbone:
    values = {"size": 12, "k": 4, "patch_size": 3, "grid": 2, "precision": "float32"} | values
    config = PatchBackboneConfig(code=code, **values)
    centroids, w = centroids_and_whitening(config.size, config.channels * config.patch_size**2)
    return PatchBackbone.of(config, *code_kernel(centroids, w))


def images_of(count: int, side: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, channels, side, side, generator=generator) * 2 - 1


def by_definition(images: torch.Tensor, config: PatchBackboneConfig) -> np.ndarray:
    """Return pooled codes (B, N grid^2) from distances of whitened patches, in loops."""
    s, side = config.patch_size, images.shape[2] - config.patch_size + 1
    centroids, w = centroids_and_whitening(config.size, config.channels * s * s)
    code = np.zeros((len(images), config.size, side, side))
    for i, image in enumerate(images.double().numpy()):
        for y in range(side):
            for x in range(side):
                patch = image[:, y : y + s, x : x + s].ravel() @ w
                far = 0.5 * ((patch - centroids) ** 2).sum(axis=1)
                order = np.argsort(far)
                match config.code:
                    case "hard":
                        code[i, order[: config.k], y, x] = 1
                    case "kth":
                        code[i, order[config.k - 1], y, x] = 1
                    case _:
                        code[i, :, y, x] = np.maximum(far.mean() - far, 0)
    pooled = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(code), config.grid)
    return pooled.flatten(1).numpy()


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(("side", "grid"), [(8, 2), (9, 3), (5, 1)])
def test_features_are_the_codes_definition_averaged_over_the_grid(code, side, grid):
    backbone, images = made_backbone(code, grid=grid), images_of(3, side)
    features = backbone(images)
    assert features.shape == (3, backbone.dim) == (3, 12 * grid**2)
    assert features.dtype == torch.float32
    expected = by_definition(images, backbone.code)
    np.testing.assert_allclose(features.numpy(), expected, rtol=1e-4, atol=2e-5)


def test_bfloat16_sets_exactly_k_entries_and_nearly_the_same():
    backbone, images = made_backbone(precision="bfloat16", size=40, k=10), images_of(4, 12)
    features = backbone(images)
    cells = features.view(4, 40, 4)
    torch.testing.assert_close(cells.sum(dim=1), torch.full((4, 4), 10.0))
    exact = made_backbone(size=40, k=10)(images)
    assert (features - exact).abs().mean() < 0.01


@pytest.mark.parametrize("code", CODES)
def test_features_do_not_depend_on_the_batch(code, monkeypatch):
    backbone, images = made_backbone(code), images_of(5, 8)
    together = backbone(images)
    alone = torch.cat([backbone(image[None]) for image in images])
    torch.testing.assert_close(together, alone)
    monkeypatch.setattr("selfsup_ray.models.patch_backbone._ENTRIES_AT_ONCE", 1)
    torch.testing.assert_close(backbone(images), together)


def test_autocast_does_not_change_a_code():
    backbone, images = made_backbone(size=32, k=8), images_of(4, 10)
    with torch.autocast("cpu", torch.bfloat16):
        cast = backbone(images)
    torch.testing.assert_close(cast, backbone(images), rtol=0, atol=0)


def test_large_images_of_any_number_of_channels_are_coded():
    backbone = made_backbone(channels=1, patch_size=5)
    features = backbone(images_of(1, 224, channels=1))
    torch.testing.assert_close(features.view(12, 4).sum(dim=0), torch.full((4,), 4.0))


def test_an_encoder_of_codes_is_saved_and_opened_like_any_other(tmp_path):
    images = ImageInput(image_size=10, mean=PIXEL_MEAN, std=PIXEL_STD)
    backbone = made_backbone()
    save_encoder(tmp_path, backbone=backbone, images=images)
    encoder = Encoder.open(tmp_path)
    assert encoder.dim == 48
    kernel, bias = encoder.backbone().dictionary  # type: ignore[attr-defined]
    torch.testing.assert_close(kernel, backbone.kernel, rtol=0, atol=0)
    torch.testing.assert_close(bias, backbone.bias, rtol=0, atol=0)
    pixels = torch.randint(0, 256, (6, 3, 10, 10), dtype=torch.uint8)
    rows = encoder.embed(pixels)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    features = backbone(pixels / 127.5 - 1)
    expected = torch.nn.functional.normalize(features).numpy()
    assert np.abs(rows - expected).mean() < 1e-3  # a tie within rounding may fall otherwise


def test_the_name_says_which_backbone_a_file_describes():
    images = {"image_size": 8}
    made = build(EncoderDescription, {"backbone": {"name": "resnet18"}, "images": images})
    assert made.backbone == ResNetConfig(name="resnet18")
    values = {"name": "patches", "size": 4, "k": 2}
    made = build(EncoderDescription, {"backbone": values, "images": images})
    assert isinstance(build_backbone(made.backbone), PatchBackbone)
    with pytest.raises(ConfigError, match="'vgg' is not one of"):
        build(EncoderDescription, {"backbone": {"name": "vgg"}, "images": images})


def test_more_neighbors_than_entries_are_refused():
    with pytest.raises(ConfigError, match="k=5 is more than the size=4 entries"):
        PatchBackboneConfig(size=4, k=5)
