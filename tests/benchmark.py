"""How fast is what, side by side in one run: python tests/benchmark.py [--quick] [--batch-size N]

Every line is a median after warm-up, in images per second, with its time against that of the line
it is compared with. The lines of a block take turns and a ratio is the median over the rounds: a
busy moment of the machine slows both. A GPU is synchronised. Nothing is asserted here.

Of a training step also how near it is to what memory allows: all that backward needs is written
and read once, and so are the gradients of it, at the speed at which a large tensor is copied.
"""
import argparse
import functools
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import dissect
import model as meter
import train

LAYERS = ["dec_3", "enc_4"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def race(title, images, lines, repeats=9):
    """Prints a block of the table; lines: (name, function, number of the line to compare with)."""
    print(f"\n{title}")
    gpu, times, memory = DEVICE.type == "cuda", [[] for _ in lines], [0] * len(lines)
    for _ in range(repeats + 2):                       # two for warm-up
        for n, (_, run, _) in enumerate(lines):
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            run()
            if gpu:
                torch.cuda.synchronize()
                memory[n] = torch.cuda.max_memory_allocated() / 2**20
            times[n].append(time.perf_counter() - start)
    times = np.array(times)[:, 2:]                     # (lines, repeats) seconds
    for (name, run, base), own, peak in zip(lines, times, memory):
        ratio = "" if base is None else f"{np.median(own / times[base]):.3f}"
        limit = f"{run.limit / np.median(own):.0%}" if getattr(run, "limit", 0) else ""
        print(f"{name:58}{images / np.median(own):12.1f}{np.median(own) * 1e3:12.2f}{ratio:>10}"
              f"{limit:>10}" + f"{peak:10.0f}" * gpu, flush=True)


@functools.cache
def copy_speed():
    """Bytes a second that are read or written while a tensor of 256 MiB is copied."""
    source = torch.zeros(2**28, dtype=torch.uint8, device=DEVICE)
    timer = Timer("target.copy_(source)", num_threads=torch.get_num_threads(),
                  globals={"source": source, "target": source.clone()})
    return 2 * len(source) / timer.blocked_autorange().median


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


def loop_selectivity(features, depth, thresholds):
    return meter.unit_selectivity(*loop_responses(features.abs(), depth, thresholds)).mean()


class Step:
    """One training step of METER-XXS as train.py does it, with its choices as arguments."""

    def __init__(self, image, depth, layers=(), amp="off", compiled=False, nchw=False, loop=False):
        torch.manual_seed(0)
        self.image = image.contiguous() if nchw else image
        self.depth, self.layers, self.loop = depth, layers, loop
        self.model = meter.METER().to(DEVICE).train()
        if not nchw:
            self.model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3, fused=not nchw)
        self.objective = train.objective
        self.amp, self.autocast, self.scaler = train.mixed_precision(amp, DEVICE)
        sizes = {}                                     # of what autograd saves, each memory once
        def note(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor
        if not loop:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                self()
        self.limit = 4 * sum(sizes.values()) / copy_speed()    # seconds
        if compiled:
            self.model.compile(dynamic=False)
            self.objective = torch.compile(train.objective, dynamic=False)

    def __call__(self):
        train.mixed_precision(self.amp, DEVICE)        # sets the backends: another line may follow
        with self.autocast, meter.record(self.model, self.layers) as features:
            prediction = self.model(data.normalise(self.image / 255))
        if self.loop:
            loss = train.balanced_loss(prediction, self.depth)
            for activation in features.values():
                edges = meter.layer_thresholds(activation.shape[1], False, DEVICE)
                loss = loss - 0.1 * loss.detach() * loop_selectivity(
                    activation.float(), self.depth, edges)
        else:
            loss = self.objective(prediction, self.depth, features, -0.1)["loss"]
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


def selectivity_term(image, depth, term):
    """The regulariser alone, forward and backward, on recorded activations."""
    model = meter.METER().to(DEVICE)
    with torch.no_grad(), meter.record(model, LAYERS) as features:
        model(data.normalise(image / 255))
    leaves = [activation.detach().requires_grad_() for activation in features.values()]

    def run():
        sum(term(leaf, depth, meter.layer_thresholds(leaf.shape[1], False, DEVICE))
            for leaf in leaves).backward()

    return run


def step_lines(image, depth, quick):
    lines = [("eager fp32 NCHW, as the notebook", Step(image, depth, nchw=True), None)]
    for amp in ["off", "bf16"] + ["fp16"] * (DEVICE.type == "cuda"):
        for compiled in [False] + [True] * (not quick):
            kind, plain = amp.replace("off", "ours, fp32") + " compiled" * compiled, len(lines)
            choices = {"amp": amp, "compiled": compiled}
            lines += [(f"{kind} (ratio to the notebook)", Step(image, depth, **choices), 0),
                      ("  with the regulariser (ratio to without)",
                       Step(image, depth, LAYERS, **choices), plain)]
    loop = "a loop over images and bins (ratio to"
    return [*lines, (f"ours, fp32, with {loop} without)", Step(image, depth, LAYERS, loop=True), 1),
            (f"NCHW with {loop} ours regularised)",
             Step(image, depth, LAYERS, nchw=True, loop=True), 2)]


def bare_pillow(pairs):
    """Decoding and resizing with nothing around it: what data.py is measured against."""
    for photo, depth in pairs:
        image = Image.open(photo).convert("RGB")
        np.asarray(image.resize((256, 192), Image.Resampling.BILINEAR))
        np.asarray(Image.open(depth).resize((64, 48), Image.Resampling.NEAREST))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--quick", action="store_true", help="batch 16 only, not compiled")
    p.add_argument("--batch-size", type=int, nargs="+", help="of the training steps")
    args = p.parse_args()
    sizes = args.batch_size or ([16] if args.quick else [16, 64, 256])
    gpu = DEVICE.type == "cuda"
    name = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} threads"
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
    print(f"METER-XXS on {DEVICE} ({name}), torch {torch.__version__}, "
          f"memory copied at {copy_speed() / 1e9:.0f} GB/s\n")
    print(f"{'':58}{'images/s':>12}{'ms':>12}{'ratio':>10}{'limit':>10}" + "       MiB" * gpu)

    folder = Path(tempfile.mkdtemp())
    data.pack(data.Rooms(2 * max(64, *sizes), "cpu"), folder / "rooms.h5")
    packed = data.Packed(folder / "rooms.h5")
    frames = data.Frames(packed, "train", DEVICE, "device", limit=max(64, *sizes))
    for size in sizes:
        torch._dynamo.reset()                          # or it stops compiling after eight variants
        _, image, depth = next(frames.batches(size))
        rounds = 9 if gpu or size <= 64 else 3         # on two cores a round of 256 takes minutes
        race(f"training step, batch {size}", size, step_lines(image, depth, args.quick), rounds)
        race("the regulariser's term alone, forward and backward", size, [
            ("ours", selectivity_term(image, depth, meter.assigned_selectivity), None),
            ("a loop over images and bins", selectivity_term(image, depth, loop_selectivity), 0)],
            rounds)

    size = 64
    subset = data.Frames(packed, "train", DEVICE, "device", limit=size)
    model = meter.METER().to(DEVICE, memory_format=torch.channels_last).eval()

    @torch.inference_mode()
    def forward():
        for _, image, _ in subset.batches(16):
            model(data.normalise(image / 255))

    @torch.inference_mode()
    def loop():
        for _, image, depth in subset.batches(16):
            with meter.record(model, meter.LAYERS) as features:
                model(data.normalise(image / 255))
            for activation in features.values():
                edges = meter.layer_thresholds(activation.shape[1], False, DEVICE)
                loop_responses(activation, depth, edges)

    race(f"dissection, {size} images, batch 16, all 16 layers", size, [
        ("bare forward pass", forward, None),
        ("  forward and dissection",
         lambda: dissect.measure(model, subset, list(meter.LAYERS)), 0),
        ("  forward and loops over images and bins", loop, 0)])
    race("feeding alone, batch 64", size, [
        (f"packed, from {feed}",
         functools.partial(lambda fed: list(fed.batches(64)),
                           data.Frames(packed, "train", DEVICE, feed, limit=size)), None)
        for feed in ["device"] + ["host"] * gpu + ["file"]])

    noise = torch.rand(size, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    noise = F.interpolate(noise, (480, 640), mode="bicubic").clamp(0, 1).mul(255).byte()
    pairs = []
    for n, photo in enumerate(noise):
        pairs.append((folder / f"{n}.jpg", folder / f"{n}.png"))
        Image.fromarray(photo.permute(1, 2, 0).numpy()).save(pairs[-1][0])
        Image.fromarray(photo[0].numpy() | 1).save(pairs[-1][1])
    (folder / "data").mkdir()
    for pool in "train", "test":
        rows = "".join(f"{photo},{depth}\n" for photo, depth in pairs)
        (folder / "data" / f"nyu2_{pool}.csv").write_text(rows)
    jpeg = data.kaggle_folder(folder)

    cores = os.cpu_count()
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        shares = [pairs[n::cores] for n in range(cores)]
        race("decoding 640x480 JPEG and PNG", size, [
            ("bare Pillow, one core", lambda: bare_pillow(pairs), None),
            (f"bare Pillow, {cores} processes", lambda: list(pool.map(bare_pillow, shares)), 0),
            (f"data.py, {cores} threads (ratio to the processes)",
             lambda: jpeg.frames("train", range(size)), 1)])


if __name__ == "__main__":
    main()
