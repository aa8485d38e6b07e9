"""Train METER on NYU Depth V2 or synthetic rooms, with or without the selectivity regulariser.

    python train.py                                          # synthetic rooms, no download
    python train.py --data nyu.h5 --neuron-selective --alpha -0.1    # NYU; units pulled to a depth

Writes settings, log, checkpoints, figures and test metrics to runs/baseline or runs/selective.

The regulariser (You et al. 2021) rewards units that answer to one range of depth only:
    loss = balanced + alpha * selectivity * balanced.detach()
METER's loss is some hundreds, theirs about 1: just added, as with --notebook, -0.1 would pull a
thousandth as hard. So alpha is relative; it grows from 0 in a tenth of the run.
"""
import argparse
import contextlib
import copy
import io
import math
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import data
import model as meter

NOTEBOOK = {"epochs": 20, "batch_size": 64, "lr": 1e-4, "schedule": "constant", "amp": "off",
            "augment": False}

def loss_terms(prediction, depth, units_per_metre=meter.CENTIMETRES):
    """The four terms of METER's balanced loss as released, a dict of scalars.
    prediction, depth (B, 1, h, w) metres, 0 = missing; the loss is taken in `units_per_metre`. The
    paper multiplies the gradient term by 0.5, the release divides by it: we divide. Missing pixels
    and all that a Sobel or SSIM window draws from them are left out of the means."""
    p, d = prediction * units_per_metre, depth * units_per_metre              # (B, 1, h, w)
    missing = (depth <= 0).float()
    def mean(x, window, padding=0):
        valid = 1 - F.max_pool2d(missing, window, 1, padding)
        return (x * valid).sum() / valid.sum().clamp(min=1)
    sobel = data.constant(((1, 0, -1), (2, 0, -2), (1, 0, -1)), p.device)
    sobel = torch.stack([sobel, sobel.T])[:, None]                            # (2, 1, 3, 3)
    slope_p, slope_d = (F.conv2d(x, sobel, padding=1) for x in (p, d))        # (B, 2, h, w)
    dot, square_p, square_d = ((a * b).sum(1, keepdim=True) + 1 for a, b in (
        (slope_p, slope_d), (slope_p, slope_p), (slope_d, slope_d)))          # normals (-x, -y, 1)
    cosine = dot / (square_p.sqrt() * square_d.sqrt())
    # SSIM: Gauss windows of sigma 1.5, constants for a range of 1000, which is 10 m in centimetres.
    gauss = torch.softmax(-torch.arange(-5.0, 6.0, device=p.device) ** 2 / (2 * 1.5 ** 2), 0)
    maps, gauss = torch.cat([p, d, p * p, d * d, p * d], 1), gauss.expand(5, 1, 1, 11)
    maps = F.conv2d(F.conv2d(maps, gauss, groups=5), gauss.mT, groups=5)      # (B, 5, h-10, w-10)
    mean_p, mean_d, pp, dd, pd = maps.chunk(5, 1)                             # (B, 1, h-10, w-10)
    c1, c2 = (0.01 * 1000) ** 2, (0.03 * 1000) ** 2
    ssim = ((2 * mean_p * mean_d + c1) * (2 * (pd - mean_p * mean_d) + c2)
            / ((mean_p ** 2 + mean_d ** 2 + c1) * (pp - mean_p ** 2 + dd - mean_d ** 2 + c2)))
    return {"loss_depth": mean((p - d).abs(), 1),
            "loss_ssim": 100 * (1 - mean(ssim, 11)),
            "loss_normal": 100 * mean((1 - cosine).abs(), 3, padding=1),
            "loss_grad": mean((slope_p - slope_d).abs().sum(1, keepdim=True), 3, padding=1) / 0.5}

def balanced_loss(prediction, depth, units_per_metre=meter.CENTIMETRES):
    """METER's loss (Papa et al., as released): scalar; arguments as in loss_terms."""
    return sum(loss_terms(prediction, depth, units_per_metre).values())

def objective(prediction, depth, features, alpha, notebook=False, min_share=0.0):
    """What training minimises, and its terms: a dict of scalars; features: name -> (B, C, h, w)."""
    terms = loss_terms(prediction, depth, meter.GREY_LEVELS if notebook else meter.CENTIMETRES)
    balanced, binned = sum(terms.values()), meter.notebook_depth(depth) if notebook else depth
    scores = {f"selectivity_{name}": meter.assigned_selectivity(
        x, binned, meter.layer_thresholds(x.shape[1], notebook, x.device), min_share)
        for name, x in features.items()}
    pull = alpha * sum(scores.values())
    return {"loss": balanced + (pull if notebook else balanced.detach() * pull), **terms, **scores}

