"""Splits, augmentation as a function of (seed, step), and the messages for missing data."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torch.nn.functional as F
import torchvision
from helpers import ROOT, tiny

import eval_jempp
import train_jempp
from samplers import to_pixels
from utils.data import (
    SPECS,
    Images,
    TrainData,
    crop_and_flip,
    digits,
    load,
    load_splits,
    reflect,
)
from utils.files.records import read_jsonl
from utils.plots import to_uint8
from utils.program import InputError
from utils.seeding import generator

DATA = ROOT / "data"
needs_cifar10 = pytest.mark.skipif(not (DATA / "cifar-10-batches-py").is_dir(),
                                   reason="no CIFAR-10 under data/")
needs_cifar100 = pytest.mark.skipif(not (DATA / "cifar-100-python").is_dir(),
                                    reason="no CIFAR-100 under data/")


def test_pixels_survive_the_way_to_floats_and_back():
    x = torch.arange(256).to(torch.uint8)
    assert to_pixels(x).min() == -1 and to_pixels(x).max() == 1
    assert torch.equal(to_uint8(to_pixels(x)), x)


def test_reflection_is_that_of_reflect_padding():
    x = torch.arange(6.0).view(1, 1, 6)
    assert torch.equal(x[..., reflect(torch.arange(-4, 10), 6)], F.pad(x, (4, 4), "reflect"))


@pytest.mark.parametrize("flip", (True, False))
def test_every_crop_is_a_window_of_the_padded_image(flip):
    x = torch.randint(0, 256, (5, 3, 12, 12), dtype=torch.uint8, generator=generator("cpu", 0))
    indices = torch.randint(5, (300,), generator=generator("cpu", 1))
    mirror = torch.rand(300, generator=generator("cpu", 3)) < 0.5 if flip else None
    out = crop_and_flip(x, indices, 2, mirror, generator("cpu", 2))
    padded = F.pad(x.float(), (2, 2, 2, 2), "reflect").to(torch.uint8)
    windows = padded.unfold(2, 12, 1).unfold(3, 12, 1)  # [5, 3, 5, 5, 12, 12]
    seen = set()
    for i, (image, index) in enumerate(zip(out, indices.tolist(), strict=True)):
        hits = []
        for mirrored in (False, True):
            target = image.flip(2) if mirrored else image
            same = (windows[index] == target[:, None, None]).all(0).all(-1).all(-1)
            hits += [(mirrored, *hit) for hit in same.nonzero().tolist()]
        assert len(hits) == 1, "each output is one window, mirrored or not"
        assert hits[0][0] == (flip and mirror[i].item()), "as it was told"
        seen.add(tuple(hits[0]))
    assert len(seen) == (50 if flip else 25), "every shift and both directions occur"


def train_data(seed=0, **changes):
    settings = {"batch_size": 20, "sigma": 0.03, "seed": seed} | changes
    return TrainData(digits(True, 16), SPECS["digits"], **settings)


def test_batches_are_functions_of_seed_and_step():
    ahead, alone = train_data(), train_data()
    for step in range(75):
        x, (x_lab, y_lab) = ahead.batch(step)
    again, (again_lab, again_y) = alone.batch(74)  # asked for first, in the second epoch
    assert torch.equal(x, again) and torch.equal(x_lab, again_lab) and torch.equal(y_lab, again_y)
    assert not torch.equal(x, x_lab), "released: two independent batches"
    assert not torch.equal(train_data(seed=1).batch(74)[0], x)
    x, (x_lab, _) = train_data(shared_batch=True).batch(74)
    assert x is x_lab, "paper: one"
    assert torch.equal(x_lab, again_lab)


def test_an_epoch_sees_each_image_once_and_noise_is_not_clamped():
    data = train_data()
    steps = [data.indices("labelled", step) for step in range(data.steps_per_epoch)]
    assert len(set(torch.cat(steps).tolist())) == data.steps_per_epoch * 20 == 1420
    quiet = train_data(sigma=0).batch(3)[1][0]
    noise = data.batch(3)[1][0] - quiet
    assert abs(noise.std().item() - 0.03) < 1e-3 and quiet.min() == -1
    assert data.batch(3)[1][0].min() < -1


def test_digits_are_one_fixed_split():
    train, valid, test = load_splits("digits", "nowhere", n_valid=137)
    assert [len(s.y) for s in (train, valid, test)] == [1300, 137, 360]
    everything = {bytes(x.numpy()) for s in (train, valid, test) for x in s.x}
    assert len(everything) > 1790  # no split repeats another's images
    assert load("digits", "nowhere", train=False, size=32).x.shape == (360, 3, 32, 32)


def test_images_digest_tells_data_apart():
    a = Images(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]))
    assert a.digest() != Images(a.x, torch.tensor([1, 0])).digest() == \
        Images(a.x, torch.tensor([1, 0])).digest()


@needs_cifar10
def test_cifar10_has_the_released_validation_split():
    train, valid, test = load_splits("cifar10", DATA, n_valid=5000)
    assert [tuple(s.x.shape) for s in (train, valid, test)] == [
        (45000, 3, 32, 32), (5000, 3, 32, 32), (10000, 3, 32, 32)]
    np.random.seed(1234)  # noqa: NPY002 -- the released code's own words
    order = list(range(50000))
    np.random.shuffle(order)  # noqa: NPY002
    assert torch.equal(valid.x, load("cifar10", DATA, train=True).x[order[:5000]])
    assert test.y.bincount().tolist() == [1000] * 10


@needs_cifar100
def test_class_gaussians_of_a_hundred_classes_fit():
    from samplers import ClassGaussians

    train = load("cifar100", DATA, train=True)
    p0 = ClassGaussians.fit(train.x, train.y, 100)
    draws = p0.sample(64, host=generator("cpu", 0), generator=generator("cpu", 1))
    assert draws.shape == (64, 3, 32, 32) and draws.abs().max() <= 1


def test_svhn_is_read_with_its_labels_through_torchvision(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
    labels = np.array([[1], [10], [3], [10], [9]])
    for split in ("train", "test"):
        scipy.io.savemat(tmp_path / f"{split}_32x32.mat", {"X": pixels, "y": labels})
    monkeypatch.setattr(torchvision.datasets.SVHN, "_check_integrity", lambda self: True)
    images = load("svhn", tmp_path, train=True)
    assert images.y.tolist() == [1, 0, 3, 0, 9]  # SVHN calls zero 10
    assert torch.equal(images.x[2], torch.from_numpy(pixels[..., 2]).permute(2, 0, 1))
    assert len(images.take([0, 1]).digest()) == 64  # every run takes it


def write_set(name, root, monkeypatch):
    """A small data set ``name`` under ``root``: random images, in the files of its authors."""
    draw, dataset = np.random.default_rng(0), getattr(torchvision.datasets, SPECS[name].source)
    for split, n in (("train", 60), ("test", 20)):
        y = np.arange(n) % SPECS[name].n_classes
        images = draw.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        if name == "svhn":
            scipy.io.savemat(root / f"{split}_32x32.mat", {"X": images.transpose(1, 2, 3, 0),
                                                           "y": np.where(y, y, 10)[:, None]})
        elif name == "stl10":
            home = root / "stl10_binary"
            home.mkdir(exist_ok=True)
            (home / "class_names.txt").write_text("\n".join(SPECS[name].names))
            draw.integers(0, 256, (n, 3, 96, 96), dtype=np.uint8).tofile(home / f"{split}_X.bin")
            (y + 1).astype(np.uint8).tofile(home / f"{split}_y.bin")
        elif name.startswith("cifar"):
            home = root / SPECS[name].files
            home.mkdir(exist_ok=True)
            content = {"data": images.reshape(n, -1), "labels": y.tolist(), "fine_labels": y}
            for file, _ in dataset.train_list if split == "train" else dataset.test_list:
                (home / file).write_bytes(pickle.dumps(content))
            content = {dataset.meta["key"]: list(SPECS[name].names)}
            (home / dataset.meta["filename"]).write_bytes(pickle.dumps(content))
        else:
            home, kind = root / SPECS[name].files, {"train": "train", "test": "t10k"}[split]
            home.mkdir(exist_ok=True, parents=True)
            for file, array in (("images-idx3", images[:, :28, :28, 0]), ("labels-idx1", y)):
                head = np.array([2048 + array.ndim, *array.shape], dtype=">i4").tobytes()
                (home / f"{kind}-{file}-ubyte").write_bytes(head + array.astype(np.uint8).tobytes())
    monkeypatch.setattr(dataset, "_check_integrity", lambda self: True, raising=False)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.source])
def test_every_data_set_is_trained_and_evaluated(tmp_path, monkeypatch, call, name):
    write_set(name, tmp_path, monkeypatch)
    run, root = tmp_path / "run", ["--data_root", tmp_path, "--no-download"]
    init = "uniform" if name == "cifar100" else "informative"  # not all 100 classes have an image
    code, _, err = call(train_jempp.main, [*tiny(run, "--dataset", name, "--n_valid", "10", *root,
                                                 "--init", init, "--max_steps", "1")])
    assert code == 0, err
    code, _, err = call(eval_jempp.main, ["--load_path", run / "best.pt", *root, "--eval",
                                          "accuracy", "ood", "--ood", "uniform"])
    assert code == 0, err
    found = read_jsonl(run / "eval" / "results.jsonl")
    assert [r["n"] for r in found if r["metric"] == "accuracy"][-1] == 20
    assert {r["protocol"]["out"] for r in found if r["metric"] == "auroc"} == {"uniform"}


@pytest.mark.parametrize("name", ("cifar10", "cifar100", "svhn"))
def test_missing_data_is_one_line_that_says_what_belongs_where(name, tmp_path):
    with pytest.raises(InputError) as error:
        load(name, tmp_path, train=True, download=False)
    message = str(error.value)
    assert str(tmp_path) in message and SPECS[name].files in message and "\n" not in message
    with pytest.raises(InputError, match="no data folder"):
        load(name, tmp_path / "absent", train=True, download=False)


def test_an_unreachable_network_is_one_line(tmp_path, monkeypatch):
    import torchvision.datasets.utils as tv_utils

    def refuse(*words, **more):
        raise OSError("network is unreachable")

    monkeypatch.setattr(tv_utils, "_urlretrieve", refuse)
    with pytest.raises(InputError, match="check the network") as error:
        load("cifar10", tmp_path, train=True, download=True)
    assert "\n" not in str(error.value)


def test_more_validation_images_than_there_are_is_refused(tmp_path):
    with pytest.raises(InputError, match="leaves no training image"):
        load_splits("digits", Path(tmp_path), n_valid=1437)


def test_fewer_training_images_are_the_first_after_those_of_validation():
    every, held, _ = load_splits("digits", "nowhere", n_valid=137)
    train, valid, _ = load_splits("digits", "nowhere", n_valid=137, n_train=50)
    assert torch.equal(train.x, every.x[:50]) and torch.equal(valid.x, held.x)
