"""The data sets: the embedded digits, idx files good and bad, and the batch iterator."""

import gzip
import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from tscnc import data

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def idx(array: np.ndarray, magic: int | None = None) -> bytes:
    magic = 0x0800 + array.ndim if magic is None else magic
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()


def small_files() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    files = {}
    for images, labels, count in ((TRAIN_IMAGES, TRAIN_LABELS, 7), (TEST_IMAGES, TEST_LABELS, 3)):
        files[images] = idx(random.integers(0, 256, (count, 4, 5), dtype=np.uint8))
        files[labels] = idx(random.integers(0, 10, count, dtype=np.uint8))
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_digits_are_complete_and_scaled() -> None:
    digits = data.load("digits")
    assert digits.input_shape == (1, 8, 8)
    assert len(digits.train_images) == len(digits.train_labels) == 1442
    assert len(digits.test_images) == len(digits.test_labels) == 355
    for images, labels in (
        (digits.train_images, digits.train_labels),
        (digits.test_images, digits.test_labels),
    ):
        assert images.dtype == torch.float32
        assert images.min() == 0 and images.max() == 1
        assert labels.dtype == torch.int64
        assert labels.unique().tolist() == list(range(digits.num_classes))


def test_digits_split_is_stratified_and_fixed() -> None:
    digits = data.load("digits")
    test, train = digits.test_labels.bincount(), digits.train_labels.bincount()
    assert torch.equal(test, (test + train) // 5)
    assert torch.equal(digits.test_images, data.load("digits").test_images)


def test_digits_are_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    digits = data.load("digits")
    original = datasets.load_digits()
    ours = torch.cat([digits.train_images, digits.test_images]).view(-1, 64) * 16
    ours = torch.cat([ours, torch.cat([digits.train_labels, digits.test_labels])[:, None]], dim=1)
    theirs = np.concatenate([original.data, original.target[:, None]], axis=1)
    assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, theirs.tolist()))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"not an archive", None])
def test_corrupt_digits_are_named(
    damage: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "digits.npz"
    if damage is None:
        np.savez(path, images=np.zeros((2, 8, 8), np.uint8))
    else:
        assert callable(damage)
        path.write_bytes(damage(data._DIGITS_PATH.read_bytes()))
    monkeypatch.setattr(data, "_DIGITS_PATH", path)
    with pytest.raises(ValueError, match=r"digits\.npz is corrupt"):
        data.load("digits")


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "mnist"),
        ("mnist", "MNIST/raw"),
        ("fashion-mnist", "fashion-mnist"),
        ("fashion-mnist", "FashionMNIST/raw"),
    ],
)
def test_plain_idx_files_are_read_from_both_layouts(name: str, folder: str, tmp_path: Path) -> None:
    files = small_files()
    write(tmp_path / folder, files)
    dataset = data.load(name, tmp_path)
    assert (dataset.name, dataset.num_classes, dataset.input_shape) == (name, 10, (1, 4, 5))
    pixels = np.frombuffer(files[TEST_IMAGES], np.uint8, offset=16).reshape(3, 1, 4, 5)
    torch.testing.assert_close(dataset.test_images, torch.tensor(pixels / 255).float())
    assert dataset.train_labels.tolist() == list(files[TRAIN_LABELS][8:])


def test_archives_of_the_published_md5_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archives = {name: gzip.compress(content) for name, content in small_files().items()}
    for name, archive in archives.items():
        md5 = hashlib.md5(archive, usedforsecurity=False).hexdigest()
        monkeypatch.setitem(data._IDX_SOURCES["mnist"].md5, name, md5)
    write(tmp_path / "mnist", {name + ".gz": archive for name, archive in archives.items()})
    assert data.load("mnist", str(tmp_path)).train_images.shape == (7, 1, 4, 5)


def test_an_archive_of_another_md5_is_refused(tmp_path: Path) -> None:
    archive = gzip.compress(small_files()[TRAIN_IMAGES])
    write(tmp_path / "mnist", {TRAIN_IMAGES + ".gz": archive})
    got = hashlib.md5(archive, usedforsecurity=False).hexdigest()
    with pytest.raises(
        ValueError, match="expected md5 f68b3c2dcbeaaa9fbdd348bbdeb94873, got " + got
    ):
        data.load("mnist", tmp_path)


