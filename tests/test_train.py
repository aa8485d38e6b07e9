"""train.py: its loss and objective against literal slow loops, and whole tiny runs on the CPU.

KILLS=200 kills the training process more often than 30 times; TEST_SLOW=1 adds torch.compile.
"""
import copy
import csv
import errno
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
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import dissect
import train
from model import (
    GREY_LEVELS,
    METER,
    assigned_selectivity,
    layer_thresholds,
    load_checkpoint,
    record,
)

ROOT = Path(__file__).resolve().parents[1]
TERMS = ["loss", "loss_depth", "loss_ssim", "loss_normal", "loss_grad"]
METRICS = ["rmse_m", "rel", "log10", "delta1", "delta2", "delta3"]
FACES = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])


class GreyRooms(data.Rooms):
    """Rooms with depth on the 8-bit grid of Kaggle's PNGs; the notebook's last threshold occurs."""

    def frames(self, pool, indices):
        image, depth = super().frames(pool, indices)
        levels = (depth * GREY_LEVELS).round().clamp(1, 255)
        levels[:, :, :2], levels[:, :, -2:] = 100, 255
        return image, levels * (10 / 255)


def small_frames(patch):
    """A sixth of the pixels: resuming and saving do not depend on them, the time of a run does."""
    patch.setattr(data, "SIZE", (64, 128))
    patch.setattr(data, "DEPTH_SIZE", (16, 32))


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        small_frames(patch)
        yield


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "rooms.h5"
    data.pack(GreyRooms(12, "cpu"), path)
    return path


@pytest.fixture(scope="module")
def flags(packed):
    return ["--data", packed, "--batch-size", 4, "--epochs", 2]  # 11 images: 3 steps an epoch


@pytest.fixture(scope="module")
def unbroken(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    run(*flags, "--out", out)
    return out


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):  # they take most of the time
    monkeypatch.setattr(train, "draw_curves", lambda *_: None)
    monkeypatch.setattr(train, "draw_predictions", lambda *_: None)


def run(*words):
    train.main([str(word) for word in words])


def run_small(*words):
    """`run` in a process of its own."""
    torch.set_num_threads(1)
    small_frames(pytest.MonkeyPatch())
    run(*words)


def end(*words):
    """What a run says when it ends early."""
    with pytest.raises(SystemExit) as stop:
        run(*words)
    return str(stop.value.code)


def log(out):
    with open(out / "log.csv", newline="") as file:
        return [{key: value for key, value in row.items() if "second" not in key}
                for row in csv.DictReader(file)]


def state(path):
    return torch.load(path, weights_only=True)


def assert_same_run(one, other):
    assert log(one) == log(other)
    for name in ("best.pt", "last.pt"):
        ours, theirs = state(one / name)["model"], state(other / name)["model"]
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), name
    assert (one / "metrics.json").read_text() == (other / "metrics.json").read_text()


