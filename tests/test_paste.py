"""Each piece of the README's table, run alone in an empty notebook cell with what that names."""
import ast
import builtins
import dis
import functools
import re
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import data
import dissect
import model
import train

ROOT = Path(__file__).resolve().parents[1]
OWN = {"model": model, "data": data, "train": train, "dissect": dissect}
ALWAYS = ["torch", "F"]  # import torch; import torch.nn.functional as F: in every cell
# The README's table: file, and what is pasted with a piece, in this order. A name that is a piece
# itself brings its own; imports are those of the file.
PIECES = {
    "METER": ("model.py", [
        "OrderedDict", "nn", "CENTIMETRES", "VARIANTS", "conv", "conv3x3",
        "bn_relu", "MobileNetV2Block", "Attention", "feed_forward", "PreNorm", "METERBlock",
        "UpBlock"]),
    "record": ("model.py", ["contextmanager", "LAYERS"]),
    "sid_thresholds": ("model.py", []),
    "bin_weights": ("model.py", ["functools", "bin_masks", "interpolation"]),
    "bin_sums": ("model.py", []),
    "counted_bins": ("model.py", []),
    "selectivity": ("model.py", []),
    "unit_selectivity": ("model.py", ["counted_bins", "selectivity", "assigned_bins"]),
    "assigned_selectivity": ("model.py", ["bin_weights", "bin_sums", "unit_selectivity"]),
    "make_rooms": ("data.py", [
        "np", "SIZE", "FOCAL", "FURNITURE", "PAINT", "furnish", "camera_rays", "cast", "hashed",
        "shade"]),
    "normalise": ("data.py", ["functools", "MEAN", "STD", "constant"]),
    "augment": ("data.py", ["functools", "permutations", "constant"]),
    "depth_metrics": ("data.py", []),
    "loss_terms": ("train.py", [
        "CENTIMETRES", "mean_without", "slopes", "normal_cosine", "ssim"]),
    "balanced_loss": ("train.py", ["loss_terms"]),
    "objective": ("train.py", [
        "loss_terms", "assigned_selectivity", "sid_thresholds", "GREY_LEVELS", "MAX_BINS",
        "layer_thresholds", "notebook_depth"]),
    "learning_rate": ("train.py", ["cos", "pi"]),
    "switch_off": ("dissect.py", []),
}


@functools.cache
def sources(file):
    """{name: source} of all that stands at the top of a script, imports included."""
    text, found = (ROOT / file).read_text(encoding="utf-8"), {}
    for node in ast.parse(text).body:
        source = ast.get_source_segment(text, node)
        if isinstance(node, ast.Import | ast.ImportFrom):
            start = f"from {node.module} " if isinstance(node, ast.ImportFrom) else ""
            for x in node.names:
                end = f" as {x.asname}" if x.asname else ""
                found[x.asname or x.name] = f"{start}import {x.name}{end}"
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            decorators = [ast.get_source_segment(text, x) for x in node.decorator_list]
            found[node.name] = "\n".join([*(f"@{x}" for x in decorators), source])
        elif isinstance(node, ast.Assign):
            for x in ast.walk(node.targets[0]):
                if isinstance(x, ast.Name):
                    found[x.id] = source
    return found


def source_of(name, file):
    """Of a name in a script, or where that imports it from."""
    for place in (file, "model.py", "data.py"):
        source = sources(place).get(name, "import model")
        if not re.match(rf"(from|import) ({'|'.join(OWN)})\b", source):
            return source
    raise AssertionError(f"{name} stands in none of our files, nor do they import it")


def cell(piece):
    """{name: source} of what is pasted, in order."""
    file, names = PIECES[piece]
    found = {name: source_of(name, "model.py") for name in ALWAYS}
    for name in names:
        found |= cell(name) if name in PIECES else {name: source_of(name, file)}
    return found | {piece: source_of(piece, file)}


def run_cell(source):
    """What is in a fresh notebook once a cell with this source was run."""
    names = {"__name__": "__main__"}
    exec(compile(source, "<cell>", "exec"), names)
    return names


