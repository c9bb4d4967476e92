"""Networks on a patch dictionary: sizes of the paper, order of the parts, slow references."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup_ray.errors import ConfigError
from selfsup_ray.models.layer_codes import BitCode, Dictionary
from selfsup_ray.models.locally_linear import (
    Block,
    PatchNetwork,
    code_block,
    conv_block,
)
from selfsup_ray.models.patch_layers import (
    DeeperCodeConfig,
    DeeperConvConfig,
    PhiFullConfig,
    PhiHardConfig,
    VanillaConfig,
    entries,
)
from selfsup_ray.models.simple_embedding import SimpleNetwork
from selfsup_ray.ops.patch_codes import full_embedding

Phi = PhiFullConfig | PhiHardConfig
PHI = PhiFullConfig()
BARE: dict[str, Any] = {"pool": None, "batch_norm": False, "bottleneck": None}


def dictionary(size: int, patch_size: int = 5, channels: int = 3, seed: int = 0) -> Dictionary:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, channels * patch_size**2, generator=generator)
    return Dictionary(-rows, 0.5 * rows.square().sum(dim=1), patch_size)


def network(config: Phi, size: int, side: int = 32, num_classes: int = 10) -> PatchNetwork:
    torch.manual_seed(0)
    block = code_block(config, dictionary(size), model=config, side=side, num_classes=num_classes)
    return PatchNetwork([block])


def trained_values(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def features_read(block: Block) -> int:
    classifier = block.classifiers[0]
    assert isinstance(classifier, nn.Linear)
    return classifier.in_features


def vanilla(**values: Any) -> PatchNetwork:
    block = conv_block(VanillaConfig(**values), channels=3, side=32, num_classes=10)
    return PatchNetwork([block])


@pytest.mark.parametrize(
    ("made", "features", "parameters"),
    [
        (lambda: network(PhiFullConfig(), 1024), 1568, 128_362),
        (lambda: network(PhiHardConfig(), 1024), 1568, 50_538),
        (lambda: vanilla(), 1568, 128_362),
        (lambda: network(PhiFullConfig(k=64, **BARE), 256), 200_704, 19_456 + 2_007_050),
    ],
)
def test_features_and_trained_parameters_are_those_of_the_paper(
    made: Any, features: int, parameters: int
):
    built = made()
    assert features_read(built.top) == features
    assert trained_values(built) == parameters


@pytest.mark.parametrize(
    ("pool", "bottleneck", "parameters"),
    [(None, None, 8_028_170), (4, None, 501_770), (None, 32, 250_890), (4, 32, 15_690)],
)
def test_the_linear_layer_has_the_sizes_of_table_3(
    pool: int | None, bottleneck: int | None, parameters: int
):
    config = PhiFullConfig(pool=pool, batch_norm=pool is not None, bottleneck=bottleneck)
    block = network(config, 1024).top
    assert trained_values(block.classifiers) == parameters


def test_the_simple_network_has_the_size_of_table_2():
    with torch.device("meta"):
        simple = SimpleNetwork(dictionary_shape(256), k=64, image_size=32, num_classes=10)
    assert trained_values(simple) == 150_528_010


def dictionary_shape(size: int) -> Dictionary:
    return Dictionary(torch.empty(size, 75), torch.empty(size), 5)


def test_the_frozen_code_has_the_dictionarys_values():
    code = network(PhiFullConfig(), 1024).top.code
    assert isinstance(code, BitCode)
    assert code.kernel.numel() + code.bias.numel() == 77_824
    assert not list(code.parameters())


def test_four_layers_have_the_maps_and_linear_layers_of_the_paper():
    torch.manual_seed(0)
    first = PhiFullConfig(pool=2, k=256)
    with torch.device("meta"):
        blocks = [code_block(first, dictionary(1024), model=first, side=32, num_classes=10)]
        for _ in range(3):
            below = blocks[-1].layers[0]
            deeper = DeeperCodeConfig()
            on = dictionary(deeper.size, deeper.patch_size, channels=32)
            blocks.append(
                code_block(deeper, on, model=first, side=int(below.out_side), num_classes=10)  # type: ignore[arg-type]
            )
    assert [block.layers[0].out_side for block in blocks] == [14, 12, 10, 8]
    assert [features_read(block) for block in blocks] == [6272, 4608, 3200, 2048]
    code = blocks[1].code
    assert isinstance(code, BitCode) and code.kernel.shape == (1024, 32 * 9)


@pytest.mark.parametrize("kind", ["full", "hard"])
@pytest.mark.parametrize("code", ["up_to", "kth", "triangle"])
def test_a_network_equals_slow_loops_in_the_order_of_the_paper(kind: str, code: str):
    size, side, s, k = 16, 13, 5, 4
    values: dict[str, Any] = {"k": k, "code": code, "pool": 4, "adaptive_pool": 2, "bottleneck": 3}
    config: Phi = PhiFullConfig(**values) if kind == "full" else PhiHardConfig(**values)
    made = network(config, size, side=side, num_classes=5).eval()
    block, layer = made.top, made.top.layers[0]
    layer.norm.running_mean = torch.rand(size)  # type: ignore[assignment]
    layer.norm.running_var = torch.rand(size) + 0.5  # type: ignore[assignment]
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))
    h = side - s + 1
    z = torch.zeros(2, size, h, h)
    for b, y, x in itertools.product(range(2), range(h), range(h)):
        patch = images[b, :, y : y + s, x : x + s].reshape(-1)
        distance = block.code.kernel @ patch + block.code.bias  # type: ignore
        order = distance.argsort()
        if code == "triangle":
            m = (distance.mean() - distance).clamp_min(0)
        else:
            m = torch.zeros(size)
            m[order[:k] if code == "up_to" else order[k - 1]] = 1
        v = torch.ones(size)
        if kind == "full":
            v = layer.linear.weight.flatten(1) @ patch + layer.linear.bias  # type: ignore
        z[b, :, y, x] = m * v
    pooled = torch.zeros(2, size, 3, 3)  # 9 positions: windows of 4, 4 and 1
    for i, j in itertools.product(range(3), range(3)):
        pooled[:, :, i, j] = z[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].mean(dim=(2, 3))
    x2 = F.adaptive_avg_pool2d(pooled, 2)
    norm = layer.norm
    x2 = (x2 - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()  # type: ignore
    bottleneck = layer.bottleneck
    x2 = torch.einsum("oc,bchw->bohw", bottleneck.weight[:, :, 0, 0], x2)  # type: ignore
    x2 = x2 + bottleneck.bias[:, None, None]  # type: ignore
    want = block.classifiers[0](x2.flatten(1))
    [got] = made(images)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_gradients_of_phi_full_are_those_of_the_plain_form():
    config = PhiFullConfig(k=4, pool=4, bottleneck=3)
    made = network(config, 16, side=13, num_classes=5)
    images = torch.randn(4, 3, 13, 13, generator=torch.Generator().manual_seed(3))
    block, layer = made.top, made.top.layers[0]
    code = block.code(images)[0]  # type: ignore[misc]
    made(images)[0].square().sum().backward()
    got = {name: p.grad.clone() for name, p in made.named_parameters()}
    made.zero_grad()
    bits = torch.from_numpy(np.unpackbits(code.numpy(), axis=-1, bitorder="little").copy())
    z = layer.linear(images) * bits.permute(0, 3, 1, 2)  # type: ignore[operator]
    x = layer.bottleneck(layer.norm(F.avg_pool2d(z, 4, 4, ceil_mode=True)))  # type: ignore
    block.classifiers[0](x.flatten(1)).square().sum().backward()
    for name, p in made.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-4)


def test_several_maps_an_entry_are_summed_over_the_set_entries_and_divided_by_k():
    config = PhiFullConfig(k=3, maps_per_entry=2, **BARE)
    made = network(config, 8, side=7, num_classes=4)
    images = torch.randn(2, 3, 7, 7)
    layer, code = made.top.layers[0], made.top.code
    [bits] = code(images)  # type: ignore[misc]
    m = np.unpackbits(bits.numpy(), axis=-1, bitorder="little")
    z = layer.linear(images).detach().numpy()  # type: ignore[operator]
    want = np.zeros((2, 2, 3, 3), np.float32)
    for b, c, n, y, x in itertools.product(range(2), range(2), range(8), range(3), range(3)):
        want[b, c, y, x] += m[b, y, x, n] * z[b, c * 8 + n, y, x] / 3
    np.testing.assert_allclose(
        made.top.maps(images)[0].detach().numpy(), want, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("side", range(5, 16))
@pytest.mark.parametrize(("pool", "stride"), [(5, 3), (2, 3), (4, 4), (3, 1), (6, 2)])
def test_windows_that_overlap_are_averaged_as_torch_does(side: int, pool: int, stride: int):
    bare: dict[str, Any] = {"k": 2, "batch_norm": False, "bottleneck": None}
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    for kind in (PhiFullConfig, PhiHardConfig):
        plain = network(kind(pool=None, **bare), 8, side=side).top
        config = kind(pool=pool, pool_stride=stride, **bare)
        try:
            want = F.avg_pool2d(plain.maps(images)[0], pool, stride, ceil_mode=True)
        except RuntimeError:
            with pytest.raises(ValueError, match="leaves nothing of a map"):
                network(config, 8, side=side)
            continue
        made = network(config, 8, side=side).top
        made.layers.load_state_dict(plain.layers.state_dict())
        [got] = made.maps(images)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert got.shape[-1] == made.layers[0].out_side


@pytest.mark.parametrize("residual", ["add", "cat"])
def test_the_residual_is_the_middle_of_the_input(residual: str):
    config = PhiHardConfig(k=2, pool=None, batch_norm=False, bottleneck=3, residual=residual)
    plain = PhiHardConfig(k=2, pool=None, batch_norm=False, bottleneck=3)
    images = torch.randn(2, 3, 9, 9)
    with_it = network(config, 8, side=9).top.maps(images)[0]
    without = network(plain, 8, side=9).top.maps(images)[0]
    middle = images[:, :, 2:7, 2:7]
    want = without + middle if residual == "add" else torch.cat([without, middle], dim=1)
    torch.testing.assert_close(with_it, want)


def test_a_residual_that_does_not_fit_says_what_to_set():
    with pytest.raises(ValueError, match="set bottleneck=3, or residual=cat"):
        network(PhiHardConfig(residual="add"), 256)


def test_the_simple_network_is_one_linear_layer_on_the_full_embedding():
    torch.manual_seed(0)
    on = dictionary(8)
    simple = SimpleNetwork(on, k=3, image_size=9, num_classes=4)
    images = torch.randn(3, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    [bits] = simple.code(images)
    embedded = full_embedding(images, bits, 8, patch_size=5).view(3, 8, 75, 25)  # (B, N, d, P)
    weight = simple.weight.detach().clone().requires_grad_()
    by_entry = weight.view(25, 75, 8, 4)  # (P, d, N, C)
    want = torch.einsum("bndp,pdnc->bc", embedded, by_entry) + simple.bias
    [got] = simple(images)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    got.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(simple.weight.grad, weight.grad, rtol=1e-4, atol=1e-4)


def test_every_k_has_its_own_network_and_its_code_is_that_of_this_k_alone():
    both = network(PhiFullConfig(k=4, also_k=(1, 0.5), bottleneck=3), 16, side=13)
    assert both.head_names == ("", "_k1", "_k8")
    images = torch.randn(2, 3, 13, 13)
    codes = both.top.code(images)  # type: ignore[misc]
    for k, bits in zip((4, 1, 8), codes, strict=True):
        alone = network(PhiFullConfig(k=k, bottleneck=3), 16, side=13).top.code
        assert alone is not None and torch.equal(alone(images)[0], bits)
    assert len(both(images)) == 3
    both(images)[1].sum().backward()
    untouched = [p.grad for p in both.top.layers[0].parameters()]
    assert all(grad is None for grad in untouched)


def test_a_layer_below_the_top_evaluates_and_is_not_trained():
    first = network(PhiFullConfig(k=4, pool=2, bottleneck=6), 16, side=13).top
    below = first.layers[0]
    on = dictionary(8, 3, channels=6)
    config = DeeperCodeConfig(size=8, k=2, bottleneck=5)
    top = code_block(config, on, model=PHI, side=int(below.out_side), num_classes=10)  # type: ignore
    deep = PatchNetwork([first, top]).train()
    before = below.norm.running_mean.clone()  # type: ignore[union-attr, operator]
    images = torch.randn(3, 3, 13, 13)
    deep(images)[0].sum().backward()
    assert torch.equal(below.norm.running_mean, before)  # type: ignore[arg-type]
    assert all(p.grad is None for p in first.parameters())
    assert all(p.grad is not None for p in top.parameters())
    alone = PatchNetwork([top])
    torch.testing.assert_close(deep.eval()(images), alone.eval()(first.maps(images)[0]))


def test_summed_logits_are_those_of_all_layers():
    first = network(PhiFullConfig(k=4, pool=2, bottleneck=6), 16, side=13).top
    on = dictionary(8, 3, channels=6)
    side = int(first.layers[0].out_side)  # type: ignore[arg-type]
    top = code_block(DeeperCodeConfig(size=8, k=2), on, model=PHI, side=side, num_classes=10)
    images = torch.randn(3, 3, 13, 13)
    summed = PatchNetwork([first, top], sum_logits=True).eval()(images)[0]
    apart = PatchNetwork([first, top]).eval()(images)[0] + PatchNetwork([first]).eval()(images)[0]
    torch.testing.assert_close(summed, apart)


@pytest.mark.parametrize("kind", ["full", "hard"])
@pytest.mark.parametrize("code", ["up_to", "kth", "triangle"])
def test_a_further_layer_has_the_code_of_the_first(kind: str, code: str):
    size, side, s, k, channels = 8, 7, 3, 3, 4
    values: dict[str, Any] = {"k": 5, "code": code}
    model: Phi = PhiFullConfig(**values) if kind == "full" else PhiHardConfig(**values)
    config = DeeperCodeConfig(size=size, k=k, **BARE)
    on = dictionary(size, s, channels=channels)
    block = code_block(config, on, model=model, side=side, num_classes=5).eval()
    maps = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        [got] = block.maps(maps)
    layer = block.layers[0]
    for b, y, x in itertools.product(range(2), range(5), range(5)):
        patch = maps[b, :, y : y + s, x : x + s].reshape(-1)
        distance = on.kernel @ patch + on.bias
        order, want = distance.argsort(), torch.zeros(size)
        if code == "triangle":
            want = (distance.mean() - distance).clamp_min(0)
        else:
            want[order[:k] if code == "up_to" else order[k - 1]] = 1
        if kind == "full":
            want = want * (layer.linear.weight.flatten(1) @ patch + layer.linear.bias)  # type: ignore
        torch.testing.assert_close(got[b, :, y, x], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("embedding", ["random", "learnable"])
def test_a_further_layer_has_the_embedding_of_the_first(embedding: str):
    on = dictionary(8, 3, channels=4)
    model = PhiHardConfig(code="triangle", embedding=embedding)  # type: ignore[arg-type]
    block = code_block(DeeperCodeConfig(), on, model=model, side=7, num_classes=5)
    code = block.code
    assert code is not None and code.kernel.abs().max() <= 1 / 6 < on.kernel.abs().max()
    assert code.kernel.requires_grad == (embedding == "learnable")


def test_layer_wise_convolutions_stack_as_codes_do():
    first = vanilla(size=8, pool=2, bottleneck=6).top
    side = int(first.layers[0].out_side)  # type: ignore[arg-type]
    second = conv_block(DeeperConvConfig(size=8), channels=6, side=side, num_classes=10)
    made = PatchNetwork([first, second])
    assert made(torch.randn(2, 3, 32, 32))[0].shape == (2, 10)
    assert second.layers[0].out_side == 12


def test_random_embeddings_keep_their_kernel_and_learnable_ones_train_it():
    images = torch.randn(2, 3, 13, 13)
    fixed = network(PhiHardConfig(k=4, embedding="random", bottleneck=3), 16, side=13)
    assert isinstance(fixed.top.code, BitCode)
    bound = 1 / math.sqrt(75)
    assert fixed.top.code.kernel.abs().max() <= bound and fixed.top.code.kernel.std() > bound / 3
    config = PhiHardConfig(code="triangle", embedding="learnable", bottleneck=3)
    trained = network(config, 16, side=13)
    trained(images)[0].square().sum().backward()
    assert trained.top.code.kernel.grad.abs().sum() > 0  # type: ignore[union-attr, operator]


def test_codes_that_are_known_already_are_not_computed_again():
    made = network(PhiFullConfig(k=4, bottleneck=3), 16, side=13)
    images = torch.randn(2, 3, 13, 13)
    codes: list[Tensor] = made.top.code(images)  # type: ignore[misc]
    want = made(images)[0]
    made.top.code = None
    with pytest.raises(AssertionError):
        made(images)
    made = network(PhiFullConfig(k=4, bottleneck=3), 16, side=13)
    torch.testing.assert_close(made(images, codes)[0], want)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k": 1.5}, "k"),
        ({"k": 4, "also_k": [4]}, "hold a value twice"),
        ({"embedding": "learnable"}, "needs code=triangle"),
        ({"code": "triangle", "also_k": [2]}, "has no k"),
        ({"bottleneck": None, "bottleneck_relu": True}, "nothing to act on"),
        ({"pool": None, "pool_stride": 2}, "moves nothing"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        PhiHardConfig(**values)


def test_a_share_of_the_dictionary_is_a_number_of_entries():
    assert [entries(k, 1024) for k in (1, 256, 0.25, 0.0001)] == [1, 256, 256, 1]
    with pytest.raises(ValueError, match="k=17 is more than the 16 entries"):
        network(PhiFullConfig(k=17), 16)
