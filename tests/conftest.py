"""A tiny fake NYU Depth V2: Kaggle's folder and the official .mat, random frames, made here.

A run of many tests is shared by two processes: half the time on two cores.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import data

torch.set_num_threads(1)
TRAIN_PAIRS, TEST_PAIRS, LABELED = 24, 8, 40
BESIDE = "test_dissect.py", "test_model.py"  # run in a second process; the first shows its reports


def pytest_collection_finish(session):
    config, option = session.config, session.config.option
    shared = [item for item in session.items if item.path.name in BESIDE]
    if "METER_TEST_REPORTS" in os.environ:
        config.pluginmanager.register(Reporter(config, os.environ["METER_TEST_REPORTS"]))
    elif not (len(shared) < 100 or len(session.items) < 2 * len(shared) or option.collectonly
              or option.usepdb or option.capture == "no" or os.cpu_count() == 1
              or hasattr(config, "workerinput") or getattr(option, "numprocesses", None)):
        session.items.sort(key=lambda item: item.path.name in BESIDE)  # to be waited for last
        config.pluginmanager.register(Shared(config, [item.nodeid for item in shared]))


class Reporter:
    """In the second process: writes a line of JSON for each report."""

    def __init__(self, config, path):
        self.config, self.file = config, open(path, "w", encoding="utf-8")

    def pytest_runtest_logreport(self, report):
        content = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        print(json.dumps(content), file=self.file, flush=True)


class Shared:
    """In the first process: starts the second, and reports of its tests what that reports."""

    def __init__(self, config, names):
        self.config, self.names = config, set(names)
        self.reports, self.log = (tempfile.NamedTemporaryFile("w+", encoding="utf-8")
                                  for _ in range(2))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "--rootdir", config.rootpath, *names],
            cwd=config.rootpath, env=os.environ | {"METER_TEST_REPORTS": self.reports.name},
            stdout=self.log, stderr=subprocess.STDOUT)

    def pytest_runtest_protocol(self, item):
        if item.nodeid not in self.names:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        when = line = ""
        while when != "teardown":
            ended = self.process.poll() is not None
            line += self.reports.readline()  # perhaps a part of it
            if line.endswith("\n"):
                report = self.config.hook.pytest_report_from_serializable(
                    config=self.config, data=json.loads(line))
                when, line = report.when, ""
                item.ihook.pytest_runtest_logreport(report=report)
            elif ended:
                raise RuntimeError(f"the second process died:\n{Path(self.log.name).read_text()}")
            else:
                time.sleep(0.02)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_unconfigure(self):
        self.process.kill()


def frame_size(number):
    """Width, height: one frame of NYU's own size, the others a quarter of it, to be quick."""
    return (160, 120) if number else (640, 480)


@pytest.fixture(scope="session")
def nyu(tmp_path_factory):
    """nyu_data as on Kaggle: 24 training pairs in three scenes, 8 test pairs."""
    root, random = tmp_path_factory.mktemp("kaggle") / "nyu_data", np.random.default_rng(0)
    rows = {"train": [], "test": []}
    for pool, pairs in (("train", TRAIN_PAIRS), ("test", TEST_PAIRS)):
        for i in range(pairs):
            stem = f"scene_{i // 8:04}_out/{i % 8 + 1}" if pool == "train" else f"{i:05}"
            ends = (".jpg", ".png") if pool == "train" else ("_colors.png", "_depth.png")
            rows[pool].append([f"data/nyu2_{pool}/{stem}{end}" for end in ends])
            image, depth = (root / cell for cell in rows[pool][-1])
            image.parent.mkdir(parents=True, exist_ok=True)
            width, height = frame_size(i)
            colours = random.integers(0, 256, (height, width, 3)).astype(np.uint8)
            Image.fromarray(colours).save(image)
            low, high, kind = (10, 256, np.uint8) if pool == "train" else (400, 10000, np.uint16)
            Image.fromarray(random.integers(low, high, (height, width)).astype(kind)).save(depth)
    for pool, pairs in rows.items():
        text = "".join(",".join(pair) + "\n" for pair in pairs)
        (root / "data" / f"nyu2_{pool}.csv").write_text(text)
    return root


@pytest.fixture(scope="session")
def mat(tmp_path_factory):
    """nyu_depth_v2_labeled.mat, cut to its first 40 frames, of 64 x 48; rawDepths has holes."""
    path = tmp_path_factory.mktemp("labeled") / "nyu_depth_v2_labeled.mat"
    random = np.random.default_rng(1)
    depths = random.uniform(0.5, 9.9, (LABELED, 64, 48)).astype(np.float32)
    with h5py.File(path, "w") as file:
        file["images"] = random.integers(0, 256, (LABELED, 3, 64, 48)).astype(np.uint8)
        file["depths"], file["rawDepths"] = depths, depths * (random.random(depths.shape) < 0.8)
    return path


@pytest.fixture(scope="session")
def packed(nyu, tmp_path_factory):
    """The fake Kaggle folder, packed by `python data.py`."""
    path = tmp_path_factory.mktemp("packed") / "nyu.h5"
    data.main([str(nyu), str(path)])
    return path


def small_frames(patch):
    """A sixth of the pixels: most of what is tested does not depend on them, the time does."""
    size, depth_size = (64, 128), (16, 32)
    patch.setattr(data, "SIZE", size)
    patch.setattr(data, "DEPTH_SIZE", depth_size)
    patch.setattr(data, "FORMS", {"image": ((*size, 3), "u1"), "depth": ((1, *depth_size), "<f4")})


@pytest.fixture(scope="module")
def small():
    """Small frames in all tests of a module."""
    with pytest.MonkeyPatch.context() as patch:
        small_frames(patch)
        yield


@pytest.fixture(scope="session")
def device():
    """Where tests put their tensors: on the GPU if there is one. They compare on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:The given NumPy array is not writable")


@pytest.fixture(autouse=True)
def full_precision():
    """A GPU's fp32 is to be fp32, also after a run of train.py, which lets some of it be TF32."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def quick_figures(request, monkeypatch):
    """Drawing takes most of a tiny run's time: only tests with "figure" in their name draw."""
    if "figure" not in request.node.name:
        monkeypatch.setattr(FigureCanvasAgg, "print_png", lambda _, file: file.write_bytes(b"png"))
