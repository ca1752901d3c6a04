"""Image data sets as tensors: the embedded digits, MNIST and Fashion-MNIST.

``digits`` ships inside the package (``digits.npz``): 1,797 images of 8 x 8 pixels, 0..16 each, the
test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine
Learning Repository, 1998, https://doi.org/10.24432/C50P49), licensed CC BY 4.0. The file holds the
images and labels exactly as scikit-learn's ``load_digits`` returns them, as uint8; the pixels are
divided by 16 here, nothing else is changed. The split into 1,442 training and 355 test images is
fixed: of every class, each fifth image in file order is a test image.

``mnist`` and ``fashion-mnist`` are read from their official idx files, which are never downloaded
here. Under ``data_dir`` both ``<name>/<file>[.gz]`` and torchvision's ``MNIST/raw/<file>[.gz]``,
``FashionMNIST/raw/<file>[.gz]`` are understood. Archives are checked against their published md5,
plain files against what their headers promise.
"""

import gzip
import hashlib
import io
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_IMAGES_MAGIC = 0x00000803  # idx: unsigned bytes, 3 dimensions
_LABELS_MAGIC = 0x00000801  # idx: unsigned bytes, 1 dimension
_NUM_CLASSES = 10
_DIGITS_PATH = Path(__file__).with_name("digits.npz")


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification data set, wholly in memory.

    Attributes:
        name: the name it was loaded by.
        train_images: (N, C, H, W) float32 in [0, 1].
        train_labels: (N,) int64 in [0, num_classes).
        test_images: (M, C, H, W) float32 in [0, 1].
        test_labels: (M,) int64 in [0, num_classes).
        num_classes: how many classes there are.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width


@dataclass(frozen=True)
class _IdxSource:
    """Where a data set's idx files lie, their published md5, and where they come from."""

    folders: tuple[str, ...]
    address: str
    md5: dict[str, str]


