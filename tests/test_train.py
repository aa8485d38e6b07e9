"""train.py: its loss and objective against literal slow loops, and whole tiny runs.

KILLS=30 kills the training process more often than six times; TEST_SLOW=1 adds torch.compile on a
CPU. What needs a GPU is skipped without one.
"""
import copy
import csv
import functools
import io
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import matplotlib
import pytest
import torch
import torch.nn.functional as F
from conftest import small_frames
from PIL import Image

import data
import dissect
import train
from model import (
    GREY_LEVELS,
    LAYERS,
    METER,
    CheckpointError,
    assigned_selectivity,
    layer_thresholds,
    load_checkpoint,
    record,
    sid_thresholds,
)

pytestmark = pytest.mark.usefixtures("small")
ROOT = Path(__file__).resolve().parents[1]
TERMS = ["loss", "loss_depth", "loss_ssim", "loss_normal", "loss_grad"]
METRICS = ["rmse_m", "rel", "log10", "delta1", "delta2", "delta3"]
FACES = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
DRAW_CURVES, DRAW_PREDICTIONS, EVALUATE = train.draw_curves, train.draw_predictions, train.evaluate
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class GreyRooms(data.Rooms):
    """Rooms with depth on the 8-bit grid of Kaggle's PNGs; the notebook's last threshold occurs."""

    def __init__(self, rooms, device):
        super().__init__(rooms, device)
        self.names["test"] = self.names["test"][:rooms // 5]

    def frames(self, pool, indices):
        image, depth = super().frames(pool, indices)
        levels = (depth * GREY_LEVELS).round().clamp(1, 255)
        levels[:, :, :2], levels[:, :, -2:] = 100, 255
        return image, levels * (10 / 255)


@pytest.fixture(scope="module")
def packed(tmp_path_factory, small):
    path = tmp_path_factory.mktemp("packed") / "rooms.h5"
    data.pack(GreyRooms(12, "cpu"), path)
    return path


@pytest.fixture(scope="module")
def flags(packed):
    """11 images: 3 steps an epoch. So high a rate, that six steps change what is predicted."""
    return ["--data", packed, "--batch-size", 4, "--epochs", 2, "--lr", 0.03]


@pytest.fixture(scope="module")
def unbroken(flags, tmp_path_factory):
    """A run; beside it lie copies of its folder as each write of a result would leave it."""
    genuine, out = os.replace, tmp_path_factory.mktemp("runs") / "unbroken"

    def replace(temporary, path):
        if path.suffix in (".pt", ".csv", ".json"):
            number = len(list(out.parent.iterdir()))
            died = out.parent / f"{number} died in {path.name}"
            shutil.copytree(out, died, copy_function=os.link)  # no file is changed in its place
        genuine(temporary, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        run(*flags, "--out", out)
    return out


@pytest.fixture
def finished(unbroken, tmp_path):
    """A copy of that run, to be changed."""
    return shutil.copytree(unbroken, tmp_path / "finished")


@pytest.fixture
def on_cpu(monkeypatch):
    """For runs that a test follows step by step: as on a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):  # they take most of the time
    monkeypatch.setattr(train, "draw_curves", lambda *_: None)
    monkeypatch.setattr(train, "draw_predictions", lambda *_: None)


@pytest.fixture
def command(monkeypatch):
    """Runs `python train.py words` in this process, guard included."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(*words):
    return train.main([str(word) for word in words])


def run_small(*words):
    """`run` in a process of its own."""
    torch.set_num_threads(1)
    small_frames(pytest.MonkeyPatch())
    train.draw_curves = train.draw_predictions = lambda *_: None
    run(*words)


@pytest.fixture(scope="module", autouse=True)
def mistaken(tmp_path_factory):
    """`python train.py` at work beside the first tests: to import torch takes seconds."""
    folder = tmp_path_factory.mktemp("mistaken")
    words = [sys.executable, ROOT / "train.py", "--data", "nowhere", "--out", folder / "new"]
    with subprocess.Popen(words, cwd=folder, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        yield process, folder


def refusal(*words):
    """The sentence with which a run ends early."""
    with pytest.raises((data.UserError, CheckpointError)) as stop:
        run(*words)
    return str(stop.value)


def log(out):
    with open(out / "log.csv", newline="", encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if key not in ("seconds", "images/s")}
                for row in csv.DictReader(file)]


def column(out, key):
    return [float(row[key]) for row in log(out)]


def read_json(path):
    def refuse(word):
        raise AssertionError(f"{path} holds {word}, which is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def state(path):
    return loaded(path.read_bytes())


@functools.lru_cache(8)  # many tests compare with the same run
def loaded(content):
    return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")


def assert_same(one, other, place="state"):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_same(one[key], other[key], f"{place}, {key}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, list) and one and isinstance(one[0], dict):
        for n, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{place}, {n}")
    else:
        assert one == other, place


def assert_same_run(one, other):
    """Bit for bit; only what says where and how fast may differ."""
    assert log(one) == log(other)
    for name in ("best.pt", "last.pt"):
        ours, theirs = state(one / name), state(other / name)
        for key in ours.keys() - {"config", "rows"}:
            assert_same(ours[key], theirs[key], f"{name}, {key}")
    assert read_json(one / "metrics.json") == read_json(other / "metrics.json")


def changed(packed, path, change):
    """A copy of the packed frames in which change(file) was made."""
    shutil.copy(packed, path)
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def on_call(monkeypatch, place, name, number, act):
    """From the `number`-th call of place.name on, act(result) stands in for its result."""
    genuine, calls = getattr(place, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        result = genuine(*args, **kwargs)
        return act(result) if len(calls) >= number else result

    monkeypatch.setattr(place, name, counted)


def in_epoch(monkeypatch, epoch, act):
    """Calls act() after the first step of that epoch."""
    genuine = data.progress

    def progress(items, label, *rest):
        for number, item in enumerate(genuine(items, label, *rest)):
            if label == f"epoch {epoch}" and number == 1:
                act()
            yield item

    monkeypatch.setattr(data, "progress", progress)


def scene(missing=0.0):
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(2, 2, 6, 8, generator=generator) * 5 + 0.7
    prediction, depth = F.interpolate(coarse, (48, 64), mode="bilinear").split(1, 1)
    return prediction, depth * (torch.rand(depth.shape, generator=generator) >= missing)


def slow_terms(prediction, depth, units=100.0):
    """The released loss, literally; a window or Sobel patch with a missing pixel does not count."""
    p, d = prediction * units, depth * units
    measured = (depth > 0).float()
    near = F.unfold(F.pad(measured, (1, 1, 1, 1), value=1.0), 3).amin(1).view_as(p) > 0

    def normal_and_slopes(z):
        x, y = (F.conv2d(z, kernel.to(z)[None, None], padding=1) for kernel in (FACES, FACES.T))
        return torch.cat([-x, -y, torch.ones_like(x)], 1), x, y

    (n_p, x_p, y_p), (n_d, x_d, y_d) = normal_and_slopes(p), normal_and_slopes(d)
    cosine = F.cosine_similarity(n_p, n_d, dim=1, eps=0)[:, None]
    window = torch.tensor([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5 ** 2))
                            for j in range(11)] for i in range(11)]).to(p)
    window = (window / window.sum()).view(1, 121, 1)
    p_cells, d_cells = F.unfold(p, 11), F.unfold(d, 11)                    # (B, 121, windows)
    whole = F.unfold(measured, 11).amin(1) > 0
    mean_p, mean_d = (p_cells * window).sum(1), (d_cells * window).sum(1)
    variance_p = (p_cells ** 2 * window).sum(1) - mean_p ** 2
    variance_d = (d_cells ** 2 * window).sum(1) - mean_d ** 2
    covariance = (p_cells * d_cells * window).sum(1) - mean_p * mean_d
    c1, c2 = (0.01 * 1000) ** 2, (0.03 * 1000) ** 2
    ssim = ((2 * mean_p * mean_d + c1) * (2 * covariance + c2)
            / ((mean_p ** 2 + mean_d ** 2 + c1) * (variance_p + variance_d + c2)))
    return {"loss_depth": (p - d).abs()[measured > 0].mean(),
            "loss_ssim": 100 * (1 - ssim[whole].mean()),
            "loss_normal": 100 * (1 - cosine)[near].abs().mean(),
            "loss_grad": ((x_p - x_d).abs()[near].mean() + (y_p - y_d).abs()[near].mean()) / 0.5}


def slow_notebook_selectivity(features, levels):
    """You et al. on one batch, the notebook's bins: up to 100 levels, and all beyond in bin 0."""
    units = features.shape[1]
    bins = min(units, 64)
    edges = [0, 0.75, *(math.exp(math.log(100.25) * i / (bins - 1)) - 0.25
                        for i in range(1, bins - 1)), 100]
    total, count = torch.zeros(units, bins), [0] * bins
    for activation, level in zip(features.abs(), levels[:, 0]):
        activation = F.interpolate(activation[None], level.shape, mode="bilinear")[0]
        number = torch.where(level > 0, 0, -1)  # missing: in no bin
        for b in range(bins):
            number[(level > edges[b]) & (level <= edges[b + 1])] = b
        for b in range(bins):
            count[b] += int((number == b).sum())
            found = activation[:, number == b].sum(1, keepdim=True)
            total = total + found * F.one_hot(torch.tensor(b), bins)
    score = 0
    for k in range(units):
        own = k * bins // units
        if count[own]:
            response = [total[k, b] / max(count[b], 1) for b in range(bins)]
            others = (sum(response) - response[own]) / (bins - 1)
            score = score + (response[own] - others) / (response[own] + others + 1e-15)
    return score / units


def literal_run(notebook, seed):
    """Three epochs of two steps, literally: terms of each step; of each epoch, weights and average.

    A plain loop: AdamW written out, slow terms. Ours: cosine from 1e-3, augmented, dec_3 pulled to
    its bins by -0.6; the notebook's: 1e-4, two layers, literal -0.5, its split.
    """
    names, alpha = (["dec_3", "enc_4"], -0.5) if notebook else (["dec_3"], -0.6)
    count = 9 if notebook else 11  # of the twelve images, 80 % or 90 %, in file order
    images, depths = GreyRooms(12, "cpu").frames("train", range(count))
    images = images.permute(0, 3, 1, 2) / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    torch.manual_seed(seed)
    model = METER("xxs", 25.5 if notebook else 1.0).to(memory_format=torch.channels_last).train()
    moments = [[torch.zeros_like(x), torch.zeros_like(x)] for x in model.parameters()]
    average = {key: x.clone() for key, x in model.state_dict().items()}
    steps, ends = [], []
    for n in range(6):
        epoch, number = divmod(n, 2)  # the images that fill no batch are left out
        chance = torch.Generator().manual_seed(seed * 100_003 + epoch)
        batch = torch.randperm(count, generator=chance).split(4)[number]
        image, depth, rate, pull, weight = images[batch], depths[batch], 1e-4, alpha, 1.0
        if not notebook:
            draws = torch.rand(count, 11, generator=chance)[batch]
            image, depth = data.augment(image, depth, draws, mirror_shift=3)
            done = n / 6
            rate = 1e-3 * min((done + 1e-3) / 0.05,
                              (1 + math.cos(math.pi * max(0, done - 0.05) / 0.95)) / 2)
            pull = alpha * min(1, done / 0.1)
            weight = max(0.01, 9 / (9 + n))

        with record(model, names) as features:
            prediction = model((image - mean) / deviation)
        if notebook:  # all in grey levels
            levels = (depth * 25.5).round()
            terms = slow_terms(prediction * 25.5, levels, 1.0)
            scores = {x: slow_notebook_selectivity(features[x], levels) for x in names}
            loss = sum(terms.values()) + pull * sum(scores.values())
        else:
            terms = slow_terms(prediction, depth)
            scores = {x: assigned_selectivity(features[x], depth, sid_thresholds(8), 0.001)
                      for x in names}
            balanced = sum(terms.values())
            loss = balanced + pull * sum(scores.values()) * balanced.item()
        named = {"loss": loss, **terms, **{f"selectivity_{x}": y for x, y in scores.items()}}
        steps.append({key: x.item() for key, x in named.items()} | {"lr": rate})

        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for x, (first, second) in zip(model.parameters(), moments):
                first.mul_(0.9).add_(0.1 * x.grad)
                second.mul_(0.999).add_(0.001 * x.grad ** 2)
                x.mul_(1 - rate * 0.01)  # weight decay
                x.sub_(rate * (first / (1 - 0.9 ** (n + 1)))
                       / ((second / (1 - 0.999 ** (n + 1))).sqrt() + 1e-8))
        for key, x in model.state_dict().items():
            if x.is_floating_point():
                average[key] = (1 - weight) * average[key] + weight * x
        if number == 1:
            ends.append(copy.deepcopy({"training": model.state_dict(), "model": average}))
    return steps, ends


@pytest.mark.parametrize("missing", [0, 0.002])
@pytest.mark.parametrize("units", [100.0, GREY_LEVELS])
def test_each_term_of_the_loss_equals_its_literal_formula(units, missing, device):
    prediction, depth = scene(missing)
    terms = train.loss_terms(prediction.to(device), depth.to(device), units)
    for key, value in slow_terms(prediction.double(), depth.double(), units).items():
        assert terms[key].item() == pytest.approx(value.item(), rel=1e-4)


def test_the_loss_of_a_fixed_scene_is_pinned(device):
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    depth, prediction = 2 + y / 24 + (x / 8).sin() / 2, 2.5 + x / 64 + (y / 9).cos() / 3
    loss = train.balanced_loss(prediction[None, None].to(device), depth[None, None].to(device))
    assert loss.item() == pytest.approx(364.1222, rel=1e-5)


def test_a_term_whose_windows_all_have_holes_is_zero(device):
    depth = torch.full((1, 1, 48, 64), 2.0, device=device)
    depth[..., ::5, ::5] = 0  # no window of 11 x 11 is free of holes, some pixels are
    terms = train.loss_terms(depth + 0.01, depth)
    assert terms["loss_depth"].item() == pytest.approx(1, rel=1e-4)
    assert terms["loss_ssim"].item() == 0
    nothing = train.loss_terms(depth, 0 * depth)
    assert [x.item() for x in nothing.values()] == [0, 0, 0, 0]


@pytest.mark.parametrize("missing", [0, 0.002])
def test_mirroring_prediction_and_depth_leaves_the_loss_unchanged(missing, device):
    prediction, depth = (x.to(device) for x in scene(missing))
    for axis in (2, 3):
        torch.testing.assert_close(train.balanced_loss(prediction.flip(axis), depth.flip(axis)),
                                   train.balanced_loss(prediction, depth))


def test_a_missing_pixel_has_no_influence_and_gets_no_gradient(device):
    prediction, depth = (x.to(device) for x in scene(missing=0.002))
    hole = depth == 0
    prediction.requires_grad_()
    loss = train.balanced_loss(prediction, depth)
    loss.backward()
    assert hole.any() and (prediction.grad[hole] == 0).all() and (prediction.grad[~hole] != 0).all()
    other = prediction.detach().where(~hole, 7.0)
    torch.testing.assert_close(train.balanced_loss(other, depth), loss.detach())


def test_alpha_is_relative_to_the_loss_in_value_and_gradient_and_literal_in_the_notebook(device):
    torch.manual_seed(0)
    features = {"dec_3": torch.randn(2, 8, 48, 64), "enc_9": torch.randn(2, 80, 6, 8)}
    features = {name: x.to(device) for name, x in features.items()}
    base, depth = ((torch.rand(2, 1, 48, 64) * span + 0.5).to(device) for span in (5, 3))
    alpha = -0.3

    def gradients(function):
        leaves = [x.clone().requires_grad_() for x in features.values()]
        value = function(base + 0.1 * leaves[0].mean(1, keepdim=True), dict(zip(features, leaves)))
        return value.detach(), torch.autograd.grad(value, leaves, materialize_grads=True)

    for notebook, units in ((False, 100.0), (True, GREY_LEVELS)):
        def selectivity(_, f, notebook=notebook):
            return sum(assigned_selectivity(x, depth, layer_thresholds(x.shape[1], notebook))
                       for x in f.values())

        def objective(p, f, notebook=notebook):
            return train.objective(p, depth, f, alpha, notebook)["loss"]

        balanced = gradients(lambda p, _, units=units: train.balanced_loss(p, depth, units))
        pull, (value, slopes) = gradients(selectivity), gradients(objective)
        factor = alpha if notebook else alpha * balanced[0]
        torch.testing.assert_close(value, balanced[0] + factor * pull[0])
        for slope, a, b in zip(slopes, balanced[1], pull[1]):
            torch.testing.assert_close(slope, a + factor * b)


@pytest.mark.parametrize("notebook", [True, False], ids=["notebook", "ours"])
def test_training_equals_a_literal_loop(notebook, packed, tmp_path, monkeypatch, on_cpu):
    ours, genuine, seed = [], train.save_epoch, 5

    def save_epoch(out, checkpoint):
        ours.append(copy.deepcopy(checkpoint))
        genuine(out, checkpoint)

    made, adamw = [], torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **options: made.append(
        adamw(*args, **options)) or made[-1])
    monkeypatch.setattr(train, "save_epoch", save_epoch)
    frames = changed(packed, tmp_path / "rooms.h5", lambda file: file.attrs.update(mirror_shift=3))
    words = ["--data", frames, "--neuron-selective", "--batch-size", 4, "--epochs", 3,
             "--seed", seed]
    if notebook:
        words += ["--notebook", "--layers", "dec_3", "enc_4", "--alpha", -0.5]
    else:
        words += ["--layers", "dec_3", "--alpha", -0.6, "--lr", 1e-3]
    run(*words, "--out", tmp_path)

    steps, ends = literal_run(notebook, seed)
    lrs = [step.pop("lr") for step in steps]
    assert column(tmp_path, "lr") == pytest.approx(lrs[1::2])  # of the last step
    bounds = 0.02, 0.4, 0.4  # of a step, for each epoch: rounding grows in Adam, .008 to .19
    for key in steps[0]:
        for n, (found, bound) in enumerate(zip(column(tmp_path, key), bounds, strict=True)):
            mean = (steps[2 * n][key] + steps[2 * n + 1][key]) / 2
            assert found == pytest.approx(mean, rel=bound / 100, abs=bound / 400), key
    layers = [key for key in steps[0] if key.startswith("selectivity_")]
    found = sum(map(torch.tensor, (column(tmp_path, key) for key in layers))) / len(layers)
    assert column(tmp_path, "selectivity") == pytest.approx(found.tolist())

    # A decay of .01 * rate a step is seen where weights are 1, in the mean of those of the norms.
    rate = 1e-4 if notebook else 1e-3
    [group] = made[0].param_groups  # six steps do not tell betas apart
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.01)
    for bound, saved, literal in zip(bounds, ours, ends, strict=True):
        for key, weights in literal.items():
            assert saved[key].keys() == weights.keys()
            off = {name: (x - weights[name]).flatten().double() / rate
                   for name, x in saved[key].items() if x.is_floating_point()}
            norms = [x for name, x in off.items()
                     if weights[name].shape[1:] == () and name.endswith("weight")]
            assert torch.cat(list(off.values())).abs().mean() < bound, key
            assert torch.cat(norms).mean().abs() < bound / 2, key


