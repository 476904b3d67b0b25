"""Image data sets: shapes, normalisation, augmentation by key, and one clear line for every kind of damage."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import shared_data
from PIL import Image, ImageCms
from torchvision.transforms import v2

import datasets
from datasets.augment import PadAndCrop, RandomFlip, RandomResizedCrop, RandomRotation
from datasets.base import Split, generator_for
from datasets.cifar import CIFAR10, CIFAR100, Variant
from datasets.pictures import read_rgb, to_rgb
from pipeline.data.loader import MicrobatchFeed
from pipeline.data.plan import Plan
from pipeline.errors import UserError

Maker = Callable[[Path], dict[str, Any]]


def write_cifar(folder: Path, variant: Variant, images: int = 12) -> None:
    """The files of one CIFAR, in its own format, with a few random images in each."""
    random = np.random.default_rng(0)
    (folder / variant.folder).mkdir(parents=True, exist_ok=True)
    for name in (*variant.train, *variant.val):
        content = {
            "data": random.integers(0, 256, (images, 3072), dtype=np.uint8),
            variant.label_key: [i % variant.num_classes for i in range(images)],
        }
        (folder / variant.folder / name).write_bytes(pickle.dumps(content, protocol=2))


def write_images(folder: Path, classes: tuple[str, ...], *, images: int = 3, side: int = 32) -> None:
    random = np.random.default_rng(len(classes))
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(images):
            pixels = random.integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.jpg")


def with_cifar10(folder: Path) -> dict[str, Any]:
    write_cifar(folder, CIFAR10)
    return {"name": "cifar10", "data_dir": folder}


def with_cifar100(folder: Path) -> dict[str, Any]:
    write_cifar(folder, CIFAR100)
    return {"name": "cifar100", "data_dir": folder}


def with_imagefolder(folder: Path) -> dict[str, Any]:
    write_images(folder / "train", ("ape", "bee", "cow"))
    write_images(folder / "test", ("ape", "bee", "cow"))
    return {"name": "imagefolder", "data_dir": folder}


def with_imagenet(folder: Path) -> dict[str, Any]:
    write_images(folder / "train", ("n01", "n02"), side=80)
    write_images(folder / "val", ("n01", "n02"), side=80)
    return {"name": "imagenet", "data_dir": folder, "image_size": 48}


def with_digits(folder: Path) -> dict[str, Any]:
    return {"name": "digits"}


def with_synthetic(folder: Path) -> dict[str, Any]:
    return {"name": "synthetic", "samples": 40}


ALL = (with_cifar10, with_cifar100, with_imagefolder, with_imagenet, with_digits, with_synthetic)
AUGMENTED = (with_cifar10, with_cifar100, with_imagefolder, with_imagenet, with_digits)


@pytest.mark.parametrize("make", ALL)
def test_inputs_are_float_images_and_targets_their_classes(make: Maker, tmp_path: Path) -> None:
    splits = datasets.load(**make(tmp_path))
    assert splits.val is not None
    for split in (splits.train, splits.val):
        assert len(split.inputs) == len(split.targets) == split.size > 0
        (image,), (label,) = split.inputs[0, split.size - 1], split.targets[0, split.size - 1]
        assert image.dtype == torch.float32 and image.shape[0] == 3 and image.shape[1] == image.shape[2]
        assert label.dtype == torch.int64 and label.shape == ()
        assert split.num_classes is not None and 0 <= label < split.num_classes
    assert splits.train.num_classes == splits.val.num_classes


@pytest.mark.parametrize("make", ALL)
def test_a_sample_depends_on_its_key_and_not_on_what_was_read_before(make: Maker, tmp_path: Path) -> None:
    options = make(tmp_path)
    train = datasets.load(**options, seed=4).train
    keys = [(epoch, index) for epoch in range(3) for index in range(4)]
    first = [train.inputs[key][0] for key in keys]
    torch.manual_seed(1)
    again = datasets.load(**options, seed=4).train
    backwards = [again.inputs[key][0] for key in reversed(keys)]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(backwards), strict=True))
    assert torch.equal(train.inputs[2][0], first[2])  # a plain index means epoch 0


@pytest.mark.parametrize("make", AUGMENTED)
def test_training_images_change_by_epoch_and_by_seed_and_validation_images_do_not(make: Maker, tmp_path: Path) -> None:
    options = make(tmp_path)
    splits, other = datasets.load(**options, seed=4), datasets.load(**options, seed=5)
    assert splits.val is not None

    def images(split: Split, epoch: int) -> torch.Tensor:
        return torch.stack([split.inputs[epoch, index][0] for index in range(6)])

    assert not torch.equal(images(splits.train, 0), images(splits.train, 1))
    assert not torch.equal(images(splits.train, 0), images(other.train, 0))
    assert torch.equal(images(splits.val, 0), images(splits.val, 1))


@pytest.mark.parametrize("make", ALL)
def test_loader_processes_bring_the_same_images_as_reading_in_place(make: Maker, tmp_path: Path) -> None:
    train = datasets.load(**make(tmp_path)).train
    plan = Plan(size=train.size, batch_size=4, microbatches=2, seed=1)
    stop = min(30, 2 * plan.batches_per_epoch * plan.microbatches)
    here, there = (
        [image for _, (image,) in MicrobatchFeed(train.inputs, plan, stop_microbatch=stop, workers=workers)]
        for workers in (0, 2)
    )
    assert len(here) == stop
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_an_unknown_name_lists_the_choices() -> None:
    with pytest.raises(UserError, match=r"unknown dataset 'mnist' of images; choose from cifar10, .*digits"):
        datasets.load("mnist")
    with pytest.raises(UserError, match="unknown dataset 'digits' of tokens; choose from synthetic, wiki"):
        datasets.load("digits", kind="tokens")


# ---- normalisation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [CIFAR10, CIFAR100])
def test_cifar_pixels_are_scaled_and_normalised_by_mean_and_std_of_each_channel(
    variant: Variant, tmp_path: Path
) -> None:
    write_cifar(tmp_path, variant)
    content = pickle.loads((tmp_path / variant.folder / variant.val[0]).read_bytes())
    val = datasets.load(variant.name, data_dir=tmp_path).val
    assert val is not None
    pixels = content["data"].reshape(-1, 3, 32, 32)[5] / 255.0
    expected = (pixels - np.array(variant.normalise.mean)[:, None, None]) / np.array(variant.normalise.std)[
        :, None, None
    ]
    np.testing.assert_allclose(val.inputs[5][0].numpy(), expected, rtol=1e-5, atol=1e-5)
    assert val.targets[5][0] == content[variant.label_key][5]


def test_bright_pixels_do_not_wrap(tmp_path: Path) -> None:
    (tmp_path / "train" / "white").mkdir(parents=True)
    Image.new("RGB", (40, 40), (255, 255, 255)).save(tmp_path / "train" / "white" / "0.png")
    train = datasets.load("imagefolder", data_dir=tmp_path, image_size=100, validation=False).train
    expected = [(1 - mean) / std for mean, std in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    torch.testing.assert_close(train.inputs[0][0].mean((1, 2)), torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_digits_are_standardised_and_every_class_is_held_out_by_a_fifth() -> None:
    splits = datasets.load("digits")
    assert splits.val is not None and (splits.train.size, splits.val.size) == (1442, 355)
    images = torch.stack([splits.train.inputs[index][0] for index in range(splits.train.size)])
    assert images.shape == (1442, 3, 32, 32)
    assert abs(images.mean()) < 0.05 and abs(images.std() - 1) < 0.1
    shares = [
        torch.bincount(torch.stack([split.targets[i][0] for i in range(split.size)]), minlength=10) / split.size
        for split in (splits.train, splits.val)
    ]
    assert (shares[0] - shares[1]).abs().max() < 0.01


def test_the_held_out_digits_are_the_same_for_every_seed_and_never_trained_on() -> None:
    first, second = datasets.load("digits", seed=0), datasets.load("digits", seed=1)
    assert first.val is not None and second.val is not None
    held_out = torch.stack([first.val.inputs[i][0] for i in range(first.val.size)])
    assert torch.equal(held_out, torch.stack([second.val.inputs[i][0] for i in range(second.val.size)]))
    trained = {image.numpy().tobytes() for image in first.train.inputs.read.pixels}  # type: ignore[attr-defined]
    held = {image.numpy().tobytes() for image in first.val.inputs.read.pixels}  # type: ignore[attr-defined]
    assert not trained & held


# ---- augmentation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_random_resized_crop_is_torchvisions(seed: int) -> None:
    image = torch.randint(0, 256, (3, 50, 90), dtype=torch.uint8)
    torch.manual_seed(seed)
    expected = v2.RandomResizedCrop(24, antialias=True)(image)
    ours = RandomResizedCrop(24)(image, torch.Generator().manual_seed(seed))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("shape", [(3, 400), (400, 3)])
def test_a_very_long_image_is_cropped_in_the_middle_as_torchvision_does(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    expected = v2.RandomResizedCrop(8, scale=(0.9, 1.0)).make_params([torch.zeros(3, *shape)])
    box = RandomResizedCrop(8, scale=(0.9, 1.0)).box(*shape, generator_for(0))
    assert box == tuple(expected[name] for name in ("top", "left", "height", "width"))


def test_a_padded_crop_moves_the_image_by_every_distance_up_to_the_padding() -> None:
    image = torch.zeros(1, 9, 9)
    image[0, 4, 4] = 1
    places = {tuple(PadAndCrop(2)(image, generator_for(i)).nonzero()[0].tolist()) for i in range(400)}
    assert places == {(0, row, column) for row in range(2, 7) for column in range(2, 7)}


def test_half_of_the_images_are_flipped() -> None:
    image = torch.arange(4.0).reshape(1, 1, 4)
    flipped = sum(torch.equal(RandomFlip()(image, generator_for(i)), image.flip(-1)) for i in range(1000))
    assert 440 < flipped < 560


def test_cifar_images_can_be_rotated(tmp_path: Path) -> None:
    write_cifar(tmp_path, CIFAR10)
    plain, turned = (
        datasets.load("cifar10", data_dir=tmp_path, rotation_degrees=degrees).train.inputs[0][0] for degrees in (0, 15)
    )
    assert plain.shape == turned.shape and not torch.equal(plain, turned)
    image = torch.rand(3, 32, 32)
    torch.testing.assert_close(RandomRotation(0)(image, generator_for(0)), image)


# ---- folders -----------------------------------------------------------------------------------------------------


def test_the_classes_of_train_number_those_of_val(tmp_path: Path) -> None:
    write_images(tmp_path / "train", ("ape", "bee", "cow"))
    write_images(tmp_path / "val", ("cow",))
    val = datasets.load("imagefolder", data_dir=tmp_path).val
    assert val is not None and val.num_classes == 3
    assert [int(val.targets[i][0]) for i in range(val.size)] == [2, 2, 2]


def test_labels_are_read_without_decoding_any_image(tmp_path: Path) -> None:
    write_images(tmp_path / "train", ("ape", "bee"), images=2)
    train = datasets.load("imagefolder", data_dir=tmp_path, image_size=32, validation=False).train
    for file in (tmp_path / "train").rglob("*.jpg"):
        file.unlink()
    assert [int(train.targets[5, i][0]) for i in range(4)] == [0, 0, 1, 1]


def test_image_folders_take_thumbnails_as_they_are_and_photographs_at_224(tmp_path: Path) -> None:
    write_images(tmp_path / "small" / "train", ("ape",), side=32)
    write_images(tmp_path / "large" / "train", ("ape",), side=100)
    for folder, size in (("small", 32), ("large", 224)):
        train = datasets.load("imagefolder", data_dir=tmp_path / folder, validation=False).train
        assert train.inputs[0][0].shape == (3, size, size)


def test_grey_and_transparent_and_cmyk_images_become_rgb(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "ape"
    folder.mkdir(parents=True)
    for number, (mode, suffix) in enumerate([("L", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("P", "png")]):
        Image.new(mode, (40, 40)).save(folder / f"{number}.{suffix}")
    train = datasets.load("imagefolder", data_dir=tmp_path, validation=False).train
    assert all(train.inputs[i][0].shape == (3, 40, 40) for i in range(4))


def test_imagenet_is_found_through_the_environment(tmp_path: Path) -> None:
    write_images(tmp_path / "a", ("n01", "n02"))
    write_images(tmp_path / "b", ("n01", "n02"))
    roots = {"IMAGENET_TRAIN_ROOT": str(tmp_path / "a"), "IMAGENET_VAL_ROOT": str(tmp_path / "b")}
    splits = datasets.load("imagenet", environment=roots)
    assert splits.val is not None and splits.train.size == splits.val.size == 6
    assert splits.val.inputs[0][0].shape == (3, 224, 224)


@pytest.mark.parametrize("name", ["imagenet", "imagefolder"])
def test_without_a_validation_folder_one_line_says_so(name: str, tmp_path: Path) -> None:
    write_images(tmp_path / "train", ("n01",))
    lines: list[str] = []
    assert datasets.load(name, data_dir=tmp_path, warn=lines.append).val is None
    assert len(lines) == 1 and "without validation" in lines[0] and str(tmp_path) in lines[0]
    assert datasets.load(name, data_dir=tmp_path, warn=lines.append, validation=False).val is None
    assert len(lines) == 1


# ---- damage ------------------------------------------------------------------------------------------------------


def refused(message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        datasets.load(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("cifar10", "cifar-10-batches-py/.*cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python/.*cifar-100-python.tar.gz"),
        ("imagenet", "IMAGENET_TRAIN_ROOT"),
        ("imagefolder", "give --data DIR"),
    ],
)
def test_a_missing_folder_is_named_with_what_to_do(name: str, remedy: str, tmp_path: Path) -> None:
    refused(f"{name}: no folder given; .*{remedy}", name=name, environment={})
    refused(f"{name}: no folder {tmp_path}/x; .*{remedy}", name=name, data_dir=tmp_path / "x")
    refused(f"{name}: no folder {tmp_path}/.*; .*{remedy}", name=name, data_dir=tmp_path)


def test_a_missing_validation_root_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "a", ("n01",))
    roots = {"IMAGENET_TRAIN_ROOT": str(tmp_path / "a"), "IMAGENET_VAL_ROOT": str(tmp_path / "b")}
    refused(f"IMAGENET_VAL_ROOT: no folder {tmp_path}/b", name="imagenet", environment=roots)


def test_an_empty_class_and_a_folder_without_classes_are_named(tmp_path: Path) -> None:
    write_images(tmp_path / "train", ("ape", "bee"))
    (tmp_path / "train" / "cow").mkdir()
    (tmp_path / "train" / "cow" / "notes.txt").write_text("no image")
    refused(f"{tmp_path}/train/cow: no images in this class folder", name="imagefolder", data_dir=tmp_path)
    (tmp_path / "none" / "train").mkdir(parents=True)
    refused(f"{tmp_path}/none/train: no class folders", name="imagefolder", data_dir=tmp_path / "none")


def test_a_class_that_only_val_has_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "train", ("ape", "bee"))
    write_images(tmp_path / "val", ("ape", "cow"))
    refused(f"{tmp_path}/val/cow: no class 'cow' in {tmp_path}/train", name="imagefolder", data_dir=tmp_path)


MODES = ("1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA", "La", "RGBa", "I", "F")
MODES_16 = ("I;16", "I;16L", "I;16B", "I;16N")


@pytest.mark.parametrize("mode", (*MODES, *MODES_16))
def test_every_mode_that_pillow_knows_becomes_rgb_with_dark_dark_and_bright_bright(mode: str) -> None:
    """A picture whose left half is black and whose right half is white stays one."""
    half = Image.new("L", (8, 8))
    half.paste(255, (4, 0, 8, 8))
    if mode in MODES_16:
        order = ">u2" if mode == "I;16B" else "<u2"
        made = Image.frombytes(mode, (8, 8), (np.asarray(half, np.uint16) * 257).astype(order).tobytes())
    elif mode == "I":
        made = Image.fromarray(np.asarray(half, dtype=np.int32) * 257)
    elif mode == "F":
        made = Image.fromarray(np.asarray(half, dtype=np.float32) / 255)
    elif mode == "LAB":
        made = ImageCms.profileToProfile(
            half.convert("RGB"), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    else:
        via = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode)
        made = (half.convert("RGB") if mode in ("HSV", "CMYK", "YCbCr", "RGBX") else half).convert(via or mode)
        made = made.convert(mode) if via else made
    assert made.mode == mode
    rgb = np.asarray(to_rgb(made))
    assert rgb.shape == (8, 8, 3) and rgb.dtype == np.uint8
    assert rgb[:, :4].max() <= 3 and rgb[:, 4:].min() >= 252


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_grey_of_16_bits_keeps_its_levels(suffix: str, tmp_path: Path) -> None:
    for level in (0, 200, 6000, 48000, 65535):
        Image.fromarray(np.full((4, 4), level, np.uint16)).save(tmp_path / f"x.{suffix}")
        assert np.asarray(read_rgb(tmp_path / f"x.{suffix}"))[0, 0].tolist() == [round(level / 257)] * 3


def test_floats_are_scaled_by_the_range_they_use_and_nan_is_refused(tmp_path: Path) -> None:
    for values, expected in (([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 100.0, 200.0], [0, 100, 200])):
        Image.fromarray(np.array([values], np.float32)).save(tmp_path / "x.tif")
        assert np.asarray(read_rgb(tmp_path / "x.tif"))[0, :, 0].tolist() == expected
    Image.fromarray(np.array([[0.0, np.nan]], np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match=r"x\.tif: not a readable image \(it has pixels that are not finite\)"):
        read_rgb(tmp_path / "x.tif")


def test_one_odd_picture_does_not_set_the_size_of_all(tmp_path: Path) -> None:
    write_images(tmp_path / "train", ("ape", "bee"), side=100, images=9)
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "ape" / "0.jpg")
    said: list[str] = []
    train = datasets.load("imagefolder", data_dir=tmp_path, validation=False, warn=said.append).train
    assert train.inputs[0][0].shape == (3, 224, 224) and not said


def test_thumbnails_of_several_sizes_take_the_commonest_and_one_line_says_so(tmp_path: Path) -> None:
    write_images(tmp_path / "train", ("ape", "bee"), side=32, images=9)
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "ape" / "0.jpg")
    said: list[str] = []
    train = datasets.load("imagefolder", data_dir=tmp_path, validation=False, warn=said.append).train
    assert train.inputs[0][0].shape == (3, 32, 32)
    assert said == [
        f"{tmp_path}/train: images of 8 to 32 pixels, most of 32; all are resized to 32, or give --image-size"
    ]


@pytest.mark.parametrize("content", ["truncated", "empty", "text"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_jpeg_is_one_line_with_its_name(content: str, workers: int, tmp_path: Path) -> None:
    write_images(tmp_path / "train", ("ape", "bee"))
    bad = tmp_path / "train" / "bee" / "1.jpg"
    bad.write_bytes({"truncated": bad.read_bytes()[:-300], "empty": b"", "text": b"no image"}[content])
    train = datasets.load("imagefolder", data_dir=tmp_path, validation=False).train
    feed = MicrobatchFeed(train.inputs, Plan(size=6, batch_size=2), stop_microbatch=3, workers=workers)
    with pytest.raises(UserError) as caught:
        list(feed)
    assert str(caught.value).startswith(f"{bad}: not a readable image (")
    assert str(caught.value).endswith("; replace it or delete it") and "\n" not in str(caught.value)


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "train", ("ape",))
    train = datasets.load("imagefolder", data_dir=tmp_path, validation=False).train
    (tmp_path / "train" / "ape" / "1.jpg").unlink()
    with pytest.raises(UserError, match=r"ape/1\.jpg: cannot be read \(No such file or directory\)"):
        train.inputs[1]


def test_a_picture_of_too_many_pixels_is_told_so_and_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "train", ("ape",))
    train = datasets.load("imagefolder", data_dir=tmp_path, validation=False).train
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # Pillow refuses twice as many: 32 x 40 are too many
    with pytest.raises(UserError, match=r"ape/0\.jpg: has more than 0 million pixels; make it smaller"):
        train.inputs[0]


def rewrite(path: Path, **changes: Any) -> None:
    content = pickle.loads(path.read_bytes()) | changes
    path.write_bytes(pickle.dumps({key: value for key, value in content.items() if value is not None}))


def test_damaged_cifar_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / CIFAR10.folder / "data_batch_3"

    def after(damage: Callable[[], Any], message: str) -> None:
        write_cifar(tmp_path, CIFAR10)
        damage()
        refused(f"{file}{message}", name="cifar10", data_dir=tmp_path)

    after(lambda: file.write_bytes(file.read_bytes()[:1000]), ": damaged")
    after(lambda: file.write_bytes(b""), ": damaged")
    after(lambda: file.write_bytes(b"no pickle"), ": damaged")
    after(lambda: file.write_bytes(pickle.dumps([1])), ": holds a list")
    after(lambda: file.write_bytes(pickle.dumps({"data": Path("x")})), ": damaged .*has no place in it")
    after(lambda: rewrite(file, labels=None), ": no 'labels' in it")
    after(lambda: rewrite(file, data=np.zeros((12, 100), np.uint8)), r": uint8 images \(12, 100\)")
    after(lambda: rewrite(file, data=np.zeros((12, 3072), np.float32)), ": float32 images")
    after(lambda: rewrite(file, labels=[0] * 11), r".* labels \(11,\)")
    after(lambda: rewrite(file, labels=[*range(10), 10, 1]), ": label 10 is none of 10 classes")
    after(lambda: rewrite(file, labels=[], data=np.zeros((0, 3072), np.uint8)), ": no images")
    write_cifar(tmp_path, CIFAR10)
    file.unlink()
    refused(f"cifar10: no file {file}", name="cifar10", data_dir=tmp_path)


def test_the_cifar_folder_itself_may_be_given(tmp_path: Path) -> None:
    write_cifar(tmp_path, CIFAR100)
    assert datasets.load("cifar100", data_dir=tmp_path / CIFAR100.folder).train.size == 12


@pytest.mark.parametrize("option", ["image_size", "samples", "num_classes"])
def test_options_out_of_range_are_refused(option: str) -> None:
    refused(f"{option.replace('_', ' ')} is 0; give 1 or more", name="synthetic", **{option: 0})


# ---- synthetic ---------------------------------------------------------------------------------------------------


def test_synthetic_images_can_be_told_apart_and_validation_shows_the_same_classes() -> None:
    splits = datasets.load("synthetic", samples=200, num_classes=4)
    assert splits.val is not None

    def read(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
        indices = range(split.size)
        images = torch.stack([split.inputs[i][0] for i in indices])
        return images, torch.stack([split.targets[i][0] for i in indices])

    images, labels = read(splits.train)
    means = torch.stack([images[labels == label].mean(0) for label in range(4)])
    seen, truth = read(splits.val)
    nearest = ((seen[:, None] - means) ** 2).sum((2, 3, 4)).argmin(1)
    assert torch.equal(nearest, truth)
    assert not torch.equal(images[:20], seen)
    assert abs(images.mean()) < 0.2 and 0.7 < images.std() < 1.3


# ---- real data and speed -----------------------------------------------------------------------------------------


def test_real_cifar_images_in_folders() -> None:
    splits = datasets.load("imagefolder", data_dir=shared_data("cifar10"))
    assert splits.val is not None and splits.train.num_classes == 10
    assert splits.train.size > splits.val.size > 0
    images = torch.stack([splits.val.inputs[i][0] for i in range(0, splits.val.size, 10)])
    assert images.shape[1:] == (3, 32, 32)
    assert images.mean().abs() < 0.5 and 0.7 < images.std() < 1.4


def test_real_photographs() -> None:
    train = datasets.load("imagenet", data_dir=shared_data("imagenet"), warn=lambda line: None, image_size=64).train
    assert train.num_classes is not None and train.num_classes <= train.size
    plan = Plan(size=train.size, batch_size=8)
    for _, (images,) in MicrobatchFeed(train.inputs, plan, stop_microbatch=4, workers=2):
        assert images.shape == (8, 3, 64, 64) and 0.3 < images.std() < 2


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_alone_reports_samples_per_second(workers: int) -> None:
    lines: list[str] = []
    train = datasets.load("synthetic", samples=30).train
    speed = datasets.test_io(train, batch_size=4, workers=workers, disp_batches=3, seconds=0.05, say=lines.append)
    assert speed > 0
    assert lines[0].startswith("Batch [3]\tSpeed: ") and lines[0].endswith(" samples/sec")
    assert lines[-1].startswith("Read ") and f"with {workers} workers" in lines[-1]
