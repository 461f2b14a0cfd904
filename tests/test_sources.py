"""`load_model` and `load_texts`: folders, files, a hub, its cache, and no hub at all."""
import gzip
import json
import os
import random
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants
from transformers import BertConfig, BertModel

import neural_plasticity.sources as sources
from local_hub import local_hub
from neural_plasticity.data import embedded_folder, load_embedded_model, load_embedded_text, text_dataloader
from neural_plasticity.errors import InvalidArgument, SourceUnavailable, WrongType
from neural_plasticity.sources import hub_problem, load_model, load_texts

ROOT = Path(__file__).resolve().parents[1]
CARD = """---
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - split: train
    path: wikitext-2-raw-v1/train-*
  - split: validation
    path: wikitext-2-raw-v1/validation-*
- config_name: wikitext-103-raw-v1
  data_files:
  - split: train
    path: wikitext-103-raw-v1/train-*
---
"""


def write_parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    "Nothing is written to the user's cache, and no request leaves the machine."
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def wikitext(tmp_path_factory):
    "A dataset repository as wikitext is one: a card with configs, parquet files, blank rows."
    folder = tmp_path_factory.mktemp("wikitext")
    for config, split in (("wikitext-2-raw-v1", "train"), ("wikitext-2-raw-v1", "validation"), ("wikitext-103-raw-v1", "train")):
        write_parquet(folder / config / f"{split}-00000-of-00001.parquet", text=["", f" = {config} = \n", "", f" Words of {split} . \n"])
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_embedded_model_by_name(name):
    model, tokenizer = load_model(f"embedded:{name}")
    known, _ = load_embedded_model(name)
    assert all(weight.equal(known.state_dict()[key]) for key, weight in model.state_dict().items())
    assert tokenizer.model_max_length == 512 and not model.training
    assert load_model(f"embedded:{name}", dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert load_model(f"embedded:{name}", "cpu", dtype="auto")[0].dtype == torch.float32


def test_model_from_a_folder(tmp_path):
    model, tokenizer = load_embedded_model("llama")
    tokenizer.pad_token = None
    model.to(torch.bfloat16).save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    states = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    loaded, its_tokenizer = load_model(tmp_path / "mine")
    assert torch.random.get_rng_state().equal(states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]
    assert loaded.dtype == torch.float32 and not loaded.training
    assert load_model(str(tmp_path / "mine"), dtype="auto")[0].dtype == torch.bfloat16
    assert its_tokenizer.pad_token == its_tokenizer.eos_token == "<|endoftext|>"


def test_models_that_cannot_be_had(tmp_path):
    with pytest.raises(SourceUnavailable, match="no such folder.*embedded:gpt2"):
        load_model(tmp_path / "nothing")
    with pytest.raises(SourceUnavailable, match="no such folder"):
        load_model("./nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceUnavailable, match="that folder says.*embedded:gpt2"):
        load_model(tmp_path / "empty")
    model, tokenizer = load_embedded_model("gpt2")
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(SourceUnavailable, match="that folder says.*no tokenizer files"):
        load_model(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    weights = tmp_path / "bare" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(SourceUnavailable, match="that folder says"):
        load_model(tmp_path / "bare")


def test_a_model_without_a_language_model_head_is_refused(tmp_path):
    BertModel(BertConfig(vocab_size=4096, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)).save_pretrained(tmp_path)
    load_embedded_model("gpt2")[1].save_pretrained(tmp_path)
    with pytest.raises(SourceUnavailable, match="no complete causal language model"):
        load_model(tmp_path)


def test_code_in_a_model_folder_is_not_run(tmp_path):
    model, tokenizer = load_embedded_model("gpt2")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "something_new", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
    with pytest.raises(SourceUnavailable):
        load_model(tmp_path)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    "args, options, kind, words",
    [
        (("embedded:bert",), {}, InvalidArgument, "'embedded:gpt2', 'embedded:llama'"),
        (("embedded",), {}, InvalidArgument, "'embedded:gpt2'"),
        ((" ",), {}, InvalidArgument, "blank"),
        ((None,), {}, WrongType, "a name or a path"),
        (("embedded:gpt2", "gpu"), {}, InvalidArgument, "device is 'gpu'"),
        (("embedded:gpt2",), {"dtype": "float32"}, WrongType, "torch.dtype"),
    ],
)
def test_model_arguments(args, options, kind, words):
    with pytest.raises(kind, match=words):
        load_model(*args, **options)


# ---------------------------------------------------------------- texts from files and folders


def test_embedded_texts_by_name():
    assert load_texts("embedded") == load_texts("embedded:train") == load_embedded_text("train")
    assert load_texts("embedded", split="selection") == load_texts("embedded:selection", split="selection") == load_embedded_text("selection")
    assert load_texts("embedded:shift_validation", max_texts=3) == load_embedded_text("shift_validation")[:3]
    with pytest.raises(InvalidArgument, match="different splits"):
        load_texts("embedded:train", split="validation")
    with pytest.raises(InvalidArgument, match="'shift_train'"):
        load_texts("embedded:everything")


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_text_file_gives_paragraphs(tmp_path, ending):
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeffOne\ntwo.\n \n\n\n  Three — four.\n\n".replace("\n", ending).encode())
    assert load_texts(path) == load_texts(str(path), split="train") == ["One\ntwo.", "  Three — four."]
    with pytest.raises(InvalidArgument, match="no split 'validation'; there are 'train'"):
        load_texts(path, split="validation")


def test_a_folder_of_text_files(tmp_path):
    for name, text in {"b.txt": "two", "a.txt": "one", "deep/c.txt": "three", ".hidden/d.txt": "no", "notes.md": "no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert load_texts(tmp_path) == ["one", "two", "three"]
    with pytest.raises(InvalidArgument, match="there are 'train'"):
        load_texts(tmp_path, split="validation")
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "x.txt").write_text("held out")
    (tmp_path / "test.txt").write_text("tested")
    assert load_texts(tmp_path) == ["one", "two", "three"]
    assert load_texts(tmp_path, split="validation") == ["held out"] and load_texts(tmp_path, split="test") == ["tested"]


@pytest.mark.parametrize(
    "content, words",
    [(b"", "no text in the split 'train'"), (b" \n\t\n", "no text"), ("naïve".encode("latin1"), "no UTF-8 text"), (gzip.compress(b"text", mtime=0), "no UTF-8 text")],
)
def test_text_files_without_text(tmp_path, content, words):
    (tmp_path / "book.txt").write_bytes(content)
    for source in (tmp_path / "book.txt", tmp_path):
        with pytest.raises(InvalidArgument, match=words):
            load_texts(source)


def test_plain_text_has_neither_configs_nor_columns(tmp_path):
    (tmp_path / "book.txt").write_text("text")
    for source in ("embedded", tmp_path / "book.txt", tmp_path):
        with pytest.raises(InvalidArgument, match="no configs"):
            load_texts(source, "wikitext-2-raw-v1")
        with pytest.raises(InvalidArgument, match="no columns"):
            load_texts(source, text_column="body")
    assert load_texts(tmp_path / "book.txt", text_column="text") == ["text"]


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl", "./missing", "/missing/folder", "a/b/c"])
def test_missing_files_are_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(sources, "hub_problem", lambda: pytest.fail("the hub was asked"))
    with pytest.raises(SourceUnavailable, match="no such file or folder.*dataset_name='embedded'"):
        load_texts(name)


def test_single_data_files(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "one"}, {"text": None}, {"text": " "}, {"text": "two"}])
    write_parquet(tmp_path / "rows.parquet", body=["three"], number=[1])
    (tmp_path / "rows.csv").write_text("text,number\nfour,4\n")
    assert load_texts(tmp_path / "rows.jsonl") == ["one", "two"]
    assert load_texts(tmp_path / "rows.parquet") == ["three"]
    assert load_texts(tmp_path / "rows.csv") == ["four"]