BAD_FILES = {
    "truncated": (TRAIN_IMAGES, lambda b: b[:-1], r"truncated: expected 156 bytes .*got 155"),
    "too long": (TRAIN_IMAGES, lambda b: b + b"x", r"too long: expected 156 bytes .*got 157"),
    "no header": (TEST_LABELS, lambda b: b[:6], r"header of 8 bytes, got 6"),
    "empty file": (TEST_IMAGES, lambda b: b"", r"header of 16 bytes, got 0"),
    "wrong magic": (
        TEST_IMAGES,
        lambda b: b"\0\0\x08\x01" + b[4:],
        r"magic number 0x00000803, got 0x00000801",
    ),
    "no examples": (TRAIN_LABELS, lambda b: idx(np.zeros(0, np.uint8)), r"at least one example"),
    "counts": (TRAIN_LABELS, lambda b: idx(np.zeros(6, np.uint8)), r"expected 7 labels .*got 6"),
    "label 10": (TEST_LABELS, lambda b: b[:-1] + b"\x0a", r"expected labels 0\.\.9, got 10"),
    "test shape": (
        TEST_IMAGES,
        lambda b: idx(np.zeros((3, 5, 5), np.uint8)),
        r"\(1, 4, 5\), got \(1, 5, 5\)",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_idx_files_are_refused(case: str, tmp_path: Path) -> None:
    name, damage, message = BAD_FILES[case]
    files = small_files()
    files[name] = damage(files[name])
    write(tmp_path / "mnist", files)
    with pytest.raises(ValueError, match=message):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("name", "address"), [("mnist", "yann.lecun.com"), ("fashion-mnist", "fashion-mnist.s3")]
)
def test_a_missing_file_is_named_with_its_address(name: str, address: str, tmp_path: Path) -> None:
    files = small_files()
    del files[TEST_LABELS]
    write(tmp_path / name, files)
    with pytest.raises(FileNotFoundError, match=rf"{TEST_LABELS}\.gz.*{address}"):
        data.load(name, tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"no data directory.*{address}"):
        data.load(name)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    assert data.names() == ("digits", "mnist", "fashion-mnist")
    with pytest.raises(ValueError, match="'mnits', expected one of digits, mnist, fashion-mnist"):
        data.load("mnits")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_the_official_files_are_read(name: str) -> None:
    data_dir = os.environ.get("TSCNC_DATA_DIR")
    if not data_dir:
        pytest.skip("TSCNC_DATA_DIR does not name a folder with the official files")
    dataset = data.load(name, data_dir)
    assert dataset.train_images.shape == (60000, 1, 28, 28)
    assert dataset.test_images.shape == (10000, 1, 28, 28)
    assert dataset.train_images.min() == 0 and dataset.train_images.max() == 1
    balanced = {"mnist": 980, "fashion-mnist": 1000}
    assert int((dataset.test_labels == 0).sum()) == balanced[name]


def test_batches_without_a_generator_keep_the_order() -> None:
    images, labels = torch.arange(7.0)[:, None], torch.arange(7)
    got = list(data.batches(images, labels, 3))
    assert [len(x) for x, _ in got] == [3, 3, 1]
    assert torch.equal(torch.cat([y for _, y in got]), labels)
    assert [len(x) for x, _ in data.batches(images, labels, 3, drop_last=True)] == [3, 3]


def test_batches_are_a_permutation_fixed_by_the_generator() -> None:
    images, labels = torch.arange(50.0)[:, None], torch.arange(50)

    def order(seed: int) -> list[int]:
        got = list(data.batches(images, labels, 8, torch.Generator().manual_seed(seed)))
        assert all(torch.equal(x[:, 0].long(), y) for x, y in got)
        return torch.cat([y for _, y in got]).tolist()

    assert sorted(order(0)) == list(range(50))
    assert order(0) == order(0) != order(1)


def test_bad_batch_arguments_are_refused_at_the_call() -> None:
    with pytest.raises(ValueError, match="batch_size >= 1, got 0"):
        data.batches(torch.zeros(3, 1), torch.zeros(3), 0)
    with pytest.raises(ValueError, match="got 2 and 3"):
        data.batches(torch.zeros(3, 1), torch.zeros(2), 1)
