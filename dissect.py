"""Dissect trained networks: which unit answers to which depth, how selectively, does it matter?

    python dissect.py runs/baseline/best.pt runs/selective/best.pt --viz     # side by side, figures
    python dissect.py --layers dec_3 --ablate --images my_photos   # the newest run

Writes units.csv, dissect.json and what the flags ask for to --out.

Sizes: B batch, C channels (units), K depth bins, h w activation map.
"""
import itertools
import json
import os
from contextlib import contextmanager
from math import ceil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.patches import StepPatch
from PIL import Image, ImageOps

import data
import model as meter
from data import UserError, depth_metrics, new_figure, normalise, show_picture, write_figure
from model import LAYERS, record

MEASURES = {
    "selectivity": "of a unit's strongest depth bin, |mean activation|",
    "assigned_selectivity": "of the bin that training assigns, mean |activation|"}
COLUMNS = "unit selectivity peak_bin peak_m assigned_bin assigned_selectivity dead".split()
FILES = "dissect.json", "units.csv", "overview.png", "ablation.csv", "ablation.png"
ORDERS = {"most": ("tab:red", "most selective first"), "random": ("silver", "five random orders"),
          "least": ("tab:blue", "least selective first")}  # by their first word: colour, label


# Measuring.

@torch.no_grad()
def measure(model, frames, layers, notebook=False, batch_size=16, min_share=0.0):
    """One pass over the frames for all layers, in fp32: (means of data.depth_metrics, units).
    units[layer] is what `describe_units` says of that layer."""
    rows, sums = [], dict.fromkeys(layers, 0)
    for image, depth in frames.batches(batch_size):
        with record(model, layers) as features:
            prediction = model(normalise(image / 255))
        rows.append(depth_metrics(prediction, depth))

        binned = meter.notebook_depth(depth) if notebook else depth
        weights = {}  # shared by the layers of one size and number of bins
        for layer, x in features.items():
            edges = meter.layer_thresholds(x.shape[1], notebook, depth.device)
            key = len(edges), *x.shape[-2:]
            if key not in weights:
                weights[key] = meter.bin_weights(binned, edges, x.shape[-2:])
            weight = weights[key]                                        # (B, K, h, w)
            sums[layer] += torch.cat([
                weight.sum((0, 2, 3))[None],                             # (1, K) pixels
                meter.bin_sums(x, weight),                               # (C, K)
                meter.bin_sums(x.abs(), weight)]).double()               # (C, K)

    units = {layer: describe_units(x.cpu(), notebook, min_share) for layer, x in sums.items()}
    return data.mean_metrics(rows), units


def describe_units(sums, notebook=False, min_share=0.0):
    """What the units of a layer answer to depth: a dict of tensors.
    sums (1 + 2 C, K) over all pixels of each bin: their count, and the activation and |activation|
    of all units. edges (K + 1,) of the bins in metres; counted (K,) bool, see counted_bins; signed
    and absolute (C, K), means of activation and |activation|; COLUMNS (C,); peak_bin -1: dead."""
    count = sums[0]
    signed, absolute = (sums[1:] / count.clamp(min=1)).chunk(2)
    units, bins = signed.shape
    edges = meter.layer_thresholds(units, notebook)
    counted = meter.counted_bins(count, min_share)
    dead = absolute.amax(1) == 0
    peak = (signed.abs() * counted).argmax(1)
    return {
        "edges": edges, "counted": counted, "signed": signed, "absolute": absolute, "dead": dead,
        "unit": torch.arange(units), "peak_bin": peak.where(~dead, -1),
        "selectivity": meter.selectivity(signed.abs(), peak, counted),
        "peak_m": ((edges[peak] + edges[peak + 1]) / 2).where(~dead, torch.nan),
        "assigned_bin": meter.assigned_bins(units, bins),
        "assigned_selectivity": meter.unit_selectivity(absolute, count, min_share)}


# Does it matter? Changes of what a layer answers.