def test_learning_rates_at_their_corners():
    cosine = [train.learning_rate(epoch, 20, 2, "cosine") for epoch in (0, 0.48, 0.98, 1, 10.5, 20)]
    assert cosine == pytest.approx([0.04, 1, 2, 2, 1, 0])                  # 5 % warm-up: one epoch
    step = [train.learning_rate(epoch, 60, 1.0, "step") for epoch in (0, 19.9, 20, 39.9, 40, 59.9)]
    assert step == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])             # METER's, 60 epochs
    assert {train.learning_rate(n / 10, 5, 0.3, "constant") for n in range(50)} == {0.3}


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_the_rates_of_all_steps_of_a_run(schedule):
    words = ["--schedule", schedule, "--epochs", "41", "--lr", "0.5", "--neuron-selective"]
    args = train.parse_args([*words, "--alpha", "-0.6"])
    found = torch.cat([train.step_rates(args, epoch, 7) for epoch in range(41)])
    rates = [train.learning_rate(n / 7, 41, 0.5, schedule) for n in range(287)]
    alphas = [-0.6 * n / 28.7 if n < 28.7 else -0.6 for n in range(287)]  # grows in 4.1 epochs
    weights = [9 / (9 + n) if n < 891 else 0.01 for n in range(287)]
    expected = torch.tensor([rates, alphas, weights], dtype=torch.float64).T
    torch.testing.assert_close(found, expected)
    late = train.step_rates(args, 40, 100)                                 # from step 4,000
    assert late[:, 2].tolist() == [0.01] * 100


