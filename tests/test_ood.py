"""Out-of-distribution metrics by hand and by brute force; scores in closed form; the out sets."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, roc_curve
from torch import nn

from models import JEM
from utils import data
from utils.evaluation import ood
from utils.evaluation.inference import predict
from utils.program import InputError

torch.set_num_threads(1)


def tied_scores(seed, n_in, n_out):
    """Two overlapping sets of scores with many ties, within and across."""
    rng = np.random.default_rng(seed)
    return rng.integers(2, 12, n_in).astype(float), rng.integers(0, 9, n_out).astype(float)


# Metrics

def test_auroc_is_the_probability_of_the_right_order():
    score_in, score_out = tied_scores(0, 60, 45)
    wins = sum(float(a > b) + float(a == b) / 2 for a in score_in for b in score_out)
    assert ood.auroc(score_in, score_out) == pytest.approx(wins / (60 * 45), abs=1e-14)
    # Scores of log p(x) are far outside [0, 1], which must not matter.
    assert ood.auroc(score_in * 1e4 - 5e4, score_out * 1e4 - 5e4) == ood.auroc(score_in, score_out)


def test_auroc_and_aupr_equal_those_by_hand():
    assert ood.auroc([3, 1], [2, 0]) == 0.75
    # Down the ranking in, out, in, out: precision 1 at recall 1/2, 2/3 at recall 1.
    assert ood.aupr([3, 1], [2, 0]) == pytest.approx((1 + 2 / 3) / 2, abs=1e-15)
    assert ood.auroc([2, 2], [1]) == 1 and ood.auroc([1], [2, 2]) == 0
    assert ood.aupr([1, 1, 1], [1]) == 0.75  # no information: the share of in images


def test_aupr_agrees_with_scikit_learn_on_ties():
    score_in, score_out = tied_scores(1, 30, 50)
    labels = np.r_[np.ones(30), np.zeros(50)]
    expected = average_precision_score(labels, np.r_[score_in, score_out])
    assert ood.aupr(torch.tensor(score_in), torch.tensor(score_out)) == expected


def test_fpr95_equals_that_by_hand():
    score_in = np.arange(20.0)  # 19 of 20 is exactly 95 %: the threshold is 1
    assert ood.fpr_at_95_tpr(score_in, [0, 0.5, 1, 2]) == 0.5  # tied with the threshold: accepted
    # 18 of 19 is 94.7 %, too few: the threshold has to go down to the lowest, 0.
    assert ood.fpr_at_95_tpr(np.arange(19.0), [-1, 0, 0.5]) == pytest.approx(2 / 3)
    assert ood.fpr_at_95_tpr([5, 5], [4]) == 0 and ood.fpr_at_95_tpr([5], [5, 6]) == 1


@pytest.mark.parametrize("n_in", [1, 7, 20, 40, 99, 100, 101, 340])
def test_fpr95_agrees_with_scikit_learns_curve(n_in):
    score_in, score_out = tied_scores(n_in, n_in, 77)
    labels = np.r_[np.ones(n_in), np.zeros(77)]
    fpr, tpr, _ = roc_curve(labels, np.r_[score_in, score_out], drop_intermediate=False)
    assert ood.fpr_at_95_tpr(score_in, score_out) == pytest.approx(fpr[np.argmax(tpr >= 0.95)])


@pytest.mark.parametrize("metric", [ood.auroc, ood.aupr, ood.fpr_at_95_tpr])
def test_bad_scores_are_refused_by_name(metric):
    with pytest.raises(ValueError, match="score_out holds 1 NaN or infinite of 2"):
        metric([1.0], [0.5, np.nan])
    with pytest.raises(ValueError, match="score_in holds 2 NaN or infinite of 2"):
        metric(torch.tensor([np.inf, -np.inf]), [0.5])
    with pytest.raises(ValueError, match="score_in holds one score an image"):
        metric([], [0.5])
    with pytest.raises(ValueError, match="score_out holds one score an image"):
        metric([1.0], [[0.5]])


# Scores

def test_scores_are_log_sum_exp_and_largest_softmax_in_float64():
    logits = torch.tensor([[0.0, np.log(3)], [30, 0], [60, 0]], dtype=torch.float32)
    np.testing.assert_allclose(ood.log_p_x(logits), [np.log(4), 30, 60], rtol=1e-7)
    p = ood.max_p_y_given_x(logits)
    assert p[0] == pytest.approx(0.75, abs=1e-7)
    # Both are 1 in float32; in float64 at least the first is still below it.
    assert p.dtype == torch.float64 and p[1] < p[2]


class Quadratic(JEM):
    """E(x) = ||x||^2 / 2 in eval mode, so grad_x log p(x) = -x; 100 times it in train mode."""

    def __init__(self):
        nn.Module.__init__(self)

    def forward(self, x):  # of one logit, LogSumExp is the logit
        return (100.0 if self.training else 1.0) * -x.square().flatten(1).sum(1, keepdim=True) / 2


@pytest.mark.parametrize("training", [True, False])
def test_gradient_norm_equals_its_closed_form(training):
    x = torch.tensor([0, 255, 51]).to(torch.uint8).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    model = Quadratic().train(training)
    expected = -torch.tensor([1, 1, 0.6]).double() * 48**0.5
    logits, score = ood.logits_and_gradient_norm(model, x)
    torch.testing.assert_close(score, expected, rtol=1e-6, atol=0)
    assert torch.equal(logits, predict(model, x))
    assert model.training is training
    with pytest.raises(ValueError, match="uint8"):
        ood.logits_and_gradient_norm(model, x.float())


def test_gradient_norm_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    model = JEM.build(depth=10, width=1, n_classes=10)
    x = torch.randint(256, (7, 3, 16, 16), dtype=torch.uint8)
    logits, whole = ood.logits_and_gradient_norm(model, x, 7, sigma=0.03)
    assert whole.shape == (7,) and (whole < 0).all() and whole.std() > 0
    assert torch.equal(logits, predict(model, x, 7, sigma=0.03))  # of the same noisy images
    assert not torch.equal(logits, predict(model, x, 7))
    for batch in (1, 3):
        score = ood.logits_and_gradient_norm(model, x, batch, sigma=0.03)[1]
        torch.testing.assert_close(score, whole, rtol=1e-4, atol=0)
    assert model.training and all(p.grad is None for p in model.parameters())


# Out sets

IN_X = torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8,
                     generator=torch.Generator().manual_seed(0))


def out(name, size=8, *, n=None, seed=1, root="nowhere", in_x=IN_X):
    x = ood.out_set(name, size, in_x=in_x, root=root, seed=seed, n=n).x
    assert x.dtype == torch.uint8 and x.shape[1:] == (3, size, size) and x.device.type == "cpu"
    return x


def test_interp_is_the_mean_of_two_different_images():
    pairs = {}
    for i in range(12):
        for j in range(i):
            mean = (IN_X[i].int() + IN_X[j].int() + 1) // 2  # halves up
            pairs[mean.to(torch.uint8).numpy().tobytes()] = {i, j}
    found = [pairs[x.numpy().tobytes()] for x in out("interp", n=200)]
    assert set().union(*found) == set(range(12))
    assert len({frozenset(pair) for pair in found}) > 50  # of 66
    with pytest.raises(InputError, match="2 or more"):
        out("interp", in_x=IN_X[:1])


@pytest.mark.parametrize("name", ["interp", "uniform", "constant"])
def test_generated_sets_are_functions_of_seed_and_index(name):
    x = out(name)
    assert len(x) == len(IN_X)
    assert torch.equal(x[:5], out(name, n=5)) and torch.equal(x, out(name, n=20)[:12])
    assert not torch.equal(x, out(name, seed=2))
    assert len(out(name, 6, n=3)) == 3


def test_uniform_and_constant_images_have_their_known_statistics():
    x = out("uniform", 32, n=20).double()
    assert x.min() == 0 and x.max() == 255  # 61,440 values
    assert abs(x.mean() - 127.5) < 1.2 and abs(x.std() - 73.9) < 0.8  # 4 standard errors
    assert x.flatten(1).std(1).min() > 70
    x = out("constant", n=300)
    assert (x == x[:, :, :1, :1]).all()
    colours = x[:, :, 0, 0]
    assert len(colours.unique(dim=0)) > 295 and colours.min() < 5 and colours.max() > 250


def test_digits_are_drawn_at_the_size_asked_for():
    expected = data.load("digits", "nowhere", train=False, size=32).x
    assert torch.equal(out("digits", 32), expected)
    assert torch.equal(out("digits", 32, n=5), expected[:5])
    assert out("digits", 12).shape == (360, 3, 12, 12)
    with pytest.raises(InputError, match="16, 32"):
        data.load("digits", "nowhere", train=False, size=12)
    assert len(out("digits", n=361)) == 360  # there are no more


def test_loaded_sets_are_resized_only_where_the_size_differs(monkeypatch):
    stripes = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    stripes[..., ::4] = 255

    def load(name, root, *, train, download, size):
        assert (name, root, train, download, size) == ("svhn", "nowhere", False, False, 32)
        return data.Images(stripes, torch.zeros(4).long())

    monkeypatch.setattr(ood.data, "load", load)
    assert torch.equal(out("svhn", 32), stripes)
    small = out("svhn", 8, n=3)
    # Antialiased: inside, the stripes blur to their mean. Without it all would fall between pixels.
    assert len(small) == 3 and (small[..., 1:-1].int() - 64).abs().max() <= 1


def test_unknown_names_and_numbers_are_refused():
    for name in ("cifar", "folder:", "folder", ""):
        with pytest.raises(InputError, match="cifar10, cifar100, svhn, mnist, fashion_mnist, "
                           "stl10, digits, celeba, interp, uniform, constant, folder:PATH, npz:"):
            out(name)
    with pytest.raises(InputError, match="1 or more"):
        out("uniform", n=0)
    with pytest.raises(InputError, match="--data_root"):
        out("cifar10")


# Folders of images

def half_and_half(width, height, mode="RGB"):
    """Black left of the centre square's middle, white right of it; red outside that square."""
    side = min(width, height)
    image = Image.new("RGB", (width, height), (255, 0, 0))
    left, top = (width - side) // 2, (height - side) // 2
    image.paste((0, 0, 0), (left, top, left + side // 2, top + side))
    image.paste((255, 255, 255), (left + side // 2, top, left + side, top + side))
    return image.convert(mode)


def test_folder_reads_any_mode_and_size_and_counts_the_broken(tmp_path, capsys, monkeypatch):
    (tmp_path / "sub").mkdir()
    half_and_half(64, 32).save(tmp_path / "a.png")
    half_and_half(16, 16, "L").save(tmp_path / "b.PNG")
    half_and_half(30, 50, "P").save(tmp_path / "c.gif")
    half_and_half(8, 8, "RGBA").save(tmp_path / "d.tiff")
    grey16 = np.asarray(half_and_half(16, 16, "L")).astype(np.uint16) * 128  # 0 and 32640
    Image.fromarray(grey16).save(tmp_path / "e.png")
    half_and_half(20, 20).save(tmp_path / "sub" / "a.webp", lossless=True)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "0-cut.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "0-text.jpg").write_text("no image")
    (tmp_path / "0-empty.png").write_bytes(b"")
    half_and_half(60, 60).save(tmp_path / "0-bomb.png")
    (tmp_path / "notes.txt").write_text("not counted")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # 3600 warns only, from 6000 on it raises

    x = out(f"folder:{tmp_path}")
    assert len(x) == 6  # a, b, c, d, e, sub/a, in an order that does not depend on their names
    black, white = x[..., :3].flatten(1), x[..., 5:].flatten(1)
    assert black.max() == 0
    assert sorted(white.min(1).values.tolist()) == [127, 255, 255, 255, 255, 255]
    assert torch.equal(white.min(1).values, white.max(1).values)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "0-bomb.png" in line
    assert "4 of 10 image files left out: " in line and "1 more than 3,000 pixels" in line

    assert torch.equal(out(f"folder:{tmp_path}", n=2), x[:2])
    assert len(out(f"folder:{tmp_path}", n=7)) == 6


def test_folder_without_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        out(f"folder:{tmp_path}/absent")
    (tmp_path / "broken.png").write_text("")
    with pytest.raises(InputError, match="no readable image"):
        out(f"folder:{tmp_path}")


# CelebA, as a tiny folder of the same layout

def write_celeba(root, partition):
    """Grey images 178 x 218, image i of value 40 i inside the 140 x 140 centre and red around."""
    home = root / "celeba"
    (home / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06}.jpg" for i in range(1, len(partition) + 1)]
    for i, name in enumerate(names):
        image = Image.new("RGB", (178, 218), (255, 0, 0))
        image.paste((40 * i,) * 3, (19, 39, 159, 179))
        image.save(home / "img_align_celeba" / name, quality=100, subsampling=0)
    (home / "list_eval_partition.txt").write_text(
        "".join(f"{name} {part}\n" for name, part in zip(names, partition, strict=True)))


@pytest.mark.parametrize("kaggle", (False, True))
def test_celeba_is_the_test_split_cropped_to_the_face(tmp_path, monkeypatch, kaggle):
    monkeypatch.setattr(ood, "CELEBA_TEST", 3)
    write_celeba(tmp_path, [0, 2, 1, 2, 2])
    home = tmp_path / "celeba"
    images, partition = home / "img_align_celeba", home / "list_eval_partition.txt"
    if kaggle:  # the pictures one folder deeper, a table instead of the list
        images.rename(home / "inner")
        images.mkdir()
        images = (home / "inner").rename(images / "img_align_celeba")
        rows = partition.read_text().replace(" ", ",")
        (home / "list_eval_partition.csv").write_text(f"image_id,partition\n{rows}")
        partition.unlink()
    x = out("celeba", 32, root=tmp_path)
    expected = torch.tensor([40, 120, 160]).view(3, 1, 1, 1)
    assert x.shape == (3, 3, 32, 32) and (x.int() - expected).abs().max() <= 3  # JPEG
    (images / "000004.jpg").write_text("")
    assert torch.equal(out("celeba", 32, root=tmp_path, n=1), x[:1])  # the others are not opened
    with pytest.raises(InputError, match="000004.jpg is no image of a known format"):
        out("celeba", root=tmp_path)
    (images / "000004.jpg").unlink()
    with pytest.raises(InputError, match="000004.jpg is missing"):
        out("celeba", root=tmp_path)


def test_missing_celeba_names_what_is_wanted(tmp_path):
    with pytest.raises(InputError) as caught:
        ood.out_set("celeba", 32, in_x=IN_X, root=tmp_path, download=True, seed=1)
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path / "celeba") in message
    for word in ("img_align_celeba/", "list_eval_partition.txt", "--data_root", "missing:"):
        assert word in message
    write_celeba(tmp_path, [2])
    with pytest.raises(InputError, match="list_eval_partition.txt names 1 of 19,962 test images"):
        out("celeba", root=tmp_path)