def switch_off(units):
    """Ablation: a change that sets `units` (indices) of x (B, C, h, w) to zero."""
    return lambda x: x.index_fill(1, units.to(x.device), 0.0)


@contextmanager
def answering(model, answers):
    """While open, these layers compute nothing and answer what is given: {layer: tensor}."""
    modules = [model.get_submodule(LAYERS[layer]) for layer in answers]
    for module, x in zip(modules, answers.values()):
        module.forward = lambda *inputs, x=x: x
    try:
        yield
    finally:
        for module in modules:
            del module.forward


@torch.no_grad()
def rmse_after(model, frames, layer, changes, batch_size=16):
    """RMSE on the frames after each change of what a layer answers: a list of metres.
    changes: functions of the answer x (B, C, h, w). The layers up to this one answer the same
    whatever the change, and compute it once."""
    before = list(LAYERS)[:list(LAYERS).index(layer) + 1]
    rows = [[] for _ in changes]
    for image, depth in frames.batches(batch_size, label=f"ablate {layer}"):
        image = normalise(image / 255)
        with record(model, before) as features:
            model(image)
        for row, change in zip(rows, changes):
            with answering(model, features | {layer: change(features[layer])}):
                row.append(depth_metrics(model(image), depth))
    return [data.mean_metrics(row)["rmse_m"] for row in rows]


def ablate(model, frames, layer, r, batch_size=16):
    """RMSE as more and more units of a layer are off, in several orders: rows of ablation.csv.
    r: units[layer] of `measure`."""
    total = len(r["unit"])
    ranked = r["selectivity"].argsort(descending=True)
    orders = {"most selective first": ranked, "least selective first": ranked.flip(0)}
    for n in range(5):  # for the spread
        orders[f"random {n}"] = torch.randperm(total, generator=torch.Generator().manual_seed(n))

    runs = list(itertools.product(orders, sorted({round(total * n / 8) for n in range(9)})))
    changes = [switch_off(orders[order][:n]) for order, n in runs]
    errors = rmse_after(model, frames, layer, changes, batch_size)
    return [{"order": order, "units_off": n, "rmse_m": error}
            for (order, n), error in zip(runs, errors)]


# Figures. Each is written to `path` and returned.

