"""How fast is what, side by side in one run: python tests/benchmark.py [--quick]

Every line is a median after warm-up, in images per second, with the ratio of its time to the time
it is compared with; a GPU is synchronised. Nothing is asserted here: machines differ.
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import dissect
import model as meter
import train

LAYERS = ["dec_3", "enc_4"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(run, repeats):
    """Median seconds of run() after two calls of warm-up."""
    times = []
    for n in range(repeats + 2):
        start = time.perf_counter()
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[2:]))


def report(name, images, own, base=None):
    memory = torch.cuda.max_memory_allocated() / 2**20 if DEVICE.type == "cuda" else 0
    ratio = "" if base is None else f"{own / base:10.3f}"
    print(f"{name:58}{images / own:12.1f}{own * 1e3:12.2f}{ratio:>10}"
          + (f"{memory:10.0f}" if memory else ""), flush=True)
    return own


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
        if compiled:
            self.model.compile(dynamic=False)
            self.objective = torch.compile(train.objective, dynamic=False)
        self.autocast = torch.autocast(DEVICE.type, getattr(torch, {
            "fp16": "float16"}.get(amp, "bfloat16")), enabled=amp != "off")

    def __call__(self):
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
        loss.backward()
        self.optimizer.step()


def selectivity_term(image, depth, term, repeats):
    """Seconds of the regulariser alone, forward and backward, on recorded activations."""
    model = meter.METER().to(DEVICE)
    with torch.no_grad(), meter.record(model, LAYERS) as features:
        model(data.normalise(image / 255))
    leaves = [activation.detach().requires_grad_() for activation in features.values()]

    def run():
        sum(term(leaf, depth, meter.layer_thresholds(leaf.shape[1], False, DEVICE))
            for leaf in leaves).backward()

    return seconds(run, repeats)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--quick", action="store_true", help="batch 16 only, few repeats")
    args = p.parse_args()
    sizes, repeats = ([16], 5) if args.quick else ([16, 64, 256], 9)
    gpu = DEVICE.type == "cuda"
    name = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} threads"
    print(f"METER-XXS on {DEVICE} ({name}), torch {torch.__version__}\n")
    print(f"{'':58}{'images/s':>12}{'ms':>12}{'ratio':>10}" + "       MiB" * gpu)

    folder = Path(tempfile.mkdtemp())
    data.pack(data.Rooms(2 * max(sizes), DEVICE), folder / "rooms.h5")
    packed = data.Packed(folder / "rooms.h5")
    frames = data.Frames(packed, "train", DEVICE, "device", limit=max(sizes))
    for size in sizes:
        _, image, depth = next(frames.batches(min(size, len(frames))))
        size = len(image)
        print(f"\ntraining step, batch {size}")
        notebook = report("eager fp32 NCHW, as the notebook", size, seconds(
            Step(image, depth, nchw=True), repeats))
        plain = report("ours: channels last, fused AdamW", size, seconds(
            Step(image, depth), repeats), notebook)
        report("  with the regulariser (ratio to plain)", size, seconds(
            Step(image, depth, LAYERS), repeats), plain)
        report("  with a loop over images and bins", size, seconds(
            Step(image, depth, LAYERS, loop=True), 3), plain)
        for amp in ["bf16"] + ["fp16"] * (DEVICE.type == "cuda"):
            own = report(f"{amp} (ratio to the notebook)", size, seconds(
                Step(image, depth, amp=amp), repeats), notebook)
            report(f"  {amp} with the regulariser (ratio to plain {amp})", size, seconds(
                Step(image, depth, LAYERS, amp=amp), repeats), own)
            if not args.quick:
                own = report(f"{amp} compiled (ratio to the notebook)", size, seconds(
                    Step(image, depth, amp=amp, compiled=True), repeats), notebook)
                report(f"  {amp} compiled, regulariser (ratio to plain)", size, seconds(
                    Step(image, depth, LAYERS, amp=amp, compiled=True), repeats), own)
        ours = report("the regulariser's term alone", size, selectivity_term(
            image, depth, meter.assigned_selectivity, repeats))
        report("  as a loop over images and bins (ratio to ours)", size, selectivity_term(
            image, depth, loop_selectivity, 3), ours)

    size = min(64, len(frames))
    subset = data.Frames(packed, "train", DEVICE, "device", limit=size)
    model = meter.METER().to(DEVICE, memory_format=torch.channels_last).eval()
    print(f"\ndissection, {size} images, batch 16, all 16 layers")

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

    bare = report("bare forward pass", size, seconds(forward, repeats))
    report("  forward and dissection (ratio to bare)", size, seconds(
        lambda: dissect.measure(model, subset, list(meter.LAYERS)), repeats), bare)
    report("  forward and loops over images and bins", size, seconds(loop, 1), bare)

    print("\nfeeding alone, batch 64")
    for feed in ["device"] + ["host"] * (DEVICE.type == "cuda") + ["file"]:
        fed = data.Frames(packed, "train", DEVICE, feed, limit=size)
        report(f"packed, from {feed}", size, seconds(
            lambda fed=fed: list(fed.batches(64)), repeats))
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

    def pillow():
        for photo, depth in pairs:
            image = Image.open(photo).convert("RGB")
            np.asarray(image.resize((256, 192), Image.Resampling.BILINEAR))
            np.asarray(Image.open(depth).resize((64, 48), Image.Resampling.NEAREST))

    bare = report("bare Pillow, one core: 640x480 JPEG and PNG", size, seconds(pillow, 3))
    report("decoded by data.py on all cores (ratio to bare)", size, seconds(
        lambda: jpeg.frames("train", range(size)), 3), bare)


if __name__ == "__main__":
    main()