def on_call(monkeypatch, place, name, number, act):
    """From the `number`-th call of place.name on, act(result) stands in for its result."""
    genuine, calls = getattr(place, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        result = genuine(*args, **kwargs)
        return act(result) if len(calls) >= number else result

    monkeypatch.setattr(place, name, counted)


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
        number = torch.zeros_like(level)
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


@pytest.mark.parametrize("missing", [0, 0.002])
@pytest.mark.parametrize("units", [100.0, GREY_LEVELS])
def test_each_term_of_the_loss_equals_its_literal_formula(units, missing):
    prediction, depth = scene(missing)
    terms = train.loss_terms(prediction, depth, units)
    for key, value in slow_terms(prediction.double(), depth.double(), units).items():
        assert terms[key].item() == pytest.approx(value.item(), rel=1e-4)


def test_the_loss_of_a_fixed_scene_is_pinned():
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    depth, prediction = 2 + y / 24 + (x / 8).sin() / 2, 2.5 + x / 64 + (y / 9).cos() / 3
    loss = train.balanced_loss(prediction[None, None], depth[None, None])
    assert loss.item() == pytest.approx(364.1222, rel=1e-5)


@pytest.mark.parametrize("missing", [0, 0.002])
def test_mirroring_prediction_and_depth_leaves_the_loss_unchanged(missing):
    prediction, depth = scene(missing)
    for axis in (2, 3):
        torch.testing.assert_close(train.balanced_loss(prediction.flip(axis), depth.flip(axis)),
                                   train.balanced_loss(prediction, depth))


def test_a_missing_pixel_has_no_influence_and_gets_no_gradient():
    prediction, depth = scene(missing=0.002)
    hole = depth == 0
    prediction.requires_grad_()
    loss = train.balanced_loss(prediction, depth)
    loss.backward()
    assert hole.any() and (prediction.grad[hole] == 0).all() and (prediction.grad[~hole] != 0).all()
    other = prediction.detach().where(~hole, 7.0)
    torch.testing.assert_close(train.balanced_loss(other, depth), loss.detach())


def test_alpha_is_relative_to_the_loss_in_value_and_gradient_and_literal_in_the_notebook():
    torch.manual_seed(0)
    features = {"dec_3": torch.randn(2, 8, 48, 64), "enc_9": torch.randn(2, 80, 6, 8)}
    base, depth = torch.rand(2, 1, 48, 64) * 5 + 0.5, torch.rand(2, 1, 48, 64) * 3 + 0.5
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


def test_notebook_training_equals_a_literal_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SIZE", (192, 256))
    monkeypatch.setattr(data, "DEPTH_SIZE", (48, 64))
    data.pack(GreyRooms(12, "cpu"), packed := tmp_path / "rooms.h5")
    names, steps, weights = ["dec_3", "enc_4", "enc_7"], [], []
    on_call(monkeypatch, train, "objective", 1, lambda terms: steps.append(terms) or terms)
    monkeypatch.setattr(train.meter, "record", lambda network, layers: weights.append(
        copy.deepcopy(network.state_dict())) or record(network, layers))
    run("--data", packed, "--notebook", "--neuron-selective", "--layers", *names, "--alpha", -0.5,
        "--epochs", 1, "--batch-size", 4, "--seed", 3, "--out", tmp_path / "run")

    image, depth = GreyRooms(12, "cpu").frames("train", range(9))  # 80 % of the 12, in file order
    image, levels = data.normalise(image.permute(0, 3, 1, 2) / 255), (depth * 25.5).round()
    torch.manual_seed(3)
    model = METER("xxs", GREY_LEVELS).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3 * 100_003))
    for batch, terms, start in zip(order.split(4), steps, weights):
        off = torch.cat([(x - start[name]).abs().flatten() for name, x in model.named_parameters()])
        assert off.mean() < 1e-3 * 1e-4  # of the rate: Adam makes a whole step of a rounding error
        model.load_state_dict(start)
        with record(model, names) as features:
            prediction = model(image[batch]) * 25.5  # the notebook's network: levels
        scores = {name: slow_notebook_selectivity(features[name], levels[batch]) for name in names}
        loss = sum(slow_terms(prediction, levels[batch], 1.0).values()) - 0.5 * sum(scores.values())
        assert terms["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
        for name in names:
            score = terms[f"selectivity_{name}"].item()
            assert score == pytest.approx(scores[name].item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(steps) == 5  # three steps, validation, test


def test_learning_rates_at_their_corners():
    cosine = [train.learning_rate(epoch, 20, 2, "cosine") for epoch in (0, 0.48, 0.98, 1, 10.5, 20)]
    assert cosine == pytest.approx([0.04, 1, 2, 2, 1, 0])                  # 5 % warm-up: one epoch
    step = [train.learning_rate(epoch, 60, 1.0, "step") for epoch in (0, 19.9, 20, 39.9, 40, 59.9)]
    assert step == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])             # METER's, 60 epochs
    assert {train.learning_rate(n / 10, 5, 0.3, "constant") for n in range(50)} == {0.3}