def test_the_defaults_are_those_that_were_measured():
    args = train.parse_args(["--neuron-selective"])
    assert (args.layers, args.alpha, args.min_share) == (["dec_1"], -0.1, 0.001)
    assert train.parse_args([]).layers == []
    assert (args.epochs, args.batch_size, args.lr, args.schedule) == (24, 8, 2e-3, "cosine")
    assert (args.variant, args.amp, args.augment, args.seed) == ("xxs", "auto", True, 0)


def test_the_notebook_has_its_own_rates_and_defaults_unless_given():
    args = train.parse_args(["--notebook", "--neuron-selective", "--alpha", "-0.6"])
    assert train.step_rates(args, 0, 3).tolist() == [[1e-4, -0.6, 1.0]] * 3
    assert train.step_rates(args, 19, 3).tolist() == [[1e-4, -0.6, 1.0]] * 3
    assert (args.epochs, args.batch_size, args.lr, args.schedule) == (20, 64, 1e-4, "constant")
    assert (args.amp, args.augment, args.min_share) == ("off", False, 0)
    assert args.layers == ["enc_4", "dec_3"]
    given = train.parse_args(["--notebook", "--epochs", "3", "--batch-size", "5", "--augment",
                              "--neuron-selective", "--min-share", "0.01"])
    assert (given.epochs, given.batch_size, given.augment, given.min_share) == (3, 5, True, 0.01)
    assert given.lr == 1e-4


class SomeFrames(data.Frames):
    """Five rooms; of one nothing is measured, of another half."""

    def __init__(self, device):
        super().__init__(GreyRooms(12, "cpu"), "train", device, limit=5)
        self.depth[3], self.depth[1, :, 8:] = 0, 0


def far_sighted():
    """A network that predicts some metres, without training."""
    torch.manual_seed(0)
    model = METER()
    model(data.normalise(torch.rand(4, 3, 64, 128)))  # sets the running means
    with torch.no_grad():
        model.decoder.conv2d_out.weight.abs_().mul_(3e4)
    return model


def slow_metrics(prediction, depth):
    """Of one image, pixel by pixel; None if nothing is measured."""
    pairs = [(min(max(p, 1e-3), 10), d)
             for p, d in zip(prediction.double().flatten().tolist(),
                             depth.double().flatten().tolist()) if 1e-3 < d < 10]
    if not pairs:
        return None
    ratios = [max(p / d, d / p) for p, d in pairs]
    n = len(pairs)
    return [math.sqrt(sum((p - d) ** 2 for p, d in pairs) / n),
            sum(abs(p - d) / d for p, d in pairs) / n,
            sum(abs(math.log10(p / d)) for p, d in pairs) / n,
            *(sum(ratio < 1.25 ** i for ratio in ratios) / n for i in (1, 2, 3))]


@pytest.mark.parametrize("words", [
    [], ["--neuron-selective", "--alpha", "-3"], ["--notebook"],
    ["--notebook", "--neuron-selective", "--alpha", "-30", "--layers", "dec_3"]], ids=str)
