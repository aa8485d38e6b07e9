"""How fast is what, side by side in one run.

    python tests/benchmark.py                  # on the CPU; --quick: in a minute or two
    python tests/benchmark.py --gpu --compile  # on a CUDA GPU: three minutes, one to compile
    python tests/benchmark.py --profile 64     # operators and kernels of a training step

Every line is a median after warm-up, with its time against that of the line it is compared with. On
a CPU the lines of a block take turns and a ratio is the median over the rounds: a busy moment of
the machine slows all. Of a training step also how near it is to what memory allows: what backward
needs is written and read once, and so are the gradients of it, at the speed at which a large tensor
is copied. Nothing is asserted here.
"""
import copy
import csv
import io
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from functools import cache, partial
from math import inf
from operator import attrgetter
from pathlib import Path
from statistics import median
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
    """Prints a block of the table: how long each line takes for so many images.

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
            own, ratio, limit = times[name][2:], "", ""
            seconds = median(own)
            if base in times:
                ratio = f"{median(a / b for a, b in zip(own, times[base][2:])):.2f}"
            if hasattr(runs[name], "limit"):
                limit = f"{runs[name].limit / seconds:.0%}"
            print(f"{name:52}{images / seconds:10.0f}{seconds * 1e3:10.2f}{ratio:>8}{limit:>8}",
                  flush=True)
        del runs, run
        if gpu:
            torch.cuda.empty_cache()


@cache
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


def loop_selectivity(features, depth, thresholds, min_share=0.0):
    """model.assigned_selectivity as the notebook has it: up-sample, loop over images and bins."""
    up = F.interpolate(features.abs().float(), depth.shape[-2:], mode="bilinear")
    bins = len(thresholds) - 1
    sums, counts = up.new_zeros(up.shape[1], bins), up.new_zeros(bins)
    for image in range(len(depth)):
        for k in range(bins):
            inside = (depth[image, 0] > thresholds[k]) & (depth[image, 0] <= thresholds[k + 1])
            if inside.any():
                counts[k] += inside.sum()
                sums[:, k] = sums[:, k] + up[image][:, inside].sum(1)
    return meter.unit_selectivity(sums / counts.clamp(min=1), counts, min_share).mean()


# What is timed. The first two make a function without arguments.

def training_step(frames, size, words, kind="eager"):
    """train.py's step with these flags, or as "graph", "compiled", or as the "notebook" has it."""
    args, device = train.parse_args(words), frames.device
    gpu, notebook = device.type == "cuda", kind == "notebook"
    layout = torch.contiguous_format if notebook else torch.channels_last
    term = loop_selectivity if notebook else meter.assigned_selectivity
    _, autocast, scaler = train.mixed_precision(args.amp, device)

    # As in train.run.
    torch.manual_seed(0)
    model = meter.METER().to(device, memory_format=layout).train()
    model.decoder.conv2d_out.to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.AdamW(model.parameters(), fused=not notebook, capturable=gpu)
    optimizer.param_groups[0]["lr"] = torch.zeros(
        (), device=device, dtype=torch.float32 if gpu else torch.float64)
    parts = model, copy.deepcopy(model), optimizer, scaler, autocast, args
    step = train.make_step(*parts)

    image, depth = frames.fetch(torch.arange(size))
    image = image.contiguous(memory_format=layout)
    draws = torch.rand(size, data.DRAWS, device=device)
    rates = train.step_rates(args, 0, 100)[0].to(device)

    def run():
        with patch.object(train, "assigned_selectivity", term):
            step(image, depth, draws, rates)

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
    model = meter.METER()
    with torch.no_grad(), meter.record(model, LAYERS) as features:
        model(data.normalise(image / 255))
    leaves = [x.detach().requires_grad_() for x in features.values()]
    edges = [meter.layer_thresholds(x.shape[1]) for x in leaves]
    return lambda: sum(map(term, leaves, [depth] * len(leaves), edges)).backward()


@torch.no_grad()
def bare_pass(model, frames, batch_size):
    for image, _ in frames.batches(batch_size):
        model(data.normalise(image / 255))


def feed(frames):
    for _ in frames.batches(64, torch.randperm(len(frames))):
        pass


def bare_pillow(pairs):
    for photo, depth in pairs:
        np.asarray(Image.open(photo).convert("RGB").resize((256, 192), Image.BILINEAR))
        np.asarray(Image.open(depth).resize((64, 48), Image.NEAREST))


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
        torch.cuda.synchronize() if gpu else None

    time_of = attrgetter("self_device_time_total" if gpu else "self_cpu_time_total")
    for title, kind in ("kernels", "CUDA"), ("operators", "CPU"):
        events = [event for event in profiled.key_averages() if time_of(event)
                  and event.device_type.name == kind and not event.is_user_annotation]
        if events:
            print(f"\n{title} of a step, batch {size}: {sum(map(time_of, events)) / 1e3:.1f} ms")
        for event in sorted(events, key=time_of, reverse=True)[:25]:
            print(f"{time_of(event) / 1e3:10.2f} ms{event.count:7} x  {event.key[:120]}")


