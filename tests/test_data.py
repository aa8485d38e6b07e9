"""Every source against Pillow, augmentation and metrics by hand, and tables of broken data."""
import base64
import fcntl
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import data
import dissect
import model
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


def load_frames(path, split="train", raw_depth=False, rooms=None, **options):
    source = data.open_source(path, raw_depth, rooms)
    frames = data.Frames(source, split, "cpu", **options)
    data.stop_on_faults(source)
    return frames


def load(path, split="train", **options):
    """All frames of a split, in file order: images, depths."""
    frames = load_frames(path, split, **options)
    return frames.fetch(torch.arange(len(frames)))


def assert_equal(found, expected):
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def few(nyu, tmp_path_factory):
    """Of Kaggle's folder 12 pairs to train, in two scenes, and 4 to test, all of them small."""
    root = tmp_path_factory.mktemp("few") / "nyu_data"
    for pool, rows in ("train", slice(9, 21)), ("test", slice(1, 5)):
        for path in itertools.chain(*pairs_of(nyu, pool)[rows]):
            (root / path.relative_to(nyu)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / path.relative_to(nyu))
        name = f"data/nyu2_{pool}.csv"
        (root / name).write_text("\n".join((nyu / name).read_text().split()[rows]) + "\n")
    return root


@pytest.fixture
def root(few, tmp_path):
    """A copy of that, to be changed."""
    return shutil.copytree(few, tmp_path / "nyu_data")


def shorten(root, rows):
    """Leaves in both CSVs at most so many rows."""
    for path in (root / "data").glob("*.csv"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:rows]))


# Sources and splits.

def test_kaggles_folder_and_the_packed_file_equal_pillow(nyu, packed):
    train_set = by_pillow(pairs_of(nyu, "train"), 10 / 255)
    test_set = by_pillow(pairs_of(nyu, "test"), 1 / 1000)
    for path in nyu, packed:
        assert_equal(load(path, "train"), [x[:22] for x in train_set])
        assert_equal(load(path, "val"), [x[22:] for x in train_set])
        assert_equal(load(path, "test"), test_set)
        for split, rows in (("train", slice(19)), ("val", slice(19, 21)), ("test", slice(21, 24))):
            assert_equal(load(path, split, notebook=True), [x[rows] for x in train_set])


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


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA"])
def test_a_mat_of_other_colours_is_packed_as_rgb(mode, mat, tmp_path):
    path = Path(shutil.copy(mat, tmp_path / "other.mat"))
    with h5py.File(path, "r+") as file:
        images = file["images"][:]
        pictures = [Image.fromarray(image.T).convert(mode) for image in images]
        del file["images"]
        file["images"] = np.stack([np.asarray(picture).T for picture in pictures])
    data.main([str(path), str(tmp_path / "packed.h5")])
    expected = np.asarray(pictures[0].convert("RGB").resize((256, 192), Image.BILINEAR))
    image, _ = load(tmp_path / "packed.h5", "test")  # frame 0 is the first of the test
    assert np.array_equal(image[0].permute(1, 2, 0), expected)


def test_a_mat_of_more_frames_than_the_official_one_loses_none(mat):
    with h5py.File(mat) as file:
        image = file["images"]
        more = mock.Mock(wraps=image, __len__=lambda _: 1500)
        with mock.patch.object(data, "dataset", lambda *_: more):
            source = data.LabeledMat(mat, file, False)
    assert [len(names) for names in source.names.values()] == [846, 654]


def test_the_official_test_split_is_that_of_kaggles_file_names():
    assert OFFICIAL_TEST[:5] == [0, 1, 8, 13, 14] and OFFICIAL_TEST[-3:] == [1446, 1447, 1448]
    assert len(OFFICIAL_TEST) == 654 and sum(OFFICIAL_TEST) == 498_184


def test_splits_are_in_file_order_and_do_not_overlap():
    splits = "train", "val", "test"
    assert [data.split_indices(50_688, split) for split in splits] == [
        range(45_620), range(45_620, 50_688), range(50_688)]  # test: of its own pool
    assert [data.split_indices(50_688, split, notebook=True) for split in splits] == [
        range(40_550), range(40_550, 45_618), range(45_618, 50_688)]


@pytest.mark.parametrize("kind", ["nyu", "packed"])
def test_batches_hold_every_frame_once_in_the_order_asked_for(request, kind):
    path = request.getfixturevalue(kind)
    order = torch.randperm(22, generator=torch.Generator().manual_seed(0))
    expected, frames = load(path), load_frames(path)
    batches = list(frames.batches(4, order))
    assert [len(image) for image, _ in batches] == [4, 4, 4, 4, 3, 3]
    assert_equal(map(torch.cat, zip(*batches)), [x[order] for x in expected])
    assert_equal(map(torch.cat, zip(*frames.batches(5))), expected)


def test_limit_spreads_frames_over_the_split(nyu, packed):
    for path in nyu, packed:
        whole = load(path)
        for limit, rows in ((5, [0, 4, 8, 13, 17]), (20, [*range(10), *range(11, 21)])):
            assert_equal(load(path, limit=limit), [x[rows] for x in whole])
        assert_equal(load(path, limit=23), whole)


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA"])
def test_other_colours_and_sizes_are_read(root, mode):
    image, depth = pairs_of(root, "train")[3]
    colours = Image.open(image).resize((80, 60)).convert(mode)
    colours.save(image, format="PNG")
    Image.open(depth).resize((80, 60), Image.NEAREST).save(depth)
    found, expected = load(root), by_pillow(pairs_of(root, "train")[:11], 10 / 255)
    assert_equal(found, expected)
    grey = (found[0][3] == found[0][3, :1]).all()
    assert grey == (mode in ("L", "LA"))


def test_a_frame_is_not_turned_as_its_exif_says_for_its_depth_is_not(root):
    image, _ = pairs_of(root, "train")[3]
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.open(image).save(image, exif=exif)
    assert Image.open(image).getexif()[0x0112] == 3
    assert_equal(load(root), by_pillow(pairs_of(root, "train")[:11], 10 / 255))


def test_an_image_must_not_hold_levels_that_pillow_would_clip(root):
    image, _ = pairs_of(root, "train")[3]
    for mode, colour in (("I;16", 3000), ("I", 70_000), ("F", 0.5), ("1", 1), ("CMYK", (9,) * 4)):
        Image.new(mode, (160, 120), colour).save(image, format="TIFF")
        with pytest.raises(data.UserError, match=f"{image}.*mode {mode}"):
            load(root)