def test_evaluation_equals_a_loop_over_images(words, device):
    args = train.parse_args([*words, "--batch-size", "2"])
    model, frames = far_sighted().to(device), SomeFrames(device)
    found = train.evaluate(model, frames, args)

    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    image, depth = frames.image.cpu().permute(0, 3, 1, 2) / 255, frames.depth.cpu()
    model.cpu().eval()
    with torch.no_grad(), record(model, ["dec_3"]) as features:
        predictions = [model((x - mean)[None] / deviation) for x in image]
        predictions = torch.cat(predictions)
        assert 0.5 < predictions.median() < 8 and predictions.std() > 0.3
        rows = [slow_metrics(p, d) for p, d in zip(predictions, depth)]
        rows = [row for row in rows if row]
        assert len(rows) == 4
        means = [sum(values) / 4 for values in zip(*rows)]
        assert [found[key] for key in METRICS] == pytest.approx(means, rel=2e-3)

        size = 256 if device.type == "cuda" and not args.notebook else 2
        units = GREY_LEVELS if args.notebook else 100.0
        losses, scores = [], []
        for p, d, x in zip(predictions.split(size), depth.split(size), image.split(size)):
            losses.append(sum(slow_terms(p, d, units).values()).item())
            model((x - mean) / deviation)
            levels = (d * GREY_LEVELS).round()
            scores.append(slow_notebook_selectivity(features["dec_3"], levels).item()
                          if args.notebook and args.neuron_selective else 0)
    assert found["val_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-3)
    assert ("val_objective" in found) == args.notebook
    if args.notebook:
        literal = sum(loss + args.alpha * score for loss, score in zip(losses, scores))
        assert found["val_objective"] == pytest.approx(literal / len(losses), rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_predicted_pixel_that_is_not_finite_fails_the_evaluation(value, device):
    class Broken(torch.nn.Module):
        def forward(self, image):
            prediction = torch.full((len(image), 1, 16, 32), 2.0, device=image.device)
            prediction[0, 0, 5, 7] = value
            return prediction

    with pytest.raises(data.UserError, match="predicts nan or infinity.*rmse_m inf"):
        train.evaluate(Broken(), SomeFrames(device), train.parse_args([]))


def test_a_nan_in_validation_ends_the_run_and_stands_in_no_file(flags, tmp_path):
    model = METER()
    model.encoder.conv2[1].running_mean.fill_(-3e38)  # finite; training takes the batch's own mean
    torch.save(model.state_dict(), tmp_path / "start.pt")
    message = refusal(*flags, "--init", tmp_path / "start.pt", "--out", tmp_path / "run")
    assert "predicts nan or infinity" in message
    assert not any((tmp_path / "run").iterdir())


def test_the_mean_depth_everywhere_has_the_rmse_of_a_loop(device):
    frames = SomeFrames(device)
    depth = frames.depth.cpu()
    constant = depth[depth > 0].double().mean().item()
    rows = [slow_metrics(torch.full_like(d, constant), d) for d in depth]
    rmse = [row[0] for row in rows if row]
    assert train.constant_rmse(frames) == pytest.approx(sum(rmse) / 4, rel=1e-4)


# Whole runs: what they write.

def test_a_run_writes_its_files_with_all_figures_and_columns(unbroken, packed):
    assert {path.name for path in unbroken.iterdir()} == {
        "config.json", "log.csv", "last.pt", "best.pt", "curves.png", "predictions.png",
        "metrics.json"}
    assert [list(row) for row in log(unbroken)] == 2 * [
        ["epoch", *TERMS, *METRICS, "val_loss", "lr"]]
    assert [row["epoch"] for row in log(unbroken)] == ["1", "2"]
    config, metrics = (read_json(unbroken / f"{name}.json") for name in ("config", "metrics"))
    assert config["epochs"] == 2 and config["alpha"] == -0.1 and metrics["images"] == 2
    assert (config["data"], config["rooms"]) == (str(packed), None)
    assert set(metrics) == {*METRICS, "val_loss", "split", "images"}
    for name in ("curves.png", "predictions.png"):
        with Image.open(unbroken / name) as picture:
            low, high = picture.convert("L").getextrema()
            assert low < high


def test_predictions_name_run_epoch_and_the_rmse_of_each_row(device, tmp_path):
    model, frames = far_sighted().to(device).eval(), SomeFrames(device)
    path = tmp_path / "predictions.png"
    drawn = DRAW_PREDICTIONS(model, {"training": frames}, "plain, epoch 7", path)
    assert path.exists() and drawn.get_suptitle() == "plain, epoch 7"
    titles = [axis.get_title() for axis in drawn.axes]
    with torch.no_grad():
        image, depth = frames.fetch(torch.tensor([0, 4]))
        prediction = model(data.normalise(image / 255)).cpu()
    for p, d in zip(prediction, depth.cpu()):
        assert f"error (red: too near), RMSE {slow_metrics(p, d)[0]:.2f} m" in titles


def test_curves_leave_out_the_first_epoch_and_show_the_best_constant(tmp_path):
    rows = [{"epoch": n, "loss": 900 / n, "val_loss": 800 / n, "rmse_m": 3 / n,
             "selectivity_dec_3": n / 10} for n in (1, 2, 3)]
    drawn = DRAW_CURVES(rows, 1.25, tmp_path / "curves.png")
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
             for axis in drawn.axes for line in axis.lines}
    assert lines["loss"] == ([2, 3], [450, 300]) and lines["val_loss"] == ([2, 3], [400, 800 / 3])
    assert lines["selectivity_dec_3"] == ([2, 3], [0.2, 0.3])
    assert set(lines["mean depth everywhere"][1]) == {1.25}
    assert len(DRAW_CURVES([rows[0]], 1.25, tmp_path / "curves.png").axes[0].lines[0].get_xdata())


@pytest.mark.parametrize("notebook", [False, True], ids=["ours", "notebook"])
def test_the_best_epoch_is_kept_and_judged_not_the_last(notebook, packed, tmp_path, monkeypatch):
    """Ours is the lowest RMSE on val; the notebook's the lowest objective there."""
    scores = iter([[3, 2], [1, 3], [2, 1]])  # the one that counts, another

    def judge(model, frames, args):
        found = EVALUATE(model, frames, args)
        counts, other = next(scores, (None, None))
        if counts:
            keys = ("val_objective", "rmse_m") if notebook else ("rmse_m", "val_loss")
            found |= dict(zip(keys, (counts, other)))
        return found

    drawn = []
    monkeypatch.setattr(train, "evaluate", judge)
    monkeypatch.setattr(train, "draw_curves", lambda rows, *_: drawn.append(len(rows)))
    if notebook:
        monkeypatch.setattr(train, "DRAW_EVERY", 0)
    words = ["--data", packed, "--batch-size", 8, "--epochs", 3, "--lr", 0.03]
    metrics = run(*words, *["--notebook"] * notebook, "--out", tmp_path)
    assert drawn == ([1, 2, 3, 3] if notebook else [3])  # when it is time, and at the end
    assert state(tmp_path / "best.pt")["epoch"] == 2 and state(tmp_path / "last.pt")["epoch"] == 3
    assert state(tmp_path / "last.pt")["best_epoch"] == 2

    args = train.parse_args(["--batch-size", "8", *["--notebook"] * notebook])
    model, content = load_checkpoint(tmp_path / "best.pt")
    assert content["rows"][-1]["epoch"] == 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frames = data.Frames(data.open_source(packed), "test", device, notebook)
    literal = EVALUATE(model.to(device), frames, args)
    assert metrics == read_json(tmp_path / "metrics.json")
    assert metrics == {"split": "test", "images": 2, **metrics}
    assert {key: metrics[key] for key in literal} == pytest.approx(literal, rel=1e-4)
    last, _ = load_checkpoint(tmp_path / "last.pt")
    assert EVALUATE(last.to(device), frames, args) != pytest.approx(literal, rel=1e-4)


def test_validation_judges_the_average_that_is_saved(unbroken, packed, device):
    model, content = load_checkpoint(unbroken / "last.pt")
    args = train.parse_args(["--batch-size", "4"])
    train.mixed_precision("off", device)  # the same backends
    frames = data.Frames(data.open_source(packed), "val", device)
    said = content["rows"][-1]
    found = EVALUATE(model.to(device), frames, args)
    assert found == pytest.approx({key: said[key] for key in found}, rel=1e-5)
    model.load_state_dict(content["training"])
    other = EVALUATE(model, frames, args)
    off, far = (abs(x["val_loss"] - said["val_loss"]) for x in (found, other))
    assert off < far / 100


def test_main_works_in_a_thread_and_returns_what_metrics_json_holds(flags, tmp_path):
    with ThreadPoolExecutor(1) as thread:
        metrics = thread.submit(run, *flags, "--epochs", 1, "--out", tmp_path).result()
    assert metrics == read_json(tmp_path / "metrics.json")
    assert (metrics["split"], metrics["images"]) == ("test", 2) and metrics["rmse_m"] > 0


def test_the_line_of_an_epoch_is_short_and_from_the_row_of_the_log(packed, tmp_path, capsys):
    run("--data", packed, "--batch-size", 4, "--epochs", 1, "--neuron-selective",
        "--layers", *LAYERS, "--out", tmp_path)
    line, = [x for x in capsys.readouterr().out.splitlines() if x.startswith("epoch 1 ")]
    assert len(line) <= 160
    said = dict(part.split() for part in line.split(" | "))
    with open(tmp_path / "log.csv", newline="") as file:
        row, = csv.DictReader(file)
    assert list(said) == ["epoch", "loss", "rmse_m", "delta1", "selectivity", "seconds", "images/s"]
    assert {key: float(x) for key, x in said.items()} == pytest.approx(
        {key: float(row[key]) for key in said}, rel=1e-3)
    assert float(row["images/s"]) * float(row["seconds"]) == pytest.approx(8)  # of 11: two batches


# What a run depends on.

def test_the_same_seed_gives_the_same_run(flags, unbroken, tmp_path):
    run(*flags, "--out", tmp_path)
    assert_same_run(unbroken, tmp_path)


def test_other_seeds_give_other_runs_also_large_ones(flags, unbroken, tmp_path):
    losses = [column(unbroken, "loss")[0]]
    for name, seed in (("now", time.time_ns()), ("largest", 2 ** 63 - 1)):
        metrics = run(*flags, "--epochs", 1, "--seed", seed, "--out", tmp_path / name)
        assert math.isfinite(metrics["rmse_m"])
        losses += column(tmp_path / name, "loss")
    assert len(set(losses)) == 3


def test_selective_training_starts_from_a_checkpoint_and_logs_its_layers(flags, unbroken, tmp_path):
    run(*flags, "--lr", 1e-3, "--neuron-selective", "--layers", "enc_2", "dec_0", "--no-augment",
        "--init", unbroken / "best.pt", "--out", tmp_path)
    assert list(log(tmp_path)[0]) == ["epoch", *TERMS, "selectivity_enc_2", "selectivity_dec_0",
                                      "selectivity", *METRICS, "val_loss", "lr"]
    assert -1 < column(tmp_path, "selectivity_enc_2")[0] < 1
    changed = state(tmp_path / "last.pt")["model"]["decoder.conv2d_out.weight"]
    begun = state(unbroken / "best.pt")["model"]["decoder.conv2d_out.weight"]
    assert 0 < (changed - begun).abs().max() < 0.01  # six steps of at most 1e-3 away


def test_bins_below_min_share_do_not_pull(flags, tmp_path, on_cpu):
    words = [*flags, "--lr", 1e-3, "--epochs", 1]
    selective = [*words, "--neuron-selective", "--layers", "enc_7", "--alpha", -1]  # 64 bins
    run(*selective, "--min-share", 0.5, "--out", tmp_path / "none")
    run(*words, "--out", tmp_path / "plain")
    assert column(tmp_path / "none", "selectivity_enc_7") == [0]
    none, plain = (column(tmp_path / name, "loss") for name in ("none", "plain"))
    assert none == pytest.approx(plain, rel=1e-5)  # adding zero changes layouts, hence roundings


def test_bf16_trains_close_to_fp32(flags, tmp_path):
    words = [*flags, "--epochs", 1, "--lr", 1e-3, "--batch-size", 11]  # bf16 is slow for each size
    for amp in "off", "bf16":
        run(*words, "--amp", amp, "--out", tmp_path / amp)
    exact, rough = (column(tmp_path / amp, "loss") for amp in ("off", "bf16"))
    assert rough != exact and rough == pytest.approx(exact, rel=0.02)


@pytest.mark.skipif("TEST_SLOW" not in os.environ, reason="takes a minute: TEST_SLOW=1")
def test_a_compiled_run_follows_the_plain_one(flags, tmp_path, on_cpu):
    words = [*flags, "--lr", 1e-3, "--neuron-selective"]
    run(*words, "--compile", "--out", tmp_path / "compiled")
    run(*words, "--out", tmp_path / "plain")
    compiled, plain = (state(tmp_path / x / "last.pt")["model"] for x in ("compiled", "plain"))
    assert compiled.keys() == plain.keys()
    compiled, plain = (column(tmp_path / x, "loss") for x in ("compiled", "plain"))
    assert compiled == pytest.approx(plain, rel=1e-3)


# Runs that were cut off.

def test_a_signal_loses_the_running_epoch_and_resume_equals_an_unbroken_run(
        flags, unbroken, tmp_path, monkeypatch, command):
    for number, words in ((signal.SIGINT, []), (signal.SIGTERM, ["--resume"])):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            in_epoch(patch, 2, lambda number=number: os.kill(os.getpid(), number))
            command(*flags, "--out", tmp_path, *words)
        assert "stopped" in stop.value.code and "--resume" in stop.value.code
        assert state(tmp_path / "last.pt")["epoch"] == 1
    run(*flags, "--out", tmp_path, "--resume")
    assert_same_run(unbroken, tmp_path)


def test_a_run_that_dies_in_a_write_resumes_to_the_same_end(flags, unbroken, tmp_path):
    died = sorted(unbroken.parent.glob("* died in *"))
    names = [folder.name[2:] for folder in died]
    best = ["died in best.pt"] * (len(died) == 9)  # of the second epoch, if it is better
    assert names == ["died in last.pt", "died in best.pt", "died in log.csv", "died in config.json",
                     "died in last.pt", *best, "died in log.csv", "died in config.json",
                     "died in metrics.json"]
    assert all(len(list(folder.glob(".*.tmp"))) == 1 for folder in died)
    between = died[1]  # killed between last.pt and best.pt
    assert (between / "last.pt").exists() and not (between / "best.pt").exists()
    for folder in (between, *died[-3:]):
        folder = shutil.copytree(folder, tmp_path / folder.name)
        run(*flags, "--out", folder, "--resume")
        assert_same_run(unbroken, folder)
        assert not list(folder.glob(".*.tmp"))


def test_a_best_and_a_log_that_were_not_written_any_more_appear_on_resume(
        unbroken, finished, flags):
    last = state(finished / "last.pt")
    for name in ("log.csv", "metrics.json", *["best.pt"] * (last["best_epoch"] == last["epoch"])):
        (finished / name).unlink()
    run(*flags, "--out", finished, "--resume")
    assert_same_run(unbroken, finished)


def test_a_run_whose_best_epoch_is_lost_is_refused_before_it_goes_on(
        finished, flags, monkeypatch):
    last = state(finished / "last.pt")
    torch.save(last | {"best_epoch": 1}, finished / "last.pt")
    (finished / "best.pt").unlink()
    monkeypatch.setattr(train, "make_step", None)
    assert "no best.pt beside it" in refusal(*flags, "--out", finished, "--resume")


def test_figures_that_a_kill_kept_from_being_drawn_appear_on_resume(
        finished, flags, monkeypatch):
    drawn = []
    monkeypatch.setattr(train, "draw_curves", lambda rows, *_: drawn.append(len(rows)))
    monkeypatch.setattr(train, "draw_predictions", lambda *_: drawn.append("predictions"))
    run(*flags, "--out", finished, "--resume")
    assert drawn == [2, "predictions"]


def test_resume_refuses_other_settings_and_says_which(flags, unbroken):
    resume = [*flags, "--out", unbroken, "--resume"]
    assert "lr 0.03, not 0.01" in refusal(*resume, "--lr", 0.01)
    message = refusal(*resume, "--epochs", 3, "--seed", 4)
    assert "epochs 2, not 3" in message and "seed 0, not 4" in message
    assert "--resume" in refusal(*flags, "--out", unbroken)  # a run is never overwritten


@pytest.mark.parametrize("pool, key, place", [
    ("train", "depth", (0, 0, 3, 5)), ("train", "depth", (11, 0, 3, 5)),  # of train, val and test
    ("test", "depth", (1, 0, 3, 5)), ("train", "image", (2, 32, 7, 1))])
def test_resume_over_one_changed_value_is_refused(
        pool, key, place, packed, finished, flags, tmp_path):
    def change(file):
        file[pool][key][place] += 1

    other = changed(packed, tmp_path / "other.h5", change)
    before = {path: path.read_bytes() for path in finished.glob("*[tvn]")}  # .pt, .csv, .json
    message = refusal(*flags, "--data", other, "--out", finished, "--resume")
    assert "frames" in message and "checksum" in message and str(finished) in message
    assert before == {path: path.read_bytes() for path in before} and len(before) == 5


def test_resume_over_another_number_of_frames_says_both(finished, flags, tmp_path):
    data.pack(GreyRooms(20, "cpu"), tmp_path / "more.h5")
    message = refusal(*flags, "--data", tmp_path / "more.h5", "--out", finished, "--resume")
    assert "frames" in message and "[18, " in message and "[11, " in message
    rooms = refusal("--rooms", 20, *flags[2:], "--out", finished, "--resume")
    assert "frames" in rooms and "[18, " in rooms and "[11, " in rooms


def test_the_same_frames_under_another_path_or_spelling_resume(
        packed, unbroken, finished, flags, tmp_path, monkeypatch):
    shutil.copy(packed, tmp_path / "copy.hdf5")
    (tmp_path / "link.h5").symlink_to(packed)
    monkeypatch.chdir(tmp_path)
    for place in ("copy.hdf5", Path("..") / tmp_path.name / "link.h5"):
        run(*flags, "--data", place, "--out", finished, "--resume")
        assert_same_run(unbroken, finished)


def test_a_last_of_an_earlier_version_is_refused(finished, flags):
    state = torch.load(finished / "last.pt", weights_only=True)
    del state["adamw"]
    torch.save(state | {"optimizer": {"state": {}, "param_groups": []}}, finished / "last.pt")
    message = refusal(*flags, "--out", finished, "--resume")
    assert str(finished / "last.pt") in message and "another --out" in message


def test_resume_starts_anew_only_where_no_run_is(flags, finished, tmp_path, capsys):
    run(*flags, "--epochs", 1, "--out", tmp_path / "empty", "--resume")
    said = capsys.readouterr().out
    assert said.count("nothing to resume") == 1 and (tmp_path / "empty" / "last.pt").exists()

    (finished / "last.pt").rename(tmp_path / "last.pt")
    message = refusal(*flags, "--out", finished, "--resume")
    assert "best.pt" in message and str(finished) in message and "--out" in message
    (finished / "best.pt").unlink()
    assert "log.csv" in refusal(*flags, "--out", finished, "--resume")


def test_best_goes_on_in_place_of_a_last_that_is_lost_or_damaged(
        flags, unbroken, finished, tmp_path):
    for content in (b"", b"no checkpoint", (finished / "last.pt").read_bytes()[:100_000]):
        (finished / "last.pt").write_bytes(content)
        message = refusal(*flags, "--out", finished, "--resume")
        assert str(finished / "last.pt") in message
        assert "best.pt" in message and "--init" in message
        assert (finished / "last.pt").read_bytes() == content

    one = tmp_path / "one"
    shutil.copytree(finished, one)
    content = state(one / "best.pt")
    shutil.copy(one / "best.pt", one / "last.pt")
    run(*flags, "--out", one, "--resume")
    assert 1 <= content["epoch"] <= 2
    assert_same_run(unbroken, one)


def test_a_file_of_others_in_place_of_last_is_refused(flags, tmp_path):
    torch.save(METER().state_dict(), tmp_path / "last.pt")
    assert str(tmp_path) in refusal(*flags, "--out", tmp_path, "--resume")


def test_a_second_run_in_one_folder_gets_a_sentence_and_the_first_is_unharmed(
        flags, unbroken, finished):
    with data.sole_writer(finished):  # as a run holds it
        before = {path: path.read_bytes() for path in finished.iterdir()}
        for words in ([], ["--resume"]):
            message = refusal(*flags, "--out", finished, *words)
            assert "another program" in message and str(finished) in message
        assert before == {path: path.read_bytes() for path in finished.iterdir()}
    run(*flags, "--out", finished, "--resume")  # once that has ended
    assert_same_run(unbroken, finished)


def kill_and_resume(folder, kills):
    """Kills runs at random moments and resumes them until they end, all of them alike."""
    import torch._dynamo  # noqa: F401  as AdamW does: two seconds in each fork
    kill = random.Random(0)
    small_frames(pytest.MonkeyPatch())
    data.pack(GreyRooms(12, "cpu"), folder / "rooms.h5")
    flags = ["--data", folder / "rooms.h5", "--batch-size", 6, "--epochs", 2, "--lr", 0.03]

    def attempt(out, limit=None):
        """True if it came to its end."""
        words = *flags, "--out", out, "--resume"
        process = multiprocessing.get_context("fork").Process(target=run_small, args=words)
        process.start()  # a fork has everything imported already
        process.join(limit)
        if process.is_alive():
            process.kill()  # SIGKILL, also inside a save
            process.join()
            return False
        assert process.exitcode == 0
        assert_same_run(folder / "unbroken", out)
        return True

    assert attempt(folder / "unbroken")
    start = time.monotonic()
    assert attempt(folder / "again")
    seconds, done = time.monotonic() - start, 0
    while kills:
        if attempt(folder / str(done), kill.uniform(0, seconds)):
            done += 1  # on to a fresh run
        else:
            kills -= 1
    assert attempt(folder / str(done))


@pytest.fixture(scope="module", autouse=True)
def killed(tmp_path_factory):
    """That at work beside the first tests, and without a GPU, which does not survive a fork."""
    folder, kills = tmp_path_factory.mktemp("killed"), os.environ.get("KILLS", "6")
    code = f"test_train.kill_and_resume(test_train.Path({str(folder)!r}), {kills})"
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    with subprocess.Popen([sys.executable, "-c", f"import test_train; {code}"], cwd=folder,
                          text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          env=os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
                          ) as process:
        yield process
        process.kill()  # if its test was not asked for


def test_a_killed_process_resumes_to_the_same_end(killed):
    _, complaint = killed.communicate()
    assert killed.returncode == 0, complaint


# What cannot work ends with a sentence.

@pytest.mark.parametrize("words, says", [
    (["--layers", "dec_9"], "dec_9"),
    (["--alpha", "nan"], "--alpha"), (["--alpha=-inf"], "--alpha"), (["--alpha", "0.1"], "--alpha"),
    (["--lr", "0"], "--lr"), (["--lr", "nan"], "--lr"), (["--epochs", "0"], "--epochs"),
    (["--batch-size", "0"], "--batch-size"), (["--epochs", "two"], "invalid int"),
    (["--min-share", "0.6"], "--min-share"), (["--min-share", "-0.1"], "--min-share"),
    (["--seed", "-1"], "--seed"), (["--seed", str(2 ** 63)], "--seed"),
    # flags that would do nothing
    (["--alpha", "-0.2"], "--alpha does nothing without --neuron-selective"),
    (["--alpha=-0.2"], "--alpha does nothing without --neuron-selective"),
    (["--layers", "dec_3"], "--layers does nothing"),
    (["--min-share", "0"], "--min-share does nothing"),
    (["--data", "x", "--rooms", "12"], "--rooms does nothing with --data"),
    (["--rooms", "12", "--raw-depth"], "--raw-depth"),
    # flags that are none
    (["--neuron-selective", "--alp", "-0.2"], "--alp"), (["--epoch", "3"], "--epoch"),
    (["--f=kernel.json"], "--f")],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "")
def test_a_wrong_flag_is_named(words, says, tmp_path):
    out = tmp_path / "new"
    assert says in refusal("--out", out, *words) and not (out / "config.json").exists()


def test_raw_depth_of_what_is_no_mat_is_refused(flags, tmp_path):
    assert "--raw-depth" in refusal(*flags, "--raw-depth", "--out", tmp_path)


def test_a_layer_named_twice_is_regularised_once():
    args = train.parse_args(["--neuron-selective", "--layers", "dec_3", "enc_4", "dec_3"])
    assert sorted(args.layers) == ["dec_3", "enc_4"]


def test_what_cannot_work_ends_with_a_sentence_and_leaves_out_free(flags, unbroken, tmp_path):
    new = [*flags, "--out", tmp_path / "new"]
    message = refusal(*new, "--batch-size", 12)
    assert "--batch-size 12" in message and "11 training images" in message
    message = refusal(*new, "--init", unbroken / "best.pt", "--variant", "s")
    assert "best.pt is METER xxs" in message
    assert "nowhere.pt" in refusal(*new, "--init", tmp_path / "nowhere.pt")
    assert "nowhere" in refusal(*new, "--data", tmp_path / "nowhere")
    if not torch.cuda.is_available():
        assert "--amp fp16" in refusal(*new, "--amp", "fp16")
    run(*new, "--epochs", 1)


@pytest.mark.parametrize("place", ["config.json/x", "config.json"])
def test_a_folder_that_cannot_be_written_is_found_before_the_frames(
        place, flags, unbroken, tmp_path):
    message = refusal(*flags, "--data", tmp_path / "nowhere", "--out", unbroken / place)
    assert f"cannot write to {unbroken / place}" in message


def test_a_read_only_folder_is_found_before_the_frames(flags, tmp_path, monkeypatch):
    def read_only(dir):
        raise PermissionError(13, "Permission denied", dir)

    monkeypatch.setattr(data.tempfile, "TemporaryFile", read_only)
    message = refusal(*flags, "--data", tmp_path / "nowhere", "--out", tmp_path)
    assert f"cannot write to {tmp_path} (Permission denied)" in message


@pytest.mark.parametrize("name", [
    "config.json", "metrics.json", "log.csv", "curves.png", "predictions.png"])
def test_what_a_user_keeps_in_out_is_not_written_over(name, flags, tmp_path):
    (tmp_path / name).write_text("mine")
    for resume in [], ["--resume"]:
        assert f"holds a run ({name})" in refusal(*flags, "--out", tmp_path, *resume)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_dollar_in_the_name_of_a_run_begins_no_formula_in_its_figure(
        flags, tmp_path, monkeypatch):
    monkeypatch.undo()
    out = tmp_path / "$a_$b"
    run(*flags, "--epochs", 1, "--out", out)
    assert (out / "predictions.png").stat().st_size > 1000


def test_figures_do_without_latex(flags, tmp_path, monkeypatch):
    monkeypatch.undo()
    with matplotlib.rc_context({"text.usetex": True}):
        run(*flags, "--epochs", 1, "--out", tmp_path / "a_b")
    assert (tmp_path / "a_b" / "predictions.png").stat().st_size > 1000


def test_no_compiler_ends_before_anything_is_written(flags, tmp_path, monkeypatch):
    def none(*_, **__):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", none)
    message = refusal(*flags, "--compile", "--out", tmp_path / "new")
    assert "--compile" in message and "No working C++ compiler found" in message
    assert not (tmp_path / "new" / "config.json").exists()


def test_a_full_disk_ends_with_a_sentence_and_keeps_last_pt(
        flags, unbroken, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = (1_000_000, free[1])  # bytes; no checkpoint is as small
    with monkeypatch.context() as patch:
        in_epoch(patch, 2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, full))
        try:
            message = refusal(*flags, "--out", tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, free)
    assert f"cannot write {tmp_path / 'last.pt'}: File too large" in message
    assert state(tmp_path / "last.pt")["epoch"] == 1 and not list(tmp_path.glob(".*.tmp"))
    run(*flags, "--out", tmp_path, "--resume")
    assert_same_run(unbroken, tmp_path)


def test_a_nan_names_epoch_step_and_term_and_keeps_last_pt(flags, tmp_path, monkeypatch, on_cpu):
    on_call(monkeypatch, train, "loss_terms", 5,  # 2 steps, 1 validation batch, second step
            lambda terms: terms | {"loss_ssim": terms["loss_ssim"] * math.nan})
    message = refusal(*flags, "--out", tmp_path)
    assert "epoch 2, step 2: loss, loss_ssim is nan" in message
    assert state(tmp_path / "last.pt")["epoch"] == 1


# The guard.

@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory"),  # of another program, of pinned memory,
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED")])
def test_a_full_gpu_ends_with_advice(error, flags, tmp_path, monkeypatch, command):
    def full(_):
        raise error

    monkeypatch.setattr(data, "normalise", full)
    with pytest.raises(SystemExit, match="error: memory is full: halve --batch-size"):
        command(*flags, "--out", tmp_path)


def test_a_mistake_of_ours_keeps_its_traceback(flags, tmp_path, monkeypatch, command):
    def broken(_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(data, "normalise", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        command(*flags, "--out", tmp_path)


def test_a_users_mistake_ends_the_command_with_one_sentence(mistaken):
    process, folder = mistaken
    _, complaint = process.communicate()
    assert process.returncode == 1 and complaint.startswith("error: --data ")
    assert str(folder / "nowhere") in complaint and "Traceback" not in complaint


# What the documents say.

def commands(text):
    """(script, words) of each `python script words` in code blocks and `spans` of Markdown."""
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.M))
    text = "\n".join([*blocks, *spans]).replace("\\\n", " ")
    return re.findall(r"\bpython3? (\S+\.py)\b([^\n;&|>]*)", text)


def test_every_command_of_the_readme_and_the_docstrings_parses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "open_source", lambda *_: data.Rooms(10, "cpu"))
    monkeypatch.setattr(data, "pack", lambda _, path: path.write_bytes(b"packed"))
    texts = {name: (ROOT / name).read_text(encoding="utf-8")
             for name in ("README.md", ".github/STUDY.md", ".github/BENCHMARK.md")
             if (ROOT / name).exists()}
    for script in (train, dissect, data):
        texts[script.__name__] = f"```\n{script.__doc__}\n```"
    seen = set()
    for source, text in texts.items():
        for script, words in commands(text):
            seen.add(Path(script).name)
            words = re.sub(r"\$\{?\w+\}?|(?<= )[A-Z](?!\S)", "0", words)  # $seed, S: a number
            words = shlex.split(words, comments=True)
            try:
                if Path(script).name == "train.py":
                    train.parse_args(words)
                elif Path(script).name == "dissect.py":
                    dissect.parse_args(words)
                elif Path(script).name == "data.py":
                    data.main(words)
                    [path.unlink() for path in tmp_path.glob("*.h5")]
                else:
                    assert (ROOT / script).is_file(), f"{source}: {script} does not exist"
            except data.UserError as error:
                raise AssertionError(f"{source}: python {script} {' '.join(words)}") from error
    assert seen >= {"train.py", "dissect.py", "data.py"}