def test_a_run_writes_its_files_with_all_figures_and_columns(unbroken):
    assert {path.name for path in unbroken.iterdir()} == {
        "config.json", "log.csv", "last.pt", "best.pt", "curves.png", "predictions.png",
        "metrics.json"}
    assert [list(row) for row in log(unbroken)] == 2 * [
        ["epoch", *TERMS, *METRICS, "val_loss", "lr"]]
    assert [row["epoch"] for row in log(unbroken)] == ["1", "2"]
    config, metrics = (json.loads((unbroken / f"{name}.json").read_text())
                       for name in ("config", "metrics"))
    assert config["epochs"] == 2 and config["alpha"] == -0.1 and metrics["images"] == 2
    assert set(metrics) == {*METRICS, "val_loss", "split", "images"}
    for name in ("curves.png", "predictions.png"):
        with Image.open(unbroken / name) as picture:
            assert picture.convert("L").getextrema() != (255, 255)
    best = min(log(unbroken), key=lambda row: float(row["rmse_m"]))
    assert state(unbroken / "best.pt")["epoch"] == int(best["epoch"])


def test_the_saved_weights_are_a_moving_average_over_the_steps(
        flags, packed, tmp_path, monkeypatch):
    steps, weights, genuine = [], [], torch._foreach_lerp_

    def note(means, current, weight):
        steps.append([x.clone().cpu() for x in current])
        weights.append(weight)
        genuine(means, current, weight)

    monkeypatch.setattr(torch, "_foreach_lerp_", note)
    words = [*flags, "--batch-size", 1, "--schedule", "constant", "--lr", 0.01, "--out", tmp_path]
    run(*words, "--epochs", 1)
    assert len(steps) == 11
    literal = steps[0]
    for n, current in enumerate(steps):
        weight = max(0.01, 9 / (9 + n))
        literal = [(1 - weight) * mean + weight * x for mean, x in zip(literal, current)]
    saved = state(tmp_path / "last.pt")
    for key, expected in (("model", literal), ("training", steps[-1])):
        found = [x for x in saved[key].values() if x.is_floating_point()]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    model, _ = load_checkpoint(tmp_path / "best.pt")           # that is judged, on val and test
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for split, said in (("val", log(tmp_path)[0]), ("test", metrics)):
        found = train.evaluate(model, data.Frames(data.Packed(packed), split, "cpu"), 1)
        assert found == pytest.approx({key: float(said[key]) for key in found}, rel=1e-3)
    torch.save(saved | {"epoch": 80}, tmp_path / "last.pt")    # 880 steps; 100 in the mean from 891
    run(*words, "--epochs", 82, "--resume")
    assert weights[11:] == pytest.approx([max(0.01, 9 / (9 + n)) for n in range(880, 902)])


def test_alpha_grows_over_the_first_tenth_but_not_in_the_notebook_and_losses_are_means(
        flags, tmp_path, monkeypatch):
    seen, losses, genuine = [], [], train.objective

    def note(prediction, depth, features, alpha, *rest):
        seen.append(float(alpha))
        terms = genuine(prediction, depth, features, alpha, *rest)
        losses.extend([terms["loss"].item()] * prediction.requires_grad)
        return terms

    monkeypatch.setattr(train, "objective", note)
    words = [*flags, "--neuron-selective", "--alpha", -0.6, "--layers", "dec_3"]
    run(*words, "--batch-size", 1, "--out", tmp_path / "ours")         # 22 steps
    assert seen[:6] == pytest.approx([-0.6 * n / 2.2 for n in (0, 1, 2, 2.2, 2.2, 2.2)])
    assert seen[6:] == pytest.approx([-0.6] * len(seen[6:]))
    means = [sum(losses[:11]) / 11, sum(losses[11:]) / 11]
    assert [float(row["loss"]) for row in log(tmp_path / "ours")] == pytest.approx(means)
    seen.clear()
    run(*words, "--notebook", "--epochs", 1, "--out", tmp_path / "notebook")
    assert seen == pytest.approx([-0.6] * 5)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(flags, unbroken, tmp_path):
    for _ in range(2):                                         # from nothing, and finished
        run(*flags, "--out", tmp_path / "same", "--resume")
        assert_same_run(unbroken, tmp_path / "same")
    run(*flags, "--seed", 1, "--out", tmp_path / "other")
    assert log(tmp_path / "other") != log(unbroken)


