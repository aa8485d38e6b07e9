"""Every source against Pillow, augmentation and metrics by hand, and a table of broken data."""
import base64
import itertools
import json
import math
import os
import shutil

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import data
import train

OFFICIAL_TEST = np.flatnonzero(np.unpackbits(
    np.frombuffer(base64.b64decode(data.TEST_BITS), np.uint8))).tolist()


def pairs_of(root, pool):
    rows = (root / "data" / f"nyu2_{pool}.csv").read_text().split()
    return [[root / cell for cell in row.split(",")] for row in rows]


def by_pillow(pairs, metres_per_level):
    """Images uint8 (N, 3, 192, 256) and depths (N, 1, 48, 64) metres, straight from the files."""
    images = [Image.open(x).convert("RGB").resize((256, 192), Image.BILINEAR) for x, _ in pairs]
    depths = [Image.open(x).resize((64, 48), Image.NEAREST) for _, x in pairs]
    depth = torch.from_numpy(np.stack(depths).astype(np.float32)[:, None]) * metres_per_level
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), depth


def load(path, split="train", feed="host", **options):
    """All frames of a split, in file order: images, depths."""
    source = data.open_source(path, options.pop("raw_depth", False))
    frames = data.Frames(source, split, "cpu", feed, **options)
    data.stop_on_faults(source)
    return next(frames.batches(len(frames)))[1:]


def assert_equal(found, expected):
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_kaggles_folder_its_parent_and_the_packed_file_equal_pillow(nyu, packed):
    train_set = by_pillow(pairs_of(nyu, "train"), 10 / 255)
    test_set = by_pillow(pairs_of(nyu, "test"), 1 / 1000)
    for path, feed in ((nyu, "host"), (nyu.parent, "device"), (packed, "device"), (packed, "file")):
        assert_equal(load(path, "train", feed), [x[:22] for x in train_set])
        assert_equal(load(path, "val", feed), [x[22:] for x in train_set])
        assert_equal(load(path, "test", feed), test_set)
        for split, rows in (("train", slice(19)), ("val", slice(19, 21)), ("test", slice(21, 24))):
            assert_equal(load(path, split, feed, notebook=True), [x[rows] for x in train_set])


@pytest.mark.parametrize("raw_depth", [False, True])
def test_the_labelled_mat_is_transposed_and_split_officially(mat, tmp_path, raw_depth):
    tests = [i for i in OFFICIAL_TEST if i < 40]
    trains = [i for i in range(40) if i not in tests]
    with h5py.File(mat) as file:
        images, depths = file["images"][:], file["rawDepths" if raw_depth else "depths"][:]
    assert raw_depth == (depths == 0).any()
    data.main([str(mat), str(tmp_path / "mat.h5"), *["--raw-depth"] * raw_depth])
    n = len(trains) * 9 // 10 + 1
    for split, numbers in (("train", trains[:n]), ("val", trains[n:]), ("test", tests)):
        upright = [Image.fromarray(images[i].transpose(2, 1, 0)).resize((256, 192), Image.BILINEAR)
                   for i in numbers]
        expected = (torch.from_numpy(np.stack(upright)).permute(0, 3, 1, 2),
                    torch.from_numpy(np.stack([depths[i].T[None] for i in numbers])))
        assert_equal(load(mat, split, raw_depth=raw_depth), expected)
        assert_equal(load(tmp_path / "mat.h5", split), expected)


def test_the_official_test_split_is_that_of_kaggles_file_names():
    assert OFFICIAL_TEST[:5] == [0, 1, 8, 13, 14] and OFFICIAL_TEST[-3:] == [1446, 1447, 1448]
    assert len(OFFICIAL_TEST) == 654 and sum(OFFICIAL_TEST) == 498_184


def test_splits_are_in_file_order_and_do_not_overlap():
    sizes = {"train": 50_688, "test": 654}
    spans = {split: data.split_indices(sizes, split) for split in ("train", "val", "test")}
    assert spans == {"train": ("train", range(45_620)), "val": ("train", range(45_620, 50_688)),
                     "test": ("test", range(654))}
    spans = {split: data.split_indices(sizes, split, notebook=True) for split in spans}
    assert spans == {"train": ("train", range(40_550)), "val": ("train", range(40_550, 45_618)),
                     "test": ("train", range(45_618, 50_688))}