# On a GPU.

AMPS = pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])


def gpu_training(packed, amp, *words):
    """What a step needs, as `train.run` makes it, and two batches of 4."""
    args = train.parse_args(["--neuron-selective", "--layers", "enc_4", "dec_3", "--amp", amp,
                             *words])
    device = torch.device("cuda")
    _, autocast, scaler = train.mixed_precision(amp, device)
    torch.manual_seed(0)
    model = METER().to(device, memory_format=torch.channels_last).train()
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True,
                                  capturable=True)
    optimizer.param_groups[0]["lr"] = torch.zeros((), device=device)
    step = train.make_step(model, average, optimizer, scaler, autocast, args)
    batches = list(data.Frames(data.open_source(packed), "train", device).batches(4))[:2]
    return model, average, scaler, step, batches


def step_inputs(batches, n, rates):
    image, depth = batches[n % len(batches)]
    chance = torch.Generator().manual_seed(n)
    draws = torch.rand(len(image), data.DRAWS, generator=chance).to(image.device)
    return image, depth, draws, torch.tensor(rates, dtype=torch.float64, device=image.device)


@needs_gpu
@AMPS
def test_recorded_steps_equal_plain_steps_bit_for_bit(amp, packed):
    ends = []
    for prepare in (lambda step: step, train.recorded):
        model, average, scaler, step, batches = gpu_training(packed, amp)
        step = prepare(step)
        terms = [step(*step_inputs(batches, n, [1e-3 / (n + 1), -0.1, 9 / (9 + n)]))
                 for n in range(6)]  # as it is, recorded, replayed
        assert len({x.tolist()[0] for x in terms}) == 6 and torch.stack(terms).isfinite().all()
        ends.append([torch.stack(terms), model.state_dict(), average.state_dict(),
                     scaler.state_dict()])
    for ours, theirs in zip(*ends):
        assert_same(ours, theirs)


