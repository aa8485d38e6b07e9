"""dissect.py: measures, ablation and pictures against literal slow loops, and whole runs."""
import copy
import csv
import json
import math
import os
import shutil
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

import data
import dissect
from data import UserError
from model import LAYERS, METER, CheckpointError, record

pytestmark = pytest.mark.usefixtures("small")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def frames(small):
    """Six rooms with missing pixels and some beyond 10 m."""
    rooms = data.Frames(data.Rooms(12, CPU), "train", CPU, limit=6)
    rooms.depth[:, :, :3, :10] = 0
    rooms.depth[1, :, 10:] += 9
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


def kill(network, dec_3=(), enc_8=()):
    """A copy of the network in which these units, behind a ReLU, never answer."""
    network = copy.deepcopy(network)
    with torch.no_grad():
        network.decoder["ups_block_3"].end_up_layer[0].pointwise.weight[list(dec_3)] = 0
        norm = network.encoder["mvit"][1].conv4[1]
        norm.weight[list(enc_8)] = 0
        norm.bias[list(enc_8)] = -1
    return network


@pytest.fixture(scope="module")
def folder(network, tmp_path_factory):
    """Packed rooms, and some runs that were trained on them."""
    path = tmp_path_factory.mktemp("dissect")
    rooms = data.Rooms(12, CPU)
    rooms.names["test"] = rooms.names["test"][:2]
    data.pack(rooms, path / "rooms.h5")
    grey, other = dict(network.state_dict()), dict(network.state_dict())
    grey["decoder.conv2d_out.weight"] = grey["decoder.conv2d_out.weight"] * 0.255
    other["decoder.conv2d_in.weight"] = other["decoder.conv2d_in.weight"].flip(0)
    infinite = other | {"decoder.conv2d_out.weight": torch.full((1, 8, 3, 3), 3e38)}
    plain = {"neuron_selective": False, "layers": ["dec_3", "enc_9"]}
    selective = {"neuron_selective": True, "layers": ["dec_3", "enc_4"]}
    for name, weights, units, settings in (
            ("cm", network.state_dict(), 100.0, {}),
            ("grey", grey, 25.5, {}),
            ("other", other, 100.0, plain),
            ("selective", other, 100.0, selective),
            ("dead", kill(network, dec_3=[0, 6]).state_dict(), 100.0, {}),
            ("silent", kill(network, dec_3=range(8)).state_dict(), 100.0, {}),
            ("infinite", infinite, 100.0, {})):
        (path / "runs" / name).mkdir(parents=True)
        content = {"model": weights, "units_per_metre": units,
                   "config": {"data": str(path / "rooms.h5"), **settings}}
        torch.save(content, path / "runs" / name / "best.pt")
    return path


def read_json(path):
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run(folder, names, *words, out=None):
    """dissect.py on runs/<name>/best.pt: (what dissect.json holds of each, units.csv, --out)."""
    out = out or folder / "out" / "-".join(map(str, [*names, *words])).replace("/", "_")[-60:]
    results = dissect.main([*(str(folder / "runs" / name / "best.pt") for name in names),
                            *map(str, words), "--out", str(out)])
    assert read_json(out / "dissect.json") == results
    return list(results.values()), table(out / "units.csv"), out


def refusal(*words):
    """The sentence with which dissect.py ends."""
    with pytest.raises((UserError, CheckpointError)) as refused:
        dissect.main([str(word) for word in words])
    message = str(refused.value)
    assert message and not message.startswith("error")
    return message


def batches(frames):
    return [(data.normalise(image / 255), depth) for image, depth in frames.batches(4)]


# Measures.

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


def slow_sums(features, depth, notebook):
    """Pixels of each bin; activation and |activation| added up over them: (K,), 2 (C, K)."""
    units = features.shape[1]
    bins = min(units, 64)
    signed, absolute = torch.zeros(2, units, bins, dtype=torch.float64)
    pixels = torch.zeros(bins, dtype=torch.float64)
    for activation, truth in zip(features, depth[:, 0]):
        number = slow_bins(truth, bins, notebook)
        for x, total in ((activation, signed), (activation.abs(), absolute)):
            x = F.interpolate(x[None], truth.shape, mode="bilinear")[0].double()
            for b in range(bins):
                total[:, b] += x[:, number == b].sum(1)
        pixels += torch.stack([(number == b).sum() for b in range(bins)])
    return pixels, signed, absolute


def slow_score(response, own, among):
    others = [response[b] for b in among if b != own]
    other = sum(others) / max(len(others), 1)
    return (response[own] - other) / (response[own] + other + 1e-15)


def slow_units(pixels, signed, absolute, notebook, min_share):
    """What is to be said of each unit: a list of dicts."""
    count = pixels.tolist()
    edges = slow_edges(len(count), notebook)
    among = [b for b, n in enumerate(count) if n > min_share * sum(count) or min_share == 0]
    said = []
    for unit, sums in enumerate(zip(signed.tolist(), absolute.tolist())):
        mean, strength = ([x / max(n, 1) for x, n in zip(part, count)] for part in sums)
        response = [abs(x) for x in mean]
        own, dead = unit * len(count) // len(signed), not any(strength)
        peak = max(among, key=response.__getitem__)
        enough = count[own] > min_share * sum(count)
        said.append({
            "unit": unit,
            "selectivity": slow_score(response, peak, among),
            "peak_bin": -1 if dead else peak,
            "peak_m": math.nan if dead else (edges[peak] + edges[peak + 1]) / 2,
            "assigned_bin": own,
            "assigned_selectivity": slow_score(strength, own, among) if enough else 0.0,
            "dead": dead,
        })
    return said, [b in among for b in range(len(count))]


def columns(r):
    return [dict(zip(dissect.COLUMNS, unit)) for unit in zip(*(r[key].tolist()
                                                               for key in dissect.COLUMNS))]


