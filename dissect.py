"""Dissect trained networks: which unit answers to which depth, how selectively, does it matter?

    python dissect.py runs/baseline/best.pt runs/selective/best.pt --viz     # side by side, figures
    python dissect.py --layers dec_3 --ablate --correct --images my_photos   # the newest run

Writes units.csv, dissect.json and what the flags ask for to --out.
"""
# B batch, C units, K depth bins, h w size of an activation map
import argparse
import itertools
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps

import data
import model as meter

MEASURES = {"selectivity": "of a unit's strongest depth bin, |mean activation|",
            "assigned_selectivity": "of the bin that training assigns, mean |activation|"}
COLUMNS = "unit", "selectivity", "peak_bin", "peak_m", "assigned_bin", "assigned_selectivity"
ORDERS = {"most selective first": "tab:red", "least selective first": "tab:blue", "random": "gray"}

@torch.no_grad()
def measure(model, frames, layers, notebook=False, batch_size=16, change=None):
    """One pass over the frames for all layers, in fp32: (means of data.depth_metrics, units).
    units: for each layer a dict of CPU tensors: edges (K+1,) of the depth bins in metres, count
    (K,) pixels, signed and absolute (C, K), means of activation and |activation| in each bin, and
    what units.csv holds (C,). change: (layer, function), to go on with function(x, true depth)."""
    rows, sums, units = [], {}, {}
    target, function = change or ("dec_3", lambda x, depth: None)          # None: x as it was
    hook = model.get_submodule(meter.LAYERS[target]).register_forward_hook(
        lambda module, inputs, x: function(x, depth))
    with meter.record(model, layers) as features, hook:
        for _, image, depth in frames.batches(batch_size):
            prediction = model(data.normalise(image / 255))                # (B, 1, 48, 64) metres
            rows.append(data.depth_metrics(prediction, depth))
            binned, shared = meter.notebook_depth(depth) if notebook else depth, {}
            for name, x in features.items():                               # (B, C, h, w)
                edges = meter.layer_thresholds(x.shape[1], notebook, depth.device)
                key = len(edges), *x.shape[-2:]                            # these share weights
                if key not in shared:
                    shared[key] = meter.bin_weights(binned, edges, x.shape[-2:])
                maps = (x, x.abs()) if name in meter.SIGNED else (x,)      # after a ReLU |x| is x
                totals = [meter.bin_sums(y, shared[key]) for y in maps]
                new = shared[key].sum((0, 2, 3)), totals[0], totals[-1]
                sums[name] = [old + y.double() for old, y in zip(sums.get(name, (0, 0, 0)), new)]
    for name in layers:
        count, *totals = (x.cpu() for x in sums[name])
        signed, absolute = (total / count.clamp(min=1) for total in totals)
        edges, peak = meter.layer_thresholds(len(signed), notebook), signed.abs().argmax(1)
        units[name] = {"edges": edges, "count": count, "signed": signed, "absolute": absolute,
                       "unit": torch.arange(len(peak)), "peak_bin": peak,
                       "peak_m": (edges[peak] + edges[peak + 1]) / 2,
                       "selectivity": meter.selectivity(signed.abs(), peak),
                       "assigned_bin": meter.assigned_bins(*signed.shape),
                       "assigned_selectivity": meter.unit_selectivity(absolute, count)}
    return {key: torch.cat([row[key] for row in rows]).nanmean().item() for key in rows[0]}, units

def switch_off(units, value):
    """Ablation: a change for `measure` that sets `units` (indices) to their value; value (C,)."""
    off = torch.zeros_like(value, dtype=torch.bool).index_fill(0, units.to(value.device), True)
    return lambda x, depth: torch.where(off[:, None, None], value[:, None, None], x)

def at_depth(response, edges, depth):
    """Responses (..., K) at depth (B, 1, H, W): (..., B, H, W), nan where that is in no bin."""
    return F.pad(response, (1, 1), value=torch.nan)[..., torch.bucketize(depth[:, 0], edges)]

