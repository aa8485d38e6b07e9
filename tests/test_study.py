"""study.py on a tiny data set: what it runs, writes and prints."""
import csv
import json
import multiprocessing.dummy

import pytest
import study
import torch
from conftest import small_frames

import data
import dissect
import train
from data import UserError

TINY = "--data nyu.h5 --epochs 1 --batch-size 8 --lr 1e-3 --no-augment --amp off"
PULL = "--neuron-selective --alpha -1 --min-share 0 --layers dec_3"
LOOK = "--layers dec_3 --min-share 0"


def test_the_rows_are_arguments_of_train_and_have_baselines():
    names = [name for name, *_ in study.ROWS]
    assert len(set(names)) == len(names)
    for name, arguments, look in study.ROWS:
        assert name.split("_")[0] in names
        args = train.parse_args(arguments.split())
        seen = dissect.parse_args(["best.pt", *look.split()])
        assert set(args.layers) <= set(seen.layers)
        assert args.min_share == seen.min_share or not args.layers


def test_two_rows_are_run_compared_and_not_run_again(tmp_path, monkeypatch, capsys):
    if not torch.cuda.is_available():  # else processes that import torch anew, which takes seconds
        small_frames(monkeypatch)
        monkeypatch.setattr(study, "get_context", lambda _: multiprocessing.get_context("fork"))
    packed = tmp_path / "rooms.h5"
    data.pack(data.Rooms(10, "cpu"), packed)
    monkeypatch.setattr(study, "ROWS", [
        ("plain", TINY, f"{LOOK} --ablate"),
        ("plain_pulled", f"{TINY} {PULL}", LOOK),
        ("tuned", f"{TINY} --init meter_xxs_nyu.pth", LOOK),
    ])
    words = ["--data", str(packed), "--seeds", "3-3", "--jobs", "2", "--out", str(tmp_path)]
    study.main(words)
    printed = capsys.readouterr().out

    with open(tmp_path / "study.csv", newline="") as file:
        lines = {line["name"]: line for line in csv.DictReader(file)}
    assert set(lines) == {"plain", "plain_pulled"}
    for name, line in lines.items():
        metrics = json.loads((tmp_path / f"{name}_3" / "metrics.json").read_text())
        assert float(line["rmse_m"]) == pytest.approx(metrics["rmse_m"], rel=1e-6)
        assert line["seed"] == "3" and 0 < float(line["dec_3"]) < 1
    halves = [key for key in lines["plain"] if "half" in key]
    assert all(float(lines["plain"][key]) > 0 for key in halves) and len(halves) == 2
    assert lines["plain_pulled"][halves[0]] == ""

    plain, pulled = (float(lines[name]["rmse_m"]) for name in ("plain", "plain_pulled"))
    assert f"| plain | 1 | {plain:.3f} |  |" in printed
    assert f"| plain_pulled | 1 | {pulled:.3f} | {pulled / plain - 1:+.1%} |" in printed
    assert "tuned: skipped" in printed and "--init" in printed

    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    monkeypatch.setattr(study, "get_context", lambda _: multiprocessing.dummy)  # of idle workers
    study.main(words)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")} == finished
    assert f"| plain | 1 | {plain:.3f} |  |" in capsys.readouterr().out


def test_changes_are_paired_by_seed(monkeypatch, capsys):
    monkeypatch.setattr(study, "ROWS", [("a", "", ""), ("a_b", "", "")])
    study.print_tables([
        {"name": "a", "seed": "0", "rmse_m": "1.0", "dec_3": "0.2"},
        {"name": "a", "seed": "1", "rmse_m": "2.0", "dec_3": ""},
        {"name": "a", "seed": "2", "rmse_m": "9.0", "dec_3": "0.9"},
        {"name": "a_b", "seed": "1", "rmse_m": "1.8", "dec_3": "0.6"},
        {"name": "a_b", "seed": "0", "rmse_m": "1.3", "dec_3": "0.5"},
    ])
    printed = capsys.readouterr().out
    assert "| a | 3 | 4.000 ± 4.359 |  |" in printed
    assert "| a_b | 2 | 1.550 ± 0.354 | +10.0% ± 28.3% |" in printed
    assert "| a_b | 2 | 0.550 ± 0.071 | +0.300 |" in printed


@pytest.mark.parametrize("words", [
    ["--only", "nobody"], ["--seeds", "two"], ["--seeds", "3-2"], ["--seeds", "\u00b2-3"],
    ["--jobs", "0"]])
def test_a_mistake_is_a_sentence_that_names_the_flag(words, tmp_path):
    with pytest.raises(UserError, match=words[0]):
        study.main([*words, "--out", str(tmp_path)])


def test_a_table_that_a_spreadsheet_saved_is_read(tmp_path, capsys):
    (tmp_path / "study.csv").write_text("name,seed,rmse_m\r\nscratch,0,.5\r\n", "utf-8-sig")
    study.main(["--only", "scratch", "--out", str(tmp_path)])
    assert "| scratch | 1 | 0.500 |  |" in capsys.readouterr().out


def test_a_table_of_another_program_is_refused(tmp_path):
    (tmp_path / "study.csv").write_text("run;seed\n1;2\n")
    with pytest.raises(UserError, match=r"study\.csv is not of study\.py"):
        study.main(["--out", str(tmp_path)])
