"""Frames in, batches out: NYU Depth V2 or synthetic rooms, for train.py and dissect.py.

    python data.py nyu_data nyu.h5                       # decode once; from then on --data nyu.h5

A source is Kaggle's folder, the official .mat, an .h5 packed here, or rooms drawn here. Depth is
float32 metres, 0 = missing; its factor follows from format and split, never from the values.
"""
# n frames, B batch, H W image height and width, h w depth height and width, P pixels, K boxes
import argparse
import base64
import csv
import functools
import io
import itertools
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

SIZE, DEPTH_SIZE = (192, 256), (48, 64)                # height, width: METER's input and output
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)         # ImageNet's, of RGB in 0..1
DEPTH_PNG = {  # metres per level, and modes of Pillow: 8-bit train, 16-bit test PNGs
    "train": (10 / 255, ("L",)), "test": (1 / 1000, ("I;16", "I;16B", "I"))}
KAGGLE_MOUNT = Path("/kaggle/input/nyu-depth-v2/nyu_data")
PACKED = "METER frames, version 1"                     # attribute `format` of a packed .h5
DRAWS = 11, 15                     # random numbers that `augment` takes for a frame: plain, zoomed
TEST_BITS = (  # the 654 official test frames among the 1,449 labelled ones, one bit each
    "wIfIH//mAb4AHh/gAAAOD7yAAOADvx///8PwHAAAAEABA4P4AfwHOA/+AAM/8AAB/DgAPAAH4P8AB8/4AAAAH7/8OOAO"
    "P//gPgPAPhj4APwYYcMfn4fM4H+MHzwDAAP////gAfB8DgD//HD8DgAAAABwDgceAOADzn+AA+DwcA4BxgGYwAA/8f9/"
    "eA4/4wH//H5nPwHw//HwfOADx/+APw/+5/BgAPPwOPAZgAH+f4P8DweA/4A=")
HOW_TO_GET_NYU = "README, Data, tells how to get NYU Depth V2 (4.1 GB); then point --data to it."
FOCAL = SIZE[1] * 519 / 640                           # pixels; the Kinect's, as in NYU Depth V2
FURNITURE = [  # from-to of width, height, depth, bottom in metres, way out to the wall (1 is at it)
    ((.5, 1.5), (.6, 2.1), (.3, .6), (0, 0), (1, 1)),       # cabinet
    ((1.3, 2.2), (.4, .8), (.8, 1), (0, 0), (.6, 1)),       # sofa
    ((.8, 1.6), (.4, .7), (.6, 1), (0, 0), (.1, .7)),       # table
    ((.3, .6), (.3, .6), (.3, .6), (0, 0), (.1, 1)),        # stool
    ((.2, .5), (1, 1), (.2, .5), (1.8, 2.1), (.1, .7)),     # lamp, hanging: the ceiling cuts it off
    ((.6, 1.2), (.04, .4), (.2, .3), (1.3, 1.7), (1, 1)),   # shelf
    ((.4, 1.3), (.4, .9), (.03, .04), (1.1, 1.3), (1, 1))]  # picture
BRIGHTNESS = [(.1, .4), (.3, .7), (.6, .85)] + [(.04, .6)] * 7  # floor, walls, ceiling, furniture

