"""Frames in, batches out: NYU Depth V2 or synthetic rooms, for train.py and dissect.py.

    python data.py nyu_data nyu.h5    # decode once; from then on --data nyu.h5

A source is Kaggle's folder, the official .mat, an .h5 packed here, or rooms drawn here. Depth is
float32 metres, 0 = missing; its factor follows from format and split, never from the values.

Sizes: n frames, B batch, H W image height and width, h w depth height and width.
"""
import argparse
import base64
import csv
import functools
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import permutations, product
from math import ceil, isfinite
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

if "ipykernel" not in sys.modules:
    os.environ["MPLBACKEND"] = "agg"  # `!python` inherits a notebook's, which it may not have

from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # of a mapped file
SIZE = 192, 256                # height, width of METER's input
DEPTH_SIZE = 48, 64            # and of its output
MEAN = 0.485, 0.456, 0.406     # ImageNet's, of RGB in 0..1
STD = 0.229, 0.224, 0.225
FORMS = {"image": ((*SIZE, 3), "u1"), "depth": ((1, *DEPTH_SIZE), "<f4")}  # of a packed frame
BYTES = 159_744                # of a packed frame
DRAWS = 11                     # random numbers that `augment` takes for a frame
ROOMS = 400                    # synthetic rooms, unless --rooms says otherwise; most to test on
KAGGLE_INPUT = Path("/kaggle/input")
KAGGLE_NAME = "datasets/soumikrakshit/nyu-depth-v2"
MIN_SHARE = 0.001              # of the pixels: depth bins with no more do not count
POOLS = "train", "test"        # of frames, in each source
PACKED = "METER frames, version 2"  # attribute `format` of a packed .h5
HOW_TO_GET_NYU = "README, Data, tells how to get NYU Depth V2 (4.1 GB); then point --data to it."
TEST_BITS = (  # the 654 official test frames among the 1,449 labelled ones, one bit each
    "wIfIH//mAb4AHh/gAAAOD7yAAOADvx///8PwHAAAAEABA4P4AfwHOA/+AAM/8AAB/DgAPAAH4P8AB8/4AAAAH7/8OOAO"
    "P//gPgPAPhj4APwYYcMfn4fM4H+MHzwDAAP////gAfB8DgD//HD8DgAAAABwDgceAOADzn+AA+DwcA4BxgGYwAA/8f9/"
    "eA4/4wH//H5nPwHw//HwfOADx/+APw/+5/BgAPPwOPAZgAH+f4P8DweA/4A=")


# Synthetic rooms: boxes in a box, seen by a camera like the Kinect of NYU Depth V2.

FOCAL = SIZE[1] * 519 / 640    # pixels
# Ranges, low and high, in metres; of `outwards` and `place` see `furnish`.
FURNITURE = """
# width   height     depth       bottom     outwards    place
0.5 1.5   0.6  2.1   0.3  0.6    0    0     1    1     -2.2 2.2    # cabinet
1.3 2.2   0.4  0.8   0.8  1      0    0     0.6  1     -2.2 2.2    # sofa
0.8 1.6   0.4  0.7   0.6  1      0    0     0.1  0.7   -2.2 2.2    # table
0.3 0.6   0.3  0.6   0.3  0.6    0    0     0.1  1     -2.2 2.2    # stool
0.2 0.5   1    1     0.2  0.5    1.8  2.1   0.1  0.7   -2.2 2.2    # lamp
0.6 1.2   0.04 0.4   0.2  0.3    1.3  1.7   1    1     -2.2 2.2    # shelf
0.4 1.3   0.4  0.9   0.03 0.04   1.1  1.3   1    1     -2.2 2.2    # picture
"""
PAINT = """
# gray     red       green     blue        contrast     tiles along x, y, z
0.1  0.4   0.9 1.3   0.9 1.1   0.65 1.15   -0.3 0.25    0.07 1   0.07 1   0.07 1    # floor
0.3  0.7   0.9 1.3   0.9 1.1   0.65 1.15   -0.3 0.25    0.07 1   0.07 1   0.07 1    # walls
0.6  0.85  0.9 1.3   0.9 1.1   0.65 1.15   -0.3 0.25    0.07 1   0.07 1   0.07 1    # ceiling
""" + 7 * """
0.04 0.6   0.9 1.3   0.9 1.1   0.65 1.15   -0.3 0.25    0.07 1   0.07 1   0.07 1    # furniture
"""


