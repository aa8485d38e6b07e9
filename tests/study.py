"""The study in one command: settings with several seeds each, trained, dissected, compared.

    python tests/study.py --data nyu.h5 --init meter_xxs_nyu.pth

study.csv in --out gets a line when a run is done: stop it when you like, it goes on where it was.
Lines do not tell the data: other --data or --init, another --out.
"""
import csv
import sys
from contextlib import redirect_stdout
from multiprocessing import cpu_count, get_context
from pathlib import Path
from statistics import mean, stdev

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import dissect
import train

RECIPE = "--variant xxs --schedule cosine --augment --amp auto"
SCRATCH = f"--data nyu.h5 --epochs 30 --lr 2e-3 --batch-size 16 {RECIPE}"
TUNED = f"--data nyu.h5 --init meter_xxs_nyu.pth --epochs 12 --lr 3e-4 --batch-size 16 {RECIPE}"
ROOMS = f"--rooms 400 --epochs 24 --lr 2e-3 --batch-size 8 {RECIPE}"
PULL = "--neuron-selective --min-share 0 --layers"  # all bins count, the papers' form
LOOK = "--min-share 0 --layers dec_1 dec_2 dec_3 enc_4 enc_output"
PULL_SHARE, LOOK_SHARE = PULL.replace(" 0 ", " 0.001 "), LOOK.replace(" 0 ", " 0.001 ")
TRIO, PAIR = "dec_1 dec_2 dec_3", "dec_3 enc_4"
# Name, up to "_" that of the row to compare with; arguments of train.py, all flags that matter, as
# defaults change; arguments of dissect.py.
ROWS = [
    ("scratch", SCRATCH, f"{LOOK} --ablate"),
    ("scratch_lr1e-3", SCRATCH.replace("--lr 2e-3", "--lr 1e-3"), LOOK),
    ("scratch_dec_1-0.1", f"{SCRATCH} {PULL} dec_1 --alpha -0.1", f"{LOOK} --ablate"),
    ("scratch_pair-0.1", f"{SCRATCH} {PULL} {PAIR} --alpha -0.1", LOOK),
    ("scratch_pair-0.3", f"{SCRATCH} {PULL} {PAIR} --alpha -0.3", LOOK),
    ("scratch_trio-0.1", f"{SCRATCH} {PULL} {TRIO} --alpha -0.1", LOOK),
    ("scratch_trio-0.3", f"{SCRATCH} {PULL} {TRIO} --alpha -0.3", f"{LOOK} --ablate"),
    ("tuned", TUNED, f"{LOOK} --ablate"),
    ("tuned_pair-0.1", f"{TUNED} {PULL} {PAIR} --alpha -0.1", LOOK),
    ("tuned_pair-0.7", f"{TUNED} {PULL} {PAIR} --alpha -0.7", f"{LOOK} --ablate"),
    ("rooms", ROOMS, LOOK_SHARE),
    ("rooms_dec_1-0.1", f"{ROOMS} {PULL_SHARE} dec_1 --alpha -0.1", LOOK_SHARE),
    ("rooms_dec_1-0.3", f"{ROOMS} {PULL_SHARE} dec_1 --alpha -0.3", LOOK_SHARE),
]


def run(task):
    """Trains, or goes on training, and dissects: a line of study.csv, its metrics of the test."""
    name, words, look, seed, folder = task
    with open(f"{folder}.txt", "a", encoding="utf-8") as file, redirect_stdout(file):
        train.main([*words, "--seed", seed, "--out", str(folder), "--resume"])
        [found] = dissect.main([f"{folder}/best.pt", *look, "--out", f"{folder}/dissect"]).values()
    line = {"name": name, "seed": seed, **{key: found[key] for key in ("rmse_m", "rel", "delta1")}}
    line["seconds"] = sum(float(row["seconds"]) for row in csv.DictReader(open(folder / "log.csv")))
    line |= {layer: values["selectivity"] for layer, values in found["layers"].items()}
    for row in csv.DictReader(open(folder / "dissect/ablation.csv")) if "--ablate" in look else []:
        order, layer = row["order"].split()[0], row["layer"]
        if order != "random" and 2 * int(row["units_off"]) == found["layers"][layer]["units"]:
            line[f"rmse_m without the {order} selective half of {layer}"] = row["rmse_m"]
    return line


def spread(values, form=".3f"):
    deviation = f" ± {stdev(values):{form.strip('+')}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{deviation}" if values else ""


def print_tables(lines):
    """Of each column: mean ± deviation over seeds, and of its change, which is paired by seed."""
    for key in list(lines[0])[2:] if lines else []:
        relative, runs = "rmse" in key, {}  # name -> seed -> value
        for line in [line for line in lines if line[key]]:
            runs.setdefault(line["name"], {})[line["seed"]] = float(line[key])
        print(f"\n| {key} | seeds | mean | change |\n|---|---|---|---|")
        for name, own in runs.items():
            base = runs.get(name.split("_")[0], {}) if "_" in name else {}
            pairs = [(own[seed], base[seed]) for seed in own if seed in base]
            changes = [a / b - 1 if relative else a - b for a, b in pairs]
            print(f"| {name} | {len(own)} | {spread(own.values())} | "
                  f"{spread(changes, '+.1%' if relative else '+.3f')} |")


def main(argv=None):
    names, jobs = [row[0] for row in ROWS], 4 if torch.cuda.is_available() else cpu_count()
    p = data.new_parser(__doc__.splitlines()[0])
    p.add_argument("--data", help="a packed .h5, the rows' nyu.h5")
    p.add_argument("--init", help="METER's weights, the rows' meter_xxs_nyu.pth")
    p.add_argument("--only", nargs="+", choices=names, default=names, help="rows")
    p.add_argument("--seeds", default="0-7", help="first-last")
    p.add_argument("--out", type=Path, default=Path("runs/study"), help="folder for all of it")
    p.add_argument("--jobs", type=data.number(int, 1), default=jobs, help="runs at a time")
    args = p.parse_args(argv)
    first, _, last = args.seeds.partition("-")
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        p.error(f"--seeds {args.seeds}: give the first and the last, such as 0-7")
    seeds = [str(seed) for seed in range(int(first), int(last) + 1)]
    with data.sole_writer(args.out):
        table = args.out / "study.csv"
        lines = list(csv.DictReader(open(table, encoding="utf-8-sig"))) if table.exists() else []
        if lines and "name" not in lines[0]:
            raise data.UserError(f"{table.absolute()} is not of study.py: another --out.")
        done = [(line["name"], line["seed"]) for line in lines]
        tasks, files = [], {"nyu.h5": args.data, "meter_xxs_nyu.pth": args.init}
        for name, arguments, look in (row for row in ROWS if row[0] in args.only):
            words = [files.get(word, word) for word in arguments.split()]
            if None in words:
                print(f"{name}: skipped, it needs --data" + " and --init" * ("--init" in words))
            else:
                tasks += [(name, words, look.split(), seed, args.out / f"{name}_{seed}")
                          for seed in seeds if (name, seed) not in done]
        with get_context("spawn").Pool(args.jobs, torch.set_num_threads, [1]) as pool:
            for line in pool.imap_unordered(run, tasks):
                columns = dict.fromkeys([*(lines or [line])[0], *line], "")
                lines = [columns | old for old in [*lines, line]]
                data.write_csv(table, lines)
                print(data.log_line(line), flush=True)
    print_tables(lines)


if __name__ == "__main__":
    data.run_command(main)
