"""The house: which floor may lean on which, how big a room may be, and what a page owes its reader."""
import ast

import pytest
from house import NBS, NOTEBOOKS, PACKAGE, ROOMS, ROOT, cells, is_export, module_of, page, sidebar, site

FLOORS = ["place", "look", "change", "grow", "show", "run"]
EXPORT_CELL, ALONE, MODULE, CELLS = 45, 60, 400, 60  # lines, lines, lines, cells: a longer thing wants a second idea


def test_the_sidebar_shows_every_page_once():
    shown = [name for _, name in sidebar()]
    assert sorted(shown) == sorted(map(page, NOTEBOOKS))


def test_the_sidebar_goes_up_floor_by_floor():
    rooms = [section.removeprefix("API: ") for section, name in sidebar() if (NBS / name).exists() and module_of(NBS / name)]
    assert list(dict.fromkeys(rooms)) == FLOORS and [FLOORS.index(room) for room in rooms] == sorted(FLOORS.index(room) for room in rooms)


def test_the_site_is_described_at_the_top():
    "nbdev reads only `nbs/_quarto.yml`; it is a link to the file at the top."
    assert (NBS / "_quarto.yml").is_symlink() and (NBS / "_quarto.yml").resolve() == ROOT / "_quarto.yml"
    assert (NBS / "_quarto.yml").readlink().as_posix() == "../_quarto.yml"
    html = site()["format"]["html"]
    assert set(html["theme"]) == {"light", "dark"} and (NBS / html["css"]).is_file()


def imported_rooms(tree):
    "The modules of this package that a module imports, wherever in the module it does so."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("neural_plasticity."))
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            inside = parts[1:] if node.level == 0 and parts[0] == "neural_plasticity" else parts if node.level else None
            if inside is not None:
                yield from [inside[0]] if inside and inside[0] else (alias.name for alias in node.names)


@pytest.mark.parametrize("path", ROOMS, ids=page)
def test_a_room_imports_only_rooms_above_it(path):
    order = [module_of(NBS / name) for _, name in sidebar() if (NBS / name).exists()]
    assert module_of(path) in order, "it has no place in the sidebar of _quarto.yml"
    own = order.index(module_of(path))
    tree = ast.parse((PACKAGE / f"{module_of(path)}.py").read_text(encoding="utf-8"))
    below = {name for name in imported_rooms(tree) if name not in order[:own]}
    assert not below, f"{module_of(path)} imports {below}, which do not stand above it in _quarto.yml"


def test_imports_are_found_in_every_form():
    code = """
import neural_plasticity.a, torch
from neural_plasticity.b import x
def f():
    from .c import y
    from . import d
from neural_plasticity import e
from torch import nn
"""
    assert list(imported_rooms(ast.parse(code))) == ["a", "b", "e", "c", "d"]


@pytest.mark.parametrize("path", ROOMS, ids=page)
def test_rooms_stay_small(path):
    long = {}
    for kind, source, directives in cells(path):
        if kind == "code" and is_export(directives):
            lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]
            single = len(ast.parse(source).body) == 1  # one class or function, its documented parameters included, cannot be split
            if len(lines) > (ALONE if single else EXPORT_CELL):
                long[lines[0]] = len(lines)
    assert not long, f"export cells of more than {EXPORT_CELL} lines ({ALONE} for a single definition), blank ones not counted: {long}"
    assert len((PACKAGE / f"{module_of(path)}.py").read_text(encoding="utf-8").splitlines()) <= MODULE
    assert len(cells(path)) <= CELLS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=page)
def test_a_page_begins_with_title_and_subtitle(path):
    kind, source, _ = next(cell for cell in cells(path) if cell[0] != "raw")
    lines = [line for line in source.splitlines() if line.strip()]
    assert kind == "markdown" and lines[0].startswith("# ") and len(lines) > 1 and lines[1].startswith("> ") and len(lines[1]) > 12


@pytest.mark.parametrize("path", ROOMS, ids=page)
def test_modules_keep_the_house_rules(path):
    tree = ast.parse((PACKAGE / f"{module_of(path)}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        where = f"line {getattr(node, 'lineno', '?')}"
        assert not (isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)), f"{where}: import *"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{where}: bare except"
        assert not isinstance(node, ast.Assert), f"{where}: assert; raise an error of neural_plasticity.errors instead"
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & {"nbdev", "fastcore"}, f"{where}: the library must not need nbdev"
    for kind, source, directives in cells(path):
        if kind == "code" and is_export(directives):
            relative = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.level]
            assert not relative, "notebooks import by the full name"


@pytest.mark.parametrize("path", ROOMS, ids=page)
def test_a_page_shows_more_than_it_hides(path):
    examples = [(source, "hide" in directives) for kind, source, directives in cells(path) if kind == "code" and source and not is_export(directives)
                and not any(word.startswith("default_exp") for word in directives)]
    visible = [source for source, hidden in examples if not hidden]
    assert len(visible) >= len(examples) / 2
    assert any("assert" in source or "raises(" in source for source in visible), "no visible example asserts anything"