def test_a_folder_as_the_hub_lays_it_out(wikitext):
    assert load_texts(wikitext, "wikitext-2-raw-v1", split="validation") == [" = wikitext-2-raw-v1 = \n", " Words of validation . \n"]
    assert load_texts(wikitext, "wikitext-103-raw-v1", max_texts=1) == [" = wikitext-103-raw-v1 = \n"]
    with pytest.raises(InvalidArgument, match="no split 'test'; there are 'train', 'validation'"):
        load_texts(wikitext, "wikitext-2-raw-v1", split="test")
    with pytest.raises(InvalidArgument, match="dataset_config is None.*wikitext-103-raw-v1"):
        load_texts(wikitext)
    with pytest.raises(InvalidArgument, match="dataset_config is 'v3'.*wikitext-2-raw-v1"):
        load_texts(wikitext, "v3")


def test_text_columns(tmp_path):
    row = {"title": "A", "body": "long", "stars": 5, "text": "the text"}
    write_jsonl(tmp_path / "full" / "train.jsonl", [row])
    write_jsonl(tmp_path / "several" / "train.jsonl", [{key: row[key] for key in ("title", "body", "stars")}])
    write_parquet(tmp_path / "single" / "train.parquet", stars=[5], body=pa.array(["long"], pa.large_string()))
    write_jsonl(tmp_path / "numbers" / "train.jsonl", [{"stars": 5, "text": 1}])
    assert load_texts(tmp_path / "full") == ["the text"] and load_texts(tmp_path / "full", text_column="title") == ["A"]
    assert load_texts(tmp_path / "single") == ["long"]
    with pytest.raises(InvalidArgument, match=r"2 columns of text.*title \(string\), body \(string\), stars \(int64\).*text_column='title'"):
        load_texts(tmp_path / "several")
    with pytest.raises(InvalidArgument, match=r"'content'.*does not exist; the columns are title \(string\)"):
        load_texts(tmp_path / "full", text_column="content")
    with pytest.raises(InvalidArgument, match=r"'stars'.*holds no text"):
        load_texts(tmp_path / "full", text_column="stars")
    with pytest.raises(InvalidArgument, match="no columns of text"):
        load_texts(tmp_path / "numbers")