@pytest.mark.parametrize("units", [8, 24, 80])
@pytest.mark.parametrize("notebook, min_share", [(False, 0.0), (True, 0.0), (False, 0.001),
                                                 (True, 0.01), (False, 0.1)])
def test_units_are_described_as_by_a_slow_loop_with_rare_bins_and_dead_units(
        units, notebook, min_share):
    random = torch.Generator().manual_seed(units)
    bins = min(units, 64)
    pixels = 10 ** (1 + 5 * torch.rand(bins, generator=random).double())
    pixels[[2, 5]] = 0
    pixels[:2] = pixels.sum() * torch.tensor([0.2, 0.0005])
    absolute = torch.rand(units, bins, generator=random).double() * pixels
    absolute[:, 1] *= 9                                # nearly all are strongest in a rare bin
    absolute[[0, 3, units - 1]] = 0                    # dead; the first would be near
    signed = absolute * (2 * torch.rand(units, bins, generator=random) - 1)
    said, among = slow_units(pixels, signed, absolute, notebook, min_share)
    r = dissect.describe_units(torch.cat([pixels[None], signed, absolute]), notebook, min_share)

    assert r["counted"].tolist() == among
    assert min_share == 0 or 0 < sum(among) < bins
    for found, expected in zip(columns(r), said):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-9, nan_ok=True)
    assert sum(found["dead"] for found in columns(r)) == 3
    assert r["edges"].tolist() == pytest.approx(slow_edges(bins, notebook))
    torch.testing.assert_close(r["signed"], signed / pixels.clamp(min=1))
    torch.testing.assert_close(r["absolute"], absolute / pixels.clamp(min=1))


# Finer maps than depth, equal, coarser; signed, of ReLUs.
NAMES = ["enc_0", "enc_4", "enc_8", "enc_9", "dec_0", "dec_3"]


@pytest.mark.parametrize("notebook, min_share", [(False, 0.0), (True, 0.0), (False, 0.02)])
def test_measure_equals_a_loop_over_images_and_bins(network, frames, notebook, min_share):
    network = kill(network, dec_3=[5], enc_8=[0, 40])
    metrics, units = dissect.measure(network, frames, NAMES, notebook, 4, min_share)
    image, depth = frames.fetch(torch.arange(6))
    with torch.no_grad(), record(network, NAMES) as features:
        prediction = network(data.normalise(image / 255))
    assert metrics["rmse_m"] == pytest.approx(slow_rmse(prediction, frames), rel=1e-5)
    for name in NAMES:
        r, sums = units[name], slow_sums(features[name], depth, notebook)
        said, among = slow_units(*sums, notebook, min_share)
        pixels, signed, absolute = sums
        scale = absolute.max() / pixels.max()
        for key, total in (("signed", signed), ("absolute", absolute)):
            torch.testing.assert_close(r[key], total / pixels.clamp(min=1),
                                       rtol=1e-4, atol=1e-5 * scale)
        assert r["counted"].tolist() == among and (min_share == 0 or not all(among))
        for unit, (found, expected) in enumerate(zip(columns(r), said)):
            response = r["signed"][unit].abs()
            if found["peak_bin"] != expected["peak_bin"]:  # as good as equal
                best = response[expected["peak_bin"]].item()
                assert response[found["peak_bin"]].item() == pytest.approx(best, rel=1e-4)
                expected |= {key: found[key] for key in ("peak_bin", "peak_m")}
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-4, nan_ok=True), name
        killed = {"dec_3": [5], "enc_8": [0, 40]}.get(name, [])
        assert r["dead"][killed].all() and not r["dead"].all()
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("batch_size", [1, 100])
def test_results_do_not_depend_on_the_batch_size(network, frames, batch_size):
    names = ["enc_0", "enc_9", "dec_3"]
    metrics, units = dissect.measure(network, frames, names, batch_size=4, min_share=0.001)
    others = dissect.measure(network, frames, names, False, batch_size, 0.001)
    assert others[0] == pytest.approx(metrics, rel=1e-5)
    torch.testing.assert_close(others[1], units, rtol=1e-4, atol=1e-5)
    changes = [dissect.switch_off(torch.arange(n)) for n in (0, 9)]
    found, expected = (dissect.rmse_after(network, frames, "enc_4", changes, n)
                       for n in (batch_size, 4))
    assert found == pytest.approx(expected, rel=1e-5)


# Whole runs.

def test_the_files_of_one_checkpoint_have_the_documented_form(folder):
    (result,), rows, out = run(folder, ["cm"], "--layers", "dec_3", "enc_9")
    assert list(result) == ["checkpoint", "notebook", "min_share", "split", "images",
                            "regularised", "rmse_m", "rel", "log10", "delta1", "delta2", "delta3",
                            "mean_selectivity", "layers"]
    assert (result["notebook"], result["min_share"]) == (False, 0.001)
    assert (result["split"], result["images"], result["regularised"]) == ("test", 2, [])
    layer = result["layers"]["enc_9"]
    assert list(layer) == ["selectivity", "assigned_selectivity", "units", "dead", "bins",
                           "bins_used"]
    assert (layer["units"], layer["bins"]) == (80, 64) and 0 < layer["bins_used"] < 64
    assert list(rows[0]) == ["checkpoint", "layer", "unit", "selectivity", "peak_bin", "peak_m",
                             "assigned_bin", "assigned_selectivity", "dead"]
    assert len(rows) == 88 and rows[0]["layer"] == "dec_3" and rows[-1]["unit"] == "79"
    for key in dissect.MEASURES:
        mean = sum(float(row[key]) for row in rows if row["layer"] == "enc_9") / 80
        assert layer[key] == pytest.approx(mean, rel=1e-4, abs=1e-6)
    assert result["mean_selectivity"] == pytest.approx(
        sum(x["selectivity"] for x in result["layers"].values()) / 2)
    assert {path.name for path in out.iterdir()} == {"dissect.json", "units.csv"}


