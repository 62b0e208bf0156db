"""Your own images: folder:PATH and npz:FILE, right or counted, cached, trained on, evaluated."""

import errno
import json
import os
import types

import numpy as np
import pytest
import torch
from helpers import tiny
from PIL import Image

import eval_jempp
import train_jempp
from utils import image_folder, own_images
from utils.cli import train_args
from utils.data import load, load_splits, spec_of
from utils.evaluation import ood
from utils.files.records import read_jsonl
from utils.program import InputError

FRUIT = ("apple", "pear")


def paint(path, value, size=(12, 12), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).convert(mode).save(path)


def fill(folder, n=30, classes=FRUIT, start=0):
    """``n`` images a class: that of class k number i is grey 100 k + i + start."""
    for k, name in enumerate(classes):
        for i in range(n):
            paint(folder / name / f"{i:03}.png", 100 * k + i + start)


def greys(images):
    """The value of each one-coloured image, by class."""
    return {k: sorted(images.x[images.y == k, 0, 0, 0].tolist()) for k in (0, 1)}


def half(height=16, width=16, top=65535):
    """A 16-bit grey picture, black left and white right."""
    grey = np.zeros((height, width), np.uint16)
    grey[:, width // 2:] = top
    return grey


# What counts as a picture, and which pixels it has

def corners(path):
    """The upper left, upper right and lower left pixel of a grey picture, as it is read."""
    x = image_folder.square(image_folder.read_rgb(path), 16)
    assert torch.equal(x[0], x[1]) and torch.equal(x[0], x[2])
    return x[0, 0, 0].item(), x[0, 0, -1].item(), x[0, -1, 0].item()


def test_sixteen_bits_become_eight_or_are_refused(tmp_path):
    Image.fromarray(half()).save(tmp_path / "a.png")
    Image.fromarray(half()).save(tmp_path / "a.tiff")
    (tmp_path / "a.pgm").write_bytes(b"P5 16 16 4095\n" + (half() // 16).astype(">u2").tobytes())
    for name in ("a.png", "a.tiff", "a.pgm"):
        assert corners(tmp_path / name) == (0, 255, 0), name
    Image.fromarray(half()).save(tmp_path / "inverted.tiff", tiffinfo={262: 0})
    assert corners(tmp_path / "inverted.tiff") == (255, 0, 255)
    refused = {"dark.png": (half(top=1000), "16-bit pixels that all lie below"),
               "int.tiff": (half().astype(np.int32), "32-bit or signed pixels"),
               "float.tiff": ((half() / 65535).astype(np.float32), "floating-point pixels")}
    for name, (pixels, why) in refused.items():
        Image.fromarray(pixels).save(tmp_path / name)
        with pytest.raises(ValueError, match=why):
            image_folder.read_rgb(tmp_path / name)


def test_sixteen_bits_stand_upright_and_twelve_reach_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(half().T.copy()[::-1]).save(tmp_path / "a.png", exif=exif)
    assert corners(tmp_path / "a.png") == (0, 255, 0)
    grey = types.SimpleNamespace(mode="I;16", format="TIFF", tag_v2={258: (12,)},
                                 __array_interface__=half(top=4095).__array_interface__)
    assert image_folder.grey_of_16_bits(grey).max() == 255


@pytest.mark.parametrize("suffix", ("jpg", "png", "tiff", "webp"))
def test_pictures_stand_upright(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    picture = Image.new("L", (32, 32))
    picture.paste(255, (0, 0, 32, 16))  # white above, so that white comes to lie right
    picture.save(tmp_path / f"a.{suffix}", exif=exif)
    low, high, lower = corners(tmp_path / f"a.{suffix}")
    assert max(low, lower) < 10 and high > 245


def test_transparent_and_animated_pictures_are_their_colours_and_first_frame(tmp_path):
    picture = Image.fromarray((half() // 257).astype(np.uint8)).convert("P")
    picture.save(tmp_path / "a.png", transparency=bytes([0] * 256))
    picture.save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("P", (16, 16), 99)])
    assert corners(tmp_path / "a.png") == corners(tmp_path / "a.gif") == (0, 255, 0)


def test_links_are_followed_and_loops_cut(tmp_path):
    paint(tmp_path / "set" / "real" / "a.png", 1)
    paint(tmp_path / "elsewhere" / "b.png", 2)
    paint(tmp_path / "outside.png", 3)  # beside the set, not in it
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "real" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "up").symlink_to(tmp_path)
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "elsewhere")
    found = [str(f.relative_to(tmp_path / "set")) for f in image_folder.image_files(
        tmp_path / "set")]
    assert found == ["link/b.png", "real/a.png"]


def test_litter_is_skipped_and_content_tells_what_a_name_does_not(tmp_path):
    for name in (".hidden.png", "._a.jpg", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", "a.jfif",
                 "b.jpe", "sub/c.png"):
        paint(tmp_path / "x.jpg", 3)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((tmp_path / "x.jpg").read_bytes())
    (tmp_path / "x.jpg").rename(tmp_path / "nameless")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "page.png").write_text("<html>")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe")
    names = [f.name for f in image_folder.image_files(tmp_path)]
    assert names == ["a.jfif", "b.jpe", "nameless", "page.png", "pipe.png", "c.png"]
    x, left_out = image_folder.read(tmp_path, 16)
    assert len(x) == 4 and x.unique().tolist() == [3]
    assert left_out == {"no image of a known format": 1, "no regular file": 1}


def test_no_more_pictures_are_read_than_asked_for(tmp_path, monkeypatch):
    fill(tmp_path, n=20)
    opened, read_rgb = [], image_folder.read_rgb
    monkeypatch.setattr(image_folder, "read_rgb", lambda f: opened.append(f) or read_rgb(f))
    files = sorted(tmp_path.rglob("*.png"))
    first, *others = image_folder.fixed_order(40)[:6]
    files[first].write_text("broken")
    found = ood.out_set(f"folder:{tmp_path}", 16, in_x=None, root="", seed=0, n=5)
    assert found.x[:, 0, 0, 0].tolist() == [100 * (i // 20) + i % 20 for i in others]
    assert len(opened) == 6
    assert found.about == {"left_out": {"no image of a known format": 1}}


def test_an_out_set_goes_by_the_name_that_is_typed(tmp_path):
    fill(tmp_path, n=2)
    text = f"svhn=folder:{tmp_path}"
    ood.check_names([text, "cifar10"])
    assert ood.name_and_source(text) == ("svhn", f"folder:{tmp_path}")
    assert ood.name_and_source("folder:a=folder:b")[0] == "folder:a=folder:b"
    found = ood.out_set(text, 16, in_x=None, root="", seed=0)
    assert len(found.x) == 4 and found.about == {"origin": f"folder:{tmp_path}"}
    with pytest.raises(InputError, match="same name"):
        ood.check_names([text, "svhn"])


# Data sets

def test_a_folder_with_its_own_splits(tmp_path):
    fill(tmp_path / "train", n=30)
    fill(tmp_path / "test", n=5, start=40)
    fill(tmp_path / "val", n=4, start=60, classes=("apple",))
    name = f"folder:{tmp_path}"
    assert spec_of(name).names == FRUIT and spec_of(name).n_classes == 2
    train, valid, test = load_splits(name, tmp_path / "data", size=16)
    assert greys(train) == {0: list(range(30)), 1: list(range(100, 130))}
    assert greys(valid) == {0: list(range(60, 64)), 1: []}
    assert greys(test) == {0: list(range(40, 45)), 1: list(range(140, 145))}
    assert train.x.shape == (60, 3, 16, 16) and train.about == {}
    with pytest.raises(InputError, match="validation split of its own: drop --n_valid"):
        load_splits(name, tmp_path / "data", size=16, n_valid=3)


def test_a_folder_of_classes_is_split_by_a_fixed_seed(tmp_path):
    fill(tmp_path / "set")
    name = f"folder:{tmp_path / 'set'}"
    train, valid, test = load_splits(name, tmp_path)
    assert [len(s.y) for s in (train, valid, test)] == [44, 4, 12]
    everything = [greys(s)[k] for s in (train, valid, test) for k in (0, 1)]
    assert sorted(sum(everything, [])) == [*range(30), *range(100, 130)]
    assert torch.equal(test.x, load(name, tmp_path / "elsewhere", train=False).x)
    assert test.about == {"split": "1 image in 5 for testing, by seed 1234"}


def test_pictures_are_decoded_once_until_one_changes(tmp_path, monkeypatch, capsys):
    fill(tmp_path / "set")
    calls, decode = [], image_folder.decode
    monkeypatch.setattr(image_folder, "decode", lambda *a, **k: calls.append(1) or decode(*a, **k))
    (tmp_path / "set" / "pear" / "broken.png").write_text("")

    def train(root=tmp_path / "data"):
        images = load(f"folder:{tmp_path / 'set'}", root, train=True)
        assert images.about["left_out"] == {"no image of a known format": 1}
        return images

    first = train()
    assert torch.equal(first.x, train().x) and len(calls) == 1
    assert "broken.png" in (line := capsys.readouterr().err) and "1 of 61 image" in line
    paint(tmp_path / "set" / "apple" / "000.png", 77)
    assert 77 in greys(train())[0] + greys(load(f"folder:{tmp_path / 'set'}", tmp_path / "data",
                                               train=False))[0]
    assert len(calls) == 2  # the second of them found the cache again
    (cache,) = (tmp_path / "data" / "jempp-cache").iterdir()  # one, and nothing half written
    cache.write_bytes(cache.read_bytes()[:2000])
    train()
    assert len(calls) == 3
    assert "is damaged: the pictures are decoded again" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert torch.equal(train(tmp_path / "file").x, train().x) and len(calls) == 4
    assert "no cache in" in capsys.readouterr().err


def test_a_picture_of_the_same_size_and_another_side_are_not_those_of_the_cache(tmp_path):
    def apple(size):
        splits = load_splits(f"folder:{tmp_path / 'set'}", tmp_path / "data", size=size)
        return splits[0].x.shape[-1], sum((greys(split)[0] for split in splits), [])

    for name in FRUIT:
        for i in range(5):
            paint(tmp_path / "set" / name / f"{i}.bmp", i)
    assert apple(16) == (16, apple(32)[1]) and apple(32)[0] == 32
    changed = tmp_path / "set" / "apple" / "0.bmp"
    before = changed.stat()
    paint(changed, 77)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert changed.stat().st_size == before.st_size and 77 in apple(16)[1]


@pytest.mark.parametrize("layout", ("NHWC", "NCHW", "grey", "NHW"))
def test_an_npz_file_of_any_layout(tmp_path, layout):
    x = np.random.default_rng(0).integers(0, 256, (20, 16, 18, 3), dtype=np.uint8)
    expected = torch.from_numpy(x[:, :, 1:-1]).permute(0, 3, 1, 2)
    if layout in ("grey", "NHW"):
        x, expected = x[..., :1], expected[:, :1].expand(-1, 3, -1, -1)
    stored = {"NCHW": x.transpose(0, 3, 1, 2), "NHW": x[..., 0]}.get(layout, x)
    y = np.arange(20).reshape(-1, 1) % 3
    np.savez_compressed(tmp_path / "a.npz", x_train=stored, y_train=y, x_test=stored[:6],
                        y_test=y[:6])
    name = f"npz:{tmp_path / 'a.npz'}"
    train, valid, test = load_splits(name, tmp_path, size=16, n_valid=0)
    assert spec_of(name).names == ("0", "1", "2") and not len(valid.y)
    x, y = own_images.shuffled(expected[:6], torch.tensor([0, 1, 2, 0, 1, 2]))
    assert torch.equal(test.x, x) and torch.equal(test.y, y)
    assert len(train.y) == 20
    assert load(name, tmp_path, train=False).x.shape == (6, 3, 32, 32)


def test_grey_and_larger_sets_of_torchvision(tmp_path, monkeypatch):
    import torchvision.datasets as tv

    class Fake:
        def __init__(self, root, download, **split):
            assert split == ({"split": "test"} if self.labelled else {"train": False})
            grey = torch.arange(1, 785).remainder(255).to(torch.uint8).view(1, 28, 28)
            self.data = np.full((2, 3, 96, 96), 7, np.uint8) if self.labelled else grey
            setattr(self, "labels" if self.labelled else "targets", np.zeros(len(self.data)))

    monkeypatch.setattr(tv, "MNIST", type("MNIST", (Fake,), {"labelled": False}))
    monkeypatch.setattr(tv, "STL10", type("STL10", (Fake,), {"labelled": True}))
    x = load("mnist", tmp_path, train=False).x
    assert x.shape == (1, 3, 32, 32) and x[0, 1, 2, 2] == 1 and x[0, :, 1].max() == 0
    assert load("stl10", tmp_path, train=False).x.shape == (2, 3, 32, 32)
    assert load("stl10", tmp_path, train=False, size=96).x.unique().tolist() == [7]
    sizes = [(16, 32), (32, 32), (64, 96), (96, 96), (128, 96)]
    assert [(size, ood.nearest_size("stl10", size)) for size, _ in sizes] == sizes


# What makes no data set

def write_npz(path, **changes):
    x, y = np.zeros((20, 8, 8, 3), np.uint8), np.arange(20) % 2
    arrays = {"x_train": x, "y_train": y, "x_test": x, "y_test": y} | changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})


def test_a_file_with_validation_images_of_its_own(tmp_path):
    valid = np.full((4, 8, 8, 3), 9, np.uint8)
    write_npz(tmp_path / "a.npz", x_valid=valid, y_valid=np.arange(4) % 2)
    train, valid, test = load_splits(f"npz:{tmp_path / 'a.npz'}", tmp_path, size=16)
    assert [len(s.y) for s in (train, valid, test)] == [20, 4, 20]
    assert valid.x.unique().tolist() == [9] and not train.x.any()


@pytest.mark.parametrize("changes, words", [
    ({"x_test": None}, "has no array x_test"),
    ({"x_train": np.zeros((20, 8, 8, 3), np.float32)}, "x_train is float32"),
    ({"x_train": np.zeros((20, 8, 8, 2), np.uint8)}, r"\[20, 8, 8, 2\]"),
    ({"x_train": np.zeros((0, 8, 8, 3), np.uint8), "y_train": np.zeros(0, int)}, "x_train is"),
    ({"y_train": np.arange(19)}, "20 integers"),
    ({"y_train": np.arange(20) - 1}, "labels -1 .. 18"),
    ({"y_train": np.full(20, 10**15)}, "labels 1000000000000000"),
    ({"y_train": np.zeros(20, int)}, "two or more classes"),
    ({"y_train": np.arange(20) % 2 * 2}, "class '1' has no training image"),
    ({"y_test": np.arange(20)}, "y_test has label 19, y_train none above 1"),
    ({"y_train": np.array([{}] * 20)}, "20 integers")])
def test_an_npz_file_that_is_no_data_set_is_one_line(tmp_path, changes, words):
    write_npz(tmp_path / "a.npz", **changes)
    with pytest.raises(InputError, match=words) as error:
        load(f"npz:{tmp_path / 'a.npz'}", tmp_path, train=True)
    assert "\n" not in str(error.value)


def test_a_damaged_npz_file_is_one_line(tmp_path):
    write_npz(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "cut").write_bytes(whole[:3000])
    (tmp_path / "flipped").write_bytes(whole[:1000] + b"\1" + whole[1001:])
    for name in ("pipe", "cut", "flipped", "absent"):
        with pytest.raises(InputError):
            load(f"npz:{tmp_path / name}", tmp_path, train=True)


def no_test_split(path):
    fill(path / "train", n=2)


def strange_class(path):
    fill(path / "train", n=2)
    fill(path / "test", n=2, classes=("plum",))


def empty_class(path):
    fill(path, n=2)
    (path / "plum").mkdir()


def unreadable_class(path):
    fill(path, n=5)
    (path / "plum").mkdir()
    (path / "plum" / "a.png").write_text("")


def no_classes(path):
    paint(path / "train" / "a.png", 1)
    paint(path / "test" / "a.png", 1)


@pytest.mark.parametrize("build, words", [
    (no_test_split, "train/ and no test/"), (strange_class, "train/ has not: plum"),
    (empty_class, "class 'plum' has no image file"),
    (unreadable_class, "class 'plum' has no training image that can be read"),
    (no_classes, "two or more classes"),
    (lambda path: fill(path, n=5, classes=("one",)), "two or more classes.*there is one"),
    (lambda path: path.mkdir(), "two or more classes.*there is no folder"),
    (lambda path: path.write_text(""), "is no folder"), (lambda path: None, "is no folder")])
def test_a_folder_that_is_no_data_set_is_one_line(tmp_path, build, words):
    build(tmp_path / "set")
    with pytest.raises(InputError, match=words) as error:
        load(f"folder:{tmp_path / 'set'}", tmp_path / "data", train=True)
    assert "\n" not in str(error.value)


def test_images_beyond_memory_and_too_few_are_one_line(tmp_path, monkeypatch, call):
    fill(tmp_path / "set", n=5)
    argv = tiny(tmp_path / "run", "--dataset", f"folder:{tmp_path / 'set'}", "--data_root",
                tmp_path, "--n_valid", "0", "--n_train", "8")
    code, _, err = call(train_jempp.main, argv)
    assert code == 2 and "a batch of 16 is larger than the 8 training images" in err
    monkeypatch.setattr(image_folder, "memory", lambda: 10_000)
    code, _, err = call(train_jempp.main, [*argv, "--image_size", "64"])
    assert code == 2 and "10 images of 64 x 64" in err and err.count("\n") == 1


def test_flags_of_own_images(tmp_path):
    fill(tmp_path, n=2)
    words = ["--dataset", f"folder:{tmp_path}"]
    args = train_args(words)
    assert (args.image_size, args.pad, args.flip, args.n_valid) == (32, 4, False, None)
    args = train_args([*words, "--image_size", "64", "--flip"])
    assert (args.pad, args.flip, args.class_names) == (8, True, list(FRUIT))
    assert (train_args([]).pad, train_args([]).flip) == (4, True)
    for wrong in (["--image_size", "30"], ["--image_size", "512"], ["--pad", "32"]):
        with pytest.raises((InputError, SystemExit)):
            train_args([*words, *wrong])
    with pytest.raises(InputError, match="images of 32 pixels"):
        train_args(["--image_size", "16"])


# The whole way

def test_train_resume_and_evaluate_on_a_folder(tmp_path, call):
    fill(tmp_path / "set", n=50)
    name, run = f"folder:{tmp_path / 'set'}", tmp_path / "run"
    argv = tiny(run, "--dataset", name, "--data_root", tmp_path / "data", "--image_size", "16",
                "--n_valid", "20", "--n_epochs", "1", "--p_x_y_weight", "1")
    (tmp_path / "set" / "apple" / "zzz.png").write_text("broken")
    assert call(train_jempp.main, [*argv, "--max_steps", "2"])[0] == 0
    code, text, err = call(train_jempp.main, argv)
    assert code == 0 and "continuing" in text, err
    header = read_jsonl(run / "train.jsonl")[0]
    assert header["left_out"] == {"no image of a known format": 1}
    assert header["args"]["class_names"] == list(FRUIT) and header["n_test"] == 20

    out, other = tmp_path / "out.jsonl", f"folder:{tmp_path / 'other'}"
    fill(tmp_path / "other", n=9)
    (tmp_path / "other" / "broken.png").write_text("broken")
    code, text, err = call(eval_jempp.main, [
        "--load_path", run / "last.pt", "--eval", "accuracy", "samples", "ood", "--ood",
        f"svhn={other}", name, "uniform", "--chain_steps", "2", "--chain_batch", "4",
        "--results", out])
    assert code == 0, err
    records = read_jsonl(out)
    assert {r["dataset"] for r in records} == {name}
    assert all(r["class_names"] == list(FRUIT) for r in records)
    svhn = [r["protocol"] for r in records if r["protocol"].get("out") == "svhn"]
    assert len(svhn) == 9 and svhn[0]["n_out"] == 18 and svhn[0]["origin"] == other
    assert svhn[0]["left_out"] == {"no image of a known format": 1}

    paint(tmp_path / "set" / "apple" / "000.png", 200)  # other images than it was trained on
    code, _, err = call(train_jempp.main, argv)
    assert code == 2 and "trained on other images" in err
    assert json.loads((run / "args.json").read_text())["dataset"] == name


def test_the_first_images_of_a_test_split_or_an_out_set_are_of_all_classes(tmp_path):
    for split in ("train", "test"):
        fill(tmp_path / "set" / split, n=20)
    train, _, test = load_splits(f"folder:{tmp_path / 'set'}", tmp_path, size=16)
    assert set(test.y[:10].tolist()) == {0, 1} and all(
        x[0, 0, 0] // 100 == y for x, y in zip(test.x, test.y, strict=True))
    out, _ = image_folder.read(tmp_path / "set" / "test", 16, 10)
    assert {value // 100 for value in out[:, 0, 0, 0].tolist()} == {0, 1}


def test_another_fifth_set_aside_is_not_taken_for_the_test_split_of_training(tmp_path, call):
    fill(tmp_path / "set", n=40)
    argv = tiny(tmp_path / "run", "--dataset", f"folder:{tmp_path / 'set'}", "--data_root",
                tmp_path, "--image_size", "16", "--n_epochs", "1", "--p_x_weight", "0")
    argv = [word for k, word in enumerate(argv)  # all images of the folder
            if not {"--n_train", "--n_valid"} & {word, argv[k - 1]}]
    assert call(train_jempp.main, argv)[0] == 0
    judge = ["--load_path", tmp_path / "run" / "last.pt", "--eval", "accuracy", "--splits", "test",
             "--results", tmp_path / "out.jsonl"]
    assert call(eval_jempp.main, judge)[0] == 0
    paint(tmp_path / "set" / "pear" / "new.png", 90)
    code, _, err = call(eval_jempp.main, judge)
    assert code == 2 and "another fifth" in err and len(err.strip().splitlines()) == 1


def test_a_picture_that_could_not_be_opened_for_a_while_is_not_left_out_for_ever(tmp_path,
                                                                               monkeypatch):
    fill(tmp_path / "set", n=5)
    read_rgb, denied = image_folder.read_rgb, [True]

    def denying(path):
        if denied[0] and path.name == "000.png":
            raise PermissionError(errno.EACCES, "denied")
        return read_rgb(path)

    monkeypatch.setattr(image_folder, "read_rgb", denying)
    for denied[0], n in ((True, 7), (False, 8)):
        assert len(load(f"folder:{tmp_path / 'set'}", tmp_path / "data", train=True).y) == n


def test_classes_of_other_names_are_not_those_of_training(tmp_path, call):
    for split in ("train", "test"):
        fill(tmp_path / "set" / split, n=30)
    argv = tiny(tmp_path / "run", "--dataset", f"folder:{tmp_path / 'set'}", "--data_root",
                tmp_path, "--image_size", "16", "--n_valid", "0", "--max_steps", "1")
    assert call(train_jempp.main, argv)[0] == 0
    for split in ("train", "test"):
        (tmp_path / "set" / split / "apple").rename(tmp_path / "set" / split / "zebra")
    code, _, err = call(eval_jempp.main, ["--load_path", tmp_path / "run" / "last.pt", "--eval",
                                          "accuracy", "--results", tmp_path / "out.jsonl"])
    assert code == 2 and "zebra" in err and err.count("\n") == 1


def test_class_names_stand_in_pictures(tmp_path, call, monkeypatch):
    fill(tmp_path / "set", n=20)
    argv = tiny(tmp_path / "run", "--dataset", f"folder:{tmp_path / 'set'}", "--data_root",
                tmp_path, "--image_size", "16", "--n_valid", "0", "--n_train", "32",
                "--max_steps", "1")
    assert call(train_jempp.main, argv)[0] == 0
    drawn, image_rows = [], eval_jempp.plots.image_rows
    monkeypatch.setattr(eval_jempp.plots, "image_rows", lambda rows, names, *more: (
        drawn.append(list(names)) or image_rows(rows, names, *more)))
    assert call(eval_jempp.main, ["--load_path", tmp_path / "run" / "last.pt", "--eval",
                                  "best_worst"])[0] == 0
    assert drawn == [list(FRUIT)] * 4


def test_names_of_bytes_that_are_no_text(tmp_path):
    for name in ("a\udcff", "b"):
        for i in range(4):
            paint(tmp_path / "set" / name / f"{i}\udcfe.png", i)
    name = f"folder:{tmp_path / 'set'}"
    assert own_images.class_names(name) == ("a\ufffd", "b")
    assert len(load(name, tmp_path, train=True).y) == 7
