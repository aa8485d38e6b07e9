"""dissect.py: measures, ablation and correction against literal slow loops, and whole runs."""
import csv
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import dissect
from model import METER, record

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def frames():
    """Six rooms with missing pixels and some beyond 10 m."""
    rooms = data.Frames(data.Rooms(12, CPU), "train", CPU, limit=6)
    rooms.depth[:, :, :9, :20] = 0
    rooms.depth[1, :, 30:] += 9
    assert len(rooms) == 6 and rooms.depth.max() > 10
    return rooms


@pytest.fixture(scope="module")
def network(frames):
    """A random network whose answer is some metres in size, so that every unit matters."""
    torch.manual_seed(0)
    model = METER("xxs").train()
    image, _ = frames.fetch(torch.arange(6))
    with torch.no_grad():
        for n in (1, 2, 3):  # else its deep layers hardly count
            model.decoder[f"ups_block_{n}"].conv2d_transpose.weight *= 20
        for _ in range(8):
            model(data.normalise(image / 255))
        weight = model.decoder["conv2d_out"].weight
        weight.copy_(weight.abs())
        weight *= 2.5 / model.eval()(data.normalise(image / 255)).mean()
    return model


@pytest.fixture(scope="module")
def folder(network, tmp_path_factory):
    """Packed rooms; one network as centimetres and as grey levels; and another one."""
    path = tmp_path_factory.mktemp("dissect")
    data.pack(data.Rooms(12, CPU), path / "rooms.h5")
    grey, other = dict(network.state_dict()), dict(network.state_dict())
    grey["decoder.conv2d_out.weight"] = grey["decoder.conv2d_out.weight"] * 0.255
    other["decoder.conv2d_in.weight"] = other["decoder.conv2d_in.weight"].flip(0)
    for name, weights, units in (("cm", network.state_dict(), 100.0), ("grey", grey, 25.5),
                                 ("other", other, 100.0)):
        (path / "runs" / name).mkdir(parents=True)
        content = {"model": weights, "units_per_metre": units,
                   "config": {"data": str(path / "rooms.h5")}}
        torch.save(content, path / "runs" / name / "best.pt")
    return path


def run(folder, names, *words):
    """dissect.py on runs/<name>/best.pt: (dissect.json, rows of units.csv, --out)."""
    out = folder / "out" / "-".join(map(str, [*names, *words])).replace("/", "_")[-60:]
    dissect.main([*(str(folder / "runs" / name / "best.pt") for name in names),
                  *map(str, words), "--out", str(out)])
    return json.loads((out / "dissect.json").read_text()), table(out / "units.csv"), out


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def end(*words):
    with pytest.raises(SystemExit) as stop:
        dissect.main([str(word) for word in words])
    return str(stop.value.code)


def batches(frames):
    return [(data.normalise(image / 255), depth) for _, image, depth in frames.batches(4)]


def slow_edges(bins, notebook):
    near, far = 0.75, 100 if notebook else 10
    edges = [0, near, *(math.exp(math.log(far + 1 - near) * i / (bins - 1)) - (1 - near)
                        for i in range(1, bins - 1)), far]
    return [edge * 10 / 255 for edge in edges] if notebook else edges


def slow_bins(depth, bins, notebook=False):
    """Bin of each pixel; -1 where depth is missing or beyond 10 m; notebook: 0 beyond 3.92 m."""
    edges = torch.tensor(slow_edges(bins, notebook))
    number = torch.full(depth.shape, -1)
    for b in range(bins):
        number[(depth > edges[b]) & (depth <= edges[b + 1])] = b
    if notebook:
        number[depth > edges[-1]] = 0
    return number


def slow_rmse(predictions, frames):
    errors = []
    for p, d in zip(predictions, frames.depth):
        measured = (d > 1e-3) & (d < 10)
        errors.append((p.clamp(1e-3, 10)[measured] - d[measured]).square().mean().sqrt())
    return torch.stack(errors).mean().item()