def test_the_split_the_bins_and_the_number_of_frames_are_those_asked_for(network, folder):
    source = data.Packed(folder / "rooms.h5", data.h5py.File(folder / "rooms.h5"))
    for words, split, settings, images in (
            (["--split", "val", "--notebook"], "val", (True, 0.0), 1),
            (["--notebook", "--min-share", "0.02"], "test", (True, 0.02), 2),
            (["--split", "train", "--limit", "3"], "train", (False, 0.001), 3),
            (["--min-share", "0", "--batch-size", "1"], "test", (False, 0.0), 2)):
        (result,), _, _ = run(folder, ["cm"], "--layers", "dec_3", *words)
        notebook, min_share = settings
        frames = data.Frames(source, split, CPU, limit=images)
        metrics, units = dissect.measure(
            network, frames, ["dec_3"], notebook, min_share=min_share)
        assert result["images"] == len(frames) == images and result["split"] == split
        assert (result["notebook"], result["min_share"]) == settings
        assert result["rmse_m"] == pytest.approx(metrics["rmse_m"], rel=1e-4)
        for key in dissect.MEASURES:
            wanted = units["dec_3"][key].mean().item()
            assert result["layers"]["dec_3"][key] == pytest.approx(wanted, abs=1e-4)


def test_two_checkpoints_stand_side_by_side_and_units_per_metre_come_from_each(folder, capsys):
    (first, second), rows, _ = run(folder, ["cm", "grey"], "--layers", "dec_3", "--notebook")
    assert second["rmse_m"] == pytest.approx(first["rmse_m"], rel=1e-5) and first["rmse_m"] < 5
    assert second["layers"] == first["layers"] and len(rows) == 16
    assert "(+0.000)" in capsys.readouterr().out
    (first, second), _, _ = run(folder, ["cm", "other"], "--layers", "dec_3")
    change = second["layers"]["dec_3"]["selectivity"] - first["layers"]["dec_3"]["selectivity"]
    assert f"({change:+.3f})" in capsys.readouterr().out and change


def test_layers_that_a_run_regularised_are_starred(folder, capsys):
    (first, second), _, _ = run(folder, ["cm", "selective"], "--layers", "enc_4", "enc_9", "dec_3")
    printed = capsys.readouterr().out
    names = [line.split()[0] for line in printed.splitlines() if line[:4] in ("enc_", "dec_")]
    assert names == ["enc_4*", "enc_9", "dec_3*"]
    assert (first["regularised"], second["regularised"]) == ([], ["dec_3", "enc_4"])

    figure = dissect.draw_overview({"cm": first, "selective": second}, folder / "overview.png")
    assert isinstance(figure, Figure)
    assert [x.get_text() for x in figure.axes[1].get_xticklabels()] == names
    for axis, key in zip(figure.axes, dissect.MEASURES):
        heights = [bar.get_height() for bar in axis.patches]
        assert heights == [x["layers"][layer][key] for x in (first, second)
                           for layer in ("enc_4", "enc_9", "dec_3")]

    run(folder, ["other", "selective"], "--layers", "enc_9", "dec_2")  # plain; not dissected
    assert "*" not in capsys.readouterr().out

    run(folder, ["selective"], "--layers", "dec_3")  # nothing to compare with
    assert "dec_3*" in capsys.readouterr().out


def test_dead_units_are_counted_and_have_no_peak(folder, capsys):
    (result,), rows, _ = run(folder, ["dead"], "--layers", "dec_3", "enc_9")
    assert [(row["unit"], row["dead"]) for row in rows if row["layer"] == "dec_3"] == [
        (str(unit), str(unit in (0, 6))) for unit in range(8)]
    for unit in (0, 6):
        row = rows[unit]
        assert (row["peak_bin"], row["peak_m"]) == ("-1", "nan")
        assert float(row["selectivity"]) == float(row["assigned_selectivity"]) == 0
    assert [layer["dead"] for layer in result["layers"].values()] == [2, 0]
    assert "dead units 2" in capsys.readouterr().out


def test_two_runs_of_one_name_are_kept_apart(folder, tmp_path):
    shutil.copytree(folder / "runs/other", tmp_path / "cm")
    paths = [str(path / "cm" / "best.pt") for path in (folder / "runs", tmp_path)]
    results = dissect.main([*paths, "--layers", "dec_3", "--out", str(tmp_path / "out")])
    first, second = results.values()
    assert [first["checkpoint"], second["checkpoint"]] == paths
    assert first["rmse_m"] != second["rmse_m"]
    names = {row["checkpoint"] for row in table(tmp_path / "out" / "units.csv")}
    assert names == set(results) and len(names) == 2


