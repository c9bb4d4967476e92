"""Networks for other programs: TorchScript and ONNX, with what they expect of images inside."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selfsup_ray.artifacts import whole_file
from selfsup_ray.errors import ConfigError
from selfsup_ray.models.backbones import ResNetConfig
from selfsup_ray.models.clusterer import Clusterer
from selfsup_ray.models.encoder import Encoder, for_inference
from selfsup_ray.models.inputs import ImageInput
from selfsup_ray.models.objective import unit_rows

Format = Literal["torchscript", "onnx"]
SUFFIX: dict[Format, str] = {"torchscript": ".torchscript.pt", "onnx": ".onnx"}
FITS = {
    "crop": "scale the shorter side to {0} pixels and cut the central square",
    "pad": "scale the longer side to {0} pixels and pad to a square",
    "squash": "scale both sides to {0} pixels",
}


class Portable(nn.Module):
    """A network from levels in [0, 1], float32 (B, 3, s, s), to unit rows or probabilities."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, body: nn.Module, images: ImageInput, *, output: Literal["unit_rows", "softmax"]
    ) -> None:
        super().__init__()
        self.body, self.output = body, output
        self.register_buffer("mean", torch.tensor(images.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(images.std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Return float32 (B, d) unit rows, or (B, K) probabilities."""
        out = self.body((images - self.mean) / self.std)
        return unit_rows(out) if self.output == "unit_rows" else out.softmax(dim=1)


def portable_encoder(encoder: Encoder) -> Portable:
    """Return an encoder's network, weights and batch norm folded, on the CPU.

    Raises ConfigError for an encoder of patches.
    """
    description = encoder.description
    if not isinstance(description.backbone, ResNetConfig):
        raise ConfigError(
            f"export.formats writes ResNets, but {encoder.path} holds a "
            f"{description.backbone.name}. Leave formats out: its safetensors are written anyway."
        )
    head = encoder.head() if description.output == "head" else nn.Identity()
    body = nn.Sequential(encoder.backbone(), head)
    return _finished(Portable(body, description.images, output="unit_rows"))


def portable_clusterer(clusterer: Clusterer) -> Portable:
    """Return a clusterer's network, weights and batch norm folded, on the CPU."""
    body = nn.Sequential(clusterer.backbone(), clusterer.head())
    return _finished(Portable(body, clusterer.description.images, output="softmax"))


def _finished(network: Portable) -> Portable:
    for_inference(network, "cpu")
    return network.to(memory_format=torch.contiguous_format)


def preprocessing(images: ImageInput, *, output: str) -> dict[str, Any]:
    """Return what is to be done to a file before the network sees it, in numbers and in words."""
    side = images.view_size or images.image_size
    steps = ["decode as RGB", FITS[images.fit].format(images.image_size)]
    if images.share < 1:
        steps.append(f"cut the central square of {images.share:g} of the side")
    if side != images.image_size or images.share < 1:
        steps.append(f"scale to {side} x {side} pixels")
    return {
        "input": f"images: float32 (batch, 3, {side}, {side}), RGB, levels divided by 255",
        "output": output,
        "steps": [*steps, "divide by 255; mean and deviation are part of the network"],
        "image_size": images.image_size,
        "view_size": side,
        "share": images.share,
        "fit": images.fit,
        "mean": list(images.mean),
        "std": list(images.std),
    }


def write_portable(network: Portable, path: Path, kind: Format, metadata: dict[str, Any]) -> None:
    """Write a network for any batch size, its metadata inside, as TorchScript or ONNX.

    Raises ConfigError when the packages that ONNX needs are not installed.
    """
    side = int(metadata["view_size"])
    example = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    text = json.dumps(metadata)
    if kind == "torchscript":
        with warnings.catch_warnings(), torch.no_grad(), whole_file(path) as temporary:
            # It warns that it is deprecated; what comes after it, torch.export, only Python reads.
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(network, example)  # type: ignore[no-untyped-call]
            torch.jit.save(traced, temporary, _extra_files={"preprocessing.json": text})
        return
    require_onnx()
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter's own
            program = torch.onnx.export(
                network,
                (example,),
                input_names=["images"],
                output_names=["rows" if network.output == "unit_rows" else "probabilities"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                dynamo=True,
                verbose=False,
            )
            assert program is not None, "the exporter returns a program"
            program.model.metadata_props["preprocessing"] = text
            with whole_file(path) as temporary:
                program.save(str(temporary))
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def require_onnx() -> None:
    """Raise ConfigError unless the packages that torch's exporter needs are installed."""
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"export.formats=[onnx] needs the package {package}: "
                f"pip install 'selfsup-ray[onnx]', or leave onnx out."
            )
