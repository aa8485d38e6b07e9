"""Train METER on NYU Depth V2 or synthetic rooms, with or without the selectivity regulariser.

    python train.py                                                  # synthetic rooms, no download
    python train.py --data nyu.h5 --neuron-selective --alpha -0.1    # NYU; units pulled to a depth

Writes settings, log, checkpoints, figures and test metrics to runs/baseline or runs/selective.

The regulariser (You et al. 2021) rewards units that answer to one range of depth only:
    loss = balanced + alpha * selectivity * balanced.detach()
METER's loss is a hundred or more, theirs about 1: just added, as with --notebook, -0.1 would pull
a hundredth as hard, or less. So alpha is relative; it grows from 0 in a tenth of the run.

Sizes: B batch, C channels (units), h w depth map.
"""
import argparse
import copy
import io
import sys
import time
import warnings
from math import cos, isfinite, nan, pi
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import model as meter
from data import UserError, depth_metrics, log_line, normalise, number, show_picture
from model import CENTIMETRES, GREY_LEVELS, assigned_selectivity, layer_thresholds, notebook_depth

# What --notebook changes of the flags' defaults.
NOTEBOOK = {"epochs": 20, "batch_size": 64, "lr": 1e-4, "schedule": "constant", "amp": "off",
            "augment": False, "min_share": 0.0, "layers": ["dec_3", "enc_4"]}
TERMS = "loss", "loss_depth", "loss_ssim", "loss_normal", "loss_grad"
PLACES = {"data", "rooms", "raw_depth", "out", "resume"}  # flags that may change on resume
DRAW_EVERY = 20  # seconds: drawing takes longer than a short epoch on a GPU


# METER's balanced loss (Papa et al., as released). In the release's units, centimetres.

def mean_without(missing, x, window, padding=0):
    """Mean of a map over the cells in whose window x window pixels none is missing."""
    valid = 1 - F.max_pool2d(missing, window, stride=1, padding=padding)
    return (x * valid).sum() / valid.sum().clamp(min=1)


def slopes(x):
    """Sobel slopes of a map (B, 1, h, w) along x and y: (B, 2, h, w)."""
    offset = torch.arange(-1.0, 2.0, device=x.device)
    kernel = torch.outer(2 - offset.abs(), -offset)  # 1 0 -1, 2 0 -2, 1 0 -1
    return F.conv2d(x, torch.stack([kernel, kernel.T])[:, None], padding=1)


def normal_cosine(slope_p, slope_d):
    """Cosine between the normals (-x, -y, 1) of two surfaces with these slopes: (B, 1, h, w)."""
    def dot(a, b):
        return (a * b).sum(1, keepdim=True) + 1

    return dot(slope_p, slope_d) / (dot(slope_p, slope_p).sqrt() * dot(slope_d, slope_d).sqrt())


def ssim(p, d):
    """Structural similarity of two maps (B, 1, h, w) in windows of 11 x 11: (B, 1, h-10, w-10)."""
    offset = torch.arange(-5.0, 6.0, device=p.device)
    gauss = torch.softmax(-offset ** 2 / (2 * 1.5 ** 2), 0).expand(5, 1, 1, 11)
    maps = torch.cat([p, d, p * p, d * d, p * d], 1)
    maps = F.conv2d(F.conv2d(maps, gauss, groups=5), gauss.mT, groups=5)
    mean_p, mean_d, mean_pp, mean_dd, mean_pd = maps.split(1, 1)

    variance_p = mean_pp - mean_p ** 2
    variance_d = mean_dd - mean_d ** 2
    covariance = mean_pd - mean_p * mean_d
    c1, c2 = (0.01 * 1000) ** 2, (0.03 * 1000) ** 2  # for a range of 1000: 10 m in centimetres
    return ((2 * mean_p * mean_d + c1) * (2 * covariance + c2)
            / ((mean_p ** 2 + mean_d ** 2 + c1) * (variance_p + variance_d + c2)))