def make_rooms(numbers, device="cpu"):
    """Images (B, 3, 192, 256) uint8, z-depths (B, 1, 48, 64) in metres of the rooms `numbers`.
    x points right, y up, z forward, in metres; the origin is the middle of the room. A box is half
    its size (x, y, z) and its center. Box 0 is the room itself, seen from within."""
    rooms = [torch.Generator().manual_seed(n) for n in numbers.tolist()]

    def draw(table):
        """Numbers from the ranges (low, high) in each row of a table: (B, ranges, rows)."""
        columns = torch.tensor(np.loadtxt(table.splitlines(), np.float32, ndmin=2).T)
        low, high = columns[::2], columns[1::2]
        uniform = torch.stack([torch.rand(low.shape, generator=room) for room in rooms])
        return (low + (high - low) * uniform).to(device)

    room = draw("1.2 3.0   1.2 1.5   1.4 4.6")                            # (B, 3, 1), half its size
    camera = draw("-0.4 0.4   -0.2 0.15   -0.9 0.2") * room
    yaw, pitch = draw("-0.8 0.8   -0.1 0.45").split(1, 1)                 # (B, 1, 1)
    half, center = furnish(room, draw)                                    # (B, 3, boxes)
    ray = camera_rays(yaw, pitch)                                         # (B, 3, pixels)
    depth, box = cast(ray, camera, half, center)                          # (B, 1, pixels)
    image = shade(camera + ray * depth, box, room, half, center, draw)    # (B, 3, pixels)

    image = (image * 255).byte().view(-1, 3, *SIZE)
    depth = depth.view(-1, 1, *SIZE)[..., 2::4, 2::4]  # the pixel that Pillow's NEAREST takes
    return image, depth.contiguous()


def furnish(room, draw):
    """The room and its furniture as boxes: half and center, (B, 3, 8)."""
    # `place` goes along the left (-3 to -1), far (-1 to 1) and right wall (1 to 3); at the left and
    # right one furniture is turned by 90 degrees. `outwards` is the share of the way to the wall.
    size, bottom, outwards, place = draw(FURNITURE).split([3, 1, 1, 1], 1)
    half = size.where(place.abs() < 1, size.flip(1)) / 2
    along = torch.cat([place, 0 * place, 2 - place.abs()], 1).clamp(-1, 1)
    center = along * (room - half) * outwards
    center[:, 1] = (bottom + half - room)[:, 1]
    return torch.cat([room, half], 2), torch.cat([0 * room, center], 2)