@pytest.mark.parametrize("notebook", [False, True])
def test_measure_equals_a_loop_over_images_and_bins(network, frames, notebook):
    names = ["enc_0", "enc_4", "enc_8", "enc_9", "dec_0", "dec_3"]  # finer, equal, coarser; signed
    metrics, units = dissect.measure(network, frames, names, notebook, batch_size=4)
    image, depth = frames.fetch(torch.arange(6))
    with torch.no_grad(), record(network, names) as features:
        prediction = network(data.normalise(image / 255))
    assert metrics["rmse_m"] == pytest.approx(slow_rmse(prediction, frames), rel=1e-5)
    for name in names:
        count = features[name].shape[1]
        bins = min(count, 64)
        signed, absolute = torch.zeros(2, count, bins, dtype=torch.float64)
        pixels = torch.zeros(bins)
        for activation, truth in zip(features[name], depth[:, 0]):
            number = slow_bins(truth, bins, notebook)
            for x, total in ((activation, signed), (activation.abs(), absolute)):
                x = F.interpolate(x[None], truth.shape, mode="bilinear")[0].double()
                for b in range(bins):
                    total[:, b] += x[:, number == b].sum(1)
            pixels += torch.stack([(number == b).sum() for b in range(bins)])
        signed, absolute = signed / pixels.clamp(min=1), absolute / pixels.clamp(min=1)
        assert units[name]["count"].tolist() == pytest.approx(pixels.tolist(), abs=1e-2)
        scale = absolute.max().item()
        torch.testing.assert_close(units[name]["signed"], signed, rtol=1e-4, atol=1e-5 * scale)
        torch.testing.assert_close(units[name]["absolute"], absolute, rtol=1e-4, atol=1e-5 * scale)
        for k in range(count):
            r = signed[k].abs()
            peak = int(r.argmax())
            others = (r.sum() - r[peak]) / (bins - 1)
            assert units[name]["selectivity"][k].item() == pytest.approx(
                ((r[peak] - others) / (r[peak] + others + 1e-15)).item(), abs=1e-4)
            own, r = k * bins // count, absolute[k]
            others = (r.sum() - r[own]) / (bins - 1)
            expected = float((r[own] - others) / (r[own] + others + 1e-15) * (pixels[own] > 0))
            assert units[name]["assigned_bin"][k] == own
            score = units[name]["assigned_selectivity"][k].item()
            assert score == pytest.approx(expected, abs=1e-4)
            edges = slow_edges(bins, notebook)
            found = int(units[name]["peak_bin"][k])
            middle = (edges[found] + edges[found + 1]) / 2
            assert units[name]["peak_m"][k].item() == pytest.approx(middle, rel=1e-5)
            assert found == peak or r.max() == pytest.approx(0, abs=1e-6) or math.isclose(
                signed[k, found].abs(), signed[k, peak].abs(), rel_tol=1e-4)
    assert not any(module._forward_hooks for module in network.modules())


def test_the_files_of_one_checkpoint_have_the_documented_form(folder):
    result, rows, out = run(folder, ["cm"], "--layers", "dec_3", "enc_9")
    assert list(result) == ["checkpoint", "binning", "split", "images", "rmse_m", "rel", "log10",
                            "delta1", "delta2", "delta3", "layers", "mean_selectivity"]
    assert (result["binning"], result["split"], result["images"]) == ("metres", "test", 2)
    layer = result["layers"]["enc_9"]
    assert list(layer) == ["selectivity", "assigned_selectivity", "units", "bins", "bins_used"]
    assert (layer["units"], layer["bins"]) == (80, 64) and 0 < layer["bins_used"] < 64
    assert list(rows[0]) == ["checkpoint", "layer", "unit", "selectivity", "peak_bin", "peak_m",
                             "assigned_bin", "assigned_selectivity"]
    assert len(rows) == 88 and rows[0]["layer"] == "dec_3" and rows[-1]["unit"] == "79"
    for key in ("selectivity", "assigned_selectivity"):
        mean = sum(float(row[key]) for row in rows if row["layer"] == "enc_9") / 80
        assert layer[key] == pytest.approx(mean, rel=1e-4, abs=1e-6)
    assert result["mean_selectivity"] == pytest.approx(
        sum(x["selectivity"] for x in result["layers"].values()) / 2)
    assert {path.name for path in out.iterdir()} == {"dissect.json", "units.csv"}


def test_two_checkpoints_stand_side_by_side_and_units_per_metre_come_from_each(folder, capsys):
    (first, second), rows, _ = run(folder, ["cm", "grey"], "--layers", "dec_3", "--notebook")
    assert second["rmse_m"] == pytest.approx(first["rmse_m"], rel=1e-5) and first["rmse_m"] < 5
    assert second["layers"] == first["layers"]
    assert first["binning"] == "notebook" and len(rows) == 16
    assert "(+0.000)" in capsys.readouterr().out
    (first, second), _, _ = run(folder, ["cm", "other"], "--layers", "dec_3")
    change = second["layers"]["dec_3"]["selectivity"] - first["layers"]["dec_3"]["selectivity"]
    assert f"({change:+.3f})" in capsys.readouterr().out and change