def draw_units(title, r, path):
    """How each unit of a layer answers to depth: bars, or above 64 one map. r: units[layer]."""
    edges, rare = r["edges"].numpy(), ~r["counted"].numpy()
    response = (r["signed"].abs() * r["counted"]).numpy()
    response = response / np.maximum(response.max(1, keepdims=True), 1e-12)
    if len(response) > 64:
        return draw_map(title, r, response, path)

    figure = new_figure(11, 1.7 + 0.95 * ceil(len(response) / 8))
    axis = figure.subplots()
    for unit, heights in enumerate(response):  # a panel: as wide as the depths, 1 high
        x, y = edges + 1.15 * edges[-1] * (unit % 8), -1.5 * (unit // 8)
        own, dead = r["assigned_bin"][unit], r["dead"][unit]
        note = "dead" if dead else f"{r['selectivity'][unit]:.2f}"
        axis.text(x[0], y + 1.05, f"unit {unit}: {note}", fontsize=8, color="0.5" if dead else "0")
        colour = data.DEPTH_COLOURS.to_rgba(r["peak_m"][unit])
        for tops, style in ((heights, {"fc": colour}), (rare, {"fc": "none", "hatch": "/////"})):
            # As axis.stairs, which also seeks the axis' limits at every corner, and takes long.
            axis.add_artist(StepPatch(y + tops, x, baseline=y, ec="silver", lw=0, **style))
        axis.plot(x[[own, own + 1]], [y - 0.09] * 2, color="tab:orange", lw=4)

    axis.set(yticks=[], xticks=edges[[0, -1]], ylim=(y - 0.3, 1.4), frame_on=False,
             title=f"{title}: |mean activation| of each unit over depth, and its selectivity",
             xlabel="each panel: depth, metres; orange: assigned bin; hatched: too few pixels")
    figure.colorbar(data.DEPTH_COLOURS, ax=axis, label="depth of its peak, metres")
    return write_figure(path, figure)


def draw_map(title, r, response, path):
    """All units of a layer over depth, sorted by the depth of their peak; dead ones last."""
    order = r["peak_m"].nan_to_num(torch.inf).argsort(stable=True).numpy()
    figure = new_figure(8, 6)
    axis = figure.subplots()
    shown = axis.pcolormesh(r["edges"].numpy(), range(len(order) + 1),
                            np.where(r["counted"], response, np.nan)[order])
    figure.colorbar(shown, label="|mean activation| / the unit's strongest")
    axis.set(title=f"{title}: which depth do its {len(order)} units see? ({r['dead'].sum()} dead)",
             ylim=(len(order), 0), xlabel="depth in metres; white: too few pixels",
             ylabel="units, sorted by the depth of their peak")
    return write_figure(path, figure)


def draw_overview(results, path):
    """Mean selectivity of each layer, both measures, checkpoints side by side; * regularised."""
    width = 0.8 / len(results)
    figure = new_figure(11, 6)
    for axis, (key, meaning) in zip(figure.subplots(2, 1, sharex=True), MEASURES.items()):
        for n, (label, result) in enumerate(results.items()):
            means = [layer[key] for layer in result["layers"].values()]
            axis.bar(np.arange(len(means)) + (n + 0.5) * width - 0.4, means, width,
                     label=" " + label)  # else matplotlib hides one that begins with _
        axis.set(title=f"{key}: {meaning}", ylabel="mean over units")
        axis.grid(alpha=0.3, axis="y")
    axis.set_xticks(range(len(means)), starred(results), rotation=30)
    axis.legend(title="* regularised in one of them")
    return write_figure(path, figure)


def draw_ablation(rows, path):
    """RMSE against the number of units off: a line of panels a layer, a column a checkpoint."""
    panels = {}
    for row in rows:
        curves = panels.setdefault((row["layer"], row["checkpoint"]), {})
        curves.setdefault(row["order"], {})[row["units_off"]] = row["rmse_m"]
    columns = len({checkpoint for _, checkpoint in panels})
    lines = len(panels) // columns
    figure = new_figure(max(4.2 * columns, 7.5), 3.4 * lines + 1)
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    for axis, panel in zip(axes, sorted(panels, key=lambda panel: list(LAYERS).index(panel[0]))):
        for order, curve in reversed(panels[panel].items()):
            colour, label = ORDERS[order.split()[0]]
            axis.plot(curve.keys(), curve.values(), ".-", color=colour, label=label)
        axis.set(title=", ".join(panel), ylabel="RMSE, m", xlabel="units off (answer 0)")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)

    figure.suptitle("Do selective units matter? Red rises first: the network needs them most.\n"
                    "Blue rises first: it needs the unselective ones most.", fontsize=10)
    figure.legend(*(x[-3:] for x in axis.get_legend_handles_labels()), loc="outside lower center",
                  ncols=3)
    return write_figure(path, figure)


@torch.no_grad()
def two_pictures(model, image, depth, units):
    """What units answer, and what depth alone tells of it, on the CPU.
    image (B, 3, H, W) uint8; depth (B, 1, 48, 64) metres, or None for the prediction. Returns depth
    and, for each layer of `units`, |activation| and its mean over all frames at that depth, 0 where
    that is missing, (B, C, 48, 64) each, and their correlation over the image (B, C)."""
    with record(model, units) as features:
        prediction = model(normalise(image / 255))
    depth = (prediction if depth is None else depth).cpu()
    pictures = {}
    for layer, r in units.items():
        answer = F.interpolate(features[layer].abs().cpu(), depth.shape[-2:], mode="bilinear")
        number = torch.bucketize(depth[:, 0], r["edges"])  # 0 missing, 1 to K, K + 1 beyond
        usual = F.pad(r["absolute"].float(), (1, 1))[:, number].transpose(0, 1)
        centred = [x.flatten(2) - x.mean((2, 3))[..., None] for x in (answer, usual)]
        pictures[layer] = answer, usual, F.cosine_similarity(*centred, dim=2)
    return depth, pictures