def give_mean(unit, response, edges):
    """Correction (You et al.): a change that makes a unit answer as on average at the true depth.
    response (K,) signed, of depth bins with edges (K+1,). A cell of several pixels gets their mean;
    cells with missing depth stay as they are."""
    def change(x, depth):
        mean = F.adaptive_avg_pool2d(at_depth(response, edges, depth), x.shape[-2:])   # (B, h, w)
        return x.select_scatter(mean.where(mean.isfinite(), x[:, unit]), 1, unit)
    return change

def ablate(model, frames, layer, r, replacement, batch_size=16):
    """RMSE as more and more units of a layer are off: rows of ablation.csv, in several orders.
    r: units[layer] of `measure`; a unit that is off answers "zero", or its "mean" over pixels."""
    value = (r["signed"] * r["count"]).sum(1) / r["count"].sum() * (replacement == "mean")
    value, ranked = value.float().to(frames.device), r["selectivity"].argsort(descending=True)
    orders = dict(zip(ORDERS, (ranked, ranked.flip(0)))) | {               # five, for their spread
        f"random {n}": torch.randperm(len(value), generator=torch.Generator().manual_seed(n))
        for n in range(5)}
    counts, rows = sorted({round(len(value) * n / 8) for n in range(9)}), []
    show = data.progress(f"ablate {layer}", len(orders) * len(counts) * len(frames))
    for (order, units), n in itertools.product(orders.items(), counts):
        change = layer, switch_off(units[:n], value)
        metrics, _ = measure(model, frames, [], batch_size=batch_size, change=change)
        rows.append({"layer": layer, "replaced_by": replacement, "order": order, "units_off": n,
                     "rmse_m": metrics["rmse_m"]})
        show(len(rows) * len(frames))
    return rows

def draw_layer(title, r, path):
    """Two figures of a layer: a bar chart over depth for each unit, and all units in one map."""
    edges, response = r["edges"].numpy(), r["signed"].abs().numpy()        # (C, K)
    lines = len(response) // (columns := 8 if len(response) <= 64 else 16)  # METER's divide by it
    figure = Figure(figsize=(1.7 * columns, 1.15 * lines + 1.1), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, squeeze=False).flat
    for unit, (axis, values) in enumerate(zip(axes, response)):
        own = r["assigned_bin"][unit]
        axis.axvspan(*edges[own:own + 2], color="tab:orange", alpha=0.35, lw=0)
        colour = matplotlib.colormaps["viridis"](min(r["peak_m"][unit].item() / 6, 1.0))
        axis.stairs(values, edges, fill=True, color=colour)
        axis.set_title(f"unit {unit}: {r['selectivity'][unit]:.2f}", fontsize=8, pad=2)
        axis.set(yticks=[], xlim=(0, edges[-1]))
    figure.suptitle(f"{title}: |mean activation| of each unit over depth, and its selectivity\n"
                    "colour: depth of its peak; orange: the bin that training assigns", fontsize=10)
    figure.supxlabel("depth in metres", fontsize=10)
    data.write_figure(path.with_name(f"{path.name}_units.png"), figure)
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axis, order = figure.subplots(), r["peak_bin"].argsort(stable=True).numpy()
    scaled = (response / np.maximum(response.max(1, keepdims=True), 1e-12))[order]
    shown = axis.pcolormesh(edges, np.arange(len(order) + 1), scaled, cmap="magma", vmin=0)
    figure.colorbar(shown, label="|mean activation| / the unit's strongest")
    axis.set(title=f"{title}: which depth do its {len(order)} units see?", ylim=(len(order), 0),
             xlabel="depth in metres", ylabel="units, sorted by the depth of their peak")
    data.write_figure(path.with_name(f"{path.name}_map.png"), figure)