@pytest.mark.parametrize("metres, fine", [(99.5, True), (100.5, False)])
def test_depth_up_to_100_m_is_taken_for_metres(mat, tmp_path, metres, fine):
    path = shutil.copy(mat, tmp_path / "x.mat")
    edit(lambda file: put(file["depths"], metres))(path)
    if fine:
        assert load(path)[1].max() == metres  # frame 3 is of the training pool
    else:
        with pytest.raises(data.UserError, match="frame 3: .* 100 m"):
            load(path)


# A packed file is mapped.

def place_of(path, name):
    with h5py.File(path) as file:
        return file[name].id.get_offset()


def test_packed_frames_are_read_from_the_file_when_they_are_used(packed, tmp_path):
    path = shutil.copy(packed, tmp_path / "x.h5")
    frames = load_frames(path)
    with open(path, "r+b") as file:
        file.seek(place_of(path, "train/image") + 5 * 192 * 256 * 3)
        value = file.read(1)[0] ^ 255
        file.seek(-1, 1)
        file.write(bytes([value]))
    assert frames.fetch(torch.tensor([5]))[0][0, 0, 0, 0] == value


def test_a_packed_file_larger_than_memory_opens_at_once(tmp_path):
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    n = 2 * memory // (192 * 256 * 3)
    with h5py.File(tmp_path / "x.h5", "w") as file:  # a file with a hole, small on the disk
        file.attrs.update(format=data.PACKED, mirror_shift=0)
        for pool, count in (("train", n), ("test", 1)):
            for name, *shape in (("image", 192, 256, 3), ("depth", 1, 48, 64)):
                kind = "u1" if name == "image" else "<f4"
                array = file.create_dataset(f"{pool}/{name}", (count, *shape), kind)
                array[0], array[-1] = np.full(shape, 1), np.full(shape, 2)
    source = data.open_source(tmp_path / "x.h5")
    image, depth = source.load("train", [0, n - 1])
    assert image.flatten(1).unique(dim=1).tolist() == [[1], [2]]
    assert depth.flatten(1).unique(dim=1).tolist() == [[1], [2]]


# Rooms.

@pytest.fixture(scope="module")
def rooms():
    """Thirty of them: images uint8, depths."""
    return [torch.cat(part) for part in zip(*map(data.make_rooms, torch.arange(30).split(15)))]


def test_a_room_depends_on_its_number_alone(rooms):
    numbers = torch.arange(6)
    image, depth = data.make_rooms(numbers)
    assert_equal(data.make_rooms(numbers), (image, depth))
    assert_equal(data.make_rooms(torch.tensor([4, 1])), [x[[4, 1]] for x in (image, depth)])
    other = data.make_rooms(numbers + 10 ** 9)[1]
    assert (depth != other).flatten(1).any(1).all()
    for part in rooms:
        assert len(part.flatten(1).unique(dim=0)) == 30


def test_the_lamp_lights_the_floor_by_angle_and_distance():
    def draw(table):  # the middle of each range, (1, ranges, rows); floor and walls of one shade
        columns = torch.tensor(np.loadtxt(table.splitlines(), np.float32, ndmin=2).T)
        middle = (columns[::2] + columns[1::2]) / 2
        if len(middle) == 8:  # PAINT
            middle[4] = 0
        return middle[None]

    room = torch.tensor([2, 1.3, 3])[:, None]                            # half its size
    point = room * torch.empty(3, 50).uniform_(-0.9, 0.9)
    point[1] = -1.3                                                      # on the floor
    found = data.shade(point[None], torch.zeros(1, 1, 50, dtype=torch.long), room[None],
                       room[None], torch.zeros(1, 3, 1), draw)
    way = torch.tensor([[0], [0.75], [0]]) * room - point                # to the lamp
    cosine = torch.cosine_similarity(torch.tensor([[0.0], [1], [0]]), way, dim=0)
    light = 0.35 + 1.25 * cosine / (1 + way.norm(dim=0) ** 2 / 6)
    plain = (0.25 * torch.tensor([[1.1], [1], [0.9]]) * light).sqrt()
    noise = data.hashed(data.hashed(torch.arange(50)) * 78.233 + 49.5)
    torch.testing.assert_close(found[0], plain + 0.03 * noise)


def test_the_splits_of_rooms_differ():
    for rooms in 1000, 20:  # as many to test as to train, at most 400
        source = data.open_source(None, rooms=rooms)
        pools = [len(source.names[pool]) for pool in data.POOLS]
        assert source.rooms == rooms and pools == [rooms, min(rooms, 400)]
    images, depths = source.load("train", range(4))
    test_images, test_depths = source.load("test", range(4))
    assert images.shape == (4, 192, 256, 3) and images.dtype == torch.uint8
    assert (images != test_images).any() and (depths != test_depths).any()
    assert_equal(source.load("train", [3, 1]), [x[[3, 1]] for x in (images, depths)])


def test_rooms_are_flat_faced_and_as_deep_as_nyu(rooms):
    image, depth = rooms
    assert depth.isfinite().all() and 0.5 <= depth.min() and depth.max() <= 10
    assert 1.8 < depth.median() < 3.5 and 40 < image.float().mean() < 200
    # On a plane 1 / z is affine in the pixel's row and column, so its second differences vanish.
    for axis in (2, 3):
        bend = (1 / depth.double()).diff(n=2, dim=axis).abs()
        assert 0.7 < (bend < 1e-5).float().mean() < 0.999


def test_the_faces_of_a_room_are_at_right_angles_for_a_kinect_and_at_most_3_m_high(rooms):
    z = rooms[1][:, 0].double()                                     # (30, 48, 64)
    focal = 519 / 640 * 256
    v, u = torch.meshgrid(torch.arange(2, 192, 4) - 95.5, torch.arange(2, 256, 4) - 127.5,
                          indexing="ij")                            # the pixels that have a depth
    point = torch.stack([z * u / focal, z * v / focal, z], 3)
    right, down = point.diff(dim=2)[:, :-1], point.diff(dim=1)[:, :, :-1]
    normal = torch.linalg.cross(right, down)
    normal = normal / normal.norm(dim=3, keepdim=True)
    along, across = ((1 / z).diff(n=2, dim=axis).abs() < 1e-6 for axis in (2, 1))
    flat = along[:, :46] & along[:, 1:47] & across[..., :62] & across[..., 1:63]
    for own, room, points in zip(normal[:, :46, :62], flat, point):
        own = own[room][::7]                                        # one in seven is enough
        cosine = (own @ own.T).abs()
        assert torch.minimum(cosine, (1 - cosine).abs()).max() < 1e-3
        upright = own[own[:, 1].abs().argmax()]                     # of a floor, ceiling or top
        heights = points @ upright
        assert upright[1].abs() < 0.8 or heights.max() - heights.min() < 3.001


