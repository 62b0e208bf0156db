"""Published models: made of a run, and those in results/models are what their cards say."""

import hashlib
import json
import re

import pytest
import torch
from helpers import ROOT, TINY, tiny

import eval_jempp
import train_jempp
from samplers import evenly_spaced
from scripts import publish
from utils import cli, distributed
from utils.data import Images, load
from utils.evaluation.evaluations import EVALUATIONS
from utils.evaluation.inference import accuracy
from utils.files import checkpoint, published, records
from utils.files.records import read_jsonl, write_jsonl
from utils.program import InputError

PUBLISHED = sorted((ROOT / "results" / "models").glob("*/model.safetensors"))


def test_a_run_is_published_and_evaluates_as_before(tmp_path, call):
    run, out = tmp_path / "run", tmp_path / "models" / "tiny"
    code, _, err = call(train_jempp.main, [*TINY, "--n_epochs", "1", "--run_dir", run, "--amp",
                                           "bf16", "--decay_epochs", "5", "7"])
    assert code == 0, err
    code, said, err = call(publish.main, ["model", run, out, "--n_buffer", "20"])
    assert code == 0 and not err, err
    content, _ = published.read(out)
    assert content["buffer"].dtype == torch.uint8 and len(content["buffer"]) == 20
    assert "optimizer" not in content and str(tmp_path) not in json.dumps(content["args"])
    opened, before = (checkpoint.open_any(p) for p in (out, run / "best.pt"))
    assert (opened.buffer - before.buffer[::2]).abs().max() <= 1 / 255  # half a grey level
    weights = before.model.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in opened.model.state_dict().items())
    flags = ["--no-download", "--device", "cpu", "--num_threads", "1", "--eval", "accuracy",
             "calibration", "--splits", "test"]
    values = []
    for file, results in ((out, out / "records.jsonl"),
                          (run / "best.pt", tmp_path / "before.jsonl")):
        code, _, err = call(eval_jempp.main, ["--load_path", file, "--results", results, *flags])
        assert code == 0, err
        values.append([(r["metric"], r["value"]) for r in read_jsonl(results)])
    # the weights lie in another memory layout, which changes rounding
    assert dict(values[0]) == pytest.approx(dict(values[1]), rel=1e-6)
    code, said, err = call(publish.main, ["card", out])
    assert code == 0, err
    card = (out / "README.md").read_text()
    assert str(tmp_path) not in card and "for 1 epoch (" in card
    cost = json.loads((out / "run.json").read_text())["pflop"]
    assert 0 < cost < 1e-3 and f"{cost:.3g}·10¹⁵ operations" in card
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    assert digest in card and f"{100 * dict(values[0])['accuracy']:.2f} %" in card
    command = re.search(r"python train_jempp.py (.*)", card)[1].split()
    args, now = (vars(cli.train_args(words)) for words in (command, TINY + [
        "--n_epochs", "1", "--amp", "bf16", "--decay_epochs", "5", "7"]))
    different = {k for k in args if args[k] != now[k]}
    assert different <= {"num_threads", "device", "run_dir"}
    check_half(run, tmp_path / "half", weights, call)


