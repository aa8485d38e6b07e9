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
import os
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
            own = np.array(times[name][2:])  # seconds
            ratio = f"{np.median(own) / np.median(times[base][2:]):.2f}" if base in times else ""
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


def loop_selectivity(features, depth, thresholds, min_share=0.0):
    """model.assigned_selectivity as the notebook does it: up-sample, then loop over images, bins."""
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


# Each of these makes a function to time.

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
    with torch.no_grad(), meter.record(meter.METER(), LAYERS) as features:
        meter.METER()(data.normalise(image / 255))
    leaves = [x.detach().requires_grad_() for x in features.values()]
    return lambda: sum(term(x, depth, meter.layer_thresholds(x.shape[1])) for x in leaves).backward()


def dissection(frames, batch_size, layers):
    """dissect.py's pass over the frames; without layers a bare forward pass."""
    model = meter.METER().to(frames.device, memory_format=torch.channels_last).eval()

    @torch.no_grad()
    def bare():
        for image, _ in frames.batches(batch_size):
            model(data.normalise(image / 255))

    return (lambda: dissect.measure(model, frames, layers, batch_size=batch_size)) if layers else bare
