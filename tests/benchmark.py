"""How fast is what, side by side in one run.

    python tests/benchmark.py                  # on the CPU; --quick: in a minute or two
    python tests/benchmark.py --gpu --compile  # on a CUDA GPU: three minutes, one to compile
    python tests/benchmark.py --profile 64     # operators and kernels of a training step

Every line is a median after warm-up, with its time against that of the line it is compared with. On
a CPU the lines of a block take turns: a busy moment of the machine slows all. Of a training step
also the share of the speed that memory allows: what backward needs is written and read once, and so
are its gradients, at the speed at which a large tensor is copied. Nothing is asserted here.
"""
import copy
import csv
import functools
import io
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from math import inf
from operator import attrgetter
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import dissect
import model as meter
import train

LAYERS = ["dec_3", "enc_4"]  # the notebook's pair
PULL = ["--neuron-selective", "--layers", *LAYERS]
NOTEBOOK = "as the notebook: fp32, NCHW, loops over bins"


def race(title, images, lines, device, rounds):
    """Prints a block of the table: of so many images, each line's median.

    lines: (name, name of the line to compare with, what makes the function to time, arguments).
    """
    print(f"\n{title}", flush=True)
    gpu = device.type == "cuda"
    calls = 5 if gpu else 1  # a GPU works while Python prepares the next
    times = {}
    for group in [[line] for line in lines] if gpu else [lines]:  # alone, or taking turns
        runs = {name: make(*arguments) for name, _, make, *arguments in group}
        begin = time.perf_counter()
        for n in range(rounds + 2):  # two for warm-up
            if gpu and n > 3 and time.perf_counter() - begin > 3:
                break
            for name, run in runs.items():
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                if gpu:
                    torch.cuda.synchronize()
                times.setdefault(name, []).append((time.perf_counter() - start) / calls)

        for name, base, *_ in group:
            own = np.array(times[name][2:])  # seconds
            ratio = f"{np.median(own / times[base][2:]):.2f}" if base in times else ""
            limit = getattr(runs[name], "limit", 0) / np.median(own)
            print(f"{name:52}{images / np.median(own):10.0f}{np.median(own) * 1e3:10.2f}"
                  f"{ratio:>8}{f'{limit:.0%}' if limit else '':>8}", flush=True)
        del runs, run
        if gpu:
            torch.cuda.empty_cache()


@functools.cache
def copy_speed(device):
    """Bytes a second that are read or written while a tensor of 256 MiB is copied."""
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    timer = Timer("target.copy_(source)", num_threads=torch.get_num_threads(),
                  globals={"source": source, "target": source.clone()})
    return 2 * len(source) / timer.blocked_autorange().median


def memory_limit(run, device):
    """Seconds that a training step would take if memory alone held it up."""
    sizes = {}  # of what autograd saves, each piece of memory once

    def note(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return 4 * sum(sizes.values()) / copy_speed(device)


def loop_responses(features, depth, thresholds):
    """As the notebook: up-sample, then loop over images and bins; (C, K) means, (K,) counts."""
    up = F.interpolate(features, depth.shape[-2:], mode="bilinear", align_corners=False)
    bins = len(thresholds) - 1
    sums, counts = features.new_zeros(features.shape[1], bins), features.new_zeros(bins)
    for image in range(len(depth)):
        for k in range(bins):
            inside = (depth[image, 0] > thresholds[k]) & (depth[image, 0] <= thresholds[k + 1])
            if inside.any():
                counts[k] += inside.sum()
                sums[:, k] = sums[:, k] + up[image][:, inside].sum(1)
    return sums / counts.clamp(min=1), counts


def loop_selectivity(features, depth, thresholds, min_share=0.0):
    """In place of model.assigned_selectivity."""
    means, counts = loop_responses(features.float().abs(), depth, thresholds)
    return meter.unit_selectivity(means, counts, min_share).mean()


# Makers of what is timed: each returns a function without arguments.

def training_step(frames, size, words, kind="eager"):
    """train.py's step with these flags, or "graph", "compiled", or as the "notebook" has it."""
    args, device = train.parse_args(words), frames.device
    gpu, notebook = device.type == "cuda", kind == "notebook"
    layout = torch.contiguous_format if notebook else torch.channels_last
    term = loop_selectivity if notebook else meter.assigned_selectivity
    _, autocast, scaler = train.mixed_precision(args.amp, device)

    torch.manual_seed(0)
    model = meter.METER().to(device, memory_format=layout).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=not notebook, capturable=gpu)
    optimizer.param_groups[0]["lr"] = torch.zeros(
        (), device=device, dtype=torch.float32 if gpu else torch.float64)
    parts = model, copy.deepcopy(model), optimizer, scaler, autocast, args
    image, depth = frames.fetch(torch.arange(size))
    image = image.contiguous(memory_format=layout)
    draws = torch.rand(size, data.DRAWS, device=device)
    rates = train.step_rates(args, 0, 100)[0].to(device)

    def run():
        train.mixed_precision(args.amp, device)  # sets the backends: another line may follow
        with patch.object(train, "assigned_selectivity", term):
            step(image, depth, draws, rates)

    step = train.make_step(*parts)
    if not notebook:
        run.limit = memory_limit(run, device)
    if kind == "compiled":
        args.compile = True
        model.compile(dynamic=False)
        step = train.make_step(*parts)
    if gpu and kind in ("graph", "compiled"):
        step = train.recorded(step)
    return run