def test_feeds_give_the_same_batches_and_first_skips_without_changing_the_order(nyu, packed):
    order = torch.randperm(22, generator=torch.Generator().manual_seed(0))
    expected = load(nyu)
    for path, feed in ((nyu, "device"), (packed, "host"), (packed, "file")):
        frames = data.Frames(data.open_source(path), "train", "cpu", feed)
        batches = list(frames.batches(4, order))
        assert [len(rows) for rows, _, _ in batches] == [4, 4, 4, 4, 4, 2]
        for rows, image, depth in batches:
            assert_equal((image, depth), [x[rows] for x in expected])
        assert torch.equal(torch.cat([rows for rows, _, _ in batches]), order)
        for found, batch in zip(frames.batches(4, order, first=2), batches[2:], strict=True):
            assert_equal(found, batch)


@pytest.mark.parametrize("known, free, feed", [
    ({"SC_AVPHYS_PAGES": 0, "SC_PHYS_PAGES": 0}, 2.1, "device"),  # need: 22 frames
    ({"SC_PHYS_PAGES": 0}, 1.9, "host"), ({"SC_AVPHYS_PAGES": 0}, 1.4, "file"),
    ({}, 0, "device")])  # as on Windows, which does not say
def test_auto_feeds_from_the_first_place_with_room(packed, monkeypatch, known, free, feed):
    need = 22 * (192 * 256 * 3 + 48 * 64 * 4)
    monkeypatch.setattr(os, "sysconf_names", known)
    monkeypatch.setattr(os, "sysconf", lambda key: 1 if key == "SC_PAGE_SIZE" else free * need)
    assert data.Frames(data.open_source(packed), "train", "cpu").feed == feed


def test_limit_spreads_frames_over_the_split(packed):
    whole = load(packed)
    for limit, rows in ((5, [0, 4, 8, 13, 17]), (20, [*range(10), *range(11, 21)])):
        assert_equal(load(packed, limit=limit), [x[rows] for x in whole])
    assert_equal(load(packed, limit=23), whole)


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA"])
def test_other_colours_and_sizes_are_read(nyu, tmp_path, mode):
    root = shutil.copytree(nyu, tmp_path / "nyu_data")
    image, depth = pairs_of(root, "train")[3]
    colours = Image.open(image).resize((80, 60)).convert(mode)
    colours.save(image, format="PNG")
    Image.open(depth).resize((80, 60), Image.NEAREST).save(depth)
    found, expected = load(root), by_pillow(pairs_of(root, "train")[:22], 10 / 255)
    assert_equal(found, expected)
    grey = (found[0][3] == found[0][3, :1]).all()
    assert grey == (mode in ("L", "LA"))


def test_a_room_depends_on_its_number_and_seed_alone():
    numbers = torch.arange(6)
    image, depth = data.make_rooms(numbers)
    assert_equal(data.make_rooms(numbers), (image, depth))
    assert_equal(data.make_rooms(torch.tensor([4, 1])), [x[[4, 1]] for x in (image, depth)])
    others = data.make_rooms(numbers, seed=1)[1], data.make_rooms(numbers + 10 ** 9)[1]
    assert all((depth != other).flatten(1).any(1).all() for other in others)


def test_the_splits_of_rooms_differ(monkeypatch, nyu):
    source = data.open_source(None, rooms=20)
    assert source.sizes == {"train": 20, "test": 4}
    images, depths = source.frames("train", range(4))
    test_images, test_depths = source.frames("test", range(4))
    assert images.shape == (4, 192, 256, 3) and images.dtype == torch.uint8
    assert (images != test_images).any() and (depths != test_depths).any()
    monkeypatch.setattr(data, "KAGGLE_MOUNT", nyu)
    assert data.open_source(None).sizes == {"train": 24, "test": 8}


def test_rooms_are_flat_faced_and_as_deep_as_nyu():
    parts = [data.make_rooms(part) for part in torch.arange(60).split(15)]
    image, depth = map(torch.cat, zip(*parts))
    assert depth.isfinite().all() and 0.5 <= depth.min() and depth.max() <= 10
    assert 1.8 < depth.median() < 3.5 and 40 < image.float().mean() < 200
    # On a plane 1 / z is affine in the pixel's row and column, so its second differences vanish.
    for axis in (2, 3):
        bend = (1 / depth.double()).diff(n=2, dim=axis).abs()
        assert 0.7 < (bend < 1e-5).float().mean() < 0.999