def test_augmentation_draws_anew_for_each_frame_and_epoch(flags, tmp_path, monkeypatch):
    seen, zooms, genuine = [], set(), data.augment

    def note(image, depth, draws, zoom):
        seen.extend(draws[:, 0].tolist())
        zooms.add((draws.shape[1], zoom))
        return genuine(image, depth, draws, zoom)

    monkeypatch.setattr(data, "augment", note)
    run(*flags, "--augment", "--out", tmp_path / "plain")
    assert len(seen) == len(set(seen)) == 22 and zooms == {(11, 1)}
    run(*flags, "--augment", "--zoom", 1.5, "--epochs", 1, "--out", tmp_path / "zoomed")
    assert (15, 1.5) in zooms and len(zooms) == 2


def test_selective_training_starts_from_a_checkpoint_and_logs_its_layers(flags, unbroken, tmp_path):
    run(*flags, "--neuron-selective", "--layers", "enc_2", "dec_0", "--augment",
        "--init", unbroken / "best.pt", "--out", tmp_path)
    assert list(log(tmp_path)[0]) == ["epoch", *TERMS, "selectivity_enc_2", "selectivity_dec_0",
                                      *METRICS, "val_loss", "lr"]
    row = {key: float(value) for key, value in log(tmp_path)[0].items()}
    assert -1 < row["selectivity_enc_2"] < 1
    changed = state(tmp_path / "last.pt")["model"]["decoder.conv2d_out.weight"]
    begun = state(unbroken / "best.pt")["model"]["decoder.conv2d_out.weight"]
    assert 0 < (changed - begun).abs().max() < 0.01  # six steps of at most 1e-3 away


def test_bins_below_min_share_do_not_pull(flags, tmp_path):
    run(*flags, "--neuron-selective", "--min-share", 1, "--alpha", -1, "--out", tmp_path / "none")
    run(*flags, "--out", tmp_path / "plain")
    none, plain = log(tmp_path / "none"), log(tmp_path / "plain")
    assert [row.pop("selectivity_dec_3") for row in none] == ["0.0", "0.0"]
    none, plain = ([float(row["loss"]) for row in rows] for rows in (none, plain))
    assert none == pytest.approx(plain, rel=1e-5)  # adding zero changes layouts, hence roundings


def test_bf16_trains_close_to_fp32(flags, tmp_path):
    for amp in "off", "bf16":
        run(*flags, "--amp", amp, "--out", tmp_path / amp)
        fused = torch.backends.cuda.flash_sdp_enabled()  # attention: slow on a CPU in bf16
        assert fused == (amp == "off" or torch.cuda.is_available())
    exact, rough = (float(log(tmp_path / amp)[0]["loss"]) for amp in ("off", "bf16"))
    assert rough != exact and rough == pytest.approx(exact, rel=0.02)


@pytest.mark.skipif("TEST_SLOW" not in os.environ, reason="takes a minute: TEST_SLOW=1")
def test_a_compiled_run_follows_the_plain_one(flags, unbroken, tmp_path):
    run(*flags, "--compile", "--out", tmp_path)
    compiled, plain = (state(out / "last.pt")["model"] for out in (tmp_path, unbroken))
    assert compiled.keys() == plain.keys()
    compiled, plain = (float(log(out)[0]["loss"]) for out in (tmp_path, unbroken))
    assert compiled == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("number, step", [(signal.SIGINT, 1), (signal.SIGTERM, 5)])