def mixed_precision(amp, device):
    """What --amp means on this device: its name, an autocast and a GradScaler; sets the backends."""
    gpu = device.type == "cuda"
    if amp == "fp16" and not gpu:
        sys.exit("error: --amp fp16 needs a GPU; a CPU has --amp off and --amp bf16.")
    half = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    amp = amp if amp != "auto" else "bf16" if half else "fp16" if gpu else "off"
    torch.set_float32_matmul_precision("high")         # TF32 on a GPU, for what stays fp32
    torch.backends.cudnn.allow_tf32 = False            # the loss squares centimetres
    torch.backends.cudnn.deterministic = True          # same seed, same machine, same result
    torch.backends.cuda.enable_flash_sdp(gpu or amp == "off")      # a CPU's fused attention takes
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)   # 2 to 4 times as long in bf16
    autocast = torch.autocast(device.type, torch.float16 if amp == "fp16" else torch.bfloat16,
                              enabled=amp != "off")
    return amp, autocast, torch.amp.GradScaler(device.type, enabled=amp == "fp16")

def learning_rate(epoch, epochs, peak, schedule):
    """epoch counts in fractions. cosine: 5 % warm-up, then down to 0. step: METER's. constant."""
    done = epoch / epochs
    cosine = min((done + 1e-3) / 0.05, 0.5 + 0.5 * math.cos(math.pi * max(done - 0.05, 0) / 0.95))
    return peak * {"cosine": cosine, "step": 0.1 ** (epoch // 20), "constant": 1}[schedule]

def evaluate(model, frames, batch_size, layers=(), alpha=0.0, notebook=False, min_share=0.0):
    """Means over a split: the usual metrics per image, the objective per batch as `val_loss`."""
    model.eval()
    rows = []
    for _, image, depth in frames.batches(batch_size):
        with torch.no_grad(), meter.record(model, layers) as features:
            prediction = model(data.normalise(image / 255))                   # (B, 1, h, w) metres
            loss = objective(prediction, depth, features, alpha, notebook, min_share)["loss"]
        rows.append(data.depth_metrics(prediction, depth) | {"val_loss": loss[None]})
    return {key: torch.cat([row[key] for row in rows]).nanmean().item() for key in rows[0]}

def draw_curves(rows, path):
    """Loss, RMSE and the selectivity of the regularised layers over the epochs."""
    panels = {"loss (lower is better)": ["loss", "val_loss"], "RMSE on val, metres": ["rmse_m"]}
    if scores := [key for key in rows[0] if key.startswith("selectivity")]:
        panels["selectivity in training"] = scores
    figure = Figure(figsize=(4.4 * len(panels), 3.6), layout="constrained")
    for axis, (title, keys) in zip(figure.subplots(1, len(panels)), panels.items()):
        values = [[row[key] for key in keys] for row in rows]                 # a curve a column
        axis.plot([row["epoch"] for row in rows], values, ".-", label=keys)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        axis.legend()
    data.write_figure(path, figure)

def draw_predictions(model, splits, path):
    """Two training and two validation frames: image, true depth, predicted depth, error."""
    pairs = [frames.fetch(torch.tensor([0, len(frames) - 1])) for frames in splits]
    image, depth = map(torch.cat, zip(*pairs))                 # (4, 3, 192, 256), (4, 1, 48, 64)
    with torch.no_grad():
        prediction = model(data.normalise(image / 255))
    maps = [x.where(depth > 0, math.nan)[:, 0].cpu() for x in (depth, prediction)]
    names, photos = 2 * ["training"] + 2 * ["validation"], image.permute(0, 2, 3, 1).cpu()
    spans = [{"vmin": 0, "vmax": x.max().item()} for x in depth]
    data.write_pictures(path, [
        [(f"{name} image", photo, "", {}), ("true depth", true, "", span),
         ("predicted depth", guess, "metres", span),
         ("error (red: too near)", guess - true, "metres", {"vmin": -2, "vmax": 2, "cmap": "RdBu"})]
        for name, photo, true, guess, span in zip(names, photos, *maps, spans)])

def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    data.add_source_arguments(p)
    p.add_argument("--neuron-selective", action="store_true", help="regularise units of --layers")
    p.add_argument("--alpha", type=data.number(float, high=0), default=-0.1,
                   help="weight of selectivity relative to the loss: 0 none, -1 strong")
    p.add_argument("--layers", nargs="+", choices=meter.LAYERS, default=["dec_3", "enc_4"],
                   metavar="LAYER", help=f"to regularise, out of {', '.join(meter.LAYERS)}")
    p.add_argument("--min-share", type=data.number(float, 0, 1), default=0.0, metavar="SHARE",
                   help="leave out bins with no more than this share of a batch's pixels: .001")
    p.add_argument("--variant", choices=meter.VARIANTS, default="xxs", help="size of METER")
    p.add_argument("--init", type=Path, help="checkpoint to start from, not random weights")
    p.add_argument("--epochs", type=data.number(int, 1), default=12, help="passes over the split")
    p.add_argument("--lr", type=data.number(float, 1e-9, 1), default=1e-3, help="AdamW's peak rate")
    p.add_argument("--schedule", choices=["cosine", "step", "constant"], default="cosine",
                   help="of --lr: warm-up and cosine to 0, METER's tenth every 20 epochs, or none")
    p.add_argument("--weight-decay", type=data.number(float, 0, 1), default=0.01, help="AdamW's")
    p.add_argument("--augment", action=argparse.BooleanOptionalAction, default=True,
                   help="mirror, shift colours and depth")
    p.add_argument("--zoom", type=data.number(float, 1, 4), default=1, help="crop and enlarge: 1.5")
    p.add_argument("--notebook", action="store_true", help="as the notebook: grey levels, its bins "
                   f"and split, literal alpha; unless given, {data.line(NOTEBOOK)}")
    p.add_argument("--seed", type=data.number(int, 0), default=0, help="of weights, order, augment")
    p.add_argument("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto",
                   help="mixed precision; auto: bf16, or else fp16, on a GPU, off on a CPU")
    p.add_argument("--compile", action="store_true", help="torch.compile; slow to start")
    p.add_argument("--out", type=Path, help="run folder; default runs/baseline or runs/selective")
    p.add_argument("--resume", action="store_true", help="continue from last.pt in --out")
    if p.parse_args(argv).notebook:
        p.set_defaults(**NOTEBOOK)
    args = p.parse_args(argv)
    args.layers = list(dict.fromkeys(args.layers))     # each once
    args.out = args.out or Path("runs", "selective" if args.neuron_selective else "baseline")
    return args

def main(argv=None):
    args = parse_args(argv)
    config = {key: str(value) if isinstance(value, Path) else value
              for key, value in vars(args).items() if key not in ("out", "resume", "feed")}
    last, best, state = args.out / "last.pt", args.out / "best.pt", {}
    torch.manual_seed(args.seed)
    model = meter.METER(args.variant, meter.GREY_LEVELS if args.notebook else meter.CENTIMETRES)
    if args.resume and last.exists():
        model, state = meter.load_checkpoint(last)
        old, grows = state.get("config", {}), args.neuron_selective and not args.notebook
        if args.schedule != "cosine" and not grows and args.epochs > old.get("epochs", 0):
            old["epochs"] = args.epochs                # neither rate nor alpha was laid out for it
        if differ := [f"{key} {old.get(key)}, not {config[key]}" for key in config
                      if old.get(key) != config[key]]:
            sys.exit(f"error: {last.resolve()} (schedule {old.get('schedule')}) has other "
                     f"settings: {', '.join(differ)}. Give the same, or another --out.")
    elif not args.resume and (args.out / "config.json").exists():
        sys.exit(f"error: {args.out.resolve()} holds a run: --resume it, or choose another --out.")
    elif args.init:
        model, _ = meter.load_checkpoint(args.init)
        if model.variant != args.variant:
            sys.exit(f"error: --init {args.init} is METER {model.variant}, not {args.variant}.")
    device = torch.device("cuda" if (gpu := torch.cuda.is_available()) else "cpu")
    amp, autocast, scaler = mixed_precision(args.amp, device)
    model.to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(model).eval()              # over some 100 steps: what is judged, saved
    means, current = ([x for x in network.state_dict().values() if x.is_floating_point()]
                      for network in (average, model))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay, fused=True)
    step_objective = torch.compile(objective, dynamic=False) if args.compile else objective
    if args.compile:                                   # what we cache are constants
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
        model.compile(dynamic=False)
    data.check_folder(args.out)
    source = data.open_source(args.data, args.raw_depth, args.rooms, device)
    splits = {split: data.Frames(source, split, device, args.feed, args.notebook)
              for split in ("train", "val", "test")}
    data.stop_on_faults(source)
    train, layers = splits["train"], args.layers if args.neuron_selective else []
    settings = args.batch_size, layers, args.alpha, args.notebook, args.min_share   # `evaluate`'s
    if len(train) < args.batch_size:
        sys.exit(f"error: --batch-size {args.batch_size}: there are {len(train)} training images.")
    steps = math.ceil(len(train) / args.batch_size)    # in an epoch
    rows, best_score = state.get("rows", []), state.get("best_score", math.inf)
    first_epoch, first_step = state.get("epoch", 0), state.get("step", 0)
    history = torch.zeros(steps, 5 + len(layers), device=device)   # all terms of an epoch's steps
    alpha = torch.zeros((), device=device)             # a tensor: `torch.compile` bakes floats in
    if state:
        model.load_state_dict(state["training"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        history.copy_(state["history"])
    data.write_json(args.out / "config.json", config)
    print(f"{torch.cuda.get_device_name() if gpu else 'CPU'}, {'fp32' if amp == 'off' else amp} | "
          f"METER {args.variant}, {sum(x.numel() for x in model.parameters()):,} parameters | "
          f"{', '.join(f'{len(x):,} {split}' for split, x in splits.items())} images, fed from "
          f"{train.feed} | alpha {args.alpha if layers else 0} | {args.out.resolve()}", flush=True)
    def save(path, epoch, step=0):
        content = {"model": average.state_dict(), "units_per_metre": model.units_per_metre,
                   "config": config, "rows": rows, "best_score": best_score, "epoch": epoch,
                   "step": step, "history": history, "training": model.state_dict(),
                   "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        torch.save(content, buffer := io.BytesIO())    # of a full disk it says nothing useful
        data.write(path, lambda file: file.write_bytes(buffer.getbuffer()))
    stop = []                                          # Ctrl-C or SIGTERM; a second ends at once
    with contextlib.ExitStack() as handlers:           # puts the former ones back
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers.callback(signal.signal, number, signal.signal(
                number, lambda n, _: stop.append(signal.signal(n, signal.SIG_DFL))))
        for epoch in range(first_epoch, args.epochs):
            model.train()
            rng = torch.Generator().manual_seed(args.seed * 100_003 + epoch)
            order = torch.randperm(len(train), generator=rng).to(train.where)
            draws = torch.rand(len(train), data.DRAWS[args.zoom > 1], generator=rng).to(train.where)
            show, start = data.progress(f"epoch {epoch + 1}", len(train)), time.monotonic()
            batches = train.batches(args.batch_size, order, first_step)
            for step, (frames, image, depth) in enumerate(batches, first_step):
                image = image / 255                                        # (B, 3, 192, 256)
                if args.augment:
                    image, depth = data.augment(image, depth, draws[frames], args.zoom)
                with autocast, meter.record(model, layers) as features:
                    prediction = model(data.normalise(image))              # (B, 1, 48, 64) metres
                done = epoch + step / steps                                # epochs
                alpha.fill_(args.alpha * (1 if args.notebook else min(1, 10 * done / args.epochs)))
                terms = step_objective(prediction, depth, features, alpha, *settings[3:])
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(terms["loss"]).backward()
                rate = learning_rate(done, args.epochs, args.lr, args.schedule)
                optimizer.param_groups[0]["lr"] = rate
                scaler.step(optimizer)
                scaler.update()
                weight = 1 if args.notebook else max(0.01, 9 / (9 + done * steps))
                torch._foreach_lerp_(means, current, weight)
                history[step] = torch.stack(list(terms.values())).detach()  # .item() would wait
                show(min((step + 1) * args.batch_size, len(train)))
                if stop or (not gpu and not terms["loss"].isfinite()):
                    break                              # a GPU would have to wait for this answer
            for at, values in enumerate(history[:step + 1].tolist()):
                if bad := [name for name, x in zip(terms, values) if not math.isfinite(x)]:
                    sys.exit(f"error: epoch {epoch + 1}, step {at + 1}: {', '.join(bad[1:] or bad)}"
                             " is nan or infinite: try a lower --lr or --amp off. last.pt is kept.")
            if stop and step + 1 < steps:
                save(last, epoch, step + 1)
                sys.exit(f"stopped in epoch {epoch + 1} after step {step + 1}/{steps}: --resume.")
            seconds, images = time.monotonic() - start, len(train) - first_step * args.batch_size
            rows.append(row := {
                "epoch": epoch + 1, **dict(zip(terms, history.mean(0).tolist())),
                **evaluate(average, splits["val"], *settings), "lr": rate, "seconds": seconds,
                "images_per_second": images / seconds})
            print(data.line(row), flush=True)
            score = row["val_loss" if args.notebook else "rmse_m"]
            if not math.isfinite(score):
                sys.exit(f"error: epoch {epoch + 1}: validation gives {score}: try a lower --lr.")
            if score < best_score:
                best_score = score
                save(best, epoch + 1)
            data.write_csv(args.out / "log.csv", rows)
            draw_curves(rows, args.out / "curves.png")
            draw_predictions(average, (train, splits["val"]), args.out / "predictions.png")
            save(last, epoch + 1)
            first_step = 0
            if stop and epoch + 1 < args.epochs:
                sys.exit(f"stopped after epoch {epoch + 1}: --resume continues there.")
    model, test = meter.load_checkpoint(best)[0].to(device), splits["test"]
    metrics = {"split": "test", "images": len(test), **evaluate(model, test, *settings)}
    data.write_json(args.out / "metrics.json", metrics)
    print(f"best.pt | {data.line(metrics)}\nnext: python dissect.py {best} --viz")

if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError:
        sys.exit("error: the GPU's memory is full: halve --batch-size.")
    except KeyboardInterrupt:
        sys.exit("stopped; what was saved stays.")
