"""Every name that `neural_plasticity` offers is there, is documented, and is shown at work on its page."""
import ast
import inspect

import pytest
from fastcore.docments import docments
from house import ROOMS, cells, is_export, module_of, settings

import neural_plasticity

TABLE = [(room, name) for room, names in neural_plasticity._ROOMS.items() for name in names.split()]
FLAGS = {"IS_APPLE_SILICON", "IS_COLAB", "HAS_GPU"}  # answered when asked; plain booleans
SPEAKING = {"model", "tokenizer", "dataloader", "train_dataloader", "eval_dataloader", "device"}  # mean the same everywhere


def test_the_version_is_the_one_in_the_settings():
    assert neural_plasticity.__version__ == settings()["version"]


def test_every_room_of_the_table_has_a_page():
    assert set(neural_plasticity._ROOMS) <= {module_of(path) for path in ROOMS}
    assert len({name for _, name in TABLE}) == len(TABLE)


def test_no_name_is_hidden_by_a_room():
    "Importing a room sets it as an attribute of the package, so that a function of the same name could no longer be reached."
    assert not {name for _, name in TABLE} & {module_of(path) for path in ROOMS}


@pytest.mark.parametrize("room, name", TABLE)
def test_the_name_is_there(room, name):
    value = getattr(neural_plasticity, name)
    assert name in neural_plasticity.__all__ and name in dir(neural_plasticity)
    module = __import__(f"neural_plasticity.{room}", fromlist=[name])
    assert name in FLAGS or (name in module.__all__ and value is getattr(module, name))


def silent_parameters(function):
    "The parameters with neither a comment beside them, nor a type, nor a default that shows one."
    notes = docments(function, full=True, returns=False)
    silent = {name for name, parameter in inspect.signature(function).parameters.items()
              if parameter.annotation is parameter.empty and parameter.default in (parameter.empty, None)}
    return sorted(name for name in silent if not notes[name].docment)


@pytest.mark.parametrize("room, name", TABLE)
def test_the_name_is_documented(room, name):
    value = getattr(neural_plasticity, name)
    if not callable(value):
        return  # a flag or a table; its page says what it is
    text = inspect.getdoc(value) or ""
    assert len(text) > 12 and not text.startswith(f"{name}("), f"{name} has no docstring"
    if inspect.isfunction(value):
        assert not set(silent_parameters(value)) - SPEAKING


def test_a_parameter_without_a_word_is_found():
    def example(model, level: float, heads, mask=None, title="Heads"):  # one line, no comments
        "An example."

    assert silent_parameters(example) == ["heads", "mask", "model"]


@pytest.mark.parametrize("room, name", [(room, name) for room, name in TABLE if room != "errors" and name != "Anatomy"])
def test_the_name_is_used_on_a_page(room, name):
    "In a cell that a reader sees, on the page that defines it or offers it. An Anatomy is never called by name: `probe` makes it."
    home = getattr(getattr(neural_plasticity, name), "__module__", "").removeprefix("neural_plasticity.")
    pages = [path for path in ROOMS if module_of(path) in (room, home)]
    used = set()
    for path in pages:
        for kind, source, directives in cells(path):
            if kind == "code" and not is_export(directives) and "hide" not in directives:
                nodes = list(ast.walk(ast.parse(source)))
                used |= {node.id for node in nodes if isinstance(node, ast.Name)} | {node.attr for node in nodes if isinstance(node, ast.Attribute)}
                used |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert name in used, f"no visible example uses {name}"
