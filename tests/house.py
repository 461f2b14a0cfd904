"""What the tests of the house itself share: where things stand, and how notebooks and the sidebar are read."""
import configparser
import importlib
import json
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
NBS, PACKAGE = ROOT / "nbs", ROOT / "neural_plasticity"
NOTEBOOKS = sorted(path for path in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def page(path):
    "A notebook's name as the sidebar writes it, such as `explanations/seeds.ipynb`."
    return path.relative_to(NBS).as_posix()


@contextmanager
def imported_script(name):
    "A benchmark as a module, found beside its neighbours as when it is run."
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        for module in (name, "common"):
            sys.modules.pop(module, None)


@cache
def settings():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


@cache
def site():
    return yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))


@cache
def sidebar():
    "The pages of the site in order: `[(section or None, page)]`."
    pages = []
    for entry in site()["website"]["sidebar"]["contents"]:
        section = entry.get("section") if isinstance(entry, dict) else None
        pages += [(section, name) for name in (entry["contents"] if section else [entry])]
    return pages


@cache
def cells(path):
    "A notebook's cells as `(type, source, directives)`; directives are the words behind `#|` at the top."
    found = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        words = [" ".join(line[2:].split()) for line in source.splitlines() if line.startswith("#|")]
        found.append((cell["cell_type"], source, words))
    return found


def is_export(directives):
    return any(word in ("export", "exports", "exporti") for word in directives)


@cache
def module_of(path):
    "The module that a notebook exports, or None."
    names = [word.split()[1] for _, _, directives in cells(path) for word in directives if word.startswith("default_exp ")]
    return names[0] if names else None


ROOMS = [path for path in NOTEBOOKS if module_of(path)]  # the notebooks that export a module