def loss_terms(prediction, depth, units_per_metre=CENTIMETRES):
    """The four terms of the balanced loss: a dict of scalars.
    prediction, depth (B, 1, h, w) metres, 0 = missing; the loss is taken in `units_per_metre`.
    Missing pixels, and all that a Sobel or SSIM window draws from them, are left out of the means.
    The paper multiplies the gradient term by 0.5, the release divides by it: we divide."""
    p, d = prediction * units_per_metre, depth * units_per_metre
    missing = (depth <= 0).float()
    slope_p, slope_d = slopes(p), slopes(d)
    steepness = (slope_p - slope_d).abs().sum(1, keepdim=True)
    tilt = (1 - normal_cosine(slope_p, slope_d)).abs()
    return {
        "loss_depth": mean_without(missing, (p - d).abs(), 1),
        "loss_ssim": 100 * mean_without(missing, 1 - ssim(p, d), 11),
        "loss_normal": 100 * mean_without(missing, tilt, 3, padding=1),
        "loss_grad": mean_without(missing, steepness, 3, padding=1) / 0.5}


def balanced_loss(prediction, depth, units_per_metre=CENTIMETRES):
    """METER's loss: scalar; arguments as in loss_terms."""
    return sum(loss_terms(prediction, depth, units_per_metre).values())


def objective(prediction, depth, features, alpha, notebook=False, min_share=0.0):
    """What training minimises, and its terms: a dict of scalars.
    prediction, depth (B, 1, h, w) metres; features: the recorded activations (B, C, h, w) of each
    regularised layer; alpha: float or scalar, negative. You et al. add alpha * selectivity to a
    loss of about 1; here it is relative to the loss, as METER's is some hundreds. notebook: its
    units, its bins, and alpha just added."""
    terms = loss_terms(prediction, depth, GREY_LEVELS if notebook else CENTIMETRES)
    balanced = sum(terms.values())

    binned = notebook_depth(depth) if notebook else depth
    scores = {}
    for name, x in features.items():
        thresholds = layer_thresholds(x.shape[1], notebook, x.device)
        scores[f"selectivity_{name}"] = assigned_selectivity(x, binned, thresholds, min_share)

    pull = alpha * sum(scores.values())
    if not notebook:
        pull = pull * balanced.detach()
    return {"loss": balanced + pull, **terms, **scores}


# The recipe.

def mixed_precision(amp, device):
    """What --amp means on this device: its name, autocast and GradScaler. Sets the backends."""
    gpu = device.type == "cuda"
    if amp == "auto":
        amp = "off"
        if gpu:
            amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if amp == "fp16" and not gpu:
        raise UserError("--amp fp16 needs a GPU; a CPU has --amp off and --amp bf16.")

    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, for what stays fp32,
    torch.backends.cudnn.allow_tf32 = False     # but not for the loss, which squares centimetres
    torch.backends.cudnn.deterministic = True   # same seed, same machine, same result:
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # it adds up gradients in any order

    half = torch.float16 if amp == "fp16" else torch.bfloat16
    autocast = torch.autocast(device.type, half, enabled=amp != "off")
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    return amp, autocast, scaler