def nearness(image, depth):
    """How much more an image changes at edges of depth, at each of the four pixels of a cell."""
    found = []
    image = image.float().mean(1)
    for grey, z in ((image, depth[:, 0]), (image.mT, depth[:, 0].mT)):  # along rows, then columns
        change = grey[:, 2::4].diff().abs()[..., 2:-1].unfold(2, 4, 4)  # 4c+2 .. 4c+6 of each row
        jump = z.log().diff().abs() > 0.4                               # from depth c to c + 1
        found.append(change[jump].mean(0) / change[~jump].mean())
    return torch.stack(found)


def test_depth_in_rooms_is_that_of_the_pixel_which_pillow_takes_for_four(rooms):
    assert (nearness(*rooms) > 2).all()


# Augmentation.

def crafted_draws(frames, **values):
    """Draws that change nothing, except those given as d<column>=value."""
    draws = torch.full((frames, data.DRAWS), 1 - 2 ** -24)
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
    assert_equal(data.augment(*frames, torch.full((3, data.DRAWS), 0.5)), frames)


def test_augment_mirrors_image_and_depth_together_and_frame_by_frame(frames):
    draws = crafted_draws(3)
    draws[1, 0] = 0.49
    for shift in 0, 1, 2:
        image, depth = (x.numpy().copy() for x in frames)
        backwards = image[1, :, :, ::-1].copy()
        image[1, :, :, shift:] = backwards[:, :, :256 - shift]
        image[1, :, :, :shift] = backwards[:, :, :1]  # the edge, as nothing is seen beyond it
        depth[1] = depth[1, :, :, ::-1].copy()
        found = data.augment(*frames, draws, shift)
        assert_equal(found, map(torch.from_numpy, (image, depth)))
    assert_equal(data.augment(*frames, draws), data.augment(*frames, draws, 1))