def camera_rays(yaw, pitch):
    """Rays of length 1 along the optical axis, so that the way along them is z-depth."""
    height, width = SIZE
    pixel = torch.arange(height * width, device=yaw.device)
    x = (pixel % width - (width - 1) / 2) / FOCAL
    y = ((height - 1) / 2 - pixel // width) / FOCAL
    y, z = pitch.cos() * y - pitch.sin(), pitch.sin() * y + pitch.cos()
    x, z = yaw.cos() * x + yaw.sin() * z, yaw.cos() * z - yaw.sin() * x
    return torch.cat([x, y, z], 1)


def cast(ray, camera, half, center):
    """z-depth of the nearest box beyond .5 m on each ray (the room from within), its number."""
    inverse = (1 / ray).clamp(-1e6, 1e6)  # finite: an infinity times 0 would be nan
    seen = []
    for size, place in zip(half.split(1, 2), center.split(1, 2)):
        reach, middle = size * inverse.abs(), (place - camera) * inverse    # (B, 3, pixels)
        enter, leave = (middle - reach).amax(1, True), (middle + reach).amin(1, True)
        seen.append(enter.where((enter > 0.5) & (enter < leave), torch.inf if seen else leave))
    return torch.cat(seen, 1).min(1, keepdim=True)


def hashed(x):
    """A number in -1 .. 1 that follows from x as if drawn."""
    return (x.sin() * 43758.5).frac()


def shade(point, box, room, half, center, draw):
    """RGB in 0..1 of what is seen at `point` (B, 3, pixels) on `box`."""
    # The face, `local` 1 or -1: its normal, and whether it is floor, wall, ceiling or furniture.
    local = (point - center.take_along_dim(box, 2)) / half.take_along_dim(box, 2)
    normal = local.sign() * (local.abs() == local.abs().amax(1, True))
    normal = normal.where(box > 0, -normal)                            # of the room: inwards
    kind = (box + 2).where(box > 0, 1 - normal[:, 1:2].long())         # row of PAINT

    # Its paint: tiles or planks whose shades follow from their numbers along x, y, z.
    paint = draw(PAINT).relu().take_along_dim(kind, 2)
    gray, hue, contrast, width = paint.split([1, 3, 1, 3], 1)
    x, y, z = (point * (normal == 0) / width).floor().split(1, 1)
    tile = hashed(x * 127.1 + y * 311.7 + z * 74.7 + kind + draw("0 99"))

    # The light: a lamp at the ceiling, some daylight from each side, and the sensor's noise.
    way = draw("-0.6 0.6   0.6 0.9   -0.6 0.6") * room - point
    square = way.square().sum(1, True)
    lamp = (normal * way).sum(1, True).relu() / square.sqrt() / (1 + square / 6)
    light = 0.35 + draw("0.6 1.9") * lamp
    light += (normal * draw("-0.15 0.15   -0.15 0.15   -0.15 0.15")).sum(1, True)
    image = (gray * hue * (1 + contrast * tile) * light).clamp(0, 1).sqrt()
    pixel = torch.arange(point.shape[2], device=point.device)
    noise = hashed(hashed(pixel) * 78.233 + draw("0 99   0 99   0 99"))
    return (image + 0.03 * noise).clamp(0, 1)


class UserError(Exception):
    """What only the user can mend. The message says what is wrong, where, and what to do next."""


# Sources. Each has two POOLS of frames.

class Source:
    """Frames that Pillow decodes: a subclass's read(pool, name) gives image, depth and its unit.
    names[pool] is what each frame is called; `faults` collects what is wrong with them."""
    at_once = 256     # frames that are decoded or drawn
    rooms = None      # how many, if they are drawn
    mirror_shift = 1  # see `augment`

    def __init__(self, path, names):
        self.path, self.names, self.faults = path, names, []

    def load(self, pool, indices):
        """Images uint8 (n, 192, 256, 3), depths (n, 1, 48, 64) metres; indices: range or list."""
        image = torch.empty(len(indices), *SIZE, 3, dtype=torch.uint8)
        depth = torch.empty(len(indices), 1, *DEPTH_SIZE)
        for chunk, *block in self.blocks(pool, indices):
            image[chunk], depth[chunk] = block
        return image, depth

    def blocks(self, pool, indices):
        """Yields (slice, images, depths), a block of frames at a time."""
        n = len(indices)
        for start in progress(range(0, n, self.at_once), f"read {pool}", n, self.at_once):
            chunk = slice(start, start + self.at_once)
            image, depth = self.frames(pool, indices[chunk])
            self.check(pool, indices[chunk], depth)
            yield chunk, image, depth

    def frames(self, pool, indices):
        with ThreadPoolExecutor() as threads:  # Pillow frees the GIL
            pairs = threads.map(lambda i: self.decode(pool, self.names[pool][i]), indices)
            return [torch.from_numpy(np.stack(part)) for part in zip(*pairs)]

    def decode(self, pool, name):
        """One frame, resized as in the notebook; black and 1 m away where it is broken."""
        try:
            image, depth, metres = self.read(pool, name)
            if image.width * 3 != image.height * 4 or image.size != depth.size:
                raise ValueError(f"image {image.size}, depth {depth.size}: not one 4:3 size")
            self.mirror_shift = mirror_shift(image.width)
            image = image.resize(SIZE[::-1], Image.BILINEAR)
            depth = depth.resize(DEPTH_SIZE[::-1], Image.NEAREST)
            return np.asarray(image), metres * np.asarray(depth, np.float32)[None]
        except Exception as error:  # noqa: BLE001  a damaged file may raise almost anything
            self.faults.append(f"{self.path}, {pool} frame {name}: {error}")
            return np.zeros(*FORMS["image"]), np.ones(*FORMS["depth"])

    def check(self, pool, indices, depth):
        """Notes frames whose depth cannot be metres."""
        for i, part in zip(indices, depth):
            low, high = part.aminmax()
            if low < 0 or not 0 < high <= 100:  # nor is nan
                self.faults.append(f"{self.path}, {pool} frame {self.names[pool][i]}: "
                                   "depth is nan, negative, above 100 m or all missing")


def mirror_shift(width):
    """Pixels (of 256) by which `augment` moves the mirror image of a frame of this width.
    Pillow's NEAREST takes one pixel for a cell of `step`: the middle one, or the right one of two,
    at .625 of the cell if the frame has 256 pixels and at .55 if it has 640. Mirrored it stands at
    .375 or .45, which is 1 or .4 pixels of 256 away."""
    step, rest = divmod(width, DEPTH_SIZE[1])
    return 0 if rest else round(8 * ((step // 2 + 0.5) / step - 0.5))


def to_rgb(image):
    """A Pillow image as RGB; ValueError for a mode that is not 8-bit colour or grey."""
    if image.mode not in ("RGB", "RGBA", "P", "L", "LA"):
        raise ValueError(f"image of mode {image.mode}: save it as RGB or grey of 8 bits")
    return image.convert("RGB")


class KaggleFolder(Source):
    """nyu2_train.csv and nyu2_test.csv list pairs of files: image, depth."""
    METRES = {"train": 10 / 255, "test": 1 / 1000}             # 8-bit and 16-bit PNGs
    MODES = {"train": ["L"], "test": ["I;16", "I;16B", "I"]}   # as Pillow calls these

    def __init__(self, path):
        super().__init__(path, {pool: read_list(path, f"nyu2_{pool}.csv") for pool in POOLS})
        if not self.names["train"]:
            raise UserError(f"{path / 'data' / 'nyu2_train.csv'} does not exist, nor any "
                            f"nyu2_train.csv up to four folders below {path}.\n{HOW_TO_GET_NYU}")

    def read(self, pool, name):
        if not all(map(os.path.isfile, name)):  # a pipe would never end
            raise FileNotFoundError("No such file")
        image, depth = map(Image.open, name)
        if depth.mode not in self.MODES[pool]:
            raise ValueError(f"depth of mode {depth.mode}: 8-bit grey to train, 16-bit mm to test")
        return to_rgb(image), depth, self.METRES[pool]


def read_list(folder, name):
    """Pairs of paths from Kaggle's CSV of this name, here or below; [] if there is none."""
    found = []
    for level in range(5):
        found = found or [file for file in folder.glob("*/" * level + name) if file.is_file()]
    if not found:
        return []  # the notebook needs no test
    path = max(found, key=lambda file: (len(str(file)), file))  # versions/10, not versions/9

    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = list(csv.reader(text.split("\n"), delimiter="," if "," in text else ";"))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is no CSV in UTF-8 ({error}): get it again.") from error
    # Spreadsheets and Windows add empty cells, other separators and other slashes.
    pairs = [[cell.strip().replace("\\", "/") for cell in row if cell.strip()] for row in rows]
    pairs = [pair for pair in pairs if pair]
    odd = [pair for pair in pairs if len(pair) != 2 or "\0" in "".join(pair)]
    if odd or not pairs:
        raise UserError(f"{path}: {odd[0] if odd else 'it is empty, which'} is no image and depth.")

    # The paths begin at the folder above, or at the CSV's own.
    root = path.parent if os.path.exists(path.parent / pairs[0][0]) else path.parent.parent
    return [[str(root / cell) for cell in pair] for pair in pairs]


class LabeledMat(Source):
    """nyu_depth_v2_labeled.mat: MATLAB 7.3, which is HDF5; each image lies there transposed."""

    def __init__(self, path, file, raw_depth):
        self.image = dataset(file, "images")
        self.depth = dataset(file, "rawDepths" if raw_depth else "depths")
        bits = np.frombuffer(base64.b64decode(TEST_BITS), np.uint8)
        test = np.unpackbits(bits, count=len(self.image))
        super().__init__(path, {"train": np.flatnonzero(test == 0), "test": np.flatnonzero(test)})

    def read(self, pool, name):
        depth = self.depth[name].T.astype(np.float32)
        return to_rgb(Image.fromarray(self.image[name].T)), Image.fromarray(depth), 1


class Packed(Source):
    """Written by `pack`: <pool>/image and <pool>/depth, each in one piece.
    They are mapped: what lies there is read when it is used, and may be larger than memory."""

    def __init__(self, path, file):
        self.mirror_shift = int(file.attrs.get("mirror_shift", 1))
        self.arrays, names = {}, {}
        for pool, (key, (shape, kind)) in product(POOLS, FORMS.items()):
            found = dataset(file, f"{pool}/{key}")
            offset = found.id.get_offset()
            n = len(names.setdefault(pool, range(len(found))))
            if offset is None or found.shape != (n, *shape) or found.dtype != kind:
                raise UserError(f"{path} is damaged ({pool}/{key} {found.shape}): pack it again.")
            mapped = np.memmap(path, kind, "r", offset, found.shape)
            self.arrays[pool, key] = torch.from_numpy(mapped)
        super().__init__(path, names)

    def load(self, pool, indices):
        chunk = slice(indices.start, indices.stop) if isinstance(indices, range) else indices
        image, depth = (self.arrays[pool, key][chunk] for key in FORMS)
        self.check(pool, indices, depth)
        return image, depth

    frames = load


class Rooms(Source):
    """Rooms of `make_rooms`: numbers from 0 to train, from a billion to test, there at most 400."""

    def __init__(self, rooms, device):
        self.rooms, self.device = rooms, device
        self.at_once = 64 if "cuda" in str(device) else 4
        super().__init__(None, {"train": range(rooms), "test": range(10**9, 10**9 + ROOMS)[:rooms]})

    def frames(self, pool, indices):
        numbers = torch.tensor(indices) + self.names[pool].start
        image, depth = make_rooms(numbers, self.device)
        return image.permute(0, 2, 3, 1).cpu(), depth.cpu()


def open_source(data=None, raw_depth=False, rooms=None, device="cpu"):
    """The source behind --data, --raw-depth, --rooms, or NYU on Kaggle; UserError if none."""
    if data and rooms:
        raise UserError("--rooms does nothing with --data: give one of them.")
    if not data and not rooms:
        data = find_kaggle()
    if data is None:
        source = Rooms(rooms or ROOMS, device)
        print(f"data: {source.rooms:,} synthetic rooms, drawn now. {HOW_TO_GET_NYU}")
    elif os.path.isdir(data):
        source = KaggleFolder(Path(os.path.abspath(data)))
    elif os.path.isfile(data):
        source = open_hdf5(os.path.abspath(data), raw_depth)
    else:
        raise UserError(f"--data {os.path.abspath(data)} does not exist.\n{HOW_TO_GET_NYU}")
    if raw_depth and not isinstance(source, LabeledMat):
        raise UserError("--raw-depth chooses a depth of the labelled .mat, and --data is none.")
    return source


def find_kaggle():
    """NYU Depth V2 as Kaggle mounts it or kagglehub keeps it; None elsewhere."""
    cache = os.environ.get("KAGGLEHUB_CACHE") or os.path.expanduser("~/.cache/kagglehub")
    places = KAGGLE_INPUT / "nyu-depth-v2", KAGGLE_INPUT / KAGGLE_NAME, Path(cache, KAGGLE_NAME)
    for place in places:
        if place.is_dir():
            return place
    if KAGGLE_INPUT.is_dir():
        raise UserError(f"{KAGGLE_INPUT} holds no NYU Depth V2: add the data set "
                        "soumikrakshit/nyu-depth-v2 to the notebook, or ask for --rooms 400.")


def open_hdf5(path, raw_depth):
    """An HDF5 file, known by its content, whatever its name."""
    try:
        file = h5py.File(path)
    except OSError as error:
        held = isinstance(error, BlockingIOError | PermissionError)
        advice = "another program holds it, or you may not read it" if held else "get it again"
        raise UserError(f"{path} is no folder, nor HDF5 ({error}): {advice}.") from error

    if str(file.attrs.get("format")) == PACKED:
        return Packed(path, file)
    if "images" in file:
        return LabeledMat(path, file, raw_depth)
    raise UserError(f"{path} was not packed here ({file.attrs.get('format')}): pack it again.")


def dataset(file, name):
    """A dataset of an HDF5 file; UserError if it is missing or its values lie in another file."""
    found = file.get(name)
    if (not isinstance(found, h5py.Dataset) or found.file.filename != file.filename
            or found.external or found.is_virtual or not found.shape):
        raise UserError(f"{file.filename} lacks {name} or has it elsewhere: get or pack it again.")
    return found


def pack(source, path):
    """Write all frames of a source to one .h5: whole or not at all, in bounded memory."""
    if not len(source.names["test"]):
        raise UserError(f"{source.path} lacks nyu2_test.csv.")
    need, free = sum(map(len, source.names.values())) * BYTES, shutil.disk_usage(path.parent).free
    if need > free:
        raise UserError(f"{path.absolute()} needs {need:,} bytes, and {free:,} are free.")
    source.frames("train", range(1))  # sets mirror_shift

    def save(temporary):
        # HDF5 only lays the file out: it would not survive a disk that fills while it writes.
        temporary.touch()
        os.truncate(temporary, need + BYTES)  # or one that is not allowed to grow so large
        offsets = {}
        with h5py.File(temporary, "w") as file:
            file.attrs.update(format=PACKED, mirror_shift=source.mirror_shift)
            for pool, (key, (shape, kind)) in product(POOLS, FORMS.items()):
                shape = len(source.names[pool]), *shape
                made = file.create_dataset(f"{pool}/{key}", shape, kind)
                made[0, 0, 0, 0] = 0  # now it has its place
                offsets[pool, key] = made.id.get_offset()

        with open(temporary, "r+b") as file:
            for pool in POOLS:
                for chunk, *block in source.blocks(pool, range(len(source.names[pool]))):
                    for key, values in zip(FORMS, block):
                        file.seek(offsets[pool, key] + chunk.start * values[0].nbytes)
                        file.write(values.contiguous().numpy())
        stop_on_faults(source)

    with sole_writer(path.parent):
        write(path, save)


# Frames of one split, and batches of them.

def split_indices(n, split, notebook=False):
    """Which of the n frames of its pool are "train", "val" or "test": a range.
    In file order: a random split would leak scenes. Ours: test is the source's own pool, val the
    last 10 % of train. Notebook's: 80/10/10 of train."""
    if split == "test" and not notebook:
        return range(n)
    val = int(0.8 * n) if notebook else n - n // 10
    test = val + int(0.1 * n) if notebook else n
    return {"train": range(val), "val": range(val, test), "test": range(test, n)}[split]


def stop_on_faults(source):
    """UserError with the names of broken frames. Call it when all Frames are loaded."""
    faults = sorted(set(source.faults))
    if faults:
        raise UserError(f"{len(faults)} broken frames:\n  " + "\n  ".join(faults[:20]))


class Frames:
    """One split: image uint8 (n, 192, 256, 3), depth float32 (n, 1, 48, 64), in metres.
    On the device if they fill less than half of it, else in host memory or mapped from a file.
    Says what depth they hold; UserError if there is none."""

    def __init__(self, source, split, device, notebook=False, limit=None):
        pool = "test" if split == "test" and not notebook else "train"
        indices = split_indices(len(source.names[pool]), split, notebook)
        n = len(indices)
        if not n:
            raise UserError(f"{source.path}: no images in split {split}, nyu2_{pool}.csv.")
        if limit and limit < n:
            indices = [indices[i * n // limit] for i in range(limit)]  # evenly spaced
        image, depth = source.load(pool, indices)
        self.mirror_shift = source.mirror_shift

        metres = depth.numpy()
        if not ((metres > 1e-3) & (metres < 10)).any():
            raise UserError(f"split {split} of {source.path} has no pixel between 1 mm and 10 m: "
                            "look at the depth, its scale or its encoding.")
        some = metres[::ceil(len(metres) / 1000)]
        measured = some[some > 0]
        low, self.median, high = np.percentile(measured, [1, 50, 99])
        far = np.mean(measured > 10)
        print(f"{split}: {len(metres):,} images, depth {self.median:.2f} m in the median, 1 % "
              f"below {low:.2f} m, 99 % below {high:.2f} m; {measured.size / some.size:.1%} "
              f"measured, {far:.1%} of that beyond 10 m", flush=True)
        if far > 0.5:
            print(f"warning: most of the depth in {split} is beyond 10 m: is it in metres?")

        # Of all depth and a line of each image. None of rooms: machines round them differently.
        lines = image[:, SIZE[0] // 2].contiguous().numpy()
        self.checksum = 0 if source.rooms else zlib.crc32(metres, zlib.crc32(lines))

        self.device, self.copying = torch.device(device), None
        if self.device.type == "cuda":
            if image.nbytes + depth.nbytes < torch.cuda.mem_get_info()[0] / 2:
                image, depth = image.to(device), depth.to(device)
            else:
                self.copying = torch.cuda.Stream()
        self.image, self.depth = image, depth

    def __len__(self):
        return len(self.image)

    def fetch(self, numbers):
        """Images uint8 (B, 3, 192, 256), channels last, depths (B, 1, 48, 64) of these frames."""
        batch = self.image[numbers], self.depth[numbers]
        if self.copying:  # from host memory, while the GPU still works on the batch before
            computing = torch.cuda.current_stream()
            with torch.cuda.stream(self.copying):
                batch = [x.pin_memory().to(self.device, non_blocking=True) for x in batch]
            computing.wait_stream(self.copying)
            for x in batch:
                x.record_stream(computing)  # not to be freed before it is read
        return batch[0].permute(0, 3, 1, 2), batch[1]

    def batches(self, batch_size, order=None, label="measure"):
        """Yields what `fetch` gives, and progress. Evenly split: cuDNN plans for each size."""
        order = torch.arange(len(self)) if order is None else order
        parts = order.to(self.image.device).tensor_split(ceil(len(order) / batch_size))
        return progress(map(self.fetch, parts), label, len(order), batch_size)


# What is done to a batch, on the device.

@functools.cache
def constant(values, device):
    """A tensor of (nested) tuples, copied to the device once: each copy would make the GPU wait."""
    return torch.tensor(values, device=device)


def normalise(image):
    """What METER takes: RGB 0..1 (B, 3, H, W) minus ImageNet's mean, over its deviation."""
    mean, std = constant((MEAN, STD), image.device).view(2, 3, 1, 1)
    return (image - mean) / std


def augment(image, depth, draws, mirror_shift=1):
    """METER's augmentations, each with p = 0.5 for each frame (Papa et al.).
    image (B, 3, H, W) RGB 0..1; depth (B, 1, h, w) metres; draws (B, 11) in 0..1. Mirror; any
    channel order; colours b * rgb ** g * e, all in 0.9..1.1; depth +-10 cm.
    The mirrored image moves `mirror_shift` pixels to the right, under the points where depth was
    taken. No crops: 48 x 64 depths do not say what lies between them, so a crop is off by 5 cm."""
    draws = draws.to(image.device)[..., None, None, None]  # (B, draws, 1, 1, 1)
    mirror, permute, recolour, shift = (draws[:, :4] < 0.5).unbind(1)

    flipped = F.pad(image.flip(3), (mirror_shift, 0, 0, 0), "replicate")
    image = flipped[..., :image.shape[3]].where(mirror, image)
    depth = depth.flip(3).where(mirror, depth)

    orders = constant(tuple(permutations(range(3))), image.device)          # (6, 3)
    order = orders[(draws[:, 4] * 6).long()].view(-1, 3, 1, 1)              # (B, 3, 1, 1)
    image = image.take_along_dim(order, 1).where(permute, image)

    brightness, gamma, *colours = (0.9 + 0.2 * draws[:, 5:10]).unbind(1)
    recoloured = brightness * image ** gamma * torch.cat(colours, 1)
    image = recoloured.clamp(0, 1).where(recolour, image)

    moved = (depth + 0.2 * draws[:, 10] - 0.1).clamp(min=1e-3)
    depth = moved.where(shift & (depth > 0), depth)
    return image, depth


def depth_metrics(prediction, depth):
    """The usual NYU metrics of each frame: a dict of (B,) tensors, nan where nothing was measured.
    Errors are infinite where a prediction is not finite.
    prediction, depth (B, 1, h, w) metres; pixels with 1e-3 < depth < 10, no crop, the prediction
    clamped to that. delta_i: share of pixels with max(p/d, d/p) < 1.25 ** i."""
    valid = (depth > 1e-3) & (depth < 10)
    p = prediction.clamp(1e-3, 10).where(prediction.isfinite(), torch.inf)
    d = depth.clamp(1e-3, 10)
    error = p - d
    ratio = torch.maximum(p / d, d / p)

    def mean(x):
        return x.where(valid, 0.0).sum((1, 2, 3)) / valid.sum((1, 2, 3))

    return {
        "rmse_m": mean(error.square()).sqrt(),
        "rel": mean(error.abs() / d),
        "log10": mean((p / d).log10().abs()),
        **{f"delta{i}": mean((ratio < 1.25 ** i).float()) for i in (1, 2, 3)}}


def mean_metrics(rows):
    """Means over all measured frames, a dict, of dicts of (B,) tensors; UserError if not finite."""
    means = {key: torch.cat([row[key] for row in rows]).nanmean().item() for key in rows[0]}
    if not all(map(isfinite, means.values())):
        raise UserError(f"the network predicts nan or infinity: {log_line(means)}.")
    return means


# Results out, and flags: what train.py and dissect.py share.

@contextmanager
def sole_writer(folder):
    """Makes a folder and holds it: a second program that wants to write there gets a UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # it may be read-only
        handle = fcntl and os.open(folder, os.O_RDONLY)
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, if killed
    except OSError as error:
        raise UserError(f"cannot write to {folder.absolute()} ({error.strerror}): if another "
                        "program writes there, wait for it or choose another folder.") from error
    try:
        yield
    finally:
        if fcntl:
            os.close(handle)


def write(path, save):
    """Replace `path` by what save(temporary path) writes: never by half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # also a link that somebody put there: never followed
        save(temporary)
        with open(temporary, "r+b") as file:  # Windows flushes no file that is open to read
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path.absolute()}: {error.strerror or error}.") from error
    finally:
        if os.path.exists(temporary):  # False, too, of a name that is too long
            temporary.unlink()


def write_json(path, content):
    write(path, lambda file: file.write_text(json.dumps(content, indent=1, allow_nan=False)))


def write_csv(path, rows):
    """rows: dicts with the same keys."""
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0])
    table.writeheader()
    table.writerows(rows)
    write(path, lambda file: file.write_bytes(text.getvalue().encode()))


DEPTH_COLOURS = ScalarMappable(Normalize(0, 10), "viridis")  # of metres


def new_figure(width, height):
    rcParams["text.usetex"] = False  # LaTeX, where a user wants it, would trip over each _
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def write_figure(path, figure):
    """Returns the figure, so that a notebook shows it."""
    write(path, FigureCanvasAgg(figure).print_png)  # figure.savefig would draw it twice
    return figure


def show_picture(axis, picture, title, unit="", **options):
    """A picture, a tensor, on an axis of its own; with a colour bar if it has a unit."""
    shown = axis.imshow(picture.numpy(force=True), **options)
    axis.set_title(title, fontsize=8)
    axis.set(xticks=[], yticks=[])
    if unit:
        axis.figure.colorbar(shown, ax=axis, label=unit)


def log_line(row):
    """A dict as one line of the log: key value | key value."""
    return " | ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                      for key, value in row.items())


def progress(items, label, n, step=1, unit="images"):
    """Yields `items`, each of `step` of n images, and says how far it is and how long it takes.
    `epoch 3 500/716 | 64.2 images/s | 3 s left`: this line rewrites itself on a terminal; in a
    notebook's output there is one every ten seconds, in a file every half minute."""
    notebook = "JPY_PARENT_PID" in os.environ or "KAGGLE_KERNEL_RUN_TYPE" in os.environ
    rewritten = getattr(sys.stdout, "isatty", bool)() and not notebook
    pause, before, end = 10 if notebook else 30, "", "\n"  # seconds
    if rewritten:
        pause, before, end = 0.1, "\r\033[K", ""
    start = shown = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - shown > pause:
            shown = now
            done = min(number * step, n)
            rate = done / (now - start)
            print(f"{before}{label} {done:,}/{n:,} | {rate:.1f} {unit}/s | "
                  f"{(n - done) / rate:.0f} s left", end=end, flush=True)
    if rewritten:
        print(before, end="", flush=True)


def number(kind, low=0, high=1e9):
    """For argparse: an int or float from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # nor is nan
            raise argparse.ArgumentTypeError(f"{text} is not in the range {low:g} to {high:g}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def new_parser(text):
    """An argparse parser that raises UserError."""
    p = argparse.ArgumentParser(description=text, allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(message):
        raise UserError(f"{message} (--help lists all flags).")

    p.error = error
    return p


def add_source_arguments(p):
    """The flags that choose the frames, the same in train.py and dissect.py."""
    add = p.add_argument
    add("--data", type=Path, help="folder, .mat or .h5; none: Kaggle's mount or rooms")
    add("--raw-depth", action="store_true", help=".mat: depth with holes, not filled in")
    add("--rooms", type=number(int, 10, 1e8), help=f"synthetic ones, {ROOMS} if no data is found")
    add("--min-share", type=number(float, 0, 0.5), default=MIN_SHARE, help="of pixels a bin needs")


def run_command(main):
    """main() as a command: what the user or the system did wrong ends it with one sentence."""
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):  # a Chinese path on a Western Windows
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped: train.py --resume goes on after the last whole epoch.")
    except (MemoryError, RuntimeError) as error:  # RuntimeError: of the GPU, or torch's
        if isinstance(error, RuntimeError) and not re.search("(?i)alloc|of memory", str(error)):
            raise
        sys.exit(f"error: memory is full: halve --batch-size, or pack the frames. ({error})"[:300])


def main(argv=None):
    p = new_parser("Decode NYU Depth V2 once and pack it into one .h5.")
    add = p.add_argument
    add("source", type=Path, help="Kaggle's nyu_data folder or nyu_depth_v2_labeled.mat")
    add("out", type=Path, help="the .h5 to write; it must not exist yet")
    add("--raw-depth", action="store_true", help=".mat: depth with holes, not filled in")
    args = p.parse_args(argv)
    if args.out.suffix != ".h5" or args.out.exists() or not args.out.parent.is_dir():
        raise UserError(f"{args.out.absolute()} must be a new .h5 file in a folder that exists.")

    pack(open_source(args.source, args.raw_depth), args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    run_command(main)