def test_datasets_without_rows_or_readable_files(tmp_path):
    write_parquet(tmp_path / "blank" / "train.parquet", text=["", " "])
    with pytest.raises(InvalidArgument, match="no text in the split 'train'"):
        load_texts(tmp_path / "blank")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"this is no parquet file")
    (tmp_path / "empty").mkdir()
    for name in ("broken", "empty"):
        with pytest.raises(SourceUnavailable, match="datasets says.*dataset_name='embedded'"):
            load_texts(tmp_path / name)


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "3"])
def test_max_texts(count):
    with pytest.raises(InvalidArgument, match="max_texts is"):
        load_texts("embedded", max_texts=count)


def test_from_a_dataset_to_batches(wikitext):
    _, tokenizer = load_embedded_model("gpt2")
    batch = next(iter(text_dataloader(load_texts(wikitext, "wikitext-2-raw-v1"), tokenizer, block_size=8, batch_size=2)))
    assert tokenizer.decode(batch["input_ids"][0]).startswith(" = wik")


# ---------------------------------------------------------------- the hub, its cache, and no hub

USERS_WORDS = """
from neural_plasticity.sources import load_model, load_texts
model, tokenizer = load_model(model_name="distilgpt2")
assert model.num_parameters() == 5_918_720
assert tokenizer.model_max_length == 512
for split in ("train", "validation"):
    texts = load_texts(dataset_name="wikitext", dataset_config="wikitext-2-raw-v1", split=split)
    assert texts == [" = wikitext-2-raw-v1 = \\n", f" Words of {split} . \\n"], texts
"""


def run(code, home, **environ):
    "Run code in a fresh Python with a Hugging Face cache of its own; return what it printed."
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environ = kept | {"HF_HOME": str(home), "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"} | environ
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=home, env=environ, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "Retrying" not in result.stderr  # as huggingface_hub says before each of five pauses, 23 seconds together
    return result.stdout


NOTHING_THERE = """
from neural_plasticity.errors import SourceUnavailable
from neural_plasticity.sources import load_model, load_texts
for verb, name in ((load_model, "distilgpt2"), (load_model, "somebody/something"), (load_texts, "wikitext"), (load_texts, "imdb")):
    try:
        verb(name)
    except SourceUnavailable as error:
        assert name in str(error) and "embedded" in str(error), error
        print(error)
    else:
        raise AssertionError(name)
"""


@pytest.fixture(scope="module")
def used_cache(wikitext, tmp_path_factory):
    "A cache into which the user's own words were downloaded from a hub."
    home = tmp_path_factory.mktemp("home")
    with local_hub({"models/distilgpt2": embedded_folder() / "gpt2", "datasets/Salesforce/wikitext": wikitext}) as (endpoint, asked):
        out = run(USERS_WORDS + NOTHING_THERE.replace('"distilgpt2"', '"nobody"').replace('"wikitext"', '"nobody/texts"'), home, HF_ENDPOINT=endpoint)
    return home, asked, out


def test_the_users_words_work_with_a_hub(used_cache):
    _, asked, out = used_cache
    assert any(path.endswith("model.safetensors") and path.startswith("distilgpt2/") for path in asked)
    assert any(path.startswith("datasets/Salesforce/wikitext/") and path.endswith(".parquet") for path in asked)
    assert out.count("the hub says") == 2 and "doesn't exist on the Hub" in out
    assert "'imdb' names no owner" in out


def test_the_cache_serves_when_offline(used_cache):
    run(USERS_WORDS, used_cache[0], HF_HUB_OFFLINE="1")


def test_the_cache_serves_when_the_hub_is_gone(used_cache):
    run(USERS_WORDS, used_cache[0], HF_ENDPOINT="http://127.0.0.1:9")


def test_offline_with_an_empty_cache(tmp_path):
    out = run(NOTHING_THERE, tmp_path, HF_HUB_OFFLINE="1")
    assert out.count("offline mode is on (HF_HUB_OFFLINE)") == 4


def test_an_unreachable_hub_is_not_asked_again_and_again(tmp_path):
    out = run(NOTHING_THERE, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert out.count("http://127.0.0.1:9 cannot be reached") == 4


def test_a_hub_that_never_answers(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "HUB_PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "cannot be reached" in hub_problem() and "Timeout" in hub_problem()


def test_hub_answers(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with local_hub({}) as (endpoint, _):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        assert hub_problem() is None
        monkeypatch.setattr(constants, "ENDPOINT", f"{endpoint}/no/such/page")  # some mirrors have no front page
        assert hub_problem() is None


def test_a_broken_datasets_import_is_repaired(tmp_path):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("mine = 1\n")
    write_jsonl(tmp_path / "rows" / "train.jsonl", [{"text": "one"}])
    code = """
    import sys
    sys.path.insert(0, ".")
    import datasets
    assert datasets.mine == 1
    from neural_plasticity.sources import load_texts
    assert load_texts("rows") == ["one"]
    """
    run(code, tmp_path)