@needs_gpu
@AMPS
def test_steps_on_whole_frames_are_the_same_bits_each_time(amp, packed):
    """Whole frames have 192 keys: attention in blocks of 64 adds up three, in which order?"""
    image = torch.randint(256, (16, 3, 192, 256), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(1)).cuda()
    depth = image[:, :1, ::4, ::4] / 32 + 1
    ends = []
    for _ in range(3):
        model, _, _, step, _ = gpu_training(packed, amp)
        for n in range(4):
            step(*step_inputs([(image, depth)], n, [1e-3, -0.1, 0.1]))
        ends.append(model.state_dict())
    assert_same(ends[0], ends[1])
    assert_same(ends[0], ends[2])


@needs_gpu
@pytest.mark.parametrize("prepare", [lambda step: step, train.recorded], ids=["plain", "recorded"])
def test_a_step_of_fp16_that_overflows_is_skipped_and_halves_the_scale(prepare, packed):
    model, _, scaler, step, batches = gpu_training(packed, "fp16")
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0 ** 60})
    step = prepare(step)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    for n in range(4):
        step(*step_inputs(batches[:1], n, [0.1, -0.1, 1.0]))
        assert scaler.get_scale() == 2.0 ** (59 - n)
        for name, x in model.named_parameters():
            assert torch.equal(x, before[name]), name