def test_depth_in_rooms_is_that_of_the_pixel_which_pillow_takes_for_four():
    image, depth = map(torch.cat, zip(*map(data.make_rooms, torch.arange(30).split(15))))
    image = image.float().mean(1)
    for grey, z in ((image, depth[:, 0]), (image.mT, depth[:, 0].mT)):  # along rows, then columns
        change = grey[:, 2::4].diff().abs()[..., 2:-1].unfold(2, 4, 4)  # 4c+2 .. 4c+6 of each row
        jump = z.log().diff().abs() > 0.4  # from depth c to c + 1
        assert (change[jump].mean(0) > 2 * change[~jump].mean()).all()


def crafted_draws(frames, **values):
    """Draws that change nothing, except those given as d<column>=value."""
    draws = torch.full((frames, data.DRAWS[1]), 1 - 2 ** -24)
    for key, value in values.items():
        draws[:, int(key[1:])] = value
    return draws


@pytest.fixture
def frames():
    torch.manual_seed(0)
    depth = torch.rand(3, 1, 48, 64) * 9 + 0.05
    depth[:, :, ::5, ::3] = 0
    return torch.rand(3, 3, 192, 256), depth


def test_augment_changes_nothing_when_every_draw_is_one_half_or_more(frames):
    assert_equal(data.augment(*frames, crafted_draws(3)), frames)
    assert_equal(data.augment(*frames, torch.full((3, data.DRAWS[1]), 0.5)), frames)


def test_augment_mirrors_image_and_depth_together_and_frame_by_frame(frames):
    draws = crafted_draws(3)
    draws[1, 0] = 0.49
    expected = [x.clone() for x in frames]
    for x in expected:
        x[1] = torch.from_numpy(np.asarray(x[1])[:, :, ::-1].copy())
    assert_equal(data.augment(*frames, draws), expected)


def test_augment_swaps_channels_in_each_of_the_six_orders_and_repeats_none(frames):
    image, depth = frames
    found = set()
    for number in range(6):
        draws = crafted_draws(3, d1=0, d4=(number + 0.5) / 6)
        swapped, same_depth = data.augment(image, depth, draws)
        found |= {order for order in itertools.permutations(range(3))
                  if torch.equal(swapped, image[:, order])}
        assert torch.equal(same_depth, depth)
    assert len(found) == 6


@pytest.mark.parametrize("low, high", [(0, 0.999), (0.25, 0.6)])
def test_augment_applies_gamma_to_0_to_1_and_stays_there(frames, low, high):
    image, depth = frames
    draws = crafted_draws(3, d2=0, d5=high, d6=low, d7=low, d8=0.5, d9=high)
    recoloured, same_depth = data.augment(image, depth, draws)
    b, g, e = 0.9 + 0.2 * high, 0.9 + 0.2 * low, [0.9 + 0.2 * x for x in (low, 0.5, high)]
    expected = torch.stack([(b * image[:, c] ** g * e[c]).clamp(0, 1) for c in range(3)], 1)
    torch.testing.assert_close(recoloured, expected)
    assert torch.equal(same_depth, depth) and recoloured.max() <= 1


@pytest.mark.parametrize("draw, metres", [(0, -0.1), (0.75, 0.05), (0.999, 0.0998)])
def test_augment_shifts_measured_depth_by_at_most_10_cm(frames, draw, metres):
    image, depth = frames
    same_image, moved = data.augment(image, depth, crafted_draws(3, d3=0, d10=draw))
    expected = torch.where(depth == 0, 0, (depth + metres).clamp(min=1e-3))
    torch.testing.assert_close(moved, expected)
    assert torch.equal(same_image, image) and torch.equal(moved == 0, depth == 0)