def test_a_signal_stops_after_the_step_and_resume_equals_an_unbroken_run(
        flags, unbroken, tmp_path, monkeypatch, number, step):
    before, during = signal.getsignal(number), []

    def interrupt(rate):
        if not during:
            os.kill(os.getpid(), number)
            during.append(signal.getsignal(number))
        return rate

    with monkeypatch.context() as patch:
        on_call(patch, train, "learning_rate", step, interrupt)
        message = end(*flags, "--out", tmp_path)
    assert f"epoch {1 + step // 4} after step {1 + (step - 1) % 3}/3: --resume" in message
    assert during == [signal.SIG_DFL] and signal.getsignal(number) == before  # a second one ends it
    run(*flags, "--out", tmp_path, "--resume")
    assert_same_run(unbroken, tmp_path)


def test_a_signal_also_stops_a_run_of_one_step_an_epoch(packed, tmp_path, monkeypatch):
    calls = []
    on_call(monkeypatch, train, "learning_rate", 2,
            lambda rate: calls.append(calls or os.kill(os.getpid(), signal.SIGINT)) or rate)
    assert "--resume" in end("--data", packed, "--epochs", 4, "--batch-size", 11, "--out", tmp_path)
    assert len(calls) < 3 and state(tmp_path / "last.pt")["epoch"] < 4


