"""The README's pieces, each pasted into an empty notebook cell with what its table names, and run."""
import ast
import builtins
import dis
import math
import re
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data
import dissect
import model
import train

ROOT = Path(__file__).resolve().parents[1]
COMMON = ["torch", "F"]  # import torch; import torch.nn.functional as F: in every cell
# The README's table. What is pasted with a piece, in this order: imports, constants, functions; a
# name that is a piece itself brings its own.
PIECES = {}


def cells_of(path):
    """{name: source} of all that stands at the top of a script, imports included."""
    text = path.read_text(encoding="utf-8")
    cells = {}
    for node in ast.parse(text).body:
        first = min([node.lineno] + [x.lineno for x in getattr(node, "decorator_list", [])])
        source = "\n".join(text.splitlines()[first - 1:node.end_lineno])
        if isinstance(node, ast.Import | ast.ImportFrom):
            start = f"from {node.module} " if isinstance(node, ast.ImportFrom) else ""
            for x in node.names:
                cells[x.asname or x.name] = f"{start}import {x.name}" + (
                    f" as {x.asname}" if x.asname else "")
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            cells[node.name] = source
        elif isinstance(node, ast.Assign):
            for x in ast.walk(node.targets[0]):
                if isinstance(x, ast.Name):
                    cells[x.id] = source
    return cells


CELLS = {name: cells_of(ROOT / name) for name in ("model.py", "data.py", "train.py", "dissect.py")}


def pasted(piece):
    """Names and sources that a piece needs, in order; of our own files never by import."""
    file, needs = PIECES[piece]
    found = {}
    for name in needs:
        if name in PIECES:
            found |= pasted(name)
        else:
            found[name] = CELLS[file][name]
    return found | {piece: CELLS[file][piece]}


def run_cell(source):
    """What stands in a notebook after a cell with this source was run in it."""
    space = {"__name__": "__main__"}
    exec(compile(source, "<cell>", "exec"), space)
    return space


def paste(piece):
    imports = [CELLS["model.py"][name] for name in COMMON]
    return run_cell("\n\n".join([*imports, *pasted(piece).values()]))[piece]