def global_names(code):
    """Names that compiled source looks up outside its functions, without the built-in ones."""
    found = {x.argval for x in dis.get_instructions(code)
             if x.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= global_names(constant)
    return {name for name in found if not hasattr(builtins, name) and not name.startswith("__")}


# What each piece is asked to do; it shall do the same pasted as in its file.

def some(*shape, low=0.0, high=1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return low + (high - low) * torch.rand(*shape, generator=generator)


def depth_with_holes(*shape):
    return some(*shape, low=0.3, high=10.5) * (some(*shape, 1)[..., 0] > 0.05)


def use_meter(piece):
    torch.manual_seed(0)
    networks = [piece(variant).eval() for variant in ("xxs", "xs", "s")]
    with torch.no_grad():
        return [network(some(1, 3, 64, 128)) for network in networks]


def use_record(piece):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Sequential(nn.ReLU(), nn.Conv2d(2, 1, 1)))
    answers = []
    for names, asked in (["0", "1.0"], network), (["dec_3", "enc_4"], model.METER().eval()):
        with piece(asked, names) as features, torch.no_grad():
            asked(some(1, 3, 64, 64))
        answers += [features[name] for name in names]
    with pytest.raises(ValueError, match="dec_9"), piece(network, ["dec_9"]):
        pass
    return answers


def use_unit_selectivity(piece):
    count = torch.tensor([0, 1, 500, 300, 0, 20, 100, 79])
    return [piece(some(16, 8), count, share) for share in (0.0, 0.01)]


def use_assigned_selectivity(piece):
    features, depth = some(2, 8, 6, 8, low=-1), depth_with_holes(2, 1, 24, 32)
    return [piece(features, depth, model.sid_thresholds(8), share) for share in (0.0, 0.05)]


def use_loss(piece):
    depth, prediction = depth_with_holes(2, 1, 24, 32), some(2, 1, 24, 32, low=0.5, high=9)
    return [piece(prediction, depth), piece(prediction, depth, 25.5)]


def use_objective(piece):
    depth, prediction = depth_with_holes(2, 1, 24, 32), some(2, 1, 24, 32, low=0.5, high=9)
    features = {"dec_3": some(2, 8, 24, 32), "enc_9": some(2, 80, 3, 4, low=-1)}
    return [piece(prediction, depth, features, -0.3, notebook, share)
            for notebook, share in ((False, 0.001), (True, 0.0))]


def use_learning_rate(piece):
    return [piece(epoch / 3, 60, 1e-3, schedule)
            for schedule in ("cosine", "step", "constant") for epoch in range(180)]


def use_bin_weights(piece):
    depth, thresholds = depth_with_holes(2, 1, 24, 32), model.sid_thresholds(8)
    return [piece(depth, thresholds, size) for size in ((6, 8), (24, 32), (48, 64))]


def use_augment(piece):
    image, depth, draws = some(6, 3, 64, 64), depth_with_holes(6, 1, 16, 16), some(6, 11)
    return [piece(image, depth, draws), piece(image, depth, draws, mirror_shift=0)]


USES = {
    "METER": use_meter,
    "record": use_record,
    "sid_thresholds": lambda piece: [piece(8), piece(64, near=1.0, far=80.0)],
    "bin_weights": use_bin_weights,
    "bin_sums": lambda piece: [piece(some(2, 3, *size), some(2, 8, 6, 8))
                               for size in ((6, 8), (12, 16))],
    "counted_bins": lambda piece: [piece(torch.tensor([0, 1, 9, 990]), share)
                                   for share in (0.0, 0.001, 0.005, 0.5)],
    "selectivity": lambda piece: [piece(some(5, 8), torch.arange(5)),
                                  piece(some(5, 8), torch.arange(5), torch.arange(8) > 2)],
    "unit_selectivity": use_unit_selectivity,
    "assigned_selectivity": use_assigned_selectivity,
    "make_rooms": lambda piece: [*piece(torch.tensor([0, 7, 10 ** 9]))],
    "normalise": lambda piece: piece(some(2, 3, 4, 6)),
    "augment": use_augment,
    "depth_metrics": lambda piece: piece(some(3, 1, 24, 32, high=11),
                                         depth_with_holes(3, 1, 24, 32)),
    "loss_terms": use_loss,
    "balanced_loss": use_loss,
    "objective": use_objective,
    "learning_rate": use_learning_rate,
    "switch_off": lambda piece: piece(torch.tensor([2, 0]))(some(2, 4, 3, 3)),
}


@pytest.mark.parametrize("piece", PIECES)
def test_a_piece_pasted_alone_does_what_it_does_in_its_file(piece):
    pasted = run_cell("\n\n".join(cell(piece).values()))[piece]
    own = getattr(OWN[PIECES[piece][0].removesuffix(".py")], piece)
    assert pasted is not own
    torch.testing.assert_close(USES[piece](pasted), USES[piece](own), rtol=0, atol=0)


@pytest.mark.parametrize("piece", PIECES)
def test_the_table_names_what_a_piece_needs_and_no_more(piece):
    found, names = cell(piece), PIECES[piece][1]
    used = global_names(compile("\n\n".join(found.values()), piece, "exec"))
    assert used <= found.keys() <= used | {piece, *ALWAYS}
    others = [set(cell(name)) - {name} for name in names if name in PIECES]
    assert not set().union(*others) & set(names) and len(names) == len(set(names))


def test_the_readme_has_the_same_table():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Pieces\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    rows = re.findall(r"^\|(.+)\|(.+)\|(.+)\|$", section[1] if section else "", re.MULTILINE)
    if not rows:
        pytest.skip("README.md has no table of pieces")
    assert [cell.strip() for cell in rows[0]] == ["piece", "file", "paste with it"]
    found = {re.search(r"\w+", piece)[0]: (re.search(r"\w+\.py", file)[0],
                                           re.findall(r"`(\w+)`", names))
             for piece, file, names in rows[2:]}
    assert found == PIECES