def choose_units(model, frames, units):
    """Units to show, [(layer, unit), ...], and numbers of three frames where they agree.
    One that peaks near (to 2 m), one in the middle (to 4 m), one far: the highest in selectivity *
    correlation over up to 24 frames, of those with a correlation of .3 or more."""
    numbers = torch.arange(0, len(frames), ceil(len(frames) / 24))
    _, pictures = two_pictures(model, *frames.fetch(numbers), units)
    names = [(layer, unit) for layer, r in units.items() for unit in r["unit"].tolist()]
    likeness = torch.cat([pictures[layer][2] for layer in units], 1)       # (n, all units)
    peak, score = (torch.cat([r[key] for r in units.values()]) for key in ("peak_m", "selectivity"))
    score = (score * likeness.mean(0)).where(likeness.mean(0) >= 0.3, 0)   # (all units,)

    bands = [score.where((low < peak) & (peak <= high), 0)
             for low, high in ((0, 2), (2, 4), (4, 10))]
    chosen = [band.argmax().item() for band in bands if band.any()]
    best = likeness[:, chosen].sum(1).argsort(descending=True)[:3]
    return [names[n] for n in chosen], numbers[best]


def draw_activations(model, image, depth, units, chosen, path):
    """Both pictures of the units `chosen`, in a line under image and depth.
    image (n, 3, 192, 256) uint8; depth (n, 1, 48, 64) metres, or None for the prediction."""
    title = "predicted depth" if depth is None else "true depth"
    depth, pictures = two_pictures(model, image, depth, {x: units[x] for x, _ in chosen})
    columns, lines = 2 * len(image), 1 + len(chosen)
    figure = new_figure(max(2.5 * columns, 9), 1.9 * lines + 1.3)
    figure.suptitle("" if not chosen else "Left: what a unit answers. Right: what it answers on "
                    "average at that depth.\nThe more alike (r), the more it sees depth.")
    axes = figure.subplots(lines, columns, squeeze=False)
    for n in range(len(image)):
        left, right = axes[:, 2 * n], axes[:, 2 * n + 1]
        show_picture(left[0], image[n].permute(1, 2, 0), "image")
        show_picture(right[0], depth[n, 0], title, "metres", vmin=0)
        for line, (layer, unit) in enumerate(chosen, 1):
            answer, usual, likeness = (x[n, unit] for x in pictures[layer])
            show_picture(left[line], answer, f"{layer} unit {unit}, peak "
                         f"{units[layer]['peak_m'][unit]:.1f} m", cmap="magma", vmin=0)
            show_picture(right[line], usual, f"by depth alone: r {likeness:.2f}", "answer",
                         cmap="magma", vmin=0)
    return write_figure(path, figure)


# The command.

def read_photo(path):
    """Any photo as METER takes it, uint8 (3, 192, 256): cut to 4:3 in the middle, then resized."""
    try:
        if not path.is_file():
            raise FileNotFoundError("no such file")
        photo = data.to_rgb(ImageOps.exif_transpose(Image.open(path)))
    except Exception as error:  # noqa: BLE001  a damaged file may raise almost anything
        raise UserError(f"--images {path.absolute()} is no photo (checkpoints come before it): "
                        f"{error}.") from error
    photo = ImageOps.fit(photo, data.SIZE[::-1], Image.BILINEAR)  # as in training
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1)


def read_photos(paths):
    """{name: photo} of files, and of all photos in folders."""
    photos, skipped = {}, []
    for path in paths:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            try:
                name = file.stem
                while name in photos:
                    name += "_2"
                photos[name] = read_photo(file)
            except UserError:
                if file == path:  # named outright
                    raise
                skipped.append(file.name)
    if skipped:
        print(f"--images: skipped {len(skipped)} that are no photos: {', '.join(skipped)[:200]}")
    if paths and not photos:
        raise UserError(f"--images {paths[0].absolute()} holds no photo that can be read.")
    return photos


