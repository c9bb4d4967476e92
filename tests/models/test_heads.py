"""models/heads.py against the parameter counts published for these heads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from selfsup_ray.errors import ConfigError
from selfsup_ray.models.heads import Head, LinearHead, MLPHead, NoHead

TRUNK = 11_168_832  # ResNet-18 without classifier


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("config", "in_dim", "expected"),
    [
        (MLPHead(), 512, 11_497_152 - TRUNK),  # SCAN's contrastive ResNet-18
        (LinearHead(), 512, 11_234_496 - TRUNK),  # instance discrimination
        (MLPHead(dim=256, batch_norm="hidden"), 512, 11_563_840 - TRUNK),  # BYOL's projector
        (MLPHead(hidden_dim=256, dim=256, batch_norm="hidden"), 256, 132_096),  # its predictor
    ],
)
def test_sizes_are_the_published_ones(
    config: MLPHead | LinearHead, in_dim: int, expected: int
) -> None:
    assert num_parameters(Head(config, in_dim)) == expected


def test_batch_norm_all_is_simclrs_head() -> None:
    head = Head(MLPHead(layers=3, batch_norm="all"), 16)
    kinds = [type(layer).__name__ for layer in head]
    assert kinds == ["Linear", "BatchNorm", "ReLU"] * 2 + ["Linear", "BatchNorm"]
    names = dict(head.named_parameters())
    # Linear layers have no bias, and the last normalisation has no offset.
    assert [name for name in names if name.endswith("bias")] == ["1.bias", "4.bias"]
    assert num_parameters(head) == 2 * (16 * 16 + 2 * 16) + 16 * 128 + 128


def test_moco_v2s_head_is_linear_relu_linear() -> None:
    head = Head(MLPHead(dim=4), 8)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    weights = head.state_dict()
    hidden = (x @ weights["0.weight"].T + weights["0.bias"]).clamp_min(0)
    torch.testing.assert_close(head(x), hidden @ weights["2.weight"].T + weights["2.bias"])


def test_no_head_passes_features_on() -> None:
    head = Head(NoHead(), 5)
    x = torch.ones(2, 5)
    assert head.dim == 5 and torch.equal(head(x), x)


def test_one_layer_is_refused_as_mlp() -> None:
    with pytest.raises(ConfigError, match="layers"):
        MLPHead(layers=1)


def test_without_affine_the_hidden_norms_have_nothing_to_learn() -> None:
    head = Head(MLPHead(hidden_dim=4, dim=2, batch_norm="hidden", affine=False), 3)
    assert sorted(head.state_dict()) == [
        "0.bias", "0.weight", "1.num_batches_tracked", "1.running_mean", "1.running_var",
        "3.bias", "3.weight",
    ]  # fmt: skip
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    hidden = nn.functional.batch_norm(head[0](x), None, None, training=True).relu()
    torch.testing.assert_close(head(x), head[3](hidden))
    with pytest.raises(ConfigError, match="affine=false needs a batch_norm"):
        MLPHead(affine=False)


def test_heads_with_and_without_batch_norm_name_their_linear_layers_alike() -> None:
    norms = Head(MLPHead(layers=3, batch_norm="hidden"), 8).parts()
    plain = Head(MLPHead(layers=3), 8).parts()
    assert list(norms) == ["linear1", "norm1", "linear2", "norm2", "linear3"]
    assert list(plain) == ["linear1", "linear2", "linear3"]