def regulariser(frames, size, term):
    """The regulariser's term alone, forward and backward, on recorded activations."""
    image, depth = frames.fetch(torch.arange(size))
    model = meter.METER().to(frames.device)
    with torch.no_grad(), meter.record(model, LAYERS) as features:
        model(data.normalise(image / 255))
    leaves = [x.detach().requires_grad_() for x in features.values()]

    def run():
        sum(term(x, depth, meter.layer_thresholds(x.shape[1], False, depth.device))
            for x in leaves).backward()

    return run


def dissection(frames, batch_size, how):
    """A pass over the frames: "bare", as dissect.py ("ours"), or with "loops" for all layers."""
    model = meter.METER().to(frames.device, memory_format=torch.channels_last).eval()

    @torch.no_grad()
    def run():
        if how == "ours":
            return dissect.measure(model, frames, list(meter.LAYERS), batch_size=batch_size)
        for image, depth in frames.batches(batch_size):
            with meter.record(model, meter.LAYERS if how == "loops" else []) as features:
                model(data.normalise(image / 255))
            for x in features.values():
                loop_responses(x, depth, meter.layer_thresholds(x.shape[1], False, x.device))

    return run


def rooms(device):
    return lambda: data.make_rooms(torch.arange(64), device=device)


def feed(frames, place):
    """Batches of 64, in random order, of frames that lie on the device `place`."""
    frames, order = copy.copy(frames), torch.randperm(len(frames))
    frames.image, frames.depth = frames.image.to(place), frames.depth.to(place)
    frames.copying = torch.cuda.Stream() if frames.device != frames.image.device else None
    return lambda: [None for _ in frames.batches(64, order)]


def decoding(frames, folder, how):
    """640x480 JPEGs and PNGs: by "bare" Pillow on one core, or as data.py on all."""
    pairs = [(folder / f"{n}.jpg", folder / f"{n}.png") for n in range(len(frames))]
    for image, pair in zip(frames.image.numpy(), pairs):
        photo = Image.fromarray(image).resize((640, 480))
        photo.save(pair[0])
        photo.convert("L").save(pair[1])
    (folder / "nyu2_train.csv").write_text("".join(f"{x.name},{y.name}\n" for x, y in pairs))
    source = data.KaggleFolder(folder)

    def bare():
        for photo, depth in pairs:
            np.asarray(Image.open(photo).convert("RGB").resize((256, 192), Image.BILINEAR))
            np.asarray(Image.open(depth).resize((64, 48), Image.NEAREST))

    return bare if how == "bare" else lambda: source.frames("train", range(len(pairs)))


# The command.

def print_epochs(folder):
    """Three epochs of train.py on 716 rooms, and how long they take beside their steps."""
    saved, save_epoch = [], train.save_epoch

    def save(*args):
        save_epoch(*args)
        saved.append(time.monotonic())

    start = time.monotonic()
    with patch.multiple(train, save_epoch=save, DRAW_EVERY=inf), redirect_stdout(io.StringIO()):
        train.main(["--rooms", "795", "--epochs", "3", "--batch-size", "16", "--out", str(folder)])
    total = time.monotonic() - start
    with open(folder / "log.csv", newline="") as file:
        steps = [float(row["seconds"]) for row in csv.DictReader(file)]
    beside = np.diff(saved) - steps[1:]  # of the second and third: the first one warms up
    print(f"\ntrain.py, three epochs of 716 rooms, batch 16: {total:.1f} s from start to metrics; "
          f"an epoch's steps {steps[1]:.3f} s, beside them {beside.mean():.3f} s", flush=True)