@needs_gpu
def test_features_recorded_in_a_graph_give_the_terms_of_the_regulariser(packed):
    model, _, _, step, batches = gpu_training(packed, "off", "--no-augment", "--min-share", "0")
    step, seen = train.recorded(step), []
    for n in range(6):  # nothing is learnt at a rate of 0
        image, depth, *rest = step_inputs(batches, n, [0, -0.1, 1.0])
        terms = step(image, depth, *rest)
        with torch.no_grad(), record(model, ["enc_4", "dec_3"]) as features:
            prediction = model(data.normalise(image / 255))
        scores = [assigned_selectivity(x, depth, layer_thresholds(x.shape[1], device=x.device))
                  for x in features.values()]
        balanced = train.balanced_loss(prediction, depth)
        torch.testing.assert_close(terms[5:], torch.stack(scores))
        torch.testing.assert_close(terms[0], balanced * (1 - 0.1 * sum(scores)))
        seen.append(terms[5].item())
    assert len(set(seen[:2])) == 2


@needs_gpu
@AMPS
def test_a_run_that_is_cut_off_and_resumed_on_a_gpu_equals_an_unbroken_one(
        amp, flags, tmp_path, monkeypatch):
    def die():
        raise KeyboardInterrupt

    words = [*flags, "--lr", 1e-3, "--neuron-selective", "--amp", amp]
    metrics = run(*words, "--out", tmp_path / "unbroken")
    assert all(math.isfinite(metrics[key]) for key in METRICS)
    with monkeypatch.context() as patch:
        in_epoch(patch, 2, die)
        with pytest.raises(KeyboardInterrupt):
            run(*words, "--out", tmp_path / "broken")
    assert state(tmp_path / "broken" / "last.pt")["epoch"] == 1
    run(*words, "--out", tmp_path / "broken", "--resume")
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