def test_two_runs_of_one_name_are_kept_apart(folder, tmp_path):
    shutil.copytree(folder / "runs/other", tmp_path / "cm")
    paths = [str(path / "cm" / "best.pt") for path in (folder / "runs", tmp_path)]
    dissect.main([*paths, "--layers", "dec_3", "--out", str(tmp_path / "out")])
    first, second = json.loads((tmp_path / "out" / "dissect.json").read_text())
    assert [first["checkpoint"], second["checkpoint"]] == paths
    assert first["rmse_m"] != second["rmse_m"]


def test_figures_are_drawn_for_frames_and_for_photos(folder):
    (folder / "photos").mkdir()
    for mode, size in ("RGB", (640, 480)), ("L", (100, 300)), ("RGBA", (50, 50)), ("P", (320, 240)):
        Image.new(mode, size, 99).save(folder / "photos" / f"{mode}.png")
    (folder / "photos" / ".DS_Store").write_text("no photo, as a Mac leaves it")
    photos = ["--images", folder / "photos"]
    _, _, out = run(folder, ["cm"], "--layers", "dec_3", "dec_2", "--viz", *photos)
    expected = {f"cm_{what}.png" for what in ("dec_3_units", "dec_3_map", "dec_2_units",
                                              "dec_2_map", "activations", "photos_1", "photos_2")}
    assert {path.name for path in out.glob("*.png")} == expected | {"overview.png"}
    for path in out.glob("*.png"):
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(10 ** 7)) > 20, path.name
    three, one = (Image.open(out / f"cm_photos_{page}.png").width for page in (1, 2))
    assert three == 3 * one                                    # two pictures of each photo


@pytest.mark.parametrize("size, middle", [((640, 480), None), ((120, 200), (0, 55, 120, 145))])
def test_a_photo_is_cut_to_its_middle_and_resized_as_frames_in_training(tmp_path, size, middle):
    photo = Image.frombytes("RGB", size, np.random.default_rng(0).bytes(3 * size[0] * size[1]))
    photo.save(tmp_path / "photo.png")
    expected = np.asarray(photo.resize((256, 192), Image.BILINEAR, middle))
    assert np.array_equal(dissect.read_photo(tmp_path / "photo.png").permute(1, 2, 0), expected)


def test_a_broken_photo_is_named(folder):
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "empty").mkdir()
    for path in (folder / "broken.png", folder / "nowhere.png", folder / "empty"):
        message = end(folder / "runs/cm/best.pt", "--images", path, "--out", folder / "no")
        assert str(path) in message and "--images" in message