def dissection_block(block, frames, batch_size):
    model = meter.METER().to(frames.device, memory_format=torch.channels_last).eval()
    block(f"dissection, {len(frames)} images, 16 layers, batch {batch_size}", len(frames), [
        ("bare forward pass", "", partial, bare_pass, model, frames, batch_size),
        ("forward and dissection", "bare forward pass", partial, dissect.measure, model, frames,
         list(meter.LAYERS), False, batch_size)])


def cpu_table(block, frames, folder):
    n, size = len(frames), 16
    block(f"training step, batch {size}", size, [
        (NOTEBOOK, "", training_step, frames, size, ["--notebook", *PULL], "notebook"),
        ("ours", NOTEBOOK, training_step, frames, size, []),
        ("ours, regularised", "ours", training_step, frames, size, PULL)])
    block(f"the regulariser's term alone, batch {size}", size, [
        ("ours", "", regulariser, frames, size, meter.assigned_selectivity),
        ("a loop over images and bins", "ours", regulariser, frames, size, loop_selectivity)])
    dissection_block(block, frames, size)

    photo = Image.fromarray(frames.image[0].numpy()).resize((640, 480))
    photo.save(folder / "image.jpg")
    photo.convert("L").save(folder / "depth.png")
    (folder / "nyu2_train.csv").write_text("image.jpg,depth.png\n" * n)
    source = data.KaggleFolder(folder)
    block("feed, batches of 64", n, [("from memory", "", partial, feed, frames)])
    block("decoding 640x480 JPEG and PNG", n, [
        ("bare Pillow, one core", "", partial, bare_pillow, source.names["train"]),
        ("data.py", "bare Pillow, one core", partial, source.frames, "train", range(n))])


def gpu_table(block, frames, folder):
    for size in 16, 64, 256, 1024:
        lines = []
        if size == 16:
            lines += [(NOTEBOOK, "", ["--notebook", *PULL], "notebook")]
        if size <= 64:
            lines += [("eager", NOTEBOOK, []), ("eager, regularised", "eager", PULL)]
        lines += [("CUDA graph", "eager", [], "graph"),
                  ("CUDA graph, regularised", "CUDA graph", PULL, "graph")]
        lines = [(name, base, training_step, frames, size, *how) for name, base, *how in lines]
        try:
            block(f"training step, batch {size}", size, lines)
        except torch.OutOfMemoryError:
            print("does not fit into this GPU's memory")

    some, host = copy.copy(frames), copy.copy(frames)
    some.image, some.depth = frames.image[:654], frames.depth[:654]
    dissection_block(block, some, 128)
    host.image, host.depth = frames.image.cpu(), frames.depth.cpu()
    host.copying = torch.cuda.Stream()
    block("feed, batches of 64", len(frames), [("from the GPU", "", partial, feed, frames),
                                               ("from the host", "", partial, feed, host)])
    block("rooms", 64, [
        ("drawn 64 at a time", "", partial, data.make_rooms, torch.arange(64), frames.device)])
    print_epochs(folder)


def main(argv=None):
    p = data.new_parser(__doc__.splitlines()[0])
    p.add_argument("--quick", action="store_true", help="on a CPU: fewer rounds and images")
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

    n = args.profile or (1024 if gpu else 32 if args.quick else 64)
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"METER-XXS on {name}, torch {torch.__version__}, memory copied at "
          f"{copy_speed(device) / 1e9:.0f} GB/s")
    with redirect_stdout(io.StringIO()):
        frames = data.Frames(data.Rooms(n + n // 8 + 9, device), "train", device, limit=n)
    if args.profile:
        return print_profile(frames, n)

    print(f"\n{'':52}{'images/s':>10}{'ms':>10}{'ratio':>8}{'limit':>8}")
    block = partial(race, device=device, rounds=3 if args.quick else 9)
    with tempfile.TemporaryDirectory() as folder:
        (gpu_table if gpu else cpu_table)(block, frames, Path(folder))
    if args.compile:
        size = 64 if gpu else 16
        block(f"compiled training step, batch {size}", size, [
            ("compiled, regularised", "", training_step, frames, size, PULL, "compiled")])


if __name__ == "__main__":
    data.run_command(main)