def learning_rate(epoch, epochs, peak, schedule):
    """epoch may be a fraction. cosine: 5 % warm-up, then to 0. step: a tenth every 20 (METER's)."""
    if schedule == "constant":
        return peak
    if schedule == "step":
        return peak * 0.1 ** (epoch // 20)
    done = epoch / epochs
    warm_up = (done + 1e-3) / 0.05  # the first step moves, too
    cosine = 0.5 + 0.5 * cos(pi * max(done - 0.05, 0) / 0.95)
    return peak * min(warm_up, cosine)


def step_rates(args, epoch, steps):
    """Learning rate, alpha, and weight in the moving average, of an epoch's steps: (steps, 3)."""
    rates = []
    for step in range(epoch * steps, (epoch + 1) * steps):
        at = step / steps  # the epoch, in fractions
        rate = learning_rate(at, args.epochs, args.lr, args.schedule)
        growth = min(1, 10 * at / args.epochs)  # regularised at once, a run ends up worse
        weight = max(0.01, 9 / (9 + step))      # over a tenth of the steps so far, at most 100
        if args.notebook:
            growth, weight = 1, 1
        rates.append((rate, args.alpha * growth, weight))
    return torch.tensor(rates, dtype=torch.float64)


def state_tensors(optimizer):
    """All that AdamW remembers. Saved as one vector: as hundreds of tensors it would take long."""
    return [x for state in optimizer.state.values() for x in state.values()]


def make_step(model, average, optimizer, scaler, autocast, args, mirror_shift=1):
    """The training step, as a function of tensors alone."""
    step_objective = torch.compile(objective, dynamic=False) if args.compile else objective
    pairs = zip(average.state_dict().values(), model.state_dict().values())
    pairs = [(mean, x) for mean, x in pairs if x.is_floating_point()]

    def step(image, depth, draws, rates):
        """Trains on a batch; returns all terms of its loss, (terms,), which stay on the device.
        image (B, 3, 192, 256) uint8; depth (B, 1, 48, 64) metres; draws (B, 11), see
        `augment`; rates (3,), a row of `step_rates`."""
        optimizer.param_groups[0]["lr"].copy_(rates[0])
        _, alpha, weight = rates.float()

        image = image / 255
        if args.augment:
            image, depth = data.augment(image, depth, draws, mirror_shift)
        with autocast, meter.record(model, args.layers) as features:
            prediction = model(normalise(image))  # (B, 1, 48, 64) metres
        terms = step_objective(prediction, depth, features, alpha, args.notebook, args.min_share)

        optimizer.zero_grad(set_to_none=True)
        scaler.scale(terms["loss"]).backward()
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            for mean, x in pairs:
                mean.lerp_(x, weight)
        return torch.stack(list(terms.values())).detach()

    return step


def recorded(step):
    """The same step as a CUDA graph: recorded once, then replayed.
    A GPU gets all kernels of a step at once, and need not wait until Python has launched each. They
    work in the memory in which they were recorded, so what is new in a step is copied there. The
    first step runs as it is: it finds memory and kernels, which cannot be recorded."""
    fixed, graph, output = [], None, None

    def call(*inputs):
        nonlocal graph, output
        if not fixed:
            fixed.extend(x.clone() for x in inputs)
            return step(*inputs)

        if graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = step(*fixed)
        for x, new in zip(fixed, inputs):
            x.copy_(new)
        graph.replay()
        return output.clone()

    return call


@torch.no_grad()
def evaluate(model, frames, args):
    """Means over a split: the usual metrics per image, and METER's loss per batch as `val_loss`.
    With --notebook also the objective, regulariser included, by which it chooses its best epoch."""
    model.eval()
    layers = args.layers if args.notebook else []
    large = frames.device.type == "cuda" and not args.notebook

    rows = []
    for image, depth in frames.batches(max(args.batch_size, 256 * large)):
        with meter.record(model, layers) as features:
            prediction = model(normalise(image / 255))  # (B, 1, h, w) metres
        terms = objective(prediction, depth, features, args.alpha, args.notebook, args.min_share)
        row = depth_metrics(prediction, depth)
        row["val_loss"] = sum(terms[key] for key in TERMS[1:])[None]
        if args.notebook:
            row["val_objective"] = terms["loss"][None]
        rows.append(row)
    return data.mean_metrics(rows)


# Figures.

def constant_rmse(frames):
    """RMSE in metres of an answer that looks at no image: the mean depth everywhere."""
    mean = frames.depth[frames.depth > 0].mean().expand_as(frames.depth)
    return data.mean_metrics([depth_metrics(mean, frames.depth)])["rmse_m"]


def draw_curves(rows, constant, path):
    """Loss, RMSE and the selectivity of the regularised layers over the epochs: the figure."""
    scores = [key for key in rows[0] if key.startswith("selectivity_")]
    panels = {"loss": ["loss", "val_loss"], "RMSE on val, metres": ["rmse_m"],
              "selectivity in training, -1 .. 1": scores}
    rows = rows[1:] or rows  # the first epoch would dwarf the others
    figure = data.new_figure(13 if scores else 9, 3.6)
    for axis, (title, keys) in zip(figure.subplots(1, 3 if scores else 2), panels.items()):
        for key in keys:
            axis.plot([row["epoch"] for row in rows], [row[key] for row in rows], ".-", label=key)
        if keys == ["rmse_m"]:
            axis.axhline(constant, ls="--", color="gray", label="mean depth everywhere")
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    return data.write_figure(path, figure)


@torch.no_grad()
def draw_predictions(model, splits, title, path):
    """The first and the last frame of each split: image, true and predicted depth, error."""
    model = copy.deepcopy(model).cpu()  # for two images cuDNN would first plan for a second
    figure = data.new_figure(9.6, 7.8)
    figure.suptitle(title)
    axes = iter(figure.subplots(2 * len(splits), 4))
    for name, frames in splits.items():
        images, depths = (x.cpu() for x in frames.fetch(torch.tensor([0, len(frames) - 1])))
        predictions = model(normalise(images / 255))
        errors = depth_metrics(predictions, depths)["rmse_m"]
        for image, depth, prediction, rmse, row in zip(images, depths, predictions, errors, axes):
            true, guess = (x[0].where(depth[0] > 0, nan) for x in (depth, prediction))
            span = {"vmin": 0, "vmax": depth.max().item()}
            show_picture(row[0], image.permute(1, 2, 0), f"{name} image")
            show_picture(row[1], true, "true depth", **span)
            show_picture(row[2], guess, "predicted depth", "metres", **span)
            show_picture(row[3], guess - true, f"error (red: too near), RMSE {rmse:.2f} m",
                         "metres", vmin=-2, vmax=2, cmap="RdBu")
    return data.write_figure(path, figure)


# The command.

def parse_args(argv=None):
    p = data.new_parser(__doc__.splitlines()[0])
    data.add_source_arguments(p)
    add = p.add_argument
    add("--batch-size", type=number(int, 1), default=8, help="images a step")
    # the regulariser
    add("--neuron-selective", action="store_true", help="regularise units of --layers")
    add("--alpha", type=number(float, -1e3, 0), default=-0.1, help="its weight: 0 none, -1 strong")
    add("--layers", nargs="+", choices=meter.LAYERS, default=["dec_1"],
        metavar="LAYER", help=f"to regularise, out of {', '.join(meter.LAYERS)}")
    # the network and its training
    add("--variant", choices=meter.VARIANTS, default="xxs", help="size of METER")
    add("--init", type=Path, help="checkpoint to start from, not random weights")
    add("--epochs", type=number(int, 1), default=24, help="passes over the training split")
    add("--lr", type=number(float, 1e-9, 1), default=2e-3, help="AdamW's peak rate")
    add("--schedule", choices=["cosine", "step", "constant"], default="cosine",
        help="of --lr: warm-up and cosine to 0, METER's tenth every 20 epochs, or none")
    add("--augment", action=argparse.BooleanOptionalAction, default=True, help="as METER, no crops")
    add("--notebook", action="store_true",
        help=f"as the notebook, literal alpha, its bins and split; unless given, {NOTEBOOK}")
    # the run
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of weights, order, augment")
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto",
        help="mixed precision; auto: bf16, or else fp16, on a GPU, off on a CPU")
    add("--compile", action="store_true", help="torch.compile; slow to start")
    add("--out", type=Path, help="run folder; none: runs/baseline or runs/selective")
    add("--resume", action="store_true", help="continue from last.pt in --out")
    if p.parse_args(argv).notebook:
        p.set_defaults(**NOTEBOOK)
    args = p.parse_args(argv)

    given = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    idle = given & {"--alpha", "--layers", "--min-share"}
    if idle and not args.neuron_selective:
        p.error(f"{', '.join(sorted(idle))} does nothing without --neuron-selective")
    args.layers = [x for x in meter.LAYERS if args.neuron_selective and x in args.layers]
    args.out = args.out or Path("runs", "selective" if args.neuron_selective else "baseline")
    return args