def starred(results):
    """Names of the layers, with a star where a run regularised them."""
    first, *_ = results.values()
    regularised = set().union(*(result["regularised"] for result in results.values()))
    return [layer + "*" * (layer in regularised) for layer in first["layers"]]


def print_table(results):
    """Layer by layer, both measures, checkpoints side by side, with differences from the first."""
    first, *others = results.values()
    print(f"\n{'':22}" + "".join(f"{label[-30:]:>34}" for label in results))
    print(f"{'layer':12}units  bins" + f"{'selectivity':>17}{'assigned':>17}" * len(results))
    for name, (layer, base) in zip(starred(results), first["layers"].items()):
        line = f"{name:12}{base['units']:>5} {base['bins_used']:>2}/{base['bins']:<2}"
        line += "".join(f"{base[key]:8.3f}{'':9}" for key in MEASURES)
        for x, key in itertools.product(others, MEASURES):
            value = x["layers"][layer][key]
            line += f"{value:8.3f} ({value - base[key]:+.3f})"
        print(line)

    for label, result in results.items():
        print(f"{label} | rmse_m {result['rmse_m']:.4f} | rel {result['rel']:.4f} | delta1 "
              f"{result['delta1']:.4f} | mean selectivity {result['mean_selectivity']:.4f} | dead "
              f"units {sum(layer['dead'] for layer in result['layers'].values())}")


def parse_args(argv=None):
    p = data.new_parser(__doc__.splitlines()[0])
    add = p.add_argument
    add("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT",
        help="ours, the notebook's or METER's; several are compared; none: newest run's")
    # the frames and layers
    data.add_source_arguments(p)
    add("--split", choices=["train", "val", "test"], default="test", help="the frames")
    add("--limit", type=data.number(int, 1), help="that many, evenly spaced")
    add("--batch-size", type=data.number(int, 1), help="changes no result; 8, on a GPU 128")
    add("--layers", nargs="+", choices=LAYERS, default=list(LAYERS), metavar="LAYER",
        help="to look at")
    add("--notebook", action="store_true", help="its bins, up to 3.92 m, and --min-share 0")
    # what to do beside measuring
    add("--viz", action="store_true", help="draw units, overview and activations")
    add("--ablate", action="store_true", help="switch units off, by selectivity")
    add("--images", nargs="+", type=Path, default=[], metavar="PATH",
        help="photos or folders: cut to 4:3, resized; scale as of a Kinect (63 degrees)")
    add("--out", type=Path, default="runs/dissect", help="folder for the results")
    if p.parse_args(argv).notebook:
        p.set_defaults(min_share=0.0)
    return p.parse_args(argv)


def load_all(paths):
    """{label: (path, model, config)}: the run's name, or the file's; config of our runs, or {}."""
    loaded = {}
    for path in paths:
        whole = Path(os.path.abspath(path).replace("$", "_"))  # in a figure $ begins a formula
        label = whole.parent.name if path.stem in ("best", "last") else whole.stem
        if label in loaded:
            label = "_".join(whole.parts[1:])
        model, content = meter.load_checkpoint(path)
        config = content.get("config", {}) if "units_per_metre" in content else {}
        loaded[label] = path, model, config
    return loaded


def earlier_files(folder):
    """Files of an earlier dissection, but of photos; UserError if they are another program's."""
    found = [folder / name for name in FILES if (folder / name).exists()]
    try:
        labels = json.loads((folder / "dissect.json").read_text()) if found else []
        return found + [folder / f"{label}_{end}.png" for label in labels
                        for end in ["activations", *(f"{layer}_units" for layer in LAYERS)]]
    except Exception as error:  # noqa: BLE001  another program's may hold anything
        raise UserError(f"{found[0].absolute()} is not of dissect.py: another --out.") from error


