"""The network of each layer of `classify`: built from its config, filled from the folders below."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import torch
from torch import nn

from selfsup_ray.errors import ConfigError
from selfsup_ray.models.encoder import Encoder
from selfsup_ray.models.layer_codes import Dictionary
from selfsup_ray.models.locally_linear import (
    Block,
    Layer,
    PatchNetwork,
    code_block,
    conv_block,
)
from selfsup_ray.models.patch_backbone import PatchBackbone
from selfsup_ray.models.patch_cnn import PatchCNN
from selfsup_ray.models.patch_layers import (
    CNNConfig,
    DeeperCodeConfig,
    DeeperConfig,
    PhiFullConfig,
    PhiHardConfig,
    PhiSimpleConfig,
    VanillaConfig,
    entries,
)
from selfsup_ray.models.simple_embedding import SimpleNetwork
from selfsup_ray.models.weights import load_part, read_weights
from selfsup_ray.stages.classify_config import ClassifyConfig

CHANNELS = 3
WEIGHTS = "network.safetensors"
"""In a layer's folder: the layer's own block, code included."""
DICTIONARY = "dictionary.safetensors"
"""In the folder of a further layer: kernel and bias of its code, before it is trained."""


@dataclass(frozen=True)
class NetworkPlan:
    """What the networks of all layers are built from; picklable."""

    config: ClassifyConfig
    out: Path
    image_size: int
    num_classes: int
    encoder: Encoder | None

    @property
    def depth(self) -> int:
        """Layers in all."""
        return 1 + len(self.config.deeper)

    def folder(self, layer: int) -> Path:
        """Return the folder of a layer, counted from 1."""
        return self.out / f"layer{layer}"

    def network(self, layer: int) -> nn.Module:
        """Return the network whose top is an untrained layer, on the trained ones below it.

        Raises ConfigError when config, dictionary and image size do not go together.
        """
        try:
            match self.config.model:
                case CNNConfig() as model:
                    size, classes = self.image_size, self.num_classes
                    return PatchCNN(model, image_size=size, num_classes=classes)
                case PhiSimpleConfig() as model:
                    return self.simple(model, self.dictionary(1))
            blocks = [self.trained_block(i) for i in range(1, layer)]
            blocks.append(self.block(layer, blocks, self.dictionary(layer)))
        except ValueError as error:
            raise ConfigError(f"classify: {error}.") from None
        return PatchNetwork(blocks, sum_logits=self.config.sum_logits)

    def trained_network(self) -> nn.Module:
        """Return the finished network of the last layer, in evaluation mode."""
        path = self.folder(self.depth) / WEIGHTS
        match self.config.model:
            case CNNConfig():
                return load_part(self.network(1), path, "").eval()
            case PhiSimpleConfig() as model:
                made = self.simple(model, self._stored_dictionary(1))
                return load_part(made, path, "").eval()
        blocks = [self.trained_block(i) for i in range(1, self.depth + 1)]
        return PatchNetwork(blocks, sum_logits=self.config.sum_logits).eval()

    def trained_block(self, layer: int) -> Block:
        """Return the trained block of a finished layer."""
        path = self.folder(layer) / WEIGHTS
        below = [self.trained_block(i) for i in range(1, layer)]
        has_code = not isinstance(self.config.model, VanillaConfig)
        dictionary = self._stored_dictionary(layer) if has_code else None
        return load_part(self.block(layer, below, dictionary), path, "")

    def simple(self, model: PhiSimpleConfig, dictionary: Dictionary | None) -> SimpleNetwork:
        """Return the untrained network of Table 2's Simple."""
        assert dictionary is not None, "the embedding is one of a dictionary"
        k = entries(model.k, dictionary.size)
        size, classes = self.image_size, self.num_classes
        return SimpleNetwork(dictionary, k=k, image_size=size, num_classes=classes)

    def block(self, layer: int, below: list[Block], dictionary: Dictionary | None) -> Block:
        """Return the untrained block of a layer on the blocks below it.

        Raises ValueError when they do not fit.
        """
        channels, side = CHANNELS, self.image_size
        if below:
            top = below[-1].layers[0]
            assert isinstance(top, Layer), "a block is made of layers"
            channels, side = top.out_channels, top.out_side
        model = self.config.model
        config = model if layer == 1 else self.config.deeper[layer - 2]
        if isinstance(config, PhiFullConfig | PhiHardConfig | DeeperCodeConfig):
            assert dictionary is not None, f"layer {layer} needs its dictionary"
            assert isinstance(model, PhiFullConfig | PhiHardConfig), "codes stand on codes"
            classes = self.num_classes
            return code_block(config, dictionary, model=model, side=side, num_classes=classes)
        assert not isinstance(config, CNNConfig | PhiSimpleConfig), "these have one layer only"
        return conv_block(config, channels=channels, side=side, num_classes=self.num_classes)

    def dictionary(self, layer: int) -> Dictionary | None:
        """Return the dictionary that an untrained layer starts from; None where it needs none."""
        if not self.config.needs_dictionary:
            return None
        if layer == 1:
            return dictionary_of(self.encoder)
        tensors = read_weights(self.folder(layer) / DICTIONARY)
        patch_size = self.config.deeper[layer - 2].patch_size
        return Dictionary(tensors["kernel"], tensors["bias"], patch_size)

    def _stored_dictionary(self, layer: int) -> Dictionary:
        """Return the dictionary among the weights of a trained layer."""
        tensors = read_weights(self.folder(layer) / WEIGHTS)
        kernel, bias = tensors["code.kernel"], tensors["code.bias"]
        if layer > 1:
            return Dictionary(kernel, bias, self.config.deeper[layer - 2].patch_size)
        return Dictionary(kernel, bias, isqrt(kernel.shape[1] // CHANNELS))


def dictionary_of(encoder: Encoder | None) -> Dictionary:
    """Return the dictionary of the encoder that `patches` makes.

    Raises ConfigError when there is none, or the encoder is another kind of network.
    """
    if encoder is None:
        raise ConfigError(
            "classify.model is made of a dictionary of patches, but no encoder was given. Add the "
            "stages `whiten` and `patches`, or choose model.name=vanilla or cnn."
        )
    backbone = encoder.backbone()
    if not isinstance(backbone, PatchBackbone):
        raise ConfigError(
            f"{encoder.path} holds a {encoder.description.backbone.name}, but classify.model is "
            f"made of a dictionary of patches. Give the encoder of the stage `patches`."
        )
    kernel, bias = backbone.dictionary
    return Dictionary(kernel, bias, backbone.code.patch_size)


def require_fits(plan: NetworkPlan, *, num_train: int) -> None:
    """Raise ConfigError unless the networks of all layers can be built; nothing is computed.

    num_train: training images, whose maps must have as many patches as further layers draw.
    """
    first, below = plan.dictionary(1), list[Block]()
    try:
        with torch.device("meta"):
            match plan.config.model:
                case CNNConfig():
                    plan.network(1)
                    return
                case PhiSimpleConfig() as model:
                    plan.simple(model, first)
                    return
            below.append(plan.block(1, below, first))
            for layer, config in enumerate(plan.config.deeper, start=2):
                shape = _shape_of(config, below[-1], num_train)
                below.append(plan.block(layer, below, shape))
    except ValueError as error:
        raise ConfigError(f"classify: layer {len(below) + 1}: {error}.") from None


def _shape_of(config: DeeperConfig, below: Block, num_train: int) -> Dictionary | None:
    """Return a dictionary of the shape that a layer's will have, without its numbers.

    Raises ValueError when there are too few patches to make it of.
    """
    if not isinstance(config, DeeperCodeConfig):
        return None
    top = below.layers[0]
    assert isinstance(top, Layer), "a block is made of layers"
    positions = max(0, top.out_side - config.patch_size + 1) ** 2
    if config.source == "maps" and 0 < positions * num_train < config.patches:
        raise ValueError(
            f"size={config.size} entries of patches_per_entry={config.patches_per_entry} patches "
            f"want {config.patches:,} patches, but the maps of {num_train:,} images have "
            f"{positions * num_train:,}; lower either"
        )
    kernel = torch.empty(config.size, top.out_channels * config.patch_size**2)
    return Dictionary(kernel, torch.empty(config.size), config.patch_size)