def draw_overview(results, path):
    """Mean selectivity of each layer, both measures, checkpoints side by side."""
    figure, width = Figure(figsize=(11, 6), layout="constrained"), 0.8 / len(results)
    for axis, (key, meaning) in zip(figure.subplots(2, 1, sharex=True), MEASURES.items()):
        for n, (label, result) in enumerate(results.items()):
            axis.bar(np.arange(len(result["layers"])) + (n + 0.5) * width - 0.4,
                     [layer[key] for layer in result["layers"].values()], width, label=label)
        axis.set(title=f"{key}: {meaning}", ylabel="mean over units")
        axis.grid(alpha=0.3, axis="y")
    axis.set_xticks(range(len(result["layers"])), result["layers"], rotation=30)
    figure.axes[0].legend()
    data.write_figure(path, figure)

def draw_ablation(rows, path):
    """RMSE against the number of units off: a line of panels for each layer, one a checkpoint."""
    panels = [(title, list(group)) for title, group in itertools.groupby(
        rows, lambda row: f"{row['checkpoint']}, {row['layer']}")]
    lines = len(panels) // (columns := len({row["checkpoint"] for row in rows}))
    figure = Figure(figsize=(4.2 * columns, 3.5 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).T.flat
    for axis, (title, panel) in zip(axes, panels):
        for order, colour in ORDERS.items():
            own = [row for row in panel if row["order"].startswith(order)]
            counts = sorted({row["units_off"] for row in own})
            errors = np.reshape([row["rmse_m"] for row in own], (-1, len(counts)))
            axis.plot(counts, errors.mean(0), ".-", color=colour, label=order)
            axis.fill_between(counts, errors.min(0), errors.max(0), color=colour, alpha=0.2)
        axis.set(title=title, ylabel="RMSE, m", xlabel=f"units off (to {rows[0]['replaced_by']})")
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8, title_fontsize=8, title="band: five random orders")
    data.write_figure(path, figure)

@torch.no_grad()
def two_pictures(model, image, depth, units):
    """Depth (if None, the prediction) and what units answer, on the CPU: {layer: (|activation| and
    its mean at that depth, 0 if missing, (B, C, 48, 64) each, and their correlation (B, C))}."""
    with meter.record(model, units) as features:
        prediction = model(data.normalise(image / 255))
    depth, pictures = (prediction if depth is None else depth).cpu(), {}
    for layer, r in units.items():
        own = F.interpolate(features[layer].abs().cpu(), depth.shape[-2:], mode="bilinear")
        usual = at_depth(r["absolute"].float(), r["edges"], depth).nan_to_num().transpose(0, 1)
        centred = [x.flatten(2) - x.mean((2, 3))[..., None] for x in (own, usual)]
        pictures[layer] = own, usual, F.cosine_similarity(*centred, dim=2)
    return depth, pictures

