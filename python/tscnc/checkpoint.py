"""Checkpoints: a safetensors file that stores a pruned weight as its kept values and its mask.

Each pruned weight `NAME` becomes two tensors: `NAME.values`, the kept entries in row-major order,
and `NAME.mask`, uint8, the row-major mask as little-endian bits compressed by zlib. Everything else
is stored as it is. The file's metadata holds one JSON text under `tscnc`: the format's version, the
shapes of the pruned weights and what the caller added.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tscnc.files import write_bytes
from tscnc.layers import dense_weight, pattern_of, prunable_layers, stored_weight
from tscnc.optional import require
from tscnc_kernels.nn.masked_layer import MASK_KEY

FORMAT = 1
_SHOWN = 3


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that belongs to another model."""


class Checkpoint(NamedTuple):
    """What a checkpoint file holds.

    Attributes:
        tensors: the model's parameters and buffers by their dense names, pruned weights as dense
            matrices.
        masks: bool masks of the pruned weights, by parameter name.
        metadata: what the caller of `save_checkpoint` added.
    """

    tensors: dict[str, Tensor]
    masks: dict[str, Tensor]
    metadata: dict[str, Any]


def save_checkpoint(
    path: Path, model: nn.Module, masks: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Writes a model's weights atomically, pruned ones as kept values and compressed mask.

    Args:
        path: the file to write.
        model: a network with dense or masked layers.
        masks: bool masks by parameter name (`"0.weight"`); a weight that is not named is stored
            whole.
        metadata: JSON content to keep with the weights.

    Raises:
        ValueError: a mask that names no weight or differs from its weight in shape.
        ModuleNotFoundError: safetensors is not installed.
        OSError: the file cannot be written.
    """
    safetensors = require("safetensors.torch")
    tensors = dense_tensors(model)
    shapes = {}
    for name, mask in masks.items():
        if name not in tensors or tensors[name].shape != mask.shape:
            got = tuple(tensors[name].shape) if name in tensors else "no such weight"
            raise ValueError(f"mask {name!r} has shape {tuple(mask.shape)}, the model {got}")
        weight = tensors.pop(name)
        shapes[name] = list(weight.shape)
        tensors[f"{name}.values"] = weight[mask.to(weight.device)].contiguous()
        tensors[f"{name}.mask"] = torch.frombuffer(bytearray(pack_mask(mask)), dtype=torch.uint8)
    header = {"format": FORMAT, "shapes": shapes, "metadata": dict(metadata)}
    write_bytes(path, safetensors.save(tensors, {"tscnc": json.dumps(header)}))


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint without a model.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is no checkpoint, is damaged, or holds NaN or infinite weights.
        ModuleNotFoundError: safetensors is not installed.
    """
    safetensors = require("safetensors.torch")
    content = Path(path).read_bytes()
    try:
        stored = safetensors.load(content)
        header_size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + header_size])
        ours = json.loads(header["__metadata__"]["tscnc"])
        version, shapes, metadata = ours["format"], ours["shapes"], ours["metadata"]
    except Exception as error:
        raise CheckpointError(
            f"{path} is not a complete tscnc checkpoint: {type(error).__name__}: {error}"
        ) from error
    if version != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {version!r}, this version reads {FORMAT}"
        )
    masks = {}
    for name, shape in shapes.items():
        try:
            values = stored.pop(f"{name}.values")
            mask = unpack_mask(stored.pop(f"{name}.mask").numpy().tobytes(), shape)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: damaged mask of {name!r}: {error}") from error
        kept = int(mask.sum())
        if values.shape != (kept,):
            raise CheckpointError(
                f"{path}: {name!r} keeps {kept} weights, but its values have shape "
                f"{tuple(values.shape)}"
            )
        stored[name] = torch.zeros(shape, dtype=values.dtype).masked_scatter_(mask, values)
        masks[name] = mask
    for name, tensor in stored.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name!r} holds NaN or infinite weights")
    return Checkpoint(stored, masks, metadata)


def load_checkpoint(path: Path, model: nn.Module) -> Checkpoint:
    """Loads a checkpoint into a model: a masked one with the same masks, or a plain dense one.

    Args:
        path: a file written by `save_checkpoint`.
        model: the network to fill; nothing is changed unless everything fits.

    Returns:
        What the file holds; with its `masks`, `tscnc_kernels.nn.sparsify` turns a dense model into
        the masked one.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, or its names, shapes or masks are not the model's.
    """
    checkpoint = read_checkpoint(path)
    _check_fits(Path(path), checkpoint, model)
    layers = prunable_layers(model)
    plain = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in checkpoint.tensors.items():
            pattern = pattern_of(layers[name]) if name in layers else None
            if pattern is None:
                plain[name].copy_(tensor)
                continue
            stored = stored_weight(layers[name])
            stored.copy_(tensor if stored.ndim > 1 else tensor[checkpoint.masks[name]])
    return checkpoint


def dense_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns a model's parameters and persistent buffers, masked weights as dense matrices."""
    masked = {
        name: layer
        for name, layer in prunable_layers(model).items()
        if pattern_of(layer) is not None
    }
    packed = {name.removesuffix("weight") + MASK_KEY for name in masked}
    dense = {name: dense_weight(layer) for name, layer in masked.items()}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in packed}
    return {name: t.detach().cpu().contiguous() for name, t in {**state, **dense}.items()}


def pack_mask(mask: Tensor) -> bytes:
    """Returns a bool mask as compressed bits: row-major, little-endian within a byte."""
    bits = np.packbits(mask.detach().cpu().numpy().reshape(-1), bitorder="little")
    return zlib.compress(bits.tobytes(), 9)


def unpack_mask(packed: bytes, shape: list[int] | tuple[int, ...]) -> Tensor:
    """Returns the bool mask of the given shape that `pack_mask` packed.

    Raises:
        ValueError: the bytes are damaged or belong to another shape.
    """
    count = math.prod(shape)
    size = (count + 7) // 8
    decoder = zlib.decompressobj()
    try:
        data = decoder.decompress(packed, size + 1)
    except zlib.error as error:
        raise ValueError(f"compressed mask is damaged ({error})") from error
    if len(data) != size or not decoder.eof:
        raise ValueError(
            f"expected the bits of shape {tuple(shape)}, {size} bytes, got another size"
        )
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=count, bitorder="little")
    return torch.from_numpy(bits.astype(bool)).reshape(tuple(shape))


def _check_fits(path: Path, checkpoint: Checkpoint, model: nn.Module) -> None:
    expected = dense_tensors(model)
    missing = sorted(expected.keys() - checkpoint.tensors.keys())
    surplus = sorted(checkpoint.tensors.keys() - expected.keys())
    if missing or surplus:
        raise CheckpointError(
            f"{path} belongs to another model: it lacks {_some(missing)}, and has {_some(surplus)} "
            "that the model has not"
        )
    for name, tensor in checkpoint.tensors.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{path} belongs to another model: {name!r} has shape {tuple(tensor.shape)}, "
                f"the model {tuple(expected[name].shape)}"
            )
    for name, layer in prunable_layers(model).items():
        pattern = pattern_of(layer)
        if pattern is None:
            continue
        mask = checkpoint.masks.get(name)
        if mask is None or not torch.equal(mask, pattern.mask.cpu()):
            raise CheckpointError(
                f"{path}: {name!r} has another mask than the model; load into a dense model, or "
                "sparsify with the checkpoint's masks first"
            )


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN]) or "nothing"
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