def start_or_resume(args, config):
    """The network as training finds it, and what last.pt holds of an earlier part of the run."""
    last = args.out / "last.pt"
    if args.resume and last.exists():
        try:
            model, state = meter.load_checkpoint(last)
        except meter.CheckpointError as error:
            raise UserError(f"{error} Copy best.pt over it, or --init best.pt.") from error
        old = state["config"] if "adamw" in state else {}
        differ = [f"{key} {old.get(key)}, not {value}"
                  for key, value in config.items() if old.get(key) != value]
        if old and state["best_epoch"] < state["epoch"] and not (args.out / "best.pt").exists():
            differ.append("no best.pt beside it")
        if differ:
            raise UserError(f"{last.absolute()} has {', '.join(differ)}: give it or another --out.")
        return model, state

    files = "last.pt best.pt log.csv config.json metrics.json curves.png predictions.png"
    for name in files.split():
        if (args.out / name).exists():
            raise UserError(f"{args.out.absolute()} holds a run ({name}): --resume its last.pt (or "
                            "copy best.pt there), or choose another --out.")
    if args.resume:
        print(f"nothing to resume in {args.out.absolute()}: a new run.")
    if args.init:
        model, _ = meter.load_checkpoint(args.init)
        if model.variant != args.variant:
            raise UserError(f"--init {args.init} is METER {model.variant}, not {args.variant}.")
        return model, {}

    # In metres: to answer in centimetres, as released, weights must first grow, and grow alike.
    torch.manual_seed(args.seed)
    return meter.METER(args.variant, GREY_LEVELS if args.notebook else 1), {}