def test_the_newest_run_is_taken_and_without_one_a_sentence_helps(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    for age, name in enumerate(("grey", "other", "cm")):
        os.utime(f"runs/{name}/best.pt", (1e9 - age, 1e9 - age))
    dissect.main(["--layers", "dec_3"])
    result = json.loads((folder / "runs/dissect/dissect.json").read_text())
    assert result["checkpoint"] == "runs/grey/best.pt"
    monkeypatch.chdir(tmp_path)
    assert "train.py" in end()
    assert "nowhere.pt" in end("nowhere.pt")


def test_a_gpu_dissects_in_full_fp32(folder, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # PyTorch's default
    run(folder, ["cm"], "--layers", "dec_3")
    assert not torch.backends.cudnn.allow_tf32


FRAMES = [  # checkpoints and flags; then the --data, --raw-depth and --rooms that follow
    (["released"], (None, False, 400)), (["drawn"], (None, False, 30)),
    (["released", "drawn"], (None, False, 30)), (["drawn", "--rooms=10"], (None, False, 10)),
    (["filled"], ("mat", False, 400)), (["holes"], ("mat", True, 400)),
    (["drawn", "holes"], ("mat", True, 30)), (["holes", "--data=nowhere"], ("nowhere", True, 400))]


@pytest.mark.parametrize("words, expected", FRAMES)
def test_frames_are_those_of_the_first_run_unless_flags_say_otherwise(
        words, expected, network, mat, tmp_path, monkeypatch):
    configs = {"released": {}, "drawn": {"data": None, "raw_depth": False, "rooms": 30},
               "filled": {"data": str(mat), "raw_depth": False, "rooms": 400},
               "holes": {"data": str(mat), "raw_depth": True, "rooms": 400}}
    for name, config in configs.items():
        torch.save({"model": network.state_dict(), "config": config}, tmp_path / f"{name}.pt")

    def open_source(path, *rest):
        raise LookupError(path and str(path).replace(str(mat), "mat"), *rest[:2])

    monkeypatch.setattr(data, "open_source", open_source)
    with pytest.raises(LookupError) as asked:
        dissect.main([str(tmp_path / f"{x}.pt") if x in configs else x for x in words]
                     + ["--out", str(tmp_path / "out")])
    assert asked.value.args == expected


def test_the_split_and_the_bins_are_those_asked_for(network, folder):
    result, _, _ = run(folder, ["cm"], "--split", "val", "--notebook", "--layers", "dec_3")
    frames = data.Frames(data.Packed(folder / "rooms.h5"), "val", CPU)
    metrics, units = dissect.measure(network, frames, ["dec_3"], notebook=True)
    assert result["images"] == len(frames) == 1
    assert result["rmse_m"] == pytest.approx(metrics["rmse_m"], rel=1e-4)
    for key in dissect.MEASURES:
        wanted = units["dec_3"][key].mean().item()
        assert result["layers"]["dec_3"][key] == pytest.approx(wanted, abs=1e-4)


def read_by(network, layer, unit):
    """All weights through which the network reads a unit; views, so that they can be zeroed."""
    e, d = network.encoder, network.decoder
    return {"dec_3": [d.conv2d_out.weight[:, unit]],
            "dec_0": [d.ups_block_1.conv2d_transpose.weight[unit]],
            "enc_10": [e.conv2[0].weight[:, unit]],
            "enc_7": [e.mvit[1].conv1[0].depthwise.weight[:, unit],  # block, shortcut, skip
                      e.mvit[1].conv4[0].depthwise.weight[:, 64 + unit],
                      d.ups_block_1.end_up_layer[0].depthwise.weight[:, 32 + unit]]}[layer]


@pytest.mark.parametrize("layer", ["enc_7", "enc_10", "dec_0", "dec_3"])
def test_switching_units_off_equals_zeroing_the_weights_that_read_them(network, frames, layer):
    with torch.no_grad(), record(network, [layer]) as features:
        whole = torch.cat([network(image) for image, _ in batches(frames)])
    width = features[layer].shape[1]
    units = torch.arange(7)
    change = layer, dissect.switch_off(units, torch.zeros(width))
    error = dissect.measure(network, frames, [], change=change)[0]["rmse_m"]

    edited = METER("xxs").eval()
    edited.load_state_dict(network.state_dict())
    with torch.no_grad():
        for unit in units:
            for weight in read_by(edited, layer, unit):
                weight.zero_()
        literal = torch.cat([edited(image) for image, _ in batches(frames)])
    assert error == pytest.approx(slow_rmse(literal, frames), rel=1e-5)
    assert error != pytest.approx(slow_rmse(whole, frames), rel=1e-4)
    assert not any(module._forward_hooks for module in network.modules())


def test_ablation_to_the_mean_follows_the_order_of_selectivity(network, frames):
    _, units = dissect.measure(network, frames, ["dec_3"])
    rows = dissect.ablate(network, frames, "dec_3", units["dec_3"], "mean")
    with torch.no_grad(), record(network, ["dec_3"]) as features:
        network(torch.cat([image for image, _ in batches(frames)]))
        activation = features["dec_3"]
        valid = (frames.depth > 0) & (frames.depth <= 10)
        for name, falling in (("most selective first", True), ("least selective first", False)):
            scores = units["dec_3"]["selectivity"].tolist()
            order = sorted(range(8), key=scores.__getitem__, reverse=falling)
            for n in range(9):
                x = activation.clone()
                for k in order[:n]:
                    x[:, k] = activation[:, k:k + 1][valid].mean()
                error = slow_rmse(network.decoder.conv2d_out(x) / 100, frames)
                (row,) = [row for row in rows if row["order"] == name and row["units_off"] == n]
                assert row["rmse_m"] == pytest.approx(error, rel=1e-4)
    assert len({row["order"] for row in rows}) == 2 + 5 and len(rows) == 7 * 9
    assert len({row["rmse_m"] for row in rows if row["units_off"] == 4}) > 5   # orders differ


def test_the_mean_that_a_unit_is_set_to_keeps_its_sign(network, frames, monkeypatch):
    _, units = dissect.measure(network, frames, ["dec_0"])
    seen = []
    monkeypatch.setattr(dissect, "switch_off", lambda units, value: seen.append(value))
    monkeypatch.setattr(dissect, "measure", lambda *_, **__: ({"rmse_m": 0.0}, {}))
    dissect.ablate(network, frames, "dec_0", units["dec_0"], "mean")
    with torch.no_grad(), record(network, ["dec_0"]) as features:
        network(torch.cat([image for image, _ in batches(frames)]))
    valid = ((frames.depth > 0) & (frames.depth <= 10))[:, 0]
    full = F.interpolate(features["dec_0"], (48, 64), mode="bilinear")
    means = torch.stack([full[:, unit][valid].mean() for unit in range(64)])
    assert (means < 0).any() and (means > 0).any()
    torch.testing.assert_close(seen[0], means, rtol=1e-4, atol=1e-5 * means.abs().max().item())


@pytest.mark.parametrize("layers", [["enc_2"], ["enc_5", "enc_7"], ["enc_9"], ["dec_1", "dec_3"]])
def test_the_units_drawn_are_those_whose_answer_looks_most_like_its_mean_at_each_depth(
        network, frames, layers):
    _, units = dissect.measure(network, frames, layers)
    chosen, best = dissect.choose_units(network, frames, units)
    with torch.no_grad(), record(network, layers) as features:
        network(torch.cat([image for image, _ in batches(frames)]))
    likeness, bands = {}, {}
    for layer in layers:
        activation = F.interpolate(features[layer].abs(), (48, 64), mode="bilinear")
        number = slow_bins(frames.depth[:, 0], len(units[layer]["count"]))         # -1: none
        for unit, response in enumerate(units[layer]["absolute"].float()):
            usual = response[number.clamp(min=0)] * (number >= 0)
            pairs = zip(activation[:, unit].flatten(1), usual.flatten(1))
            likeness[layer, unit] = torch.stack(
                [torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).nan_to_num()
            peak = units[layer]["peak_m"][unit].item()
            score = likeness[layer, unit].mean() * units[layer]["selectivity"][unit]
            if score > 0:  # a dead unit shows nothing
                bands.setdefault((peak > 2) + (peak > 4), []).append((score.item(), layer, unit))
    assert chosen == [max(bands[band])[1:] for band in sorted(bands)]
    total = sum(likeness[pair] for pair in chosen)
    assert best.tolist() == total.argsort(descending=True)[:3].tolist()


# The sizes of enc_0, dec_3 and enc_9.
@pytest.mark.parametrize("size, bins", [((96, 128), 16), ((48, 64), 8), ((6, 8), 64)])
def test_correction_gives_each_cell_the_mean_response_to_its_true_depth(frames, size, bins):
    torch.manual_seed(1)
    x, response, depth = torch.randn(2, 3, *size), torch.randn(bins), frames.depth[:2]
    changed = dissect.give_mean(1, response, torch.tensor(slow_edges(bins, False)))(x, depth)
    for b in range(2):
        number = slow_bins(depth[b, 0], bins)
        for i in range(0, size[0], max(size[0] // 6, 1)):
            for j in range(size[1]):
                top, left = i * 48 // size[0], j * 64 // size[1]
                own = number[top:max(top + 1, (i + 1) * 48 // size[0]),
                             left:max(left + 1, (j + 1) * 64 // size[1])]
                wanted = response[own].mean() if (own >= 0).all() else x[b, 1, i, j]
                assert changed[b, 1, i, j].item() == pytest.approx(float(wanted), abs=1e-5)
    assert torch.equal(changed[:, [0, 2]], x[:, [0, 2]])


def test_ablation_and_correction_write_their_tables_and_a_figure(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    result, _, out = run(folder, ["cm"], "--layers", "dec_3", "--ablate", "--correct")
    rows = table(out / "ablation.csv")
    assert list(rows[0]) == ["checkpoint", "layer", "replaced_by", "order", "units_off", "rmse_m"]
    assert {row["replaced_by"] for row in rows} == {"zero"}
    assert (out / "ablation.png").stat().st_size > 1000
    whole = [float(row["rmse_m"]) for row in rows if row["units_off"] == "0"]
    assert whole == pytest.approx([result["rmse_m"]] * 7)
    rows = table(out / "correction.csv")
    assert [row["unit"] for row in rows] == list("01234567")
    for row in rows:
        change = float(row["rmse_m"]) - result["rmse_m"]
        assert float(row["change_m"]) == pytest.approx(change, abs=1e-6)
    progress, printed = capsys.readouterr().out.split("lowers RMSE most:\n")
    assert "ablate dec_3" in progress and "correct dec_3" in progress
    printed = printed.splitlines()
    best = min(rows, key=lambda row: float(row["change_m"]))["unit"]
    assert len(printed) == 9 and f"| unit {best} |" in printed[0]      # 8 units, "written to"