def choose_units(model, frames, units):
    """[(layer, unit), ...], one that peaks near (to 2 m), in the middle (4 m), far: the highest in
    selectivity * correlation, over up to 24 frames; and three frames in which these agree best."""
    rows = torch.arange(0, len(frames), -(-len(frames) // 24))
    _, pictures = two_pictures(model, *frames.fetch(rows), units)
    names = [(layer, unit) for layer, r in units.items() for unit in range(len(r["unit"]))]
    likeness = torch.cat([pictures[layer][2] for layer in units], 1)       # (n, all units)
    peak, own = (torch.cat([r[key] for r in units.values()]) for key in ("peak_m", "selectivity"))
    score, band = own * likeness.mean(0), torch.bucketize(peak, torch.tensor([2.0, 4.0]))
    chosen = [score.where(band == n, 0).argmax().item() for n in band[score > 0].unique()]
    best = likeness[:, chosen].sum(1).argsort(descending=True)[:3]
    return [names[n] for n in chosen], rows[best]

def draw_activations(model, image, depth, units, chosen, path):
    """Both pictures of the units `chosen`, in a line under image and depth.
    image (n, 3, 192, 256) uint8; depth (n, 1, 48, 64) metres, or None for the prediction."""
    title = "true depth" if depth is not None else "predicted depth"
    depth, pictures = two_pictures(model, image, depth, {x: units[x] for x, _ in chosen})
    lines = [[cell for photo, map_ in zip(image.permute(0, 2, 3, 1).cpu(), depth[:, 0])
              for cell in (("image", photo, "", {}), (title, map_, "metres", {"vmin": 0}))]]
    for layer, unit in chosen:
        s, peak = (units[layer][key][unit] for key in ("selectivity", "peak_m"))
        own, usual, likeness = (x[:, unit] for x in pictures[layer])       # (n, 48, 64), (n,)
        left, right = ({"cmap": "magma", "vmin": 0, "vmax": x.max().item()} for x in (own, usual))
        lines.append([cell for a, b, r in zip(own, usual, likeness) for cell in (
            (f"{layer} unit {unit}: s {s:.2f}, {peak:.1f} m", a, "", left),
            (f"its mean at each depth: r {r:.2f}", b, "", right))])
    data.write_pictures(path, lines, "Units for near, middle and far: |activation| beside its mean "
                        "at the same depth\n(s: selectivity, depth of the peak; r: correlation)")

def read_photo(path):
    """Any photo as METER takes it, uint8 (3, 192, 256): cut to 4:3 in the middle, then resized."""
    try:
        photo = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except Exception as error:  # noqa: BLE001  a damaged file may raise almost anything
        sys.exit(f"error: --images {path.resolve()} is no photo: {error}.")
    photo = ImageOps.fit(photo, data.SIZE[::-1], Image.Resampling.BILINEAR)    # as in training
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1)

def print_table(results):
    """Layer by layer, both measures, checkpoints side by side, with differences from the first."""
    print(f"\n{'':24}" + "".join(f"{label[-30:]:>34}" for label in results))
    print(f"{'layer':12}units  bins " + f"{'selectivity':>17}{'assigned':>17}" * len(results))
    for layer, base in next(iter(results.values()))["layers"].items():
        line = f"{layer:12}{base['units']:>5} {base['bins_used']:>2}/{base['bins']:<2} "
        for own in (result["layers"][layer] for result in results.values()):
            for key in MEASURES:
                change = "" if own is base else f" ({own[key] - base[key]:+.3f})"
                line += f"{own[key]:8.3f}{change:9}"
        print(line)
    for label, result in results.items():
        print(f"{label} | {data.line({k: x for k, x in result.items() if isinstance(x, float)})}")

def parse_args(argv=None, known=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", default=[],
                   help="ours, the notebook's or METER's; several are compared; none: newest run's")
    data.add_source_arguments(p)
    p.add_argument("--split", choices=["train", "val", "test"], default="test", help="the frames")
    p.add_argument("--limit", type=data.number(int, 1), help="that many, evenly spaced")
    p.add_argument("--layers", nargs="+", choices=meter.LAYERS, default=list(meter.LAYERS),
                   metavar="LAYER", help="to look at")
    p.add_argument("--notebook", action="store_true", help="the notebook's bins, up to 3.92 m")
    p.add_argument("--viz", action="store_true", help="draw units, maps, overview and activations")
    p.add_argument("--ablate", nargs="?", const="zero", choices=["zero", "mean"],
                   help="switch units off in order of selectivity: to zero, or to the unit's mean")
    p.add_argument("--correct", action="store_true", help="correct units one by one by true depth")
    p.add_argument("--images", nargs="+", type=Path, default=[], metavar="PATH",
                   help="photos or folders: cut to 4:3, resized; scale as of a Kinect (63 degrees)")
    p.add_argument("--out", type=Path, default=Path("runs/dissect"), help="folder for the results")
    return p.parse_args(argv, known)

def main(argv=None):
    args = parse_args(argv)
    newest = sorted(Path("runs").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)[-1:]
    if not args.checkpoints and not newest:
        sys.exit("error: no runs/*/best.pt: run `python train.py` first, or name a checkpoint.")
    torch.backends.cudnn.allow_tf32 = False            # a GPU's default is less than fp32
    data.check_folder(args.out)
    photos = [read_photo(file) for path in args.images                     # no .DS_Store
              for file in sorted(path.glob("[!.]*")) or [path]]
    device, loaded = torch.device("cuda" if torch.cuda.is_available() else "cpu"), {}
    for path in args.checkpoints or newest:
        label = path.resolve().parent.name if path.stem in ("best", "last") else path.stem
        label = str(path).replace("/", "_") if label in loaded else label
        loaded[label] = path, *meter.load_checkpoint(path)
    runs = [x.get("config", {}) for *_, x in loaded.values()][::-1]        # the first one decides,
    known = {key: x[key] for x in runs for key in ("data", "raw_depth", "rooms") if x.get(key)}
    args = parse_args(argv, argparse.Namespace(**known))                   # where flags do not
    source = data.open_source(args.data, args.raw_depth, args.rooms, device)
    frames = data.Frames(source, args.split, device, args.feed, limit=args.limit)
    data.stop_on_faults(source)
    results, rows, ablation, correction = {}, [], [], []
    for label, (path, model, _) in loaded.items():
        model.to(device, memory_format=torch.channels_last).eval()
        metrics, units = measure(model, frames, args.layers, args.notebook, args.batch_size)
        layers = {}
        for layer, r in units.items():
            layers[layer] = {key: r[key].mean().item() for key in MEASURES} | {
                "units": len(r["signed"]), "bins": len(r["count"]),
                "bins_used": int((r["count"] > 0).sum())}
            rows += [{"checkpoint": str(path), "layer": layer, **dict(zip(COLUMNS, values))}
                     for values in zip(*(r[key].tolist() for key in COLUMNS))]
            if args.viz:
                draw_layer(f"{label}, {layer}", r, args.out / f"{label}_{layer}")
            if args.ablate:
                ablation += [{"checkpoint": label, **row} for row in
                             ablate(model, frames, layer, r, args.ablate, args.batch_size)]
            show = data.progress(f"correct {layer}", len(r["unit"]) * len(frames))
            for k, response in enumerate(r["signed"].float().to(device) if args.correct else ()):
                change = layer, give_mean(k, response, r["edges"].to(device))
                error = measure(model, frames, [], False, args.batch_size, change)[0]["rmse_m"]
                correction.append({"checkpoint": label, "layer": layer, "unit": k, "rmse_m": error,
                                   "change_m": error - metrics["rmse_m"]})
                show((k + 1) * len(frames))
        results[label] = {
            "checkpoint": str(path), "binning": "notebook" if args.notebook else "metres",
            "split": args.split, "images": len(frames), **metrics, "layers": layers,
            "mean_selectivity": np.mean([x["selectivity"] for x in layers.values()]).item()}
        if args.viz or photos:
            chosen, best = choose_units(model, frames, units)
            pages = {"activations": frames.fetch(best)} if args.viz else {}
            for n in range(0, len(photos), 3):
                pages[f"photos_{n // 3 + 1}"] = torch.stack(photos[n:n + 3]).to(device), None
            for page, content in pages.items():
                draw_activations(model, *content, units, chosen, args.out / f"{label}_{page}.png")
    print_table(results)
    data.write_csv(args.out / "units.csv", rows)
    every = list(results.values())
    data.write_json(args.out / "dissect.json", every if len(every) > 1 else every[0])
    if args.viz:
        draw_overview(results, args.out / "overview.png")
    if args.ablate:
        data.write_csv(args.out / "ablation.csv", ablation)
        draw_ablation(ablation, args.out / "ablation.png")
    if args.correct:
        data.write_csv(args.out / "correction.csv", correction)
        best = sorted(correction, key=lambda row: row["change_m"])[:10]
        print("\nthe units whose correction lowers RMSE most:", *map(data.line, best), sep="\n")
    print(f"written to {args.out.resolve()}")

if __name__ == "__main__":
    main()