def write_levels(root, size):
    """Frames in which each pixel's grey level is its depth: ramps and edges, no two frames same."""
    random = np.random.default_rng(2)
    for pair in pairs_of(root, "train"):
        levels = np.repeat(random.integers(10, 250, (size[1], size[0] // 4 + 1)), 4, 1)
        levels = levels[:, random.integers(4):][:, :size[0]].astype(np.uint8)
        for path in pair:
            Image.fromarray(levels).save(path, format="PNG")


def test_a_mirrored_frame_of_256_pixels_shows_each_depth_at_its_pixel(root, tmp_path):
    shorten(root, 8)
    write_levels(root, (256, 192))
    data.main([str(root), str(tmp_path / "x.h5")])
    for path in root, tmp_path / "x.h5":
        frames = load_frames(path)
        assert frames.mirror_shift == 1
        image, depth = frames.fetch(torch.arange(8))
        draws = crafted_draws(8, d0=0)
        mirrored, flipped = data.augment(image / 255, depth, draws, frames.mirror_shift)
        for x, z in ((image / 255, depth), (mirrored, flipped)):
            assert (10 * x[:, :1, 2::4, 2::4] - z).abs().max() < 1e-6
        assert not torch.equal(depth, flipped)


@pytest.mark.parametrize("width, shift", [
    (640, 0), (256, 1), (128, 2), (64, 0), (320, 0), (512, 0), (1280, 0), (224, 0), (304, 0),
    (160, 0)])
def test_the_mirror_image_moves_by_as_much_as_nearest_sampling_is_off(width, shift):
    place = Image.fromarray(np.arange(width, dtype=np.int32)[None])
    column = np.asarray(place.resize((64, 1), Image.NEAREST))[0]    # taken for each cell
    middle = (column + 0.5) / width * 256
    mirrored = (width - column[::-1] - 0.5) / width * 256
    assert round((middle - mirrored).mean()) == data.mirror_shift(width) == shift


@pytest.mark.parametrize("width", [640, 256])
def test_a_source_knows_how_far_its_mirror_image_moves(root, tmp_path, width):
    shorten(root, 3)
    write_levels(root, (width, width * 3 // 4))
    data.main([str(root), str(tmp_path / "x.h5")])
    for path in root, tmp_path / "x.h5":
        assert load_frames(path).mirror_shift == (width == 256)


def test_mirrored_rooms_keep_depth_at_its_pixel(rooms):
    frames = load_frames(None, rooms=10)
    draws = crafted_draws(30, d0=0)
    image, depth = data.augment(rooms[0] / 255, rooms[1], draws, frames.mirror_shift)
    assert (nearness(image, depth) > 2).all()


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


def test_normalise_is_torchvisions_formula():
    image = torch.rand(2, 3, 4, 5)
    slow = torch.stack([(image[:, c] - mean) / std for c, (mean, std) in enumerate(
        [(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)])], dim=1)
    torch.testing.assert_close(data.normalise(image), slow)


# Metrics.

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


def test_mean_metrics_are_means_over_images_and_leave_out_what_was_not_measured():
    rows = [{"a": torch.tensor([1.0, math.nan, 3.0])}, {"a": torch.tensor([8.0])}]
    assert data.mean_metrics(rows) == {"a": 4.0}
    with pytest.raises(data.UserError, match="nan"):
        data.mean_metrics([{"a": torch.tensor([math.nan])}])  # nothing was measured


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_prediction_that_is_not_finite_makes_the_metrics_fail(value):
    depth = torch.full((3, 1, 4, 4), 2.0)
    prediction = depth.clone()
    prediction[1, 0, 2, 3] = value
    metrics = data.depth_metrics(prediction, depth)
    assert metrics["rmse_m"].tolist() == [0, math.inf, 0]
    with pytest.raises(data.UserError, match="rmse_m|nan or infinity"):
        data.mean_metrics([metrics])
    depth[1, 0, 2, 3] = 0  # where nothing was measured it is no matter
    assert data.mean_metrics([data.depth_metrics(prediction, depth)])["rmse_m"] == 0


# What is said of the frames, and how they are told from others.

def test_a_line_says_what_depth_a_split_holds(mat, capsys):
    for raw_depth in False, True:
        frames = load_frames(mat, raw_depth=raw_depth)
        line, = capsys.readouterr().out.splitlines()
        depth = frames.depth.flatten().double()
        measured = depth[depth > 0]
        low, middle, high = (measured.quantile(q).item() for q in (0.01, 0.5, 0.99))
        share = 100 * len(measured) / len(depth)
        assert (share == 100) == (not raw_depth)
        assert line.startswith("train: 17 images, depth ")
        assert [float(word) for word in re.findall(r"\d+(?:\.\d+)?", line)] == [
            17, *(pytest.approx(x, abs=0.0051) for x in (middle, 1, low, 99, high)),
            pytest.approx(share, abs=0.051), 0, 10]
        assert frames.median == pytest.approx(middle)


FACTOR, FAR, NONE = "depth in train and test differs", "most of the depth in test", "no pixel"
SCALES = {  # what has become of the millimetres, 1000 to 9000, in the test depth; what is said
    "right": (lambda mm: mm, []),
    "nearly twice": (lambda mm: mm * 19 // 10, []),
    "more than twice": (lambda mm: mm * 21 // 10, [FACTOR, FAR]),
    "more than half": (lambda mm: mm * 11 // 20, []),
    "less than half": (lambda mm: mm * 9 // 20, [FACTOR]),
    "x5": (lambda mm: mm * 5, [FACTOR, FAR]),
    "1/256": (lambda mm: mm // 256, [FACTOR]),
    "bits turned, as in SUN RGB-D": (lambda mm: mm << 3 | mm >> 13, [FACTOR, FAR]),
    "all beyond 10 m": (lambda mm: mm + 9000, [NONE]),
    "nearly nothing": (lambda mm: mm * 0 + 1, [NONE]),
    "nothing": (lambda mm: mm * 0, [NONE])}


@pytest.mark.parametrize("scale", SCALES)
def test_depth_of_another_scale_is_told_before_the_first_epoch(root, tmp_path, scale, capsys):
    change, expected = SCALES[scale]
    random = np.random.default_rng(3)
    shorten(root, 10)
    for pool, most in ("train", 230), ("test", 9000):  # 9 m, by 255 levels or millimetres
        for _, path in pairs_of(root, pool):
            values = random.integers(most // 9, most + 1, Image.open(path).size[::-1])
            values = change(values).astype(np.uint16) if pool == "test" else values.astype(np.uint8)
            Image.fromarray(values).save(path)
    said = training_images(tmp_path, "--data", str(root))
    lines = capsys.readouterr().out.splitlines()
    warnings = [line for line in lines if line.startswith("warning: ")]
    if expected == [NONE]:
        assert str(root) in said and "test" in said and "look at the depth" in said
        assert NONE in said and "--lr" not in said
    else:
        assert said == "9"
        assert len(warnings) == len(expected)
        assert all(any(words in line for line in warnings) for words in expected)
        splits = [line.split(":")[0] for line in lines if "median" in line]
        assert splits == ["train", "val", "test"]


def test_a_checksum_tells_frames_from_others_whatever_they_lie_in(nyu, packed, tmp_path):
    sums = [load_frames(path, split).checksum
            for split in ("train", "val", "test") for path in (nyu, packed)]
    assert sums[::2] == sums[1::2] and len(set(sums)) == 3
    for name, place in (("train/depth", (5, 0, 47, 63)), ("train/image", (21, 96, 255, 2)),
                        ("train/image", (0, 96, 0, 0))):
        path = shutil.copy(packed, tmp_path / "x.h5")
        with h5py.File(path, "r+") as file:
            file[name][place] = 1 + file[name][place] % 2
        assert load_frames(path).checksum != sums[0]
        assert load_frames(path, "val").checksum == sums[2]


# Where people have their data.

@pytest.mark.parametrize("place", [".", "..", "../..", "data"])
def test_the_folder_may_be_one_or_two_levels_off(tmp_path, few, place):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "nyu_data").symlink_to(few)
    found = tmp_path / "a" / "b" / "nyu_data"
    for word in Path(place).parts:
        found = found.parent if word == ".." else found / word
    for split in "train", "test":
        assert_equal(load(found, split), load(few, split))


@pytest.mark.parametrize("inside", [False, True])
def test_the_csvs_may_lie_beside_the_folder_data(root, few, inside):
    for csv in (root / "data").glob("*.csv"):
        csv.rename(root / csv.name)
    for split in "train", "test":
        assert_equal(load(root.parent if inside else root, split), load(few, split))


MOUNTS = {  # where nyu_data lies in /kaggle/input (k) or the user's folder (u)
    "older": "k/nyu-depth-v2/nyu_data",
    "newer": "k/datasets/soumikrakshit/nyu-depth-v2/nyu_data",
    "newer with a version": "k/datasets/soumikrakshit/nyu-depth-v2/versions/1/nyu_data",
    "kagglehub": "u/.cache/kagglehub/datasets/soumikrakshit/nyu-depth-v2/versions/10/nyu_data",
    "KAGGLEHUB_CACHE": "cache/datasets/soumikrakshit/nyu-depth-v2/versions/10/nyu_data"}


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """What open_source takes for Kaggle's folders, all empty: k, u and cache."""
    monkeypatch.setattr(data, "KAGGLE_INPUT", tmp_path / "k")
    monkeypatch.setenv("HOME", str(tmp_path / "u"))
    monkeypatch.delenv("KAGGLEHUB_CACHE", raising=False)
    return tmp_path


def training_images(tmp_path, *words):
    """How many a run finds when all its frames are loaded, or the sentence that ends it before."""
    with pytest.raises(data.UserError) as stopped, mock.patch.object(model, "METER"):
        train.main([*words, "--batch-size", "999", "--out", str(tmp_path / "run")])
    return re.sub(r".*there are (\d+) training images.*", r"\1", str(stopped.value))


@pytest.mark.parametrize("mount", MOUNTS)
def test_nyu_is_found_where_kaggle_has_it(kaggle, few, monkeypatch, mount):
    place = kaggle / MOUNTS[mount]
    place.parent.mkdir(parents=True)
    place.symlink_to(few)
    if mount == "KAGGLEHUB_CACHE":
        monkeypatch.setenv("KAGGLEHUB_CACHE", str(kaggle / "cache"))
    if place.parent.name == "10":
        older = place.parents[1] / "9" / "nyu_data" / "data"
        older.mkdir(parents=True)
        shutil.copy(few / "data" / "nyu2_test.csv", older / "nyu2_train.csv")
    assert training_images(kaggle) == "11"
    assert data.open_source(rooms=20).rooms == 20


def test_without_nyu_rooms_are_drawn_but_not_unasked_on_kaggle(kaggle, capsys):
    assert data.open_source().rooms == 400
    assert "400 synthetic rooms" in capsys.readouterr().out
    (kaggle / "k" / "another-data-set").mkdir(parents=True)
    sentence = training_images(kaggle)
    assert str(kaggle / "k") in sentence and "--rooms" in sentence
    assert "soumikrakshit/nyu-depth-v2" in sentence
    assert training_images(kaggle, "--rooms", "10") == "9"


def of_pairs(row, start="", end="\n"):
    """A CSV with each pair written as row."""
    return lambda pairs: start + "".join(row.format(*pair) + end for pair in pairs)


CSVS = {  # how spreadsheets and Windows write them
    "byte-order mark": of_pairs("{},{}", "\ufeff"),
    "spaces": of_pairs("  {} ,\t{}  "),
    "semicolons": of_pairs("{};{}"),
    "Windows line ends": of_pairs("{},{}", end="\r\n"),
    "old Mac line ends": of_pairs("{},{}", end="\r"),
    "blank rows": of_pairs("{},{}", "\n\n", "\n\n  \n,\n"),
    "empty cells": of_pairs("{},{},,"),
    "quotes": of_pairs('"{}","{}"'),
    "no end": lambda pairs: of_pairs("{},{}")(pairs)[:-1],
    "all of it": of_pairs('" {} ";{};', "\ufeff\r\n", "\r\n;;\r\n"),
    "backslashes": lambda pairs: of_pairs("{},{}")(pairs).replace("/", "\\"),
    "dots": of_pairs("./{},./{}")}


@pytest.mark.parametrize("form", CSVS)
def test_a_csv_may_be_of_any_form_and_its_names_of_any_language(root, few, form):
    for number in 1, 2:
        scene = f"scene_{number:04}_out"
        (root / "data" / "nyu2_train" / scene).rename(
            root / "data" / "nyu2_train" / f"k\u00fcche {scene} \u53f0\u6240")
    for pool in data.POOLS:
        path = root / "data" / f"nyu2_{pool}.csv"
        text = re.sub("scene_...._out", "k\u00fcche \\g<0> \u53f0\u6240", path.read_text())
        pairs = [row.split(",") for row in text.splitlines()]
        path.write_bytes(CSVS[form](pairs).encode())
    for split in "train", "test":
        assert_equal(load(root, split), load(few, split))


def test_a_csv_of_50688_rows_opens_at_once(tmp_path):
    rows = "".join(f"data/nyu2_train/scene_{i // 180}_out/{i}.jpg,data/nyu2_train/scene_{i // 180}"
                   f"_out/{i}.png\n" for i in range(50_688))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "nyu2_train.csv").write_text(rows)
    start = time.process_time()
    source = data.open_source(tmp_path)
    assert time.process_time() - start < 3
    assert len(source.names["train"]) == 50_688


def test_the_notebook_needs_no_test_csv_but_others_are_told_which(root, tmp_path):
    (root / "data" / "nyu2_test.csv").unlink()
    shorten(root, 10)
    said = training_images(tmp_path, "--data", str(root))
    assert f"{root}" in said and "nyu2_test.csv" in said
    assert training_images(tmp_path, "--data", str(root), "--notebook") == "8"


@pytest.mark.parametrize("name", ["x.MAT", "x.h5", "x.hdf5", "blob", "x.zip"])
@pytest.mark.parametrize("kind", ["mat", "packed"])
def test_hdf5_is_known_by_its_content(request, tmp_path, kind, name):
    path = request.getfixturevalue(kind)
    (tmp_path / name).symlink_to(path)
    assert_equal(load(tmp_path / name, "test"), load(path, "test"))


def test_a_file_that_another_program_holds_is_not_called_broken(mat, packed, tmp_path):
    for original, script in (mat, train), (packed, data):
        (tmp_path / script.__name__).mkdir()
        path = Path(shutil.copy(original, tmp_path / script.__name__))
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # as HDF5 does for a writer
            message = refuse(path, script, path.parent)
        assert "another program" in message and "get it again" not in message
        load(path)


# Broken data.

def save(mode, size, colour=99, form=None):
    return lambda path: Image.new(mode, size, colour).save(path, form)


def text(content, encoding="utf-8"):
    return lambda path: path.write_bytes(content.encode(encoding))


def keep(share):
    """Cuts a file short."""
    return lambda path: path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])


def instead(make):
    """Puts something else in place of a file or folder."""
    def apply(path):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)
    return apply


def loop(path):
    path.symlink_to(path)


def put(depths, value):
    depths[3, ..., 5, 5] = value


def edit(change):
    """Changes an HDF5 file in place."""
    def apply(path):
        with h5py.File(path, "r+") as file:
            change(file)
    return apply


def renew(name, change=lambda array: array, **options):
    """Writes an array of an HDF5 file anew."""
    def apply(file):
        array = change(file.pop(name)[()])
        file.create_dataset(name, data=array, **options)
    return edit(apply)


def elsewhere(name):
    """Moves an array of an HDF5 file into another one, as a link."""
    def apply(path):
        shutil.copy(path, path.with_name("y"))
        with h5py.File(path, "r+") as file:
            file.pop(name)
            file[name] = h5py.ExternalLink("y", name)
    return apply


def external(name):
    """Moves an array of an HDF5 file into another one, which is no HDF5."""
    def apply(path):
        with h5py.File(path, "r+") as file:
            array = file.pop(name)[()]
            place = str(path.with_name("y"))
            file.create_dataset(name, data=array, external=[(place, 0, array.nbytes)])
    return apply


def virtual(path):
    shutil.copy(path, path.with_name("y"))
    with h5py.File(path, "r+") as file:
        form = file["images"].shape, file.pop("images").dtype
        layout = h5py.VirtualLayout(*form)
        layout[:] = h5py.VirtualSource("y", "images", *form[:1])
        file.create_virtual_dataset("images", layout)


def scribble(path):
    """Overwrites the head of a file behind its signature."""
    content = path.read_bytes()
    path.write_bytes(content[:48] + bytes(752) + content[800:])


def put_attribute(name, value):
    return edit(lambda file: file.attrs.update({name: value}))


CSV, TEST_CSV = "nyu_data/data/nyu2_train.csv", "nyu_data/data/nyu2_test.csv"
JPG, PNG = (f"nyu_data/data/nyu2_train/scene_0001_out/2.{x}" for x in ("jpg", "png"))
MM = "nyu_data/data/nyu2_test/00003_depth.png"
S = (160, 120)
README, GET, PACK = "README", "get it again", "pack it again"
FAULTS = {  # what is broken (--data is its first folder, or itself); how; what the message says
    "missing folder": ("nyu_data", shutil.rmtree, "does not exist", README),
    "empty folder": ("nyu_data", instead(Path.mkdir), "nyu2_train.csv", README),
    "folder that is a loop": ("nyu_data", instead(loop), "does not exist", README),
    "folder that is a pipe": ("nyu_data", instead(os.mkfifo), "does not exist", README),
    "missing CSV": (CSV, Path.unlink, "does not exist", README),
    "CSV that is a pipe": (CSV, instead(os.mkfifo), README),
    "CSV that is a loop": (CSV, instead(loop), README),
    "CSV that is a folder": (CSV, instead(Path.mkdir), README),
    "missing test CSV": ("nyu_data", lambda path: (path / "data" / "nyu2_test.csv").unlink(),
                         "nyu2_test.csv"),
    "row with one column": (CSV, text("data/x.jpg\n"), "data/x.jpg"),
    "row with three columns": (CSV, text("a.jpg,a.png\nb.jpg,b.png,c.png\n"), "c.png"),
    "CSV with tabs": (CSV, text("data/x.jpg\tdata/x.png\n"), "data/x.jpg"),
    "CSV with NUL bytes": (CSV, text("data/x.jpg,data/\0.png\n"), "no image and depth"),
    "CSV with an endless cell": (CSV, text('"' + 200_000 * "x"), "field", GET),
    "CSV with an open quote": (CSV, text('"data/x.jpg,data/x.png\n' + 999 * "y,z\n"), "data/x.jpg"),
    "CSV in Latin-1": (CSV, text("k\u00fcche/1.jpg,k\u00fcche/1.png\n", "latin-1"), "UTF-8", GET),
    "CSV in UTF-16": (TEST_CSV, text("data/x.jpg,data/x.png\n", "utf-16"), "UTF-8", GET),
    "empty CSV": (CSV, text(""), "empty"),
    "CSV of blank rows": (CSV, text("\n , \n,,\n"), "empty"),
    "empty test CSV": (TEST_CSV, text(""), "empty"),
    "missing image": (JPG, Path.unlink, "No such file"),
    "image that is a pipe": (JPG, instead(os.mkfifo), "No such file"),
    "image that is a loop": (JPG, instead(loop), "No such file"),
    "depth that is a pipe": (PNG, instead(os.mkfifo), "No such file"),
    "depth that is a folder": (MM, instead(Path.mkdir), "No such file"),
    "truncated JPEG": (JPG, keep(0.5), "truncated"),
    "truncated depth": (PNG, keep(0.5), "truncated"),
    "zero-byte PNG": (PNG, keep(0), "cannot identify"),
    "CMYK JPEG": (JPG, save("CMYK", S, (9, 9, 9, 9)), "CMYK"),
    "16-bit image": (JPG, save("I;16", S, 9999, "PNG"), "I;16"),
    "image of floats": (JPG, save("F", S, 0.5, "TIFF"), "mode F"),
    "wrong aspect": (JPG, lambda path: (save("RGB", (160, 100))(path),
                                        save("L", (160, 100))(path.with_suffix(".png"))), "4:3"),
    "16-bit training depth": (PNG, save("I;16", S), "8-bit"),
    "8-bit test depth": (MM, save("L", S), "16-bit"),
    "RGB depth": (PNG, save("RGB", S), "RGB"),
    "depth of nothing": (MM, save("I;16", S, 0), "depth"),
    "depth of another size": (PNG, save("L", (80, 60)), "(80, 60)"),
    ".mat not HDF5": ("x.mat", text("MATLAB 5.0"), "HDF5", GET),
    ".mat of no bytes": ("x.mat", keep(0), "HDF5", GET),
    ".mat cut short": ("x.mat", keep(0.5), "HDF5", GET),
    ".mat cut very short": ("x.mat", keep(1e-4), "HDF5", GET),
    ".mat with a broken head": ("x.mat", scribble, "HDF5", GET),
    ".mat without images": ("x.mat", edit(lambda file: file.pop("images")), "packed"),
    ".mat without depths": ("x.mat", edit(lambda file: file.pop("depths")), "depths"),
    ".mat with fewer depths": ("x.mat", renew("depths", lambda x: x[:20]), "frame 20:"),
    ".mat with nan": ("x.mat", edit(lambda file: put(file["depths"], math.nan)), "frame 3:"),
    ".mat with negative depth": ("x.mat", edit(lambda file: put(file["depths"], -1)), "frame 3:"),
    ".mat in mm": ("x.mat", edit(lambda file: put(file["depths"], 2000)), "frame 3:"),
    ".mat of floats": ("x.mat", renew("images", np.float32), "frame 0:"),
    ".mat of one number": ("x.mat", renew("images", np.sum), "again"),
    ".mat with images elsewhere": ("x.mat", elsewhere("images"), "images"),
    ".mat with depths elsewhere": ("x.mat", elsewhere("depths"), "depths"),
    ".mat with images of no HDF5": ("x.mat", external("images"), "images"),
    ".mat with images put together": ("x.mat", virtual, "images"),
    ".h5 not ours": ("x.h5", edit(lambda file: file.attrs.pop("format")), PACK),
    ".h5 of another version": ("x.h5", put_attribute("format", "METER frames, version 1"),
                               "version 1", PACK),
    ".h5 of many versions": ("x.h5", put_attribute("format", [1, 2, 3]), PACK),
    ".h5 cut short": ("x.h5", keep(0.5), "HDF5", GET),
    ".h5 a byte short": ("x.h5", keep(1 - 1e-7), "HDF5", GET),
    ".h5 without a pool": ("x.h5", edit(lambda file: file.pop("test")), "test", PACK),
    ".h5 with an empty pool": ("x.h5", renew("test/image", lambda x: x[:0]), "test", PACK),
    ".h5 with fewer depths": ("x.h5", renew("train/depth", lambda x: x[:20]), "damaged", PACK),
    ".h5 with fewer images": ("x.h5", renew("train/image", lambda x: x[:20]), "damaged", PACK),
    ".h5 of another size": ("x.h5", renew("test/image", lambda x: x[:, :96]), "damaged", PACK),
    ".h5 of another type": ("x.h5", renew("test/depth", np.float64), "damaged", PACK),
    ".h5 of the other byte order": (
        "x.h5", renew("test/depth", lambda x: x.astype(">f4")), "damaged", PACK),
    ".h5 compressed": ("x.h5", renew("test/image", compression="gzip"), "damaged", PACK),
    ".h5 of one number": ("x.h5", renew("train/depth", np.sum), PACK),
    ".h5 with a pool elsewhere": ("x.h5", elsewhere("test"), "test", PACK),
    ".h5 with depth elsewhere": ("x.h5", elsewhere("test/depth"), "test/depth", PACK),
    ".h5 with depth of no HDF5": ("x.h5", external("test/depth"), "test/depth", PACK),
    ".h5 with nan": ("x.h5", edit(lambda file: put(file["train/depth"], math.nan)), "frame 3:"),
    ".zip": ("x.zip", text("PK"), "x.zip", GET)}


def refuse(source, script, work):
    """The message with which a script ends, having left no half of a file."""
    (work / "out").mkdir(parents=True)
    path = work / "out" / ("x.h5" if script is data else "run")
    flags = ["", ""] if script is data else ["--data", "--out"]
    with pytest.raises(data.UserError) as stopped:
        with mock.patch.object(model, "METER"):  # to make one takes most of the time
            script.main([word for word in (flags[0], str(source), flags[1], str(path)) if word])
    left = [file.name for file in (work / "out").rglob("*") if file.is_file()]
    assert left == []
    assert len(str(stopped.value)) < 9000
    return str(stopped.value)


def break_data(request, tmp_path, fault):
    """A copy of the tests' data with a fault: what --data is, and where the fault lies."""
    broken, how, *_ = FAULTS[fault]
    source = tmp_path / broken.split("/")[0]
    if source.name == "nyu_data":
        shutil.copytree(request.getfixturevalue("few"), source)
    else:
        original = "mat" if source.suffix == ".mat" else "packed"
        shutil.copy(request.getfixturevalue(original), source)
    how(tmp_path / broken)
    return source, tmp_path / broken


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_data_ends_with_a_sentence_that_names_the_file(request, tmp_path, fault):
    source, broken = break_data(request, tmp_path, fault)
    for script in data, train:
        message = refuse(source, script, tmp_path / script.__name__)
        for words in (str(broken), *FAULTS[fault][2:]):
            assert words in message
        assert "cannot write" not in message


@pytest.mark.parametrize("fault", ["missing folder", "8-bit test depth", ".mat cut short",
                                   ".h5 with fewer depths"])
def test_dissection_ends_with_the_same_sentence(request, tmp_path, fault):
    source, broken = break_data(request, tmp_path, fault)
    torch.save(model.METER().state_dict(), tmp_path / "x.pth")
    with pytest.raises(data.UserError) as stopped:
        dissect.main([str(tmp_path / "x.pth"), "--data", str(source), "--out",
                      str(tmp_path / "out")])
    for words in (str(broken), *FAULTS[fault][2:]):
        assert words in str(stopped.value)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("script", [data, train], ids=["data", "train"])
def test_all_broken_frames_are_counted_and_the_first_twenty_listed(nyu, tmp_path, script):
    root = shutil.copytree(nyu, tmp_path / "nyu_data")
    broken = [image for image, _ in [*pairs_of(root, "train"), *pairs_of(root, "test")][:25]]
    for image in broken:
        keep(0.3)(image)
    message = refuse(root, script, tmp_path)
    listed = [image for image in broken if f"'{image}'," in message]
    assert message.startswith("25 ") and len(listed) == 20


# What is written.

def test_write_replaces_a_file_in_one_step_or_leaves_it(tmp_path):
    path = tmp_path / "new" / "x.json"
    data.write_json(path, {"a": 1})

    def full(file):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    def stopped(file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(data.UserError, match=f"cannot write {path}: No space left"):
        data.write(path, full)
    with pytest.raises(KeyboardInterrupt):
        data.write(path, stopped)
    with pytest.raises(ValueError, match="JSON"):  # a mistake of ours
        data.write_json(path, {"a": math.nan})
    assert list(path.parent.iterdir()) == [path] and json.loads(path.read_text()) == {"a": 1}
    data.write_json(path, {"a": 2})
    assert list(path.parent.iterdir()) == [path] and json.loads(path.read_text()) == {"a": 2}


def test_a_name_that_is_too_long_ends_with_a_sentence(tmp_path):
    with pytest.raises(data.UserError, match="cannot write .*File name too long"):
        data.write_json(tmp_path / ("x" * 250 + ".json"), {})


@pytest.mark.parametrize("stream", [None, io.BytesIO()])
def test_a_command_runs_where_the_streams_are_not_pythons(stream, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)

    def missing():
        raise FileNotFoundError(2, "No such file or directory", "nyu.csv")

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)  # of a notebook, or closed
        with pytest.raises(SystemExit, match="error: .*No such file or directory: 'nyu.csv'"):
            data.run_command(missing)
    signal.signal(signal.SIGTERM, handler)


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "x.json"
    victim.write_text("precious")
    seen = []
    data.write(path, lambda file: (seen.append(file), file.write_bytes(b"first")))
    for target in victim, tmp_path / "nowhere":
        seen[0].symlink_to(target)
        data.write(path, lambda file: file.write_bytes(b"second"))
        assert path.read_bytes() == b"second" and not path.is_symlink()
    assert sorted(tmp_path.iterdir()) == [victim, path] and victim.read_text() == "precious"


@pytest.mark.parametrize("place", ["file/x.json", "file/folder/x.json", "folder"])
def test_what_cannot_be_written_ends_with_a_sentence(tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(data.UserError, match=f"cannot write {tmp_path / place}: "):
        data.write_json(tmp_path / place, {})
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize("folder", ["file", "file/folder"])
def test_a_folder_that_cannot_be_made_ends_with_a_sentence(tmp_path, folder):
    (tmp_path / "file").touch()
    with pytest.raises(data.UserError, match=f"cannot write to {tmp_path / folder}\\b"):
        with data.sole_writer(tmp_path / folder):
            raise AssertionError("entered")


def test_a_second_writer_gets_a_sentence_and_the_first_goes_on(tmp_path, nyu):
    with data.sole_writer(tmp_path):
        with pytest.raises(data.UserError, match=f"{tmp_path} .*another program"):
            with data.sole_writer(tmp_path):
                raise AssertionError("entered")
        with pytest.raises(data.UserError, match=f"{tmp_path} .*another program"):
            data.main([str(nyu), str(tmp_path / "x.h5")])
        with pytest.raises(data.UserError, match=f"{tmp_path} .*another program"):
            train.main(["--data", str(nyu), "--out", str(tmp_path)])
        assert not list(tmp_path.iterdir())
        data.write_json(tmp_path / "x.json", {})
    with data.sole_writer(tmp_path):
        assert (tmp_path / "x.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["x.h5", "folder/x.h5", "x.hdf5"])
def test_pack_writes_only_a_new_h5_into_a_folder_that_exists(nyu, tmp_path, name):
    (tmp_path / "x.h5").write_text("precious")
    with pytest.raises(data.UserError, match=str(tmp_path / name)):
        data.main([str(nyu), str(tmp_path / name)])
    assert (tmp_path / "x.h5").read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


def test_pack_says_before_its_work_that_the_disk_is_too_small(root, tmp_path, monkeypatch):
    need = 16 * (256 * 192 * 3 + 64 * 48 * 4)
    for image, _ in pairs_of(root, "train"):
        keep(0.3)(image)  # would be found if frames were read
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, need - 1))
    message = refuse(root, data, tmp_path)
    assert f"{need:,}" in message and f"{need - 1:,}" in message
    assert str(tmp_path / "out" / "x.h5") in message


FULL = """
import resource, sys
import data

read = data.KaggleFolder.read

def pack_until(space, frame):  # from that frame on nothing can be written beyond `space` bytes
    seen = []
    def read_and_fill(self, *words):
        seen.append(words)
        if len(seen) == frame:
            resource.setrlimit(resource.RLIMIT_FSIZE, (space, resource.RLIM_INFINITY))
        return read(self, *words)
    data.KaggleFolder.read = read_and_fill
    try:
        data.run_command(lambda: data.main(sys.argv[1:]))
    except SystemExit as stop:
        print(stop.code, flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

for space, frame in (10**6, 9), (10**5, 1):
    pack_until(space, frame)
"""


@pytest.fixture(scope="module", autouse=True)
def full_disk(nyu, tmp_path_factory):
    """That script at work, on another core than the first tests: to import torch takes seconds."""
    path = tmp_path_factory.mktemp("full") / "x.h5"
    with subprocess.Popen([sys.executable, "-c", FULL, nyu, path], cwd=Path(data.__file__).parent,
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        yield process, path


def test_a_disk_that_fills_while_frames_are_packed_ends_with_a_sentence(full_disk):
    process, path = full_disk
    said, complaint = process.communicate()
    assert process.returncode == 0, complaint
    assert said == 2 * f"error: cannot write {path}: File too large.\n"
    assert not complaint and not list(path.parent.iterdir())


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    genuine, events = os.replace, []

    def replace(*names):
        events.append("named")
        genuine(*names)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "fsync", lambda file: events.append(os.fstat(file).st_size))
    data.write_json(tmp_path / "x.json", ["content"])
    assert events == [(tmp_path / "x.json").stat().st_size, "named"]


# Flags and the line that tells how far a program is.

@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-1", "-1e-9", "1.01", str(10 ** 400), "",
                                  "1e", "0x1"])
def test_a_number_out_of_range_is_refused(text):
    for flag in "--min-share", "--lr", "--epochs", "--rooms":
        with pytest.raises(data.UserError, match=flag):
            train.parse_args([f"{flag}={text}", "--neuron-selective"])
    for kind in int, float:
        parse = data.number(kind, 0, 1)
        assert [parse(text) for text in ("0", "1")] == [0, 1]


@pytest.mark.parametrize("words", [["{nyu}", "{out}", "--raw"], ["{nyu}"], ["{nyu}", "{out}", "x"],
                                   ["{nyu}", "{out}", "--raw-depth"], []])
def test_flags_of_packing_are_checked(nyu, tmp_path, words):
    with pytest.raises(data.UserError):
        data.main([word.format(nyu=nyu, out=tmp_path / "x.h5") for word in words])
    assert not list(tmp_path.iterdir())


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Bare:
    """A standard output that can only be written to."""
    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("kind, variable, pause", [
    (Terminal, None, 1), (Terminal, "JPY_PARENT_PID", 10), (Terminal, "KAGGLE_KERNEL_RUN_TYPE", 10),
    (io.StringIO, "JPY_PARENT_PID", 10), (io.StringIO, None, 30), (Bare, None, 30)])
def test_progress_rewrites_its_line_on_terminals_alone(monkeypatch, kind, variable, pause):
    for name in "JPY_PARENT_PID", "KAGGLE_KERNEL_RUN_TYPE":
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "1")
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))  # a second for each image
    output = kind()
    monkeypatch.setattr(sys, "stdout", output)
    items = list(data.progress(range(100, 164), "read", 64))
    monkeypatch.undo()
    assert items == list(range(100, 164))
    written = getattr(output, "text", None) or output.getvalue()
    lines = [line for line in re.split(r"[\r\n]+", written.replace("\033[K", "")) if line]
    assert ("\r" in written) == (pause == 1) and ("\n" in written) == (pause > 1)
    assert 64 // (pause + 1) <= len(lines) <= 64 // pause
    done, rate, left = re.fullmatch(
        r"read (\d+)/64 \| ([\d.]+) images/s \| (\d+) s left", lines[0]).groups()
    assert float(rate) == pytest.approx(1, abs=0.1) and int(done) + int(left) == 64


def test_progress_counts_images_in_batches_and_never_too_many(monkeypatch):
    clock = itertools.count(0, 100)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    output = Bare()
    monkeypatch.setattr(sys, "stdout", output)
    list(data.progress(range(3), "read", 1001, 400))
    monkeypatch.undo()
    done = re.findall(r"read ([\d,]+)/1,001 ", output.text)
    assert done == ["400", "800", "1,001"]