def make_rooms(indices, seed=0, device="cpu"):
    """Images (B, 3, 192, 256) uint8, z-depths (B, 1, 48, 64) in metres of the rooms `indices`."""
    rooms = [torch.Generator().manual_seed(seed * 10**6 + i) for i in indices.tolist()]
    def draw(*ranges):  # R of them, or R lists of N of them -> (B, R, N)
        low, high = torch.tensor(ranges).view(len(ranges), -1, 2).unbind(2)
        uniform = torch.stack([torch.rand(low.shape, generator=room) for room in rooms])
        return (low + (high - low) * uniform).to(device)
    def hashed(x):  # -1 .. 1, different wherever x is
        return (x.sin() * 43758.5).frac()
    # Room and camera: x right, y up, z forward in metres, the origin in the middle of the room.
    size = draw((1.2, 3), (1.2, 1.5), (1.4, 4.6))                          # (B, 3, 1), half of it
    camera = draw((-.4, .4), (-.2, .15), (-.9, .2)) * size
    yaw, pitch = draw((-.8, .8), (-.1, .45)).split(1, 1)                   # (B, 1, 1)
    # Furniture along the left, far and right wall (places -3 to -1 to 1 to 3), or further inside.
    half, low, out, place = draw(*zip(*FURNITURE), [(-2.2, 2.2)] * 7).split([3, 1, 1, 1], 1)
    half = half.where(place.abs() < 1, half.flip(1)) / 2                   # (B, 3, K)
    center = torch.cat([place, 0 * place, 2 - place.abs()], 1).clamp(-1, 1) * (size - half) * out
    center[:, 1:2] = low + half[:, 1:2] - size[:, 1:2]
    half, center = torch.cat([size, half], 2), torch.cat([0 * size, center], 2)  # the room is box 0
    # Rays have length 1 along the optical axis, so the way along them is z-depth.
    pixel = torch.arange(math.prod(SIZE), device=device)                   # (P,)
    x = (pixel % SIZE[1] - (SIZE[1] - 1) / 2) / FOCAL
    y = ((SIZE[0] - 1) / 2 - pixel // SIZE[1]) / FOCAL
    y, z = pitch.cos() * y - pitch.sin(), pitch.sin() * y + pitch.cos()    # (B, 1, P)
    ray = torch.cat([yaw.cos() * x + yaw.sin() * z, y, yaw.cos() * z - yaw.sin() * x], 1)
    inverse, depth, box = (1 / ray).clamp(-1e6, 1e6), torch.inf, 0         # never 0 times infinity
    for number in range(half.shape[2]):
        reach = half[:, :, number, None] * inverse.abs()                   # (B, 3, P)
        middle = (center[:, :, number, None] - camera) * inverse
        enter, leave = (middle - reach).amax(1, True), (middle + reach).amin(1, True)
        seen = enter.where((enter > .5) & (enter < leave), torch.inf) if number else leave
        box = torch.where(seen < depth, number, box)                       # (B, 1, P)
        depth = seen.clamp(max=depth)
    # Tiles or planks whose shades follow from their numbers along x, y, z; then light and noise.
    point, index = camera + ray * depth, box.expand(-1, 3, -1)             # (B, 3, P)
    local = (point - center.gather(2, index)) / half.gather(2, index)      # 1 or -1 across the face
    normal = local.sign() * (local.abs() == local.abs().amax(1, True)) * (1 - 2 * (box == 0))
    kind = torch.where(box == 0, 1 - normal[:, 1:2].long(), box + 2)       # floor, walls, ceiling
    spans = (.9, 1.3), (.9, 1.1), (.65, 1.15), (-.3, .25), (.07, 1), (.07, 1), (.07, 1)
    paint = draw(BRIGHTNESS, *[[span] * len(BRIGHTNESS) for span in spans]).relu()
    gray, hue, contrast, width = paint.gather(2, kind.expand(-1, 8, -1)).split([1, 3, 1, 3], 1)
    x, y, z = (point * (normal == 0) / width).floor().split(1, 1)
    shade = hashed(x * 127.1 + y * 311.7 + z * 74.7 + kind + draw((0, 99)))
    way = draw((-.6, .6), (.6, .9), (-.6, .6)) * size - point              # to the lamp
    lamp = torch.cosine_similarity(normal, way)[:, None] / (1 + way.square().sum(1, True) / 6)
    light = .35 + draw((.6, 1.9)) * lamp.relu() + (normal * draw(*[(-.15, .15)] * 3)).sum(1, True)
    image = (gray * hue * (1 + contrast * shade) * light).clamp(0, 1).sqrt()
    image = (image + .03 * hashed(hashed(pixel) * 78.233 + draw(*[(0, 99)] * 3))).clamp(0, 1)
    return ((image * 255).byte().view(-1, 3, *SIZE),
            depth.view(-1, 1, *SIZE)[..., 2::4, 2::4].contiguous())

class Source:
    """Frames in two pools, "train" and "test"; `faults` collects what is wrong with them."""
    def __init__(self, path, names, read=None):
        # names[pool]: files, or numbers from 0; read(pool, name): Pillow's image, depth, its unit
        self.path, self.names, self.read, self.faults = path, names, read, []
        self.sizes = {pool: len(frames) for pool, frames in names.items()}

    def frames(self, pool, indices):
        """uint8 (n, 192, 256, 3), metres (n, 1, 48, 64), resampled by Pillow as in the notebook."""
        def decode(i):
            try:
                image, depth, metres = self.read(pool, self.names[pool][i])
                if image.width * 3 != image.height * 4 or image.size != depth.size:
                    raise ValueError(f"image {image.size}, depth {depth.size}: not one 4:3 size")
                image = image.resize(SIZE[::-1], Image.Resampling.BILINEAR)
                depth = depth.resize(DEPTH_SIZE[::-1], Image.Resampling.NEAREST)
                return np.asarray(image), metres * np.asarray(depth, np.float32)[None]
            except Exception as error:  # noqa: BLE001  a damaged file may raise almost anything
                self.faults.append(f"{self.path}, {pool} frame {self.names[pool][i]}: {error}")
                return np.zeros((*SIZE, 3), np.uint8), np.ones((1, *DEPTH_SIZE), np.float32)
        with ThreadPoolExecutor(os.cpu_count()) as threads:    # at once: Pillow frees the GIL
            pairs = zip(*threads.map(decode, indices))
            return tuple(torch.from_numpy(np.stack(part)) for part in pairs)

def kaggle_folder(path):
    """nyu_data, or its parent: data/nyu2_train.csv and nyu2_test.csv list pairs of files."""
    root, names = path if (path / "data").is_dir() else path / "nyu_data", {}
    for pool in DEPTH_PNG:
        index = (root / "data" / f"nyu2_{pool}.csv").resolve()
        if not index.is_file():
            sys.exit(f"error: {index} does not exist.\n{HOW_TO_GET_NYU}")
        rows = [row for row in csv.reader(index.read_text(errors="replace").split("\n")) if row]
        if odd := [row for row in rows or ["nothing"] if len(row) != 2]:
            sys.exit(f"error: {index}: {odd[0]} is no image and depth. Get the CSV again.")
        names[pool] = [[str((root / cell).resolve()) for cell in row] for row in rows]
    def read(pool, files):
        (image, depth), (metres, modes) = map(Image.open, files), DEPTH_PNG[pool]
        if image.mode not in ("RGB", "RGBA", "P", "L", "LA") or depth.mode not in modes:
            raise ValueError(f"image {image.mode}, depth {depth.mode}: save them as RGB and grey, "
                             "8-bit for training, 16-bit for the test")
        return image.convert("RGB"), depth, metres
    return Source(path, names, read)

def labeled_mat(path, raw_depth):
    """nyu_depth_v2_labeled.mat: MATLAB 7.3, which is HDF5; each image lies there transposed."""
    file, key = h5py.File(path), "rawDepths" if raw_depth else "depths"
    if not {"images", key} <= set(file) or len(file["images"]) != len(file[key]):
        sys.exit(f"error: {path} lacks images or {key}: it is no nyu_depth_v2_labeled.mat.")
    bits = np.unpackbits(np.frombuffer(base64.b64decode(TEST_BITS), np.uint8))[:len(file[key])]
    def read(pool, i):
        image, depth = (np.ascontiguousarray(file[name][i].T) for name in ("images", key))
        return Image.fromarray(image), Image.fromarray(depth.astype(np.float32)), 1
    return Source(path, {"train": np.flatnonzero(bits == 0), "test": np.flatnonzero(bits)}, read)

class Packed(Source):
    """Written by `pack`: <pool>/image uint8 (n, 192, 256, 3), /depth float32 (n, 1, 48, 64)."""
    def __init__(self, path):
        self.file = h5py.File(path)
        if (found := self.file.attrs.get("format")) != PACKED:
            sys.exit(f"error: {path} was not packed by this data.py ({found!r}): pack it again.")
        super().__init__(path, {pool: range(len(x["image"])) for pool, x in self.file.items()})

    def frames(self, pool, indices):                   # h5py is fast row by row, slow with a list
        return tuple(torch.from_numpy(np.stack([self.file[pool][key][i] for i in indices]))
                     for key in ("image", "depth"))

class Rooms(Source):
    """Rooms drawn by `make_rooms`: numbers from 0 for training, from a billion for the test."""
    def __init__(self, rooms, device):
        tests = range(10 ** 9, 10 ** 9 + max(rooms // 5, 1))
        super().__init__("synthetic rooms", {"train": range(rooms), "test": tests})
        self.device = device

    def frames(self, pool, indices):
        rooms = torch.tensor([self.names[pool][i] for i in indices])
        parts = [make_rooms(part, device=self.device) for part in rooms.split(8)]
        image, depth = map(torch.cat, zip(*parts))
        return image.permute(0, 2, 3, 1), depth

def open_source(path, raw_depth=False, rooms=400, device="cpu"):
    """The source behind --data (a path or None); ends the program if there is none."""
    if not path and not KAGGLE_MOUNT.is_dir():
        print(f"data: {rooms:,} synthetic rooms, drawn now. {HOW_TO_GET_NYU}")
        return Rooms(rooms, device)
    path = Path(path or KAGGLE_MOUNT).resolve()
    try:
        if path.is_dir():
            return kaggle_folder(path)
        if path.is_file() and path.suffix in (".mat", ".h5"):
            return labeled_mat(path, raw_depth) if path.suffix == ".mat" else Packed(path)
    except OSError as error:                           # not HDF5, or cut short
        sys.exit(f"error: {path} cannot be opened as HDF5 ({error}). Get it again.")
    sys.exit(f"error: --data {path} does not exist as a folder, .mat or .h5.\n{HOW_TO_GET_NYU}")

def split_indices(sizes, split, notebook=False):
    """(pool, range) of "train", "val" or "test". In file order: a random split would leak scenes.
    Ours: test is the source's own, val the last 10 % of train. Notebook's: 80/10/10 of train."""
    if split == "test" and not notebook:
        return "test", range(sizes["test"])
    n = sizes["train"]
    train, end = (int(0.8 * n), int(0.8 * n) + int(0.1 * n)) if notebook else (n - n // 10, n)
    return "train", {"train": range(train), "val": range(train, end), "test": range(end, n)}[split]

def progress(label, n):
    """Call the result with how many of n are done: `train 500/716 | 64.2 images/s | 3 s left`."""
    start = shown = time.monotonic()
    def show(done):
        nonlocal shown
        now = time.monotonic()
        rate = done / (now - start + 1e-9)
        text = f"{label} {done:,}/{n:,} | {rate:.1f} images/s | {(n - done) / rate:.0f} s left"
        if sys.stdout.isatty():                        # rewritten; in a file, a line every 30 s
            print("\r\033[K" + (text if done < n else ""), end="", flush=True)
        elif now - shown > 30:
            shown = now
            print(text, flush=True)
    return show

def read_blocks(source, pool, indices, label, block=256):
    """Yields (slice, images, depths) block by block; what is wrong goes to the source's faults."""
    show = progress(label, len(indices))
    for start in range(0, len(indices), block):
        numbers = indices[start:start + block]
        image, depth = source.frames(pool, numbers)
        fine = ((depth >= 0) & (depth <= 100)).flatten(1).all(1) & depth.flatten(1).any(1)
        source.faults += [f"{source.path}, {pool} frame {source.names[pool][i]}: depth is nan, "
                          "negative, above 100 m or missing everywhere"
                          for i, good in zip(numbers, fine) if not good]
        yield slice(start, start + len(numbers)), image, depth
        show(start + len(numbers))

def stop_on_faults(source):  # names all that is broken: call it when all Frames are loaded
    if source.faults:
        sys.exit(f"error: {len(source.faults)} broken frames, to be mended or taken out. The first "
                 "twenty:\n  " + "\n  ".join(sorted(source.faults)[:20]))

class Frames:
    """One split, uint8, fed from "device", "host" or "file"; "auto": the first that has room."""
    def __init__(self, source, split, device, feed="auto", notebook=False, limit=None):
        self.source, self.device, self.feed = source, torch.device(device), feed
        self.pool, self.indices = split_indices(source.sizes, split, notebook)
        if not (whole := len(self)):
            sys.exit(f"error: no images in split {split}: the source has {source.sizes}.")
        part = min(limit or whole, whole)              # evenly spaced
        self.indices = [self.indices[n * whole // part] for n in range(part)]
        if feed == "auto":
            need = len(self) * (3 * math.prod(SIZE) + 4 * math.prod(DEPTH_SIZE))   # bytes
            known = getattr(os, "sysconf_names", ())   # free memory; macOS: all; Windows: not said
            pages = [x for x in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES") if x in known]
            host = os.sysconf(pages[0]) * os.sysconf("SC_PAGE_SIZE") if pages else math.inf
            free = torch.cuda.mem_get_info()[0] if self.device.type == "cuda" else host
            self.feed = "device" if need < free / 2 else "host" if need < 0.7 * host else "file"
        self.where = self.device if self.feed == "device" else torch.device("cpu")
        if self.feed == "file" and not isinstance(source, Packed):
            sys.exit("error: frames fed from file must be packed first: python data.py SOURCE nyu.h5")
        size = len(self) if self.feed != "file" else 0
        self.image = torch.empty(size, *SIZE, 3, dtype=torch.uint8, device=self.where)
        self.depth = torch.empty(size, 1, *DEPTH_SIZE, device=self.where)
        for rows, image, depth in read_blocks(source, self.pool, self.indices, f"load {split}"):
            if size:                                   # from a file: only checked for now
                self.image[rows], self.depth[rows] = image, depth

    def __len__(self):
        return len(self.indices)

    def fetch(self, rows):
        """Images uint8 (B, 3, 192, 256), channels last, and depths (B, 1, 48, 64) of these rows."""
        if self.feed == "file":
            pair = self.source.frames(self.pool, [self.indices[row] for row in rows])
        else:
            pair = [x[rows.to(self.where)] for x in (self.image, self.depth)]
        if pair[0].device.type != self.device.type:    # only pinned memory is copied asynchronously
            pair = [x.pin_memory().to(self.device, non_blocking=True) for x in pair]
        return pair[0].permute(0, 3, 1, 2), pair[1]

    def batches(self, batch_size, order=None, first=0):
        """Yields (rows, images, depths) from batch number `first` on."""
        order = torch.arange(len(self), device=self.where) if order is None else order
        for rows in order.split(batch_size)[first:]:
            yield rows, *self.fetch(rows)

@functools.cache
def constant(values, device):
    """A tensor of (nested) tuples, copied to the device once: each copy would make the GPU wait."""
    return torch.tensor(values, dtype=torch.float32, device=device)

def normalise(image):
    """What METER takes: RGB 0..1 (B, 3, H, W) minus ImageNet's mean, over its deviation."""
    mean, std = (constant(x, image.device).view(3, 1, 1) for x in (MEAN, STD))
    return (image - mean) / std

def augment(image, depth, draws, zoom=1.0):
    """METER's augmentations, each with p = 0.5 for each frame (Papa et al.).
    image (B, 3, H, W) RGB 0..1; depth (B, 1, h, w) metres; draws (B, 11 or 15) in 0..1.
    Mirror; another channel order; colours b * rgb ** g * e, all in 0.9..1.1; depth +-10 cm; a crop
    enlarged up to `zoom` times, its depth divided by as much (Eigen et al. 2014)."""
    draws = draws[:, :, None, None, None].to(image.device)                 # (B, D, 1, 1, 1)
    mirror, permute, recolour, shift = (draws[:, :4] < 0.5).unbind(1)      # (B, 1, 1, 1) each
    image, depth = (torch.where(mirror, x.flip(3), x) for x in (image, depth))
    orders = constant(tuple(itertools.permutations(range(3))), image.device).long()    # (6, 3)
    order = orders[(draws[:, 4] * 6).long().flatten(), :, None, None]      # (B, 3, 1, 1)
    image = torch.where(permute, image.gather(1, order.expand_as(image)), image)
    b, g, *e = (0.9 + 0.2 * draws[:, 5:10]).unbind(1)                      # e: for each channel
    image = torch.where(recolour, (b * image ** g * torch.cat(e, 1)).clamp(0, 1), image)
    moved = (depth + 0.2 * draws[:, 10] - 0.1).clamp(min=1e-3)
    depth = torch.where(shift & (depth > 0), moved, depth)
    if zoom > 1:
        part = 1 / (1 + (zoom - 1) * draws[:, 12] * (draws[:, 11] < 0.5))  # of height and width
        middle = (2 * draws[:, None, 13:, :, 0, 0] - 1) * (1 - part)       # (B, 1, 2, 1): x, y
        window = torch.cat([part * torch.eye(2, device=part.device), middle], 3)[:, 0]  # (B, 2, 3)
        grids = [F.affine_grid(window, x.shape, align_corners=False) for x in (image, depth)]
        image = F.grid_sample(image, grids[0], "bilinear", "border", False)
        depth = F.grid_sample(depth, grids[1], "nearest", "border", False) * part
    return image, depth

def depth_metrics(prediction, depth):
    """The usual NYU metrics of each frame: a dict of (B,) tensors, nan where nothing was measured.
    prediction, depth (B, 1, h, w) metres; pixels with 1e-3 < depth < 10, no crop, the prediction
    clamped to that. delta_i: share of pixels with max(p/d, d/p) < 1.25 ** i."""
    valid, p, d = (depth > 1e-3) & (depth < 10), prediction.clamp(1e-3, 10), depth.clamp(1e-3, 10)
    maps = {"rmse_m": (p - d).square(), "rel": (p - d).abs() / d, "log10": (p / d).log10().abs(),
            **{f"delta{i}": (torch.maximum(p / d, d / p) < 1.25 ** i).float() for i in (1, 2, 3)}}
    means = {key: (x * valid).sum((1, 2, 3)) / valid.sum((1, 2, 3)) for key, x in maps.items()}
    return means | {"rmse_m": means["rmse_m"].sqrt()}

def write(path, save):
    """Replace `path` by what save(temporary path) writes, if all goes well; makes its folder."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(temporary)
        with open(temporary, "r+b") as file:           # Windows flushes no file open to read
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error        # h5py's are pages long
        sys.exit(f"error: cannot write {path.resolve()}: {reason}.")
    finally:
        if temporary.exists():
            temporary.unlink()

def line(row):
    """A dict as one line of the log: key value | key value."""
    return " | ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                      for key, value in row.items())

def write_json(path, content):
    write(path, lambda file: file.write_text(json.dumps(content, indent=1)))

def write_csv(path, rows):  # dicts with the keys of the first
    text = io.StringIO()
    csv.writer(text).writerows([rows[0], *(row.values() for row in rows)])     # rows[0]: its keys
    write(path, lambda file: file.write_text(text.getvalue(), newline=""))

def write_figure(path, figure):
    write(path, lambda file: figure.savefig(file, format="png", dpi=110))

def write_pictures(path, lines, heading=None):
    """A grid of pictures: lines of (title, picture, unit of its colour bar or "", for imshow)."""
    shape = len(lines), len(lines[0])
    figure = Figure(figsize=(2.4 * shape[1], 1.9 * shape[0]), layout="constrained")
    figure.suptitle(heading)
    axes = figure.subplots(*shape, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for axis, (title, picture, unit, options) in zip(axes.flat, itertools.chain(*lines)):
        shown = axis.imshow(np.asarray(picture), **options)
        axis.set_title(title, fontsize=8)
        if unit:
            figure.colorbar(shown, ax=axis, label=unit)
    write_figure(path, figure)

def check_folder(path):  # before any work: can it be made and written to?
    there = next(x for x in (path.resolve(), *path.resolve().parents) if os.path.lexists(x))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        sys.exit(f"error: --out {path.resolve()}: {there} is not a folder that can be written to.")

def pack(source, path):
    """Write all frames of a source to one .h5, a row per chunk, atomically, in bounded memory."""
    def save(temporary):
        with h5py.File(temporary, "w") as file:
            file.attrs.update(format=PACKED, source=str(source.path))
            make = file.create_dataset
            for pool, n in source.sizes.items():
                images = make(f"{pool}/image", (n, *SIZE, 3), "u1", chunks=(1, *SIZE, 3))
                depths = make(f"{pool}/depth", (n, 1, *DEPTH_SIZE), "f", chunks=(1, 1, *DEPTH_SIZE))
                for rows, image, depth in read_blocks(source, pool, range(n), f"pack {pool}"):
                    images[rows], depths[rows] = image, depth
            stop_on_faults(source)
    write(path, save)

def number(kind, low=-math.inf, high=math.inf):
    """For argparse: a finite int or float from low to high."""
    def parse(text):
        if not low <= (value := kind(text)) <= high or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not in the range {low} to {high}")
        return value
    parse.__name__ = kind.__name__                     # argparse says "invalid int value"
    return parse

def add_source_arguments(p):
    """The flags that choose the frames, the same in train.py and dissect.py."""
    p.add_argument("--data", type=Path, help="folder, .mat or .h5; none: Kaggle's mount or rooms")
    p.add_argument("--raw-depth", action="store_true", help=".mat: depth with holes, not filled in")
    p.add_argument("--rooms", type=number(int, 10), default=400, help="synthetic training rooms")
    p.add_argument("--feed", choices=["auto", "device", "host", "file"], default="auto",
                   help="where frames wait: GPU, memory, .h5; auto: the first that has room")
    p.add_argument("--batch-size", type=number(int, 1), default=8, help="images a step")

def main(argv=None):
    p = argparse.ArgumentParser(description="Decode NYU Depth V2 once and pack it into one .h5.")
    p.add_argument("source", type=Path, help="Kaggle's nyu_data folder or nyu_depth_v2_labeled.mat")
    p.add_argument("out", type=Path, help="the .h5 to write; it must not exist yet")
    p.add_argument("--raw-depth", action="store_true", help=".mat: depth with holes, not filled in")
    args = p.parse_args(argv)
    if args.out.suffix != ".h5" or args.out.exists() or not args.out.parent.is_dir():
        sys.exit(f"error: {args.out.resolve()} must be a new .h5 file in a folder that exists.")
    pack(source := open_source(args.source, args.raw_depth), args.out)
    print(f"{args.out}: {source.sizes} frames, {args.out.stat().st_size / 1e9:.2f} GB")

if __name__ == "__main__":
    main()