def check_compiler(device):
    """UserError before any work if torch.compile cannot work here."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:  # noqa: BLE001  no compiler, no Triton, a Python too new for it
        raise UserError(f"--compile does not work here: {str(error)[:200]}") from error
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")


def save_epoch(out, checkpoint):
    """Writes last.pt and what follows from it: a run that was killed meanwhile does so again."""
    buffer = io.BytesIO()  # torch.save itself says nothing useful of a full disk
    torch.save(checkpoint, buffer)
    for name in ["last.pt"] + ["best.pt"] * (checkpoint["epoch"] == checkpoint["best_epoch"]):
        data.write(out / name, lambda file: file.write_bytes(buffer.getbuffer()))
    data.write_csv(out / "log.csv", checkpoint["rows"])
    data.write_json(out / "config.json", checkpoint["config"])


def stop_on_nan(history, names, epoch):
    """UserError if a term of the loss was nan or infinite in some step: names the first."""
    for step, values in enumerate(history.tolist(), 1):
        broken = [name for name, value in zip(names, values) if not isfinite(value)]
        if broken:
            raise UserError(f"epoch {epoch + 1}, step {step}: {', '.join(broken)} is "
                            "nan or infinite: try a lower --lr or --amp off. last.pt is kept.")


def main(argv=None):
    """Trains; returns the metrics of best.pt on the test split."""
    args = parse_args(argv)
    with data.sole_writer(args.out):
        return run(args)


def run(args):
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    amp, autocast, scaler = mixed_precision(args.amp, device)
    if args.compile:
        check_compiler(device)
    names = [*TERMS, *(f"selectivity_{layer}" for layer in args.layers)]  # of the terms of the loss

    # The settings. Those that say where things are may change when a run goes on.
    config = {key: str(value) if isinstance(value, Path) else value
              for key, value in vars(args).items()}
    model, state = start_or_resume(args, {key: config[key] for key in config.keys() - PLACES})
    source = data.open_source(args.data, args.raw_depth, args.rooms, device)
    config |= {"data": source.path and str(source.path), "rooms": source.rooms}

    # The frames.
    splits = {split: data.Frames(source, split, device, args.notebook)
              for split in ("train", "val", "test")}
    data.stop_on_faults(source)
    train, val, test = splits.values()
    if not 0.5 < train.median / test.median < 2:
        print("warning: depth in train and test differs by a factor: is the scale the same?")
    sums = {split: [len(frames), frames.checksum] for split, frames in splits.items()}
    if state.get("frames", sums) != sums:
        raise UserError(f"--resume: the frames of {args.out.absolute()} are others: {sums}, not "
                        f"{state['frames']} (their number, their checksum).")
    if len(train) < args.batch_size:
        raise UserError(f"--batch-size {args.batch_size}: there are {len(train)} training images.")

    # The network, and the moving average of its weights, which is what is judged and saved.
    # Channels last, but for one weight, whose gradient takes cuDNN a tenth of a step that way.
    model.to(device, memory_format=torch.channels_last)
    model.decoder.conv2d_out.to(memory_format=torch.contiguous_format)
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, capturable=gpu)  # decay 0.01
    optimizer.param_groups[0]["lr"] = torch.zeros(
        (), device=device, dtype=torch.float32 if gpu else torch.float64)
    if state:
        for x in model.parameters():
            x.grad = torch.zeros_like(x)
        optimizer.step()  # at a rate of 0: makes what it remembers, and changes no weight
        tensors = state_tensors(optimizer)
        for x, values in zip(tensors, state["adamw"].split([x.numel() for x in tensors])):
            x.copy_(values.view_as(x))
        model.load_state_dict(state["training"])
        if state["scaler"]:  # of fp16
            scaler.load_state_dict(state["scaler"])
        save_epoch(args.out, state)
    if args.compile:
        model.compile(dynamic=False)
    step = make_step(model, average, optimizer, scaler, autocast, args, train.mirror_shift)
    step = recorded(step) if gpu else step

    print(f"{torch.cuda.get_device_name() if gpu else 'CPU'}, amp {amp} | METER {args.variant} | "
          f"alpha {args.alpha if args.layers else 0} | {args.out.absolute()}")
    rows = state.get("rows", [])  # of log.csv, one for each epoch that is done
    constant, drawn = constant_rmse(val), time.monotonic()
    steps = len(train) // args.batch_size  # whole batches: a graph, and cuDNN, have one size

    def draw_figures():
        draw_curves(rows, constant, args.out / "curves.png")
        draw_predictions(average, {"training": train, "validation": val},
                         f"{args.out.name.replace('$', '_')}, epoch {len(rows)}",  # no formula
                         args.out / "predictions.png")

    for epoch in range(len(rows), args.epochs):
        # What an epoch draws depends on the seed and its number alone: resumed runs are the same.
        rng = torch.Generator().manual_seed((args.seed * 100_003 + epoch) % 2**63)
        order = torch.randperm(len(train), generator=rng)[:steps * args.batch_size]
        draws = torch.rand(len(train), data.DRAWS, generator=rng)[order].to(device)
        rates = step_rates(args, epoch, steps).to(device)
        start = time.monotonic()

        model.train()
        history = []  # on the device: .item() would make a GPU wait
        batches = train.batches(args.batch_size, order, f"epoch {epoch + 1}")
        for (image, depth), draw, rate in zip(batches, draws.split(args.batch_size), rates):
            history.append(step(image, depth, draw, rate))

        history = torch.stack(history)
        stop_on_nan(history, names, epoch)
        seconds = time.monotonic() - start
        row = {"epoch": epoch + 1, **dict(zip(names, history.mean(0).tolist()))}
        if args.layers:
            row["selectivity"] = history[:, len(TERMS):].mean().item()
        row |= evaluate(average, val, args)
        row |= {"lr": rates[-1, 0].item(), "seconds": seconds, "images/s": len(order) / seconds}
        rows.append(row)
        short = "epoch", "loss", "rmse_m", "delta1", "selectivity", "seconds", "images/s"
        print(log_line({key: row[key] for key in short if key in row}), flush=True)

        score = "val_objective" if args.notebook else "rmse_m"
        save_epoch(args.out, {
            "model": average.state_dict(), "units_per_metre": model.units_per_metre,
            "config": config, "frames": sums, "rows": rows, "epoch": epoch + 1,
            "best_epoch": min(rows, key=lambda row: row[score])["epoch"],
            "training": model.state_dict(), "scaler": scaler.state_dict(),
            "adamw": torch.cat([x.flatten() for x in state_tensors(optimizer)])})
        if time.monotonic() - drawn > DRAW_EVERY:
            draw_figures()
            drawn = time.monotonic()

    draw_figures()
    model, _ = meter.load_checkpoint(args.out / "best.pt")
    metrics = {"split": "test", "images": len(test), **evaluate(model.to(device), test, args)}
    data.write_json(args.out / "metrics.json", metrics)
    print(f"best.pt | {log_line(metrics)}\nnext: python dissect.py {args.out / 'best.pt'} --viz")
    return metrics


if __name__ == "__main__":
    data.run_command(main)