def test_augment_zooms_into_a_corner_and_divides_depth_by_the_enlargement(frames):
    corners = [(0, 0), (1, 0), (1, 1)]                 # x, y; half of width and height is kept
    draws = crafted_draws(3, d11=0.49, d12=1)
    draws[:, 13:] = torch.tensor(corners)
    zoomed = data.augment(*frames, draws, 2.0)
    for n, (x, y) in enumerate(corners):
        own = [part[n].numpy() for part in frames]
        image, depth = ([plane[y * h // 2:(y + 1) * h // 2, x * w // 2:(x + 1) * w // 2]
                         for plane in part] for part, (h, w) in zip(own, [(192, 256), (48, 64)]))
        expected = depth[0].repeat(2, 0).repeat(2, 1) / 2
        np.testing.assert_allclose(zoomed[1][n, 0], expected, rtol=1e-6)
        for c in range(3):                             # without the edge, where Pillow sees no more
            large = Image.fromarray(image[c]).resize((256, 192), Image.Resampling.BILINEAR)
            np.testing.assert_allclose(
                zoomed[0][n, c, 1:-1, 1:-1], np.asarray(large)[1:-1, 1:-1], atol=1e-5)


def test_augment_zooms_half_of_the_frames_by_up_to_the_largest_enlargement(frames):
    draws = torch.stack([crafted_draws(1, d11=0.5, d12=1)[0], crafted_draws(1, d11=0, d12=0.6)[0],
                         crafted_draws(1, d11=0, d12=1)[0]])
    image, depth = frames
    depth = torch.full_like(depth, 3.0)
    _, zoomed = data.augment(image, depth, draws, 1.5)
    assert zoomed.amax((1, 2, 3)).tolist() == pytest.approx([3, 3 / 1.3, 2])
    assert zoomed.amin((1, 2, 3)).tolist() == pytest.approx([3, 3 / 1.3, 2])
    assert_equal(data.augment(image, depth, draws), (image, depth))    # without a zoom


def test_normalise_is_torchvisions_formula():
    image = torch.rand(2, 3, 4, 5)
    slow = torch.stack([(image[:, c] - mean) / std for c, (mean, std) in enumerate(
        [(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)])], dim=1)
    torch.testing.assert_close(data.normalise(image), slow)


def test_depth_metrics_match_a_loop_over_pixels():
    random = np.random.default_rng(0)
    depth = random.choice([0, 5e-4, 0.5, 1, 2, 4, 9.99, 10, 12], (3, 1, 6, 8)).astype(np.float32)
    guess = depth * random.uniform(0.4, 2.2, depth.shape) + random.normal(0, 0.5, depth.shape)
    depth[2] = 0
    found = data.depth_metrics(torch.from_numpy(guess).float(), torch.from_numpy(depth))
    for n in range(2):
        both = zip(guess[n].flat, depth[n].flat, strict=True)
        pixels = [(min(max(float(p), 1e-3), 10), float(d)) for p, d in both if 1e-3 < d < 10]
        slow = {"rmse_m": math.sqrt(np.mean([(p - d) ** 2 for p, d in pixels])),
                "rel": np.mean([abs(p - d) / d for p, d in pixels]),
                "log10": np.mean([abs(math.log10(p) - math.log10(d)) for p, d in pixels])}
        for i in (1, 2, 3):
            slow[f"delta{i}"] = np.mean([max(p / d, d / p) < 1.25 ** i for p, d in pixels])
        assert {key: x[n].item() for key, x in found.items()} == pytest.approx(slow, rel=1e-5)
    assert all(x[2].isnan() for x in found.values())


def test_write_replaces_a_file_in_one_step_or_leaves_it(tmp_path, monkeypatch):
    path = tmp_path / "new" / "x.json"
    data.write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError):
        data.write(path, lambda file: file.write_bytes(b"half") / 0)
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(data.os, "replace", full)
    with pytest.raises(SystemExit, match=f"error: .*{path}.*No space left"):
        data.write_json(path, {"a": 2})
    assert list(path.parent.iterdir()) == [path] and json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize("folder", ["file", "file/folder"])
def test_an_output_folder_that_cannot_be_made_ends_with_a_sentence(tmp_path, folder):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=f"error: .*{tmp_path / folder}"):
        data.check_folder(tmp_path / folder)
    with pytest.raises(SystemExit, match=f"error: .*{tmp_path / folder}"):
        data.write_json(tmp_path / folder / "x.json", {})


def save(mode, size, colour=99, **options):
    return lambda path: Image.new(mode, size, colour).save(path, **options)


def keep(share):
    """Cuts a file short."""
    return lambda path: path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])


def put(depths, value):
    depths[3, 5, 5] = value


def put_format(file, text):
    file.attrs["format"] = text


def edit(change):
    """Changes an HDF5 file in place."""
    def apply(path):
        with h5py.File(path, "r+") as file:
            change(file)
    return apply


