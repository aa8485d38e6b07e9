"""The study in one command: every setting with several seeds, trained, dissected, compared.

    python tests/study.py --data nyu.h5 --init meter_xxs_nyu.pth    # all rows, seeds 0 to 7
    python tests/study.py --only rooms --seeds 0-2                  # needs no file

study.csv in --out gets a line when a run is done: stop it when you like, it goes on where it was.
"""
import csv
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from pathlib import Path
from statistics import mean, stdev

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import dissect
import model as meter
import train

METRICS = "rmse_m", "rel", "delta1"
LAYERS = "dec_1 dec_2 dec_3 enc_4 enc_output"  # to dissect
TRIO, PAIR = "dec_1 dec_2 dec_3", "dec_3 enc_4"
RECIPE = "--variant xxs --batch-size 16 --schedule cosine --augment --amp auto"
SCRATCH = f"--data nyu.h5 --epochs 30 --lr 1e-3 {RECIPE}"
TUNED = f"--data nyu.h5 --init meter_xxs_nyu.pth --epochs 12 --lr 3e-4 {RECIPE}"
PULL = "--neuron-selective --min-share 0"      # all bins count, the papers' form
METER = "--variant xxs --batch-size 128 --schedule step --augment --amp auto"
NOTEBOOK = "--variant xxs --batch-size 64 --schedule constant --no-augment --amp off --notebook"
# Name, up to "_" that of the row to compare with; arguments of train.py, all flags that matter, so
# that later defaults change no row; layers to dissect; whether to switch off halves of TRIO.
ROWS = [
    ("scratch", SCRATCH, LAYERS, True),
    ("scratch_lr2e-3", SCRATCH.replace("--lr 1e-3", "--lr 2e-3"), LAYERS, False),
    ("scratch_pair-0.1", f"{SCRATCH} {PULL} --layers {PAIR} --alpha -0.1", LAYERS, False),
    ("scratch_pair-0.3", f"{SCRATCH} {PULL} --layers {PAIR} --alpha -0.3", LAYERS, False),
    ("scratch_trio-0.1", f"{SCRATCH} {PULL} --layers {TRIO} --alpha -0.1", LAYERS, False),
    ("scratch_trio-0.3", f"{SCRATCH} {PULL} --layers {TRIO} --alpha -0.3", LAYERS, True),
    ("scratch_meter", f"--data nyu.h5 --epochs 30 --lr 1e-3 {METER}", LAYERS, False),
    ("scratch_notebook", f"--data nyu.h5 --epochs 20 --lr 1e-4 {NOTEBOOK}", LAYERS, False),
    ("scratch_xs", SCRATCH.replace("xxs", "xs"), LAYERS, False),
    ("scratch_s", SCRATCH.replace("xxs", "s"), LAYERS, False),
    ("scratch_100", SCRATCH.replace("--epochs 30", "--epochs 100"), LAYERS, False),
    ("tuned", TUNED, LAYERS, True),
    ("tuned_pair-0.1", f"{TUNED} {PULL} --layers {PAIR} --alpha -0.1", LAYERS, False),
    ("tuned_pair-0.7", f"{TUNED} {PULL} --layers {PAIR} --alpha -0.7", LAYERS, True),
    ("rooms", f"--rooms 4000 --epochs 6 --lr 1e-3 {RECIPE}", LAYERS, False),
]


def run(row, seed, files, folder):
    """Trains, or goes on training, and dissects: a line of study.csv, its metrics of the test."""
    name, arguments, layers, ablate = row
    words = [files.get(word, word) for word in arguments.split()]
    look = [f"{folder}/best.pt", "--min-share", "0", "--layers"]
    folder.mkdir(exist_ok=True)
    with open(folder / "output.txt", "a", encoding="utf-8") as file, redirect_stdout(file):
        train.main([*words, "--seed", str(seed), "--out", str(folder), "--resume"])
        [found] = dissect.main([*look, *layers.split(), "--out", f"{folder}/dissect"]).values()
        if ablate:
            dissect.main([*look, *TRIO.split(), "--ablate", "--out", f"{folder}/ablate"])

    line = {"name": name, "arguments": arguments, "seed": seed}
    line |= {key: found[key] for key in METRICS}
    line["seconds"] = sum(float(epoch["seconds"]) for epoch in read_csv(folder / "log.csv"))
    line |= {layer: values["selectivity"] for layer, values in found["layers"].items()}
    steps = read_csv(folder / "ablate" / "ablation.csv") if ablate else []
    units = {step["layer"]: int(step["units_off"]) for step in steps}  # the last step's: all
    for step in steps:
        order, layer = step["order"].split()[0], step["layer"]
        if order != "random" and 2 * int(step["units_off"]) == units[layer]:
            line[f"{layer} {order} off"] = step["rmse_m"]
    return line


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def print_tables(lines):
    """Of study.csv, in Markdown: mean ± deviation over seeds (change against the baseline).

    Changes are paired by seed; in % of metrics, differences of selectivity.
    """
    def column(name, key):
        return {line["seed"]: float(line[key]) for line in lines
                if line["name"] == name and line.get(key)}

    def spread(values, form):
        deviation = f" ± {stdev(values):{form.strip('+')}}" if len(values) > 1 else ""
        return f"{mean(values):{form}}{deviation}"

    halves = [f"{layer} {half} off" for layer in TRIO.split() for half in ("most", "least")]
    for keys in METRICS, LAYERS.split(), halves:
        print("\n| row | seeds |", " | ".join(keys), "|\n|---|---|" + len(keys) * "---|")
        for name, *_ in ROWS:
            cells = []
            for key in keys:
                own, base = (column(row, key) for row in (name, name.split("_")[0]))
                change = [own[s] / base[s] - 1 if key in METRICS else own[s] - base[s]
                          for s in own if s in base]
                cells.append(...)


def main(argv=None):
    """Runs what study.csv lacks; returns its lines."""