@needs_gpu
@pytest.mark.parametrize("half", ["bf16", "fp16"])
@pytest.mark.parametrize("first", ["cpu", "gpu"])
def test_a_run_goes_on_after_a_move_between_cpu_and_gpu(
        first, half, flags, tmp_path, monkeypatch):
    def die():
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: half == "bf16")
    for device in ("cpu", "gpu") if first == "cpu" else ("gpu", "cpu"):
        with monkeypatch.context() as patch:
            if device == "cpu":
                patch.setattr(torch.cuda, "is_available", lambda: False)
            if device == first:
                in_epoch(patch, 2, die)
                with pytest.raises(KeyboardInterrupt):
                    run(*flags, "--lr", 1e-3, "--out", tmp_path)
            else:
                metrics = run(*flags, "--lr", 1e-3, "--out", tmp_path, "--resume")
    assert math.isfinite(metrics["rmse_m"]) and column(tmp_path, "epoch") == [1, 2]


@needs_gpu
def test_precisions_agree_on_a_gpu_and_with_a_cpu(flags, tmp_path, monkeypatch):
    words = [*flags, "--lr", 1e-3, "--epochs", 1, "--neuron-selective"]
    for amp in ("bf16", "fp16", "off"):
        run(*words, "--amp", amp, "--out", tmp_path / amp)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run(*words, "--out", tmp_path / "cpu")
    exact = column(tmp_path / "cpu", "loss")
    assert column(tmp_path / "off", "loss") == pytest.approx(exact, rel=5e-3)
    for amp in ("bf16", "fp16"):
        assert column(tmp_path / amp, "loss") == pytest.approx(exact, rel=0.02)


@needs_gpu
def test_a_compiled_run_on_a_gpu_follows_the_plain_one(packed, tmp_path):
    words = ["--data", packed, "--batch-size", 11, "--epochs", 4, "--neuron-selective"]
    for name, flag in (("plain", []), ("compiled", ["--compile"])):
        run(*words, *flag, "--out", tmp_path / name)
    compiled, plain = (column(tmp_path / name, "loss") for name in ("compiled", "plain"))
    assert compiled == pytest.approx(plain, rel=0.02)


@needs_gpu
def test_frames_in_host_memory_give_the_same_batches(packed):
    frames = data.Frames(data.open_source(packed), "train", "cuda")
    host = copy.copy(frames)
    host.image, host.depth, host.copying = frames.image.cpu(), frames.depth.cpu(), None
    host.copying = torch.cuda.Stream()
    assert frames.copying is None and frames.image.is_cuda
    for n in range(20):
        order = torch.randperm(11, generator=torch.Generator().manual_seed(n))
        pairs = zip(frames.batches(4, order), host.batches(4, order))
        for (image, depth), (other_image, other_depth) in pairs:
            assert other_image.is_cuda and image.stride() == other_image.stride()
            assert torch.equal(image, other_image) and torch.equal(depth, other_depth)


@needs_gpu
def test_a_gpu_that_is_full_ends_with_advice(flags, tmp_path):
    torch.cuda.empty_cache()
    size = torch.cuda.get_device_properties(0).total_memory
    handler = signal.getsignal(signal.SIGTERM)
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2e6) / size)
    try:
        with pytest.raises(SystemExit, match="error: memory is full: halve --batch-size"):
            data.run_command(lambda: run(*flags, "--out", tmp_path))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        signal.signal(signal.SIGTERM, handler)


@needs_gpu
def test_a_dissection_on_a_gpu_does_not_depend_on_the_batch_size(packed):
    frames = data.Frames(data.open_source(packed), "train", "cuda")
    model = far_sighted().to("cuda", memory_format=torch.channels_last).eval()
    layers = ["enc_1", "enc_4", "enc_9", "dec_3"]
    one, all_units = dissect.measure(model, frames, layers, batch_size=1)
    for size in (4, 11):
        metrics, units = dissect.measure(model, frames, layers, batch_size=size)
        assert metrics == pytest.approx(one, rel=1e-4)
        for layer in layers:
            for key in ("selectivity", "assigned_selectivity"):
                torch.testing.assert_close(units[layer][key], all_units[layer][key],
                                           rtol=1e-3, atol=1e-4)