CSV, TEST_CSV = "nyu_data/data/nyu2_train.csv", "nyu_data/data/nyu2_test.csv"
JPG, PNG = (f"nyu_data/data/nyu2_train/scene_0001_out/2.{x}" for x in ("jpg", "png"))
MM = "nyu_data/data/nyu2_test/00003_depth.png"
S = (160, 120)
FAULTS = {  # what is broken (--data is its first folder, or itself); how; what the message says
    "missing folder": ("nyu_data", shutil.rmtree, "does not exist"),
    "missing CSV": (CSV, lambda path: path.unlink(), "does not exist"),
    "missing test CSV": (TEST_CSV, lambda path: path.unlink(), "does not exist"),
    "row with one column": (CSV, lambda path: path.write_text("data/x.jpg\n"), "data/x.jpg"),
    "empty CSV": (CSV, lambda path: path.write_text(""), ""),
    "empty test CSV": (TEST_CSV, lambda path: path.write_text(""), ""),
    "missing image": (JPG, lambda path: path.unlink(), "No such file"),
    "truncated JPEG": (JPG, keep(0.5), "truncated"),
    "truncated depth": (PNG, keep(0.5), "truncated"),
    "zero-byte PNG": (PNG, keep(0), "cannot identify"),
    "CMYK JPEG": (JPG, save("CMYK", S, (9, 9, 9, 9)), "CMYK"),
    "wrong aspect": (JPG, lambda path: (save("RGB", (160, 100))(path),
                                        save("L", (160, 100))(path.with_suffix(".png"))), "4:3"),
    "16-bit training depth": (PNG, save("I;16", S), "8-bit"),
    "8-bit test depth": (MM, save("L", S), "16-bit"),
    "RGB depth": (PNG, save("RGB", S), "RGB"),
    "depth of nothing": (MM, save("I;16", S, 0), "depth"),
    "depth of another size": (PNG, save("L", (80, 60)), "(80, 60)"),
    ".mat not HDF5": ("x.mat", lambda path: path.write_text("MATLAB 5.0"), "HDF5"),
    ".mat cut short": ("x.mat", keep(0.5), "HDF5"),
    ".mat without depths": ("x.mat", edit(lambda file: file.pop("depths")), "depths"),
    ".mat with nan": ("x.mat", edit(lambda file: put(file["depths"], math.nan)), "frame 3:"),
    ".mat in mm": ("x.mat", edit(lambda file: put(file["depths"], 2000)), "frame 3:"),
    ".h5 not ours": ("x.h5", edit(lambda file: file.attrs.pop("format")), "packed"),
    ".h5 of another version": ("x.h5", edit(lambda file: put_format(file, "frames 99")), "99"),
    ".h5 cut short": ("x.h5", keep(0.5), "HDF5"),
    ".zip": ("x.zip", lambda path: path.write_bytes(b"PK"), ".zip")}


def refuse(source, script, work):
    """The message with which a script ends, having left nothing behind."""
    (work / "out").mkdir()
    path = work / "out" / ("x.h5" if script is data else "run")
    flags = ["", ""] if script is data else ["--data", "--out"]
    with pytest.raises(SystemExit) as stopped:
        script.main([word for word in (flags[0], str(source), flags[1], str(path)) if word])
    assert not list((work / "out").iterdir())
    assert str(stopped.value.code).startswith("error: ")
    return stopped.value.code


@pytest.mark.parametrize("script", [data, train], ids=["data", "train"])
@pytest.mark.parametrize("fault", FAULTS)
def test_broken_data_ends_with_a_sentence_that_names_the_file(request, tmp_path, fault, script):
    broken, how, words = FAULTS[fault]
    source = tmp_path / broken.split("/")[0]
    if source.name == "nyu_data":
        shutil.copytree(request.getfixturevalue("nyu"), source)
    elif source.suffix in (".mat", ".h5"):
        original = {".mat": "mat", ".h5": "packed"}[source.suffix]
        shutil.copy(request.getfixturevalue(original), source)
    how(tmp_path / broken)
    message = refuse(source, script, tmp_path)
    assert str(tmp_path / broken) in message and words in message
    assert "cannot write" not in message


@pytest.mark.parametrize("script", [data, train], ids=["data", "train"])
def test_all_broken_frames_are_counted_and_the_first_twenty_listed(nyu, tmp_path, script):
    root = shutil.copytree(nyu, tmp_path / "nyu_data")
    broken = [image for image, _ in [*pairs_of(root, "train"), *pairs_of(root, "test")][:25]]
    for image in broken:
        keep(0.3)(image)
    message = refuse(root, script, tmp_path)
    listed = [image for image in broken if f"'{image}'," in message]
    assert "25 " in message.splitlines()[0] and len(listed) == 20


def test_streaming_from_a_folder_does_not_pass_over_broken_frames(nyu, tmp_path):
    root = shutil.copytree(nyu, tmp_path / "nyu_data")
    keep(0.3)(pairs_of(root, "train")[5][0])
    with pytest.raises(SystemExit, match="error: "):
        train.main(["--data", str(root), "--feed", "file", "--epochs", "1",
                    "--out", str(tmp_path / "run")])