def test_a_published_buffer_of_classes_keeps_its_blocks(tmp_path, call):
    run, out = tmp_path / "run", tmp_path / "model"
    assert call(train_jempp.main, tiny(run, "--n_epochs", "1", "--class_cond_p_x_sample"))[0] == 0
    assert call(publish.main, ["model", run, out, "--n_buffer", "35"])[0] == 0
    published, whole = (checkpoint.open_any(p).buffer for p in (out, run / "best.pt"))
    slots = torch.cdist(published.flatten(1), whole.flatten(1)).argmin(1)
    assert torch.equal(slots * 10 // 40, torch.arange(30) * 10 // 30)


@pytest.mark.parametrize("size", (100, 199, 290, 500, 2000, 10_000))
def test_evenly_spaced_slots_cover_all_class_blocks(size):
    slots = evenly_spaced(size, 100)
    assert torch.equal(slots * 10 // size, torch.arange(100) // 10) and len(slots.unique()) == 100
    assert evenly_spaced(7, 100).tolist() == list(range(7))


@pytest.mark.parametrize("words", (["--batch_size", "16", "--labelled_batch", "64"],
                                   ["--optimizer", "adam", "--lr", "0.1", "--batch_size", "24"],
                                   ["--image_size", "32", "--pad", "0"]))
def test_the_command_of_a_card_is_its_run_whatever_the_processes(monkeypatch, words):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    trained = vars(cli.train_args(["--dataset", "digits", *words]))
    monkeypatch.setattr(distributed, "world", lambda: 1)
    log = [{"kind": "header", "step": 0, "args": trained, "n_train": 1300, "steps_per_epoch": 20},
           {"kind": "step", "step": 20, "images_per_s": 10.0}]
    config = {"depth": 10, "width": 1, "n_classes": 10}
    command = publish.command(publish.account(log, config, trained)["flags"])
    again = vars(cli.train_args(command.split()[2:]))
    assert {k for k in again if again[k] != trained[k]} <= {"batch_size"}
    assert again["batch_size"] == again["global_batch_size"]


def test_weights_beyond_float16_are_not_rounded_and_a_card_needs_no_git(
        tmp_path, call, monkeypatch):
    monkeypatch.setattr(records, "git_state", lambda: (None, None))
    run, out = tmp_path / "run", tmp_path / "model"
    assert call(train_jempp.main, tiny(run, "--n_epochs", "1"))[0] == 0
    assert call(publish.main, ["model", run, out])[0] == 0
    assert call(publish.main, ["card", out])[0] == 0
    assert "commit unknown" in (out / "README.md").read_text()
    content = torch.load(run / "best.pt", weights_only=True)
    content["model"]["trunk.norm.running_var"][0] = 7e4
    content["sha256"] = checkpoint.digest(content)
    torch.save(content, run / "best.pt")
    code, _, err = call(publish.main, ["model", run, tmp_path / "half", "--half"])
    assert code == 2 and "drop --half" in err and not (tmp_path / "half").exists()


def test_a_card_tells_the_run_that_a_run_began_with_and_adds_its_cost(tmp_path, call):
    first, run, out = (tmp_path / name for name in ("first", "run", "out"))
    trained(first)
    words = [*TINY, "--n_epochs", "1", "--load_path", first / "best.pt", "--run_dir", run]
    assert call(train_jempp.main, words)[0] == 0
    code, _, err = call(publish.main, ["model", run, out, "--start", run])
    assert code == 2 and "did not begin with" in err and not out.exists()
    for words in (["model", run, out, "--start", first], ["card", out]):
        code, _, err = call(publish.main, words)
        assert code == 0, err
    card, told = (out / "README.md").read_text(), json.loads((out / "run.json").read_text())
    assert "after the first command's run of 0 epochs (1 steps" in card
    assert (told["start"]["run_step"], told["run_step"]) == (1, 3) and told["start"]["pflop"] > 0
    commands = re.findall(r"python train_jempp.py (.*)", card)
    assert "--max_steps 1" in commands[0] and "--load_path runs/" in commands[1]


def check_half(run, out, weights, call):
    """--half publishes the same weights rounded, in half the bytes, and its card says so."""
    assert call(publish.main, ["model", run, out, "--n_buffer", "1", "--half"])[0] == 0
    assert call(publish.main, ["card", out])[0] == 0
    assert "holds float16 weights" in (out / "README.md").read_text()
    rounded = checkpoint.open_any(out).model.state_dict()
    assert all(torch.equal(rounded[k], v.half().to(v.dtype) if v.is_floating_point() else v)
               for k, v in weights.items())
    n_bytes = sum(v.numel() * v.element_size() for v in weights.values())
    assert (out / "model.safetensors").stat().st_size < 0.6 * n_bytes


def test_publishing_what_is_not_there_is_one_line(tmp_path, call):
    for words in (["model", tmp_path, tmp_path / "out"], ["card", tmp_path], ["model", tmp_path]):
        code, _, err = call(publish.main, words)
        assert code == 2 and len(err.splitlines()) == 1, err


@pytest.mark.parametrize("change", ("weights", "buffer", "settings", "cut", "no json", "list"))
def test_a_damaged_published_model_is_one_line(tmp_path, change):
    out = tmp_path / "model"
    content = checkpoint.load(trained(tmp_path / "run"))
    del content["optimizer"]
    published.write(out, content, checkpoint.digest)
    assert checkpoint.open_any(out).sha256 == checkpoint.sha256_of(out / "model.safetensors")
    tensors, config = out / "model.safetensors", out / "config.json"
    data = tensors.read_bytes()
    if change == "weights":
        tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif change == "buffer":
        buffer = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
        published.write(out, content | {"buffer": buffer}, lambda _: content["sha256"])
    elif change == "settings":
        config.write_text(config.read_text().replace('"n_steps": 2', '"n_steps": 3'))
    elif change == "cut":
        tensors.write_bytes(data[:-9])
    else:
        config.write_text("{" if change == "no json" else "[" * 99_999)
    with pytest.raises(InputError) as error:
        checkpoint.open_any(out)
    assert "\n" not in str(error.value)


def trained(run):
    assert train_jempp.main([*TINY, "--p_x_weight", "0", "--max_steps", "1", "--run_dir",
                             str(run)]) == 0
    return run / "last.pt"


@pytest.mark.skipif(not PUBLISHED, reason="nothing is published")
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_a_published_file_is_the_one_its_card_names(path):
    assert path.stat().st_size < 15 * 2**20
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest in (path.parent / "README.md").read_text()
    records = read_jsonl(path.parent / "records.jsonl")
    assert records and {r["checkpoint"]["sha256"] for r in records} == {digest}


def test_a_card_shows_recalibrated_numbers_apart_and_knows_an_attack_without_steps(tmp_path):
    def number(metric, value, **protocol):
        return {"metric": metric, "value": value, "n": 10, "protocol": protocol}

    write_jsonl(tmp_path / "records.jsonl", [
        number("accuracy", 0.8, split="test"), number("accuracy", 0.9, split="test",
                                                      recalibrate_bn=100),
        number("robust_accuracy", 0.5, attack="autoattack", norm="linf", eps_255=8.0)])
    rows = [line for line in publish.table(tmp_path) if "accuracy" in line]
    assert "80.00 %" in rows[0] and "90.00 %" in rows[1] and "recalibrate_bn=100" in rows[1]
    *_, words = publish.measuring(tmp_path)
    assert words == ("--eval robustness --attacks autoattack --eps_linf 8 --eps_l2 --n_attack 10")


@pytest.mark.skipif(not PUBLISHED, reason="nothing is published")
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_the_commands_of_a_card_measure_its_numbers_again(path):
    """Each command asks for the protocol of the records: out sets, budgets, restarts, n."""
    card = (path.parent / "README.md").read_text()
    found, asked = read_jsonl(path.parent / "records.jsonl"), {}
    for words in re.findall("python eval_jempp.py (.*)", card):
        own, _ = cli.evaluation_args(words.split(), EVALUATIONS)
        asked |= {name: own for name in own.eval if name != "robustness"}
        asked |= {name: own for name in own.attacks if "robustness" in own.eval}
    for r in found:
        p = r["protocol"]
        if r["metric"] == "auroc":
            assert p["out"] in {word.split("=")[0] for word in asked["ood"].ood}
            assert p["n_in"] == (asked["ood"].n_images or 10_000)
        if r["metric"] == "robust_accuracy":
            own = asked[p["attack"]]
            budgets = own.eps_linf if p["norm"] == "linf" else own.eps_l2
            assert p.get("eps_255", p.get("eps")) in [0, *budgets]
            assert (r["n"], p["steps"]) == (own.n_attack, own.attack_steps)
            assert p.get("restarts", own.attack_restarts) == own.attack_restarts
    assert {"accuracy", "calibration", "ood", "margin"} <= asked.keys()


@pytest.mark.skipif(not PUBLISHED, reason="nothing is published")
@pytest.mark.skipif(not (ROOT / "data" / "cifar-10-batches-py").is_dir(),
                    reason="no CIFAR-10 in data/")
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
@pytest.mark.parametrize("n", (500, pytest.param(10_000, marks=pytest.mark.long)))
def test_a_published_model_has_the_accuracy_of_its_card(path, n):
    opened = checkpoint.open_any(path)
    test = load(opened.args["dataset"], ROOT / "data", train=False)
    measured = accuracy(opened.model, Images(test.x[:n], test.y[:n]))
    (told,) = {r["value"] for r in read_jsonl(path.parent / "records.jsonl")
               if r["metric"] == "accuracy" and r["protocol"].get("split") == "test"}
    of_a_part = 4 * (told * (1 - told) / n) ** 0.5  # four standard errors
    assert abs(measured - told) <= (0.001 if n == len(test.y) else of_a_part)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_no_published_model_reaches_the_bound_of_the_proximity_constraint(path):
    """results/README.md says so. The bound is 1, the gradients are those of a chain's step."""
    opened = checkpoint.open_any(path)
    if opened.buffer is None:
        pytest.skip("a softmax network")
    for training in (True, False):
        opened.model.train(training)
        gradient = opened.model.energy_gradient(opened.buffer[:100])
        assert 0.05 < gradient.abs().max() < 0.5