def test_the_newest_run_is_taken_and_without_one_a_sentence_helps(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    for age, name in enumerate(("grey", "other", "cm", "selective", "dead", "silent", "infinite")):
        os.utime(f"runs/{name}/best.pt", (1e9 - age, 1e9 - age))
    (result,) = dissect.main(["--layers", "dec_3"]).values()
    assert result["checkpoint"] == os.path.join("runs", "grey", "best.pt")
    assert read_json(folder / "runs/dissect/dissect.json") == {"grey": result}
    monkeypatch.chdir(tmp_path)
    assert "train.py" in refusal()
    assert "nowhere.pt" in refusal("nowhere.pt")


def test_a_gpu_dissects_in_full_fp32(folder, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # PyTorch's default
    run(folder, ["cm"], "--layers", "dec_3")
    assert not torch.backends.cudnn.allow_tf32


def test_a_network_that_predicts_no_number_ends_with_a_sentence_and_writes_no_result(
        folder, tmp_path):
    message = refusal(folder / "runs/cm/best.pt", folder / "runs/infinite/best.pt", "--layers",
                      "dec_3", "--out", tmp_path / "out")
    assert "nan or infinity" in message and "rmse_m" in message
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("words, message", [
    (["--data", "x", "--rooms", "20"], "--rooms does nothing with --data"),
    (["--raw-depth"], "--raw-depth"),
    (["--layers", "enc_99"], "enc_99"),
    (["--lay", "dec_3"], "--lay"),
    (["--min-share", "0.6"], "--min-share"),
    (["--batch-size", "0"], "--batch-size"),
    (["--ablate", "mean"], "mean")])
def test_flags_that_make_no_sense_are_refused(folder, tmp_path, words, message):
    assert message in refusal(folder / "runs/cm/best.pt", *words, "--out", tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def test_a_folder_to_which_another_program_writes_is_left_alone(folder, tmp_path):
    if data.fcntl is None:
        pytest.skip("no locks on this system")
    with data.sole_writer(tmp_path / "out"):
        assert str(tmp_path / "out") in refusal(folder / "runs/cm/best.pt",
                                                "--out", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_second_run_clears_what_an_earlier_one_wrote_and_nothing_else(folder, tmp_path):
    out, photo = tmp_path / "out", tmp_path / "kitchen.png"
    Image.new("RGB", (64, 48), 99).save(photo)
    own = ["notes.txt", "figure.png", "units.png", "best.pt", "dissect.json.old",
           "bedroom_depth.png", "living_room_depth.png", "holiday_photos_1.png", "old_units.png",
           "cm_notes.png", "other_kitchen.png", "ablation.pdf", "cm_my_units.png",
           "other_gt_depth.png", "grey_dec_2_units.png"]
    out.mkdir()
    for name in own:
        (out / name).write_text(name)
    run(folder, ["cm"], "--layers", "dec_3", out=out)
    run(folder, ["cm", "other"], "--layers", "dec_3", "--viz", "--ablate", "--images", photo,
        out=out)
    written = {path.name for path in out.iterdir()} - set(own)
    assert written == {
        "dissect.json", "units.csv", "ablation.csv", "ablation.png", "overview.png",
        *(f"{run}_{page}.png" for run in ("cm", "other")
          for page in ("dec_3_units", "activations", "photos_1", "kitchen_depth"))}
    run(folder, ["grey"], "--layers", "dec_3", out=out)
    photos = {f"{run}_{page}.png" for run in ("cm", "other")
              for page in ("photos_1", "kitchen_depth")}
    assert {path.name for path in out.iterdir()} == {"dissect.json", "units.csv", *photos, *own}
    assert all((out / name).read_text() == name for name in own)


def test_a_dissection_that_fails_leaves_the_earlier_one(folder, tmp_path):
    run(folder, ["cm"], "--layers", "dec_3", "--viz", out=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "nan or infinity" in refusal(folder / "runs" / "infinite" / "best.pt", "--out", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_label_with_brackets_is_cleared_as_any_other(folder, tmp_path):
    checkpoint, out = tmp_path / "lr[1e-3]" / "best.pt", tmp_path / "out"
    shutil.copytree(folder / "runs" / "cm", checkpoint.parent)
    for layer in "dec_3", "enc_9":
        dissect.main([str(checkpoint), "--layers", layer, "--viz", "--out", str(out)])
    assert [path.name for path in out.glob("*_units.png")] == ["lr[1e-3]_enc_9_units.png"]


@pytest.mark.parametrize("name", dissect.FILES)
@pytest.mark.parametrize("content", ["", "mine", "1", "[[]]", "\0"])
def test_results_of_another_program_are_not_written_over(name, content, folder, tmp_path):
    (tmp_path / name).write_text(content)
    if name == "dissect.json" and content == "[[]]":
        (tmp_path / name).write_bytes(b"\xff\xfe")
    message = refusal(folder / "runs" / "cm" / "best.pt", "--layers", "dec_3", "--out", tmp_path)
    assert str(tmp_path / name) in message and "another --out" in message
    assert [path.name for path in tmp_path.iterdir()] == [name]


FRAMES = [  # checkpoints and flags; then the --data, --raw-depth and --rooms that follow
    (["released"], (None, False, None)),
    (["drawn"], (None, False, 30)),
    (["released", "drawn"], (None, False, 30)),
    (["drawn", "--rooms=10"], (None, False, 10)),
    (["filled"], ("mat", False, None)),
    (["holes"], ("mat", True, None)),
    (["filled", "--raw-depth"], ("mat", True, None)),
    (["drawn", "holes"], (None, False, 30)),
    (["released", "holes", "drawn"], ("mat", True, None)),
    (["holes", "--data=nowhere"], ("nowhere", False, None)),
    (["holes", "--rooms=10"], (None, False, 10)),
    (["released", "--data=nowhere", "--raw-depth"], ("nowhere", True, None))]


@pytest.mark.parametrize("words, expected", FRAMES)
def test_frames_are_those_of_the_first_run_unless_flags_say_otherwise(
        words, expected, tmp_path, monkeypatch):
    configs = {"drawn": {"data": None, "raw_depth": False, "rooms": 30},
               "filled": {"data": "mat", "raw_depth": False, "rooms": None},
               "holes": {"data": "mat", "raw_depth": True, "rooms": None}}

    def load_checkpoint(path):
        ours = path.name in configs
        return None, {"config": configs[path.name], "units_per_metre": 1.0} if ours else {}

    def open_source(data, raw_depth, rooms, device):
        raise LookupError(data and str(data), raw_depth, rooms)

    monkeypatch.setattr(dissect.meter, "load_checkpoint", load_checkpoint)
    monkeypatch.setattr(data, "open_source", open_source)
    with pytest.raises(LookupError) as asked:
        dissect.main([*words, "--out", str(tmp_path / "out")])
    assert asked.value.args == expected


@pytest.mark.parametrize("config", [
    "meter.yaml", None, ["a"], {"data": {"root": "/data"}}, {"neuron_selective": True}])
def test_the_settings_of_other_programs_are_none_of_ours(config, folder, network, tmp_path):
    torch.save({"model": network.state_dict(), "config": config}, tmp_path / "theirs.pth")
    [found] = dissect.main([str(tmp_path / "theirs.pth"), "--data", str(folder / "rooms.h5"),
                            "--layers", "dec_3", "--out", str(tmp_path / "out")]).values()
    assert found["regularised"] == []


def test_odd_names_of_checkpoints_stand_in_every_figure(folder, tmp_path, monkeypatch):
    labels = {}
    monkeypatch.setattr(dissect, "draw_overview", lambda results, path: labels.update(results))
    paths = [tmp_path / name for name in ("a_$x_$.pt", "one/best.pt", "b/one/best.pt")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "runs" / "cm" / "best.pt", path)
    dissect.main([*map(str, paths), "--layers", "dec_3", "--viz", "--limit", "1",
                  "--out", str(tmp_path / "out")])
    first, second, third = labels
    assert (first, second) == ("a__x__", "one") and third.endswith("b_one_best.pt")
    assert len(list((tmp_path / "out").glob("*_dec_3_units.png"))) == 3


def test_the_overview_figure_names_a_run_that_begins_with_an_underscore(folder, tmp_path):
    (found,), _, _ = run(folder, ["cm"], "--layers", "dec_3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = dissect.draw_overview({"_first": found, "last": found}, tmp_path / "overview.png")
    texts = [text.get_text().strip() for text in figure.axes[1].get_legend().get_texts()]
    assert texts == ["_first", "last"]


# Ablation.

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
    with torch.no_grad():
        whole = torch.cat([network(image) for image, _ in batches(frames)])
    units = torch.arange(7)
    (error,) = dissect.rmse_after(network, frames, layer, [dissect.switch_off(units)], 4)

    edited = METER("xxs").eval()
    edited.load_state_dict(network.state_dict())
    with torch.no_grad():
        for unit in units:
            for weight in read_by(edited, layer, unit):
                weight.zero_()
        literal = torch.cat([edited(image) for image, _ in batches(frames)])
    assert error == pytest.approx(slow_rmse(literal, frames), rel=1e-5)
    assert error != pytest.approx(slow_rmse(whole, frames), rel=1e-4)


@pytest.mark.parametrize("layer", ["enc_0", "enc_2", "enc_5", "enc_6", "enc_output", "dec_0",
                                   "dec_1", "dec_3"])
def test_rmse_after_a_change_equals_a_forward_pass_in_which_a_hook_makes_it(
        network, frames, layer):
    def doubled(x):
        return 2 * x

    changes = [doubled, dissect.switch_off(torch.arange(0, 8, 3)), lambda x: x]
    found = dissect.rmse_after(network, frames, layer, changes, batch_size=4)
    expected, module = [], network.get_submodule(LAYERS[layer])
    for change in changes:
        predictions = []
        for image, _ in batches(frames):
            hook = module.register_forward_hook(lambda m, i, x, f=change: f(x))
            with torch.no_grad():
                predictions.append(network(image))
            hook.remove()
        expected.append(slow_rmse(torch.cat(predictions), frames))
    assert found == pytest.approx(expected, rel=1e-5)
    assert len({round(error, 5) for error in found}) == 3


def test_a_network_computes_as_before_after_layers_were_made_to_answer(network, frames):
    image = batches(frames)[0][0]
    with torch.no_grad():
        before = network(image)
        with dissect.answering(network, {"dec_3": torch.ones(4, 8, 16, 32)}):
            assert not torch.equal(network(image), before)
        with pytest.raises(ZeroDivisionError), dissect.answering(network, {"enc_4": 0, "dec_3": 0}):
            raise ZeroDivisionError
        assert torch.equal(network(image), before)
    assert not any(module._forward_hooks for module in network.modules())


def test_ablation_follows_the_order_of_selectivity(network, frames):
    _, units = dissect.measure(network, frames, ["dec_3"])
    rows = dissect.ablate(network, frames, "dec_3", units["dec_3"])
    with torch.no_grad(), record(network, ["dec_3"]) as features:
        network(torch.cat([image for image, _ in batches(frames)]))
        for name, falling in (("most selective first", True), ("least selective first", False)):
            scores = units["dec_3"]["selectivity"].tolist()
            order = sorted(range(8), key=scores.__getitem__, reverse=falling)
            for n in range(9):
                x = features["dec_3"].clone()
                x[:, order[:n]] = 0
                error = slow_rmse(network.decoder.conv2d_out(x) / 100, frames)
                (row,) = [row for row in rows if row["order"] == name and row["units_off"] == n]
                assert row["rmse_m"] == pytest.approx(error, rel=1e-4)
    assert len({row["order"] for row in rows}) == 2 + 5 and len(rows) == 7 * 9
    assert len({row["rmse_m"] for row in rows if row["units_off"] == 4}) > 5   # orders differ


def test_ablation_writes_its_table_and_a_figure(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    clock = iter(range(10 ** 6))
    monkeypatch.setattr(data.time, "monotonic", lambda: next(clock))  # every batch takes a second
    (result, other), _, out = run(folder, ["cm", "other"], "--layers", "dec_2", "dec_3", "--ablate")
    assert "ablate dec_3" in capsys.readouterr().out
    rows = table(out / "ablation.csv")
    assert list(rows[0]) == ["checkpoint", "layer", "order", "units_off", "rmse_m"]
    assert (out / "ablation.png").stat().st_size > 1000
    for run_, name in ((result, "cm"), (other, "other")):
        for layer, units in (("dec_2", 16), ("dec_3", 8)):
            own = [row for row in rows if (row["checkpoint"], row["layer"]) == (name, layer)]
            assert sorted({int(row["units_off"]) for row in own}) == [
                n * units // 8 for n in range(9)] and len(own) == 7 * 9
            whole = [float(row["rmse_m"]) for row in own if row["units_off"] == "0"]
            assert whole == pytest.approx([run_["rmse_m"]] * 7)

    deeper = {"dec_2": "enc_9", "dec_3": "enc_10"}         # whose names sort otherwise
    typed = [{**row, "layer": deeper[row["layer"]], "units_off": int(row["units_off"]),
              "rmse_m": float(row["rmse_m"])} for row in rows]
    figure = dissect.draw_ablation(typed, folder / "ablation.png")
    assert isinstance(figure, Figure)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["enc_9, cm", "enc_9, other", "enc_10, cm", "enc_10, other"]
    for axis, title in zip(figure.axes, titles):
        layer, name = title.split(", ")
        for colour, order in (("tab:red", "most selective first"),
                              ("tab:blue", "least selective first")):
            (line,) = [line for line in axis.lines if line.get_color() == colour]
            drawn = dict(zip(*line.get_data()))
            assert drawn == {row["units_off"]: row["rmse_m"] for row in typed if (
                row["layer"], row["checkpoint"], row["order"]) == (layer, name, order)}
        assert len(axis.lines) == 7
    assert len(figure.legends[0].get_texts()) == 3
    assert_whole(dissect.draw_ablation([row for row in typed if row["checkpoint"] == "cm"],
                                       folder / "ablation.png"))


# Figures.

def assert_coloured(picture):
    """Some tens of colours or more, in one pixel out of nine."""
    assert len(np.unique(np.asarray(picture.convert("RGB"))[::3, ::3].reshape(-1, 3) @ [
        65536, 256, 1])) > 20


def assert_whole(figure):
    """No text of the figure is cut by its border."""
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    texts = [figure._suptitle, *(text for axis in figure.axes for text in (
        axis.title, axis.xaxis.label, axis.yaxis.label, *axis.texts))]
    for text in texts:
        if text is not None and text.get_text():
            box = text.get_window_extent()
            assert 0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= height, text


@pytest.mark.parametrize("units", [8, 24, 64, 80, 160])
def test_figures_of_units_show_rare_bins_and_dead_units(tmp_path, units):
    random = torch.Generator().manual_seed(0)
    bins = min(units, 64)
    pixels = torch.full((bins,), 1000.0).double()
    pixels[[2, bins - 1]] = torch.tensor([0.0, 2]).double()
    absolute = torch.rand(units, bins, generator=random).double() * pixels
    absolute[:, -1] *= 9
    absolute[[0, 5]] = 0
    r = dissect.describe_units(torch.cat([pixels[None], absolute, absolute]), min_share=0.001)
    figure = dissect.draw_units("run, layer", r, tmp_path / "units.png")
    with Image.open(tmp_path / "units.png") as picture:
        assert_coloured(picture)
    assert isinstance(figure, Figure)
    assert_whole(figure)

    mean = absolute / pixels.clamp(min=1)
    mean[:, -1] = 0                                        # rare
    heights = (mean / mean.amax(1, keepdim=True)).nan_to_num().numpy()
    axis = figure.axes[0]
    assert "run, layer" in axis.get_title()
    if units > 64:
        order = sorted(range(units), key=lambda k: r["peak_m"][k].nan_to_num(99).item())
        drawn = axis.collections[0].get_array().reshape(units, bins)
        heights[:, [2, bins - 1]] = np.nan  # left white
        assert np.allclose(np.ma.filled(drawn, np.nan), heights[order], atol=1e-6, equal_nan=True)
        assert "2 dead" in axis.get_title() and order[-2:] == [0, 5]
        return
    notes = [text.get_text() for text in axis.texts]
    assert notes == [f"unit {k}: dead" if k in (0, 5) else f"unit {k}: {r['selectivity'][k]:.2f}"
                     for k in range(units)]
    steps = [patch.get_data() for patch in axis.patches]
    for unit in range(units):
        (bars, edges, low), (hatched, *_) = steps[2 * unit], steps[2 * unit + 1]
        assert np.allclose(bars - low, heights[unit], atol=1e-6)
        assert np.allclose(hatched - low, [b in (2, bins - 1) for b in range(bins)])
        assert np.allclose(edges - edges[0], slow_edges(bins, False), atol=1e-5)
    assert [bool(patch.get_hatch()) for patch in axis.patches] == [False, True] * units
    marks = [line for line in axis.lines if line.get_color() == "tab:orange"]
    assert np.allclose([line.get_xdata() for line in marks],
                       [edges[k:k + 2] for k, (_, edges, _) in enumerate(steps[::2])])


def test_figures_are_drawn_for_frames_and_for_a_photo(folder, tmp_path):
    Image.new("RGB", (640, 480), 99).save(tmp_path / "hall.png")
    _, _, out = run(folder, ["cm"], "--layers", "dec_3", "--viz", "--images", tmp_path / "hall.png")
    assert {path.name for path in out.glob("*.png")} == {
        "cm_dec_3_units.png", "cm_activations.png", "cm_photos_1.png", "cm_hall_depth.png",
        "overview.png"}
    for path in out.glob("*.png"):
        with Image.open(path) as picture:
            assert_coloured(picture)


def slow_likeness(network, frames, layers, units):
    """|activation|, its mean at each pixel's depth, and their correlation: {(layer, unit): ...}."""
    with torch.no_grad(), record(network, layers) as features:
        network(torch.cat([image for image, _ in batches(frames)]))
    pictures = {}
    for layer in layers:
        activation = F.interpolate(features[layer].abs(), (16, 32), mode="bilinear")
        number = slow_bins(frames.depth[:, 0], len(units[layer]["counted"]))       # -1: none
        for unit, response in enumerate(units[layer]["absolute"].float()):
            usual = response[number.clamp(min=0)] * (number >= 0)
            pairs = zip(activation[:, unit].flatten(1), usual.flatten(1))
            likeness = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs])
            pictures[layer, unit] = activation[:, unit], usual, likeness.nan_to_num()
    return pictures


def test_two_pictures_are_the_answer_and_its_mean_at_that_depth(network, frames):
    network = kill(network, dec_3=[5])
    _, units = dissect.measure(network, frames, ["enc_0", "enc_9", "dec_3"])
    image, depth = frames.fetch(torch.arange(6))
    shown, pictures = dissect.two_pictures(network, image, depth, units)
    assert torch.equal(shown, depth)
    for (layer, unit), parts in slow_likeness(network, frames, list(units), units).items():
        for found, expected in zip(pictures[layer], parts):
            scale = 1e-4 * max(1, expected.abs().max().item())
            torch.testing.assert_close(found[:, unit], expected, rtol=1e-3, atol=scale)

    shown, pictures = dissect.two_pictures(network, image, None, units)
    with torch.no_grad():
        torch.testing.assert_close(shown, network(data.normalise(image / 255)))
    usual = pictures["dec_3"][1][:, 1]
    number = slow_bins(shown[:, 0], 8)
    expected = units["dec_3"]["absolute"][1].float()[number.clamp(min=0)] * (number >= 0)
    torch.testing.assert_close(usual, expected)


@pytest.mark.parametrize("layers", [["enc_2"], ["enc_5", "enc_7"], ["enc_9"], ["dec_1", "dec_3"]])
def test_the_units_drawn_are_those_whose_answer_looks_most_like_its_mean_at_each_depth(
        network, frames, layers):
    _, units = dissect.measure(network, frames, layers)
    chosen, best = dissect.choose_units(network, frames, units)
    pictures, bands = slow_likeness(network, frames, layers, units), {}
    for (layer, unit), (_, _, likeness) in pictures.items():
        peak = units[layer]["peak_m"][unit].item()
        score = likeness.mean() * units[layer]["selectivity"][unit]
        if likeness.mean() >= 0.3 and score > 0:  # the others show nothing
            bands.setdefault((peak > 2) + (peak > 4), []).append((score.item(), layer, unit))
    assert chosen == [max(bands[band])[1:] for band in sorted(bands)]
    if chosen:
        total = sum(pictures[pair][2] for pair in chosen)
        assert best.tolist() == total.argsort(descending=True)[:3].tolist()


@pytest.mark.parametrize("images", [1, 2])
def test_activation_figures_name_the_units_and_show_both_pictures(
        network, frames, tmp_path, images):
    _, units = dissect.measure(network, frames, ["enc_0", "dec_3"])
    chosen = [("dec_3", 2), ("enc_0", 7)]
    image, depth = frames.fetch(torch.arange(images))
    figure = dissect.draw_activations(network, image, depth, units, chosen, tmp_path / "a.png")
    assert isinstance(figure, Figure) and (tmp_path / "a.png").stat().st_size > 1000
    assert_whole(figure)
    _, pictures = dissect.two_pictures(network, image, depth, units)
    axes = np.array([axis for axis in figure.axes if axis.get_label() != "<colorbar>"])
    axes = axes.reshape(3, 2 * images)
    for n in range(images):
        assert np.array_equal(axes[0, 2 * n].images[0].get_array(), image[n].permute(1, 2, 0))
        assert np.array_equal(axes[0, 2 * n + 1].images[0].get_array(), depth[n, 0])
        assert axes[0, 2 * n + 1].get_title() == "true depth"
        for line, (layer, unit) in enumerate(chosen, 1):
            left, right = axes[line, 2 * n:2 * n + 2]
            for axis, picture in zip((left, right), pictures[layer]):
                assert np.array_equal(axis.images[0].get_array(), picture[n, unit])
            peak, likeness = units[layer]["peak_m"][unit], pictures[layer][2][n, unit]
            assert left.get_title() == f"{layer} unit {unit}, peak {peak:.1f} m"
            assert f"r {likeness:.2f}" in right.get_title()


def seen_pages(monkeypatch):
    """Collects what is drawn on each page: {name: (image, depth, chosen)}."""
    pages = {}

    def draw_activations(model, image, depth, units, chosen, path):
        pages[path.name] = image.cpu(), depth, chosen

    monkeypatch.setattr(dissect, "draw_activations", draw_activations)
    return pages


def test_pages_show_units_of_the_regularised_layers_and_every_photo(folder, tmp_path, monkeypatch):
    pages, paths = seen_pages(monkeypatch), []
    for n, (mode, size) in enumerate({"L": (10, 300), "RGBA": (50, 50), "RGB": (640, 480),
                                      "LA": (64, 48)}.items()):
        paths.append(tmp_path / f"{n}.png")
        Image.new("RGB", size, (n, n, n)).convert(mode).save(paths[-1])
    monkeypatch.setattr(dissect, "choose_units", lambda model, frames, units: (
        [(layer, 0) for layer in units], torch.tensor([1])))
    run(folder, ["selective"], "--layers", "enc_9", "dec_3", "--viz", "--images", *paths)
    run(folder, ["other"], "--layers", "enc_9", "dec_3", "--images", paths[0])
    only, both = [("dec_3", 0)], [("enc_9", 0), ("dec_3", 0)]
    assert {name: chosen for name, (_, _, chosen) in pages.items()} == {
        "selective_activations.png": only, "selective_photos_1.png": only,
        "selective_photos_2.png": only, "other_photos_1.png": both, "other_0_depth.png": [],
        **{f"selective_{n}_depth.png": [] for n in range(4)}}
    assert [name for name, (_, depth, _) in pages.items() if depth is not None] == [
        "selective_activations.png"]
    for name, numbers in (("selective_photos_1.png", [0, 1, 2]), ("selective_photos_2.png", [3]),
                          ("selective_2_depth.png", [2])):
        assert pages[name][0][:, 0].float().mean((1, 2)).tolist() == numbers


def test_photos_of_one_name_are_all_shown(folder, tmp_path, monkeypatch):
    pages, paths = seen_pages(monkeypatch), []
    for n, name in enumerate(["a/1.png", "b/1.png", "b/1.jpg"]):
        paths.append(tmp_path / name)
        paths[-1].parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 48), (99 * n, 0, 0)).save(paths[-1])
    run(folder, ["cm"], "--layers", "dec_3", "--images", *paths)
    assert set(pages) == {"cm_photos_1.png", *(
        f"cm_{name}_depth.png" for name in ("1", "1_2", "1_2_2"))}
    assert pages["cm_photos_1.png"][0][:, 0].float().mean((1, 2)).tolist() == [0, 99, 198]


def test_where_no_unit_follows_depth_a_line_says_so_and_depth_is_shown_alone(
        folder, tmp_path, capsys):
    Image.new("RGB", (64, 48), 99).save(tmp_path / "hall.png")
    _, _, out = run(folder, ["silent"], "--layers", "dec_3", "--viz",
                    "--images", tmp_path / "hall.png")
    assert "no unit of dec_3 follows depth" in capsys.readouterr().out
    assert {path.name for path in out.glob("*.png")} == {
        "silent_dec_3_units.png", "silent_activations.png", "silent_photos_1.png",
        "silent_hall_depth.png", "overview.png"}


# Photos.

@pytest.mark.parametrize("size, middle", [((640, 480), None), ((120, 200), (0, 55, 120, 145))])
def test_a_photo_is_cut_to_its_middle_and_resized_as_frames_in_training(
        tmp_path, monkeypatch, size, middle):
    monkeypatch.setattr(data, "SIZE", (192, 256))
    photo = Image.frombytes("RGB", size, np.random.default_rng(0).bytes(3 * size[0] * size[1]))
    photo.save(tmp_path / "photo.png")
    expected = np.asarray(photo.resize((256, 192), Image.BILINEAR, middle))
    assert np.array_equal(dissect.read_photo(tmp_path / "photo.png").permute(1, 2, 0), expected)


TURNS = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270,
         8: Image.Transpose.ROTATE_90, 2: Image.Transpose.FLIP_LEFT_RIGHT}


@pytest.mark.parametrize("orientation", TURNS)
def test_a_photo_is_turned_as_the_camera_was_held(tmp_path, orientation):
    photo = Image.frombytes("RGB", (40, 30), np.random.default_rng(0).bytes(3 * 40 * 30))
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo.save(tmp_path / "held.png", exif=exif)
    photo.transpose(TURNS[orientation]).save(tmp_path / "upright.png")
    held, upright = (dissect.read_photo(tmp_path / f"{x}.png") for x in ("held", "upright"))
    assert torch.equal(held, upright)


def deep_photo(path):
    """A picture in which a pixel is not 8 bits."""
    dtype, suffix = {"grey_16_bit.png": (np.uint16, "PNG"), "float.tiff": (np.float32, "TIFF"),
                     "integer.tiff": (np.int32, "TIFF")}[path.name]
    Image.fromarray(np.full((48, 64), 900, dtype)).save(path, suffix)
    return path


@pytest.mark.parametrize("name", ["grey_16_bit.png", "float.tiff", "integer.tiff"])
def test_photos_of_16_bits_or_floats_are_refused_rather_than_shown_white(folder, tmp_path, name):
    message = refusal(folder / "runs/cm/best.pt", "--images", deep_photo(tmp_path / name))
    assert str(tmp_path / name) in message and "8 bits" in message


def test_what_is_no_photo_in_a_folder_is_skipped_and_counted(folder, tmp_path, monkeypatch, capsys):
    pages = seen_pages(monkeypatch)
    Image.new("RGB", (64, 48), 99).save(tmp_path / "hall.jpg")
    for name in "Thumbs.db", "hall.AAE", ".DS_Store", "cut.png":
        (tmp_path / name).write_bytes(b"no photo")
    (tmp_path / "more").mkdir()
    Image.new("RGB", (64, 48), 99).save(tmp_path / "more" / "deeper.jpg")
    names = ["Thumbs.db", "hall.AAE", ".DS_Store", "cut.png", "more",
             deep_photo(tmp_path / "float.tiff").name]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.jpg")
        names.append("pipe.jpg")
    run(folder, ["cm"], "--layers", "dec_3", "--images", tmp_path)
    assert set(pages) == {"cm_photos_1.png", "cm_hall_depth.png"}
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("--images")]
    assert f"skipped {len(names)} " in line and all(name in line for name in names)


def test_what_cannot_be_a_photo_is_named_with_a_sentence(folder, tmp_path, monkeypatch):
    broken, empty, odd = (tmp_path / name for name in ("broken.png", "empty", "odd"))
    broken.write_bytes(b"no picture")
    empty.mkdir()
    odd.mkdir()
    (odd / "Thumbs.db").write_bytes(b"no picture")
    checkpoint = folder / "runs/cm/best.pt"
    for path in broken, tmp_path / "nowhere.png", empty, odd:
        message = refusal(checkpoint, "--images", path, "--out", tmp_path / "no")
        assert str(path) in message and "--images" in message

    Image.new("RGB", (64, 48), 99).save(tmp_path / "hall.png")
    monkeypatch.chdir(folder)                # BUG: where there is no runs, it asks for a checkpoint
    message = refusal("--images", tmp_path / "hall.png", checkpoint, "--out", tmp_path / "no")
    assert str(checkpoint) in message and "checkpoints" in message

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)    # as 192 megapixels for the real limit
    message = refusal(checkpoint, "--images", tmp_path / "hall.png", "--out", tmp_path / "no")
    assert str(tmp_path / "hall.png") in message and "3072 pixels" in message
    assert not (tmp_path / "no").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in this file system")
def test_a_pipe_instead_of_a_photo_is_not_waited_for(folder, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    writer = os.open(tmp_path / "pipe.png", os.O_RDWR | os.O_NONBLOCK)  # a reader would not hang
    os.write(writer, b"hello" * 999)
    message = refusal(folder / "runs/cm/best.pt", "--images", tmp_path / "pipe.png")
    assert str(tmp_path / "pipe.png") in message and "no such file" in message
    os.close(writer)
