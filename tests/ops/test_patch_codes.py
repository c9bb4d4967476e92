"""Codes of patches are the published convolution and k-th value; their forms agree."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from selfsup_ray.ops import patch_codes
from selfsup_ray.ops.patch_codes import (
    distances,
    full_embedding,
    patch_bits,
    pooled_counts,
    triangle_code,
    unpack_bits,
)


def dictionary(size: int):
    """Return images with large common levels and a whitening dictionary's kernel and bias."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 3, 11, 9)).cumsum(axis=3).cumsum(axis=2) * 0.1 + 2
    images = torch.from_numpy(images.astype(np.float32))
    patches = F.unfold(images, 3).transpose(1, 2).flatten(0, 1).double()
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    whitening = vectors / (values.clamp(min=0).sqrt() + 0.02)
    entries = patches[rng.integers(0, len(patches), size)] @ whitening
    entries = entries + 0.3 * torch.from_numpy(rng.normal(size=entries.shape))
    kernel = -(entries @ whitening.T)
    return images, kernel.float(), (0.5 * entries.square().sum(dim=1)).float()


def published(images, kernel, bias, k: int, side: int = 3) -> torch.Tensor:
    """Return the mask of the released code: convolution <= its k-th value; bool (B, h, w, N)."""
    filters = kernel.view(len(kernel), images.shape[1], side, side)
    found = F.conv2d(images.double(), filters.double(), bias.double())
    return (found <= found.kthvalue(k, dim=1, keepdim=True).values).permute(0, 2, 3, 1)