_IDX_SOURCES = {
    "mnist": _IdxSource(
        folders=("mnist", "MNIST/raw"),
        address="http://yann.lecun.com/exdb/mnist/ "
        "(mirror: https://ossci-datasets.s3.amazonaws.com/mnist/)",
        md5={
            "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "fashion-mnist": _IdxSource(
        folders=("fashion-mnist", "FashionMNIST/raw"),
        address="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        md5={
            "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
}


def names() -> tuple[str, ...]:
    """The names that `load` understands."""
    return ("digits", *_IDX_SOURCES)


def load(name: str, data_dir: Path | str | None = None) -> Dataset:
    """Load a data set into memory.

    Args:
        name: one of `names()`.
        data_dir: folder with the files of ``mnist`` and ``fashion-mnist``; ``digits`` needs none.

    Returns:
        The data set, with pixels scaled to [0, 1].

    Raises:
        ValueError: unknown name; a file that is corrupt, truncated or not what it claims to be.
        FileNotFoundError: a file is missing; names the file and its official address.
    """
    if name == "digits":
        return _load_digits()
    if name in _IDX_SOURCES:
        return _load_idx(name, None if data_dir is None else Path(data_dir))
    raise ValueError(f"unknown data set {name!r}, expected one of {', '.join(names())}")


def batches(
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    generator: torch.Generator | None = None,
    *,
    drop_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Go through the examples once, in batches.

    Args:
        images: (N, ...) tensor.
        labels: (N,) tensor.
        batch_size: examples per batch; the last batch may be smaller.
        generator: CPU generator that shuffles the examples; None keeps their order.
        drop_last: leave a smaller last batch out.

    Returns:
        An iterator over (images, labels) of each batch; equal generator states, equal batches.

    Raises:
        ValueError: batch_size below 1, or unequal numbers of images and labels.
    """
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}")
    if len(images) != len(labels):
        raise ValueError(f"expected as many labels as images, got {len(labels)} and {len(images)}")
    # Drawn here, not at the iterator's first step: the generator's state after this call must not
    # depend on when the batches are consumed.
    order = None if generator is None else torch.randperm(len(images), generator=generator)
    return _iterate(images, labels, batch_size, order, drop_last)


def _iterate(
    images: Tensor, labels: Tensor, batch_size: int, order: Tensor | None, drop_last: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    end = len(images) - len(images) % batch_size if drop_last else len(images)
    for start in range(0, end, batch_size):
        if order is None:
            yield images[start : start + batch_size], labels[start : start + batch_size]
        else:
            chosen = order[start : start + batch_size]
            yield images[chosen.to(images.device)], labels[chosen.to(labels.device)]


def _load_digits() -> Dataset:
    try:
        with np.load(_DIGITS_PATH, allow_pickle=False) as file:
            pixels, labels = file["images"], file["labels"]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{_DIGITS_PATH} is corrupt, reinstall the package: {error}") from error
    images = torch.from_numpy(pixels).to(torch.float32).div_(16).unsqueeze(1)
    targets = torch.from_numpy(labels).to(torch.int64)
    one_hot = torch.nn.functional.one_hot(targets, _NUM_CLASSES)
    rank_in_class = (one_hot.cumsum(0) * one_hot).sum(1)  # 1, 2, 3, ... within each class
    is_test = rank_in_class % 5 == 0
    return Dataset(
        name="digits",
        train_images=images[~is_test],
        train_labels=targets[~is_test],
        test_images=images[is_test],
        test_labels=targets[is_test],
        num_classes=_NUM_CLASSES,
    )


def _load_idx(name: str, data_dir: Path | None) -> Dataset:
    train_images, train_labels = _read_pair(name, data_dir, "train")
    test_images, test_labels = _read_pair(name, data_dir, "t10k")
    if train_images.shape[1:] != test_images.shape[1:]:
        raise ValueError(
            f"{name}: expected test images shaped like the training images, "
            f"{tuple(train_images.shape[1:])}, got {tuple(test_images.shape[1:])}"
        )
    return Dataset(name, train_images, train_labels, test_images, test_labels, _NUM_CLASSES)


def _read_pair(name: str, data_dir: Path | None, part: str) -> tuple[Tensor, Tensor]:
    images_path, pixels = _read_idx(name, data_dir, f"{part}-images-idx3-ubyte", _IMAGES_MAGIC)
    labels_path, targets = _read_idx(name, data_dir, f"{part}-labels-idx1-ubyte", _LABELS_MAGIC)
    if len(pixels) != len(targets):
        raise ValueError(
            f"{labels_path}: expected {len(pixels)} labels for the images of {images_path}, "
            f"got {len(targets)}"
        )
    if targets.max() >= _NUM_CLASSES:
        raise ValueError(f"{labels_path}: expected labels 0..9, got {targets.max()}")
    images = torch.from_numpy(pixels).to(torch.float32).div_(255).unsqueeze(1)
    return images, torch.from_numpy(targets).to(torch.int64)


def _read_idx(
    name: str, data_dir: Path | None, filename: str, magic: int
) -> tuple[Path, np.ndarray]:
    path = _find(name, data_dir, filename)
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = _decompress(path, content, _IDX_SOURCES[name].md5[filename])
    return path, _parse_idx(path, content, magic)


def _find(name: str, data_dir: Path | None, filename: str) -> Path:
    source = _IDX_SOURCES[name]
    if data_dir is None:
        raise FileNotFoundError(
            f"{name} needs {filename}.gz, but no data directory was given; "
            f"official address: {source.address}"
        )
    candidates = [
        data_dir / folder / (filename + suffix)
        for folder in source.folders
        for suffix in (".gz", "")
    ]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"{name} needs {filename}.gz, found none of {', '.join(map(str, candidates))}; "
        f"official address: {source.address}"
    )


def _decompress(path: Path, content: bytes, expected_md5: str) -> bytes:
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 != expected_md5:
        raise ValueError(
            f"{path} ({len(content):,} bytes) is corrupt, truncated or another file: "
            f"expected md5 {expected_md5}, got {md5}"
        )
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        return file.read()


def _parse_idx(path: Path, content: bytes, magic: int) -> np.ndarray:
    """Read an idx file: big-endian magic, one uint32 per dimension, then the bytes."""
    dimensions = magic & 0xFF
    header_size = 4 + 4 * dimensions
    if len(content) < header_size:
        raise ValueError(
            f"{path} is truncated: expected a header of {header_size} bytes, got {len(content)}"
        )
    found_magic, *shape = struct.unpack_from(f">{1 + dimensions}I", content)
    if found_magic != magic:
        raise ValueError(f"{path}: expected magic number {magic:#010x}, got {found_magic:#010x}")
    if 0 in shape:
        raise ValueError(f"{path}: expected at least one example, got shape {tuple(shape)}")
    expected_size = header_size + math.prod(shape)
    if len(content) != expected_size:
        raise ValueError(
            f"{path} is {'truncated' if len(content) < expected_size else 'too long'}: expected "
            f"{expected_size:,} bytes for shape {tuple(shape)}, got {len(content):,}"
        )
    # A copy, since torch wants writable memory and `content` is immutable.
    return np.frombuffer(content, dtype=np.uint8, offset=header_size).reshape(shape).copy()