def test_a_run_that_dies_in_any_write_resumes_to_the_same_end(
        flags, unbroken, tmp_path, monkeypatch):
    genuine, out, died = os.replace, tmp_path / "out", []

    def replace(temporary, path):
        died.append(shutil.copytree(out, tmp_path / f"died in write {len(died)}"))
        genuine(temporary, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        run(*flags, "--out", out)
    # config; best, log and last of two epochs; metrics. Without a second best, one less.
    assert len(died) in (7, 8) and all(list(folder.glob(".*.tmp")) for folder in died)
    for folder in died:
        run(*flags, "--out", folder, "--resume")
        assert_same_run(unbroken, folder)


def test_a_killed_process_resumes_to_the_same_end(flags, unbroken, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    server = multiprocessing.get_context("forkserver")         # imports torch once, then forks
    server.set_forkserver_preload([__name__])
    chance, kills, done, seconds = random.Random(0), int(os.environ.get("KILLS", "30")), 0, 1.0
    while True:
        out, start = tmp_path / str(done), time.monotonic()
        process = server.Process(target=run_small, args=(*flags, "--out", out, "--resume"))
        process.start()
        process.join(chance.uniform(0, seconds) if kills else None)
        if process.is_alive():
            process.kill()                                     # SIGKILL, also inside a save
            process.join()
            kills -= 1
            continue
        assert process.exitcode == 0
        assert_same_run(unbroken, out)
        seconds, done = max(seconds, time.monotonic() - start), done + 1       # on to a fresh run
        if not kills:
            break


def test_resume_refuses_other_settings_and_says_which(flags, unbroken):
    resume = [*flags, "--out", unbroken, "--resume"]
    assert "lr 0.001, not 0.01" in end(*resume, "--lr", 0.01)
    message = end(*resume, "--epochs", 3)
    assert "epochs 2, not 3" in message and "cosine" in message
    assert "--resume" in end(*flags, "--out", unbroken)  # a run is never overwritten


def test_a_constant_schedule_may_run_on_for_more_epochs_but_not_for_fewer(flags, tmp_path):
    constant = [*flags, "--schedule", "constant"]
    run(*constant, "--out", tmp_path / "whole")
    run(*constant, "--epochs", 1, "--out", tmp_path / "parts")
    run(*constant, "--out", tmp_path / "parts", "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    selective = [*constant, "--neuron-selective", "--out", tmp_path / "selective"]
    run(*selective, "--epochs", 1)
    assert "epochs 1, not 2" in end(*selective, "--resume")  # alpha was laid out
    (tmp_path / "old").mkdir()
    torch.save(METER().state_dict(), tmp_path / "old" / "last.pt")
    assert "--out" in end(*flags, "--out", tmp_path / "old", "--resume")
    message = end(*constant, "--epochs", 1, "--out", tmp_path / "whole", "--resume")
    assert "epochs 2, not 1" in message and "cosine" not in message


@pytest.mark.parametrize("words, says", [
    (["--layers", "dec_9"], "dec_9"),
    (["--alpha", "nan"], "--alpha"), (["--alpha=-inf"], "--alpha"), (["--alpha", "0.1"], "--alpha"),
    (["--lr", "0"], "--lr"), (["--lr", "nan"], "--lr"), (["--epochs", "0"], "--epochs"),
    (["--batch-size", "0"], "--batch-size"), (["--epochs", "two"], "invalid int")])
def test_a_wrong_flag_is_named(words, says, capsys, tmp_path):
    message = end("--out", tmp_path / "new", *words)
    assert says in message + capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_layer_named_twice_is_regularised_once():
    names = "dec_3", "enc_4", "dec_3"
    assert train.parse_args(["--layers", *names]).layers == ["dec_3", "enc_4"]


def test_what_cannot_work_ends_with_a_sentence_before_training(flags, unbroken, tmp_path):
    new = [*flags, "--out", tmp_path / "new"]
    message = end(*new, "--batch-size", 12)
    assert "--batch-size 12" in message and "11 training images" in message
    message = end(*new, "--init", unbroken / "best.pt", "--variant", "s")
    assert "best.pt is METER xxs" in message
    assert "nowhere.pt" in end(*new, "--init", tmp_path / "nowhere.pt")
    if not torch.cuda.is_available():
        assert "--amp fp16" in end(*new, "--amp", "fp16")
    message = end(*flags, "--out", unbroken / "config.json" / "x")
    assert "config.json is not a folder" in message
    assert not (tmp_path / "new").exists()


def test_a_full_disk_ends_with_a_sentence_and_keeps_last_pt(flags, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    on_call(monkeypatch, os, "fsync", 5, full)  # config, best, log, last; then
    message = end(*flags, "--out", tmp_path)
    assert "No space left on device" in message and str(tmp_path) in message
    assert state(tmp_path / "last.pt")["epoch"] == 1 and not list(tmp_path.glob(".*.tmp"))


def test_a_nan_names_epoch_step_and_term_and_keeps_last_pt(flags, unbroken, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:  # 3 steps, 1 validation batch, second step
        on_call(patch, train, "loss_terms", 6,
                lambda terms: terms | {"loss_ssim": terms["loss_ssim"] * math.nan})
        message = end(*flags, "--out", tmp_path)
    assert "epoch 2, step 2: loss_ssim is nan" in message
    assert state(tmp_path / "last.pt")["epoch"] == 1
    run(*flags, "--out", tmp_path, "--resume")
    assert_same_run(unbroken, tmp_path)


def test_a_full_gpu_ends_with_advice(flags, tmp_path, monkeypatch):
    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(data, "normalise", full)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="--batch-size"):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def test_every_command_of_the_readme_and_the_docstrings_parses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "open_source", lambda *_: data.Rooms(10, "cpu"))
    monkeypatch.setattr(data, "pack", lambda _, path: path.write_bytes(b"packed"))
    blocks = re.findall(r"```.*?\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    text = "\n".join([*blocks, train.__doc__, dissect.__doc__, data.__doc__]).replace("\\\n", " ")
    found = re.findall(r"\bpython3? (?:\S*/)?(train|dissect|data)\.py\b([^\n;&|>]*)", text)
    assert {script for script, _ in found} == {"train", "dissect", "data"}
    for script, words in found:
        words = shlex.split(re.sub(r"\$\{?\w+\}?", "0", words), comments=True)
        if script == "data":
            data.main(words)
            [path.unlink() for path in tmp_path.glob("*.h5")]
        else:
            {"train": train, "dissect": dissect}[script].parse_args(words)