def print_profile(frames, size):
    """Where the time of an eager, regularised step goes."""
    gpu = frames.device.type == "cuda"
    run = training_step(frames, size, PULL)
    run()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu) as profiled:
        run()
        run()

    time_of = attrgetter("self_device_time_total" if gpu else "self_cpu_time_total")
    for title, kind in ("kernels", "CUDA"), ("operators", "CPU"):
        events = [event for event in profiled.key_averages()
                  if event.device_type.name == kind and not event.is_user_annotation]
        total = sum(map(time_of, events)) / 2e3
        if total:
            print(f"\n{title} of a step, batch {size}: {total:.1f} ms")
        for event in sorted(events, key=time_of, reverse=True)[:25]:
            print(f"{time_of(event) / 2e3:10.2f} ms{event.count // 2:7} x  {event.key[:100]}")


def main(argv=None):
    p = data.new_parser(__doc__.splitlines()[0])
    p.add_argument("--quick", action="store_true", help="on a CPU: fewer rounds")
    p.add_argument("--gpu", action="store_true", help="on a CUDA GPU, batches of 16 to 1,024")
    p.add_argument("--compile", action="store_true", help="also a compiled step, as the last")
    p.add_argument("--profile", type=data.number(int, 1), nargs="?", const=16, metavar="BATCH",
                   help="only where the time of a training step goes")
    args = p.parse_args(argv)
    if args.gpu and not torch.cuda.is_available():
        p.error("--gpu: torch finds no CUDA GPU")
    gpu = args.gpu or (args.profile and torch.cuda.is_available())
    device = torch.device("cuda" if gpu else "cpu")
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")

    n = args.profile or (1024 if gpu else 64)
    with redirect_stdout(io.StringIO()):
        frames = data.Frames(data.Rooms(n + n // 8 + 9, device), "train", device, limit=n)
        some = data.Frames(data.Rooms(800, device), "train", device, limit=654) if gpu else frames
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"METER-XXS on {name}, torch {torch.__version__}, memory copied at "
          f"{copy_speed(device) / 1e9:.0f} GB/s")
    if args.profile:
        return print_profile(frames, n)

    print(f"\n{'':52}{'images/s':>10}{'ms':>10}{'ratio':>8}{'limit':>8}")
    block = functools.partial(race, device=device, rounds=3 if args.quick else 9)
    for size in (16, 64, 256, 1024) if gpu else [16]:
        lines = []
        if size == 16:
            lines += [(NOTEBOOK, "", ["--notebook", "--neuron-selective"], "notebook")]
        if size <= 64:
            lines += [("ours", NOTEBOOK, []), ("ours, regularised", "ours", PULL)]
        if gpu:
            lines += [("one CUDA graph", "ours", [], "graph"),
                      ("one CUDA graph, regularised", "one CUDA graph", PULL, "graph")]
        else:
            lines += [("ours, regularised, bf16", "ours, regularised", [*PULL, "--amp", "bf16"])]
        block(f"training step, batch {size}", size,
              [(name, base, training_step, frames, size, *how) for name, base, *how in lines])

    images, size = len(some), 128 if gpu else 16
    lines = [("bare forward pass", "", dissection, some, size, "bare"),
             ("dissection", "bare forward pass", dissection, some, size, "ours"),
             ("loops over images and bins", "bare forward pass", dissection, some, size, "loops")]
    block(f"dissection, {images} images, 16 layers, batch {size}", images, lines[:2 if gpu else 3])
    with tempfile.TemporaryDirectory() as folder:
        if gpu:
            block("rooms", 64, [("drawn 64 at a time", "", rooms, device)])
            block("feed, batches of 64", n, [
                ("from the GPU", "", feed, frames, "cuda"), ("from the host", "", feed, frames, "cpu")])
            print_epochs(Path(folder))
        else:
            block("the regulariser's term alone, batch 16", 16, [
                ("ours", "", regulariser, frames, 16, meter.assigned_selectivity),
                ("loops over images and bins", "ours", regulariser, frames, 16, loop_selectivity)])
            block("feed, batches of 64", n, [("from memory", "", feed, frames, "cpu")])
            block("decoding 640x480 JPEG and PNG", n, [
                ("bare Pillow, one core", "", decoding, frames, Path(folder), "bare"),
                ("data.py", "bare Pillow, one core", decoding, frames, Path(folder), "ours")])
    if args.compile:
        size = 64 if gpu else 16
        block(f"compiled training step, batch {size}", size, [
            ("compiled, regularised", "", training_step, frames, size, PULL, "compiled")])


if __name__ == "__main__":
    data.run_command(main)