@pytest.fixture(params=["tiles", "torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with the kernels, and as on a machine without numba."""
    if request.param == "torch":
        monkeypatch.setattr(patch_codes, "find_spec", lambda name: None)
    return request.param


@pytest.mark.parametrize("size", [5, 64, 70, 200])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_the_code_is_the_published_mask(form: str, size: int, precision):
    images, kernel, bias = dictionary(size)
    for k in {1, size // 4 or 1, size}:
        [bits] = patch_bits(images, kernel, bias, patch_size=3, ks=[k], precision=precision)
        assert bits.shape == (4, 9, 7, -(-size // 8)) and bits.dtype == torch.uint8
        code, expected = unpack_bits(bits, size), published(images, kernel, bias, k)
        assert (expected & ~code).sum() <= 2 + 0.002 * expected.sum()
        assert (code.sum(dim=-1) == k).all()


def test_bits_are_packed_as_numpy_packs_them():
    images, kernel, bias = dictionary(21)
    [bits] = patch_bits(images, kernel, bias, patch_size=3, ks=[5], precision="float32")
    code = unpack_bits(bits, 21)
    np.testing.assert_array_equal(np.packbits(code.numpy(), axis=-1, bitorder="little"), bits)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_many_k_from_one_pass_are_each_k_alone(precision):
    images, kernel, bias = dictionary(70)
    ks = [1, 7, 20, 70]
    together = patch_bits(images, kernel, bias, patch_size=3, ks=ks, precision=precision)
    for k, bits in zip(ks, together, strict=True):
        [alone] = patch_bits(images, kernel, bias, patch_size=3, ks=[k], precision=precision)
        assert torch.equal(bits, alone)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_the_kth_alone_is_the_difference_of_two_codes(form: str, precision):
    images, kernel, bias = dictionary(70)
    [first] = patch_bits(images, kernel, bias, patch_size=3, ks=[1], precision=precision)
    both = patch_bits(images, kernel, bias, patch_size=3, ks=[19, 20], precision=precision)
    found = patch_bits(
        images, kernel, bias, patch_size=3, ks=[1, 20], precision=precision, kind="kth"
    )
    assert torch.equal(found[0], first)
    assert torch.equal(found[1], both[0] ^ both[1])


def test_float32_sets_all_that_are_as_far_as_the_kth_and_bfloat16_the_first(form: str):
    images, kernel, bias = dictionary(40)
    kernel[10:20], bias[10:20] = kernel[9], bias[9]  # ten entries are the same as entry 9
    exact = published(images, kernel, bias, 8)
    [bits] = patch_bits(images, kernel, bias, patch_size=3, ks=[8], precision="float32")
    code = unpack_bits(bits, 40)
    assert torch.equal(code, exact) and (code.sum(dim=-1) > 8).any()
    [bits] = patch_bits(images, kernel, bias, patch_size=3, ks=[8], precision="bfloat16")
    same = unpack_bits(bits, 40)
    assert (same.sum(dim=-1) == 8).all()
    chosen = same[..., 9:20].int()
    assert (chosen.diff(dim=-1) <= 0).all()  # of equal ones the lower entries


def test_a_constant_image_and_a_dictionary_of_equal_entries_give_exactly_k():
    images, kernel, bias = torch.ones(1, 3, 6, 6), torch.ones(130, 27), torch.zeros(130)
    [bits] = patch_bits(images, kernel, bias, patch_size=3, ks=[50])
    expected = torch.arange(130) < 50
    assert torch.equal(unpack_bits(bits, 130), expected.expand(1, 4, 4, 130))
    [bits] = patch_bits(images, kernel, bias, patch_size=3, ks=[50], precision="float32")
    assert unpack_bits(bits, 130).all()


@pytest.mark.parametrize("channels, side", [(1, 1), (2, 5), (7, 3), (3, 9)])
def test_any_channels_and_patch_size(channels: int, side: int):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, channels, 11, 9, generator=generator)
    kernel = torch.randn(33, channels * side**2, generator=generator)
    bias = torch.randn(33, generator=generator)
    [bits] = patch_bits(images, kernel, bias, patch_size=side, ks=[9], precision="float32")
    expected = published(images, kernel, bias, 9, side)
    assert (unpack_bits(bits, 33) != expected).sum() <= 0.001 * expected.numel()


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_codes_do_not_depend_on_threads_or_on_the_images_beside(precision):
    images, kernel, bias = dictionary(70)
    [whole] = patch_bits(images, kernel, bias, patch_size=3, ks=[20], precision=precision)
    for some in (images[:1], images[2:]):
        [part] = patch_bits(some, kernel, bias, patch_size=3, ks=[20], precision=precision)
        assert torch.equal(part, whole[:1] if len(some) == 1 else whole[2:])
    threads = torch.get_num_threads()
    [by_three] = patch_bits(
        images, kernel, bias, patch_size=3, ks=[20], precision=precision, threads=3
    )
    assert torch.equal(by_three, whole) and torch.get_num_threads() == threads


def test_a_dictionary_changed_in_place_is_seen():
    images, kernel, bias = dictionary(70)
    [before] = patch_bits(images, kernel, bias, patch_size=3, ks=[20])
    kernel.neg_()
    [after] = patch_bits(images, kernel, bias, patch_size=3, ks=[20])
    [fresh] = patch_bits(images, kernel.clone(), bias, patch_size=3, ks=[20])
    assert torch.equal(after, fresh) and not torch.equal(before, after)


def test_autocast_and_gradients_change_no_code():
    images, kernel, bias = dictionary(70)
    [plain] = patch_bits(images, kernel, bias, patch_size=3, ks=[20])
    with torch.autocast("cpu", torch.bfloat16):
        parameters = kernel.clone().requires_grad_(), bias.clone().requires_grad_()
        [found] = patch_bits(images, *parameters, patch_size=3, ks=[20])
        assert distances(images, kernel, bias, patch_size=3).dtype == torch.float32
    assert torch.equal(found, plain)


@pytest.mark.parametrize("pool, grid", [(2, None), (4, None), (20, None), (None, 1), (None, 4)])
def test_pooled_counts_are_torchs_pooling_of_the_code(form: str, pool, grid):
    images, kernel, bias = dictionary(70)
    [bits] = patch_bits(images, kernel, bias, patch_size=3, ks=[20])
    code = unpack_bits(bits, 70).permute(0, 3, 1, 2).float()
    if pool:
        expected = F.avg_pool2d(code, pool, pool, ceil_mode=True)
    else:
        expected = F.adaptive_avg_pool2d(code, grid)
    torch.testing.assert_close(pooled_counts(bits, 70, pool=pool, grid=grid), expected)


def test_the_triangle_is_what_is_nearer_than_the_mean():
    images, kernel, bias = dictionary(12)
    patches = F.unfold(images, 3)
    far = torch.einsum("nd,bdp->bnp", kernel, patches) + bias[:, None]
    expected = (far.mean(dim=1, keepdim=True) - far).clamp(min=0).view(4, 12, 9, 7)
    found = triangle_code(images, kernel, bias, patch_size=3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_full_embedding_is_the_patch_at_each_of_its_entries():
    images, kernel, bias = dictionary(12)
    [bits] = patch_bits(images, kernel, bias, patch_size=3, ks=[4])
    found, code = full_embedding(images, bits, 12, patch_size=3), unpack_bits(bits, 12)
    assert found.shape == (4, 12 * 27, 9, 7)
    for b, y, x, n in [(0, 0, 0, 0), (3, 8, 6, 11), (2, 4, 1, 5), (1, 3, 3, 3)]:
        patch = images[b, :, y : y + 3, x : x + 3].flatten()
        expected = patch if code[b, y, x, n] else torch.zeros(27)
        assert torch.equal(found[b, 27 * n : 27 * n + 27, y, x], expected)


def test_the_plain_form_needs_no_numba(monkeypatch: pytest.MonkeyPatch):
    images, kernel, bias = dictionary(12)
    monkeypatch.setattr(patch_codes, "find_spec", lambda name: None)
    for name in [name for name in sys.modules if name.startswith("selfsup_ray.ops.patch_")]:
        if name != "selfsup_ray.ops.patch_codes":
            monkeypatch.setitem(sys.modules, name, None)
    [bits] = patch_bits(images, kernel, bias, patch_size=3, ks=[4])
    assert pooled_counts(bits, 12, pool=3, grid=None).shape == (4, 12, 3, 3)


def test_no_images_have_no_codes(form: str):
    _, kernel, bias = dictionary(12)
    [bits] = patch_bits(torch.empty(0, 3, 11, 9), kernel, bias, patch_size=3, ks=[4])
    assert bits.shape == (0, 9, 7, 2)
    assert pooled_counts(bits, 12, pool=4, grid=None).shape == (0, 12, 3, 2)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_pixels_that_are_not_finite_stay_where_they_are(precision):
    images, kernel, bias = dictionary(70)
    [before] = patch_bits(images, kernel, bias, patch_size=3, ks=[20], precision=precision)
    images[1, 0, 5, 5] = float("nan")
    [after] = patch_bits(images, kernel, bias, patch_size=3, ks=[20], precision=precision)
    assert torch.equal(after[0], before[0]) and torch.equal(after[2:], before[2:])
    assert torch.equal(after[1, :3], before[1, :3])