def main(argv=None):
    """Dissects; returns {label: what dissect.json holds of that checkpoint}."""
    args = parse_args(argv)
    torch.backends.cudnn.allow_tf32 = False  # a GPU's default is less than fp32
    torch.set_float32_matmul_precision("highest")  # train.main leaves it lower
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    newest = sorted(Path("runs").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)[-1:]
    loaded = load_all(args.checkpoints or newest)
    if not loaded:
        raise UserError("no runs/*/best.pt: run `python train.py` first, or name a checkpoint.")
    photos = read_photos(args.images)

    # The frames that the flags ask for, or else those of the first run among the checkpoints.
    first = next((config for *_, config in loaded.values() if config), {})
    if args.data or args.rooms:
        first = {}
    asked = {key: first.get(key) or getattr(args, key) for key in ("data", "rooms", "raw_depth")}
    with data.sole_writer(args.out):
        old = earlier_files(args.out)
        source = data.open_source(**asked, device=device)
        frames = data.Frames(source, args.split, device, limit=args.limit)
        data.stop_on_faults(source)
        return dissect(args, loaded, frames, photos, old)


def dissect(args, loaded, frames, photos, old):
    batch_size = args.batch_size or (128 if frames.device.type == "cuda" else 8)
    results, rows, ablation = {}, [], []
    for label, (path, model, config) in loaded.items():
        model.to(frames.device, memory_format=torch.channels_last)
        metrics, units = measure(
            model, frames, args.layers, args.notebook, batch_size, args.min_share)
        while old:  # now there is something new
            old.pop().unlink(missing_ok=True)
        regularised = config["layers"] if config.get("neuron_selective") else []

        layers = {}
        for layer, r in data.progress(units.items(), label, len(units), unit="layers"):
            layers[layer] = {
                **{key: r[key].mean().item() for key in MEASURES}, "units": len(r["unit"]),
                "dead": int(r["dead"].sum()), "bins": len(r["counted"]),
                "bins_used": int(r["counted"].sum())}
            known = {"checkpoint": label, "layer": layer}
            values = zip(*(r[key].tolist() for key in COLUMNS))
            rows += [known | dict(zip(COLUMNS, unit)) for unit in values]
            if args.ablate:
                ablation += [known | row for row in ablate(model, frames, layer, r, batch_size)]
            if args.viz:
                draw_units(f"{label}, {layer}", r, args.out / f"{label}_{layer}_units.png")
        results[label] = {
            "checkpoint": str(path), "notebook": args.notebook, "min_share": args.min_share,
            "split": args.split, "images": len(frames), "regularised": regularised, **metrics,
            "mean_selectivity": np.mean([x["selectivity"] for x in layers.values()]).item(),
            "layers": layers}
        if not args.viz and not photos:
            continue

        # Pages: frames or up to three photos, and the units that follow depth best.
        shown = {layer: r for layer, r in units.items() if layer in regularised} or units
        chosen, best = choose_units(model, frames, shown)
        if not chosen:
            print(f"{label}: no unit of {', '.join(shown)} follows depth with a correlation of .3")
        pages = {"activations": (*frames.fetch(best), chosen)} if args.viz else {}
        images = [photo.to(frames.device) for photo in photos.values()]
        for n in range(0, len(images), 3):
            pages[f"photos_{n // 3 + 1}"] = torch.stack(images[n:n + 3]), None, chosen
        for name, image in zip(photos, images):
            pages[f"{name}_depth"] = image[None], None, []
        for page, (image, depth, chosen) in pages.items():
            draw_activations(model, image, depth, units, chosen, args.out / f"{label}_{page}.png")

    data.write_json(args.out / "dissect.json", results)
    data.write_csv(args.out / "units.csv", rows)
    if args.viz:
        draw_overview(results, args.out / "overview.png")
    if args.ablate:
        data.write_csv(args.out / "ablation.csv", ablation)
        draw_ablation(ablation, args.out / "ablation.png")
    print_table(results)
    print(f"written to {args.out.absolute()}")
    return results


if __name__ == "__main__":
    data.run_command(main)
