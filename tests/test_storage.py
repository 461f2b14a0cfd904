"""DESIGN.md, "What must hold" 4: save → load → the same bits; a wrong or tampered folder is refused and nothing of it is run; a save is whole or did not happen."""
import hashlib
import inspect
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from models import RANDOM, batches, build, cuttable, fingerprint, inputs, logits, same_weights, weights
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

import neural_plasticity.folders as folders
from neural_plasticity.compensation import compensate_heads
from neural_plasticity.data import embedded_folder, load_embedded_model
from neural_plasticity.errors import StorageError, UnsupportedModel
from neural_plasticity.examples import example_inputs
from neural_plasticity.export import export_dense
from neural_plasticity.gates import advance_warmup, dormant_heads, gate_heads, restore_heads, revive_heads, state_of
from neural_plasticity.probing import probe
from neural_plasticity.pruning import apply_pruning_mask
from neural_plasticity.storage import BANK, load_pruned, save_pruned
from neural_plasticity.surgery import dense_heads, kept_heads, operations_of, remove_heads
from neural_plasticity.zoo_models import small_model

ASLEEP = [(0, 0), (1, 2)]  # on top of what `cuttable` leaves, or on a whole model


def gated(model):
    apply_pruning_mask(model, ASLEEP, "gate")


def zeroed(model):
    apply_pruning_mask(model, ASLEEP, "zero_weights")


def compensated(model):
    compensate_heads(model, batches(model), ASLEEP)


def warming(model):
    apply_pruning_mask(model, ASLEEP, "zero_weights")
    compensate_heads(model, batches(model))
    revive_heads(model, [(1, 2)], warmup_steps=3)


def removed(model):
    remove_heads(model, cuttable(model.name))


def half_removed(model):
    remove_heads(model, cuttable(model.name)[:2])  # the last heads of layer 0 stay, or a whole group goes


def removed_then_compensated(model):
    removed(model)
    compensate_heads(model, batches(model), [(0, 0), (1, 1)])
    apply_pruning_mask(model, [(2, 0)], "zero_weights")


def trained(model):
    compensated(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in batches(model):
        model(**batch).loss.backward()
        optimizer.step()
    model.zero_grad()


STATES = (lambda model: None, gated, zeroed, compensated, warming, removed, half_removed, removed_then_compensated, trained)


def prepared(name, state, dtype=torch.float32):
    model = build(name).to(dtype)
    model.name = name
    state(model)
    del model.name
    return model


def assert_same_model(found, expected):
    assert type(found) is type(expected) and same_weights(found, weights(expected)) and logits(found).equal(logits(expected))
    assert dormant_heads(found) == dormant_heads(expected) and kept_heads(found) == kept_heads(expected) and dense_heads(found) == dense_heads(expected)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", RANDOM)
def test_round_trip(name, state, tmp_path):
    model = prepared(name, state)
    before, values = fingerprint(model)[:2], weights(model)
    assert save_pruned(model, tmp_path / "model") == tmp_path / "model"
    assert fingerprint(model)[:2] == before and same_weights(model, values)
    random_state = torch.get_rng_state()
    loaded = load_pruned(tmp_path / "model")
    assert torch.get_rng_state().equal(random_state) and not any(module.training for module in loaded.modules())
    assert_same_model(loaded, model)
    if state is warming:
        for one in (model, loaded):
            advance_warmup(one)
        assert_same_model(loaded, model)
    if dormant_heads(model):  # both wake, step by step, into the same model
        for heads in (dormant_heads(model)[:1], None):
            restore_heads(model, heads)
            restore_heads(loaded, heads)
            assert_same_model(loaded, model)
    loaded(**batches(loaded)[0]).loss.backward()
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("attention", ("eager", "sdpa"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("state", (compensated, removed))
@pytest.mark.parametrize("name", ("gpt2", "llama-grouped"))
def test_round_trip_in_other_dtypes(name, state, dtype, attention, tmp_path):
    "`.to(dtype)` also rounds buffers that no state dict holds."
    model = prepared(name, state, dtype)
    model.set_attn_implementation(attention)
    save_pruned(model, tmp_path / "model")
    loaded = load_pruned(tmp_path / "model")
    assert loaded.config._attn_implementation == attention and loaded.dtype == dtype
    assert_same_model(loaded, model)


@pytest.mark.parametrize("name", ("gpt2", "llama"))
def test_trained_models_with_tokenizer_in_another_process(name, tmp_path):
    model, tokenizer = load_embedded_model(name)
    ids = tokenizer("The state of the Union", return_tensors="pt")
    remove_heads(model, cuttable(f"{name}-trained"))
    compensate_heads(model, [ids], [(1, 1), (1, 3)])
    save_pruned(model, tmp_path / "model", tokenizer)
    with torch.no_grad():
        torch.save(model(**ids).logits, tmp_path / "expected.pt")
    restore_heads(model)
    with torch.no_grad():
        torch.save(model(**ids).logits, tmp_path / "restored.pt")
    script = """
import sys, torch
from transformers import AutoTokenizer
from neural_plasticity import load_pruned, restore_heads
torch.set_num_threads(1)
folder = sys.argv[1]
model, ids = load_pruned(folder + "/model"), AutoTokenizer.from_pretrained(folder + "/model")("The state of the Union", return_tensors="pt")
with torch.no_grad():
    assert model(**ids).logits.equal(torch.load(folder + "/expected.pt"))
    restore_heads(model)
    assert model(**ids).logits.equal(torch.load(folder + "/restored.pt"))
print(model.generate(**ids, max_new_tokens=5, do_sample=False).tolist())
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == model.generate(**ids, max_new_tokens=5, do_sample=False).tolist()


def test_as_many_heads_of_each_layer_as_transformers_has_no_config_for(tmp_path):
    "Six heads of eight at a width of 64: transformers wants the width to be a multiple of the heads, so the folder keeps the dense config."
    shape = dict(vocab_size=53, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8, bos_token_id=None, eos_token_id=None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    remove_heads(model, [(0, 0), (0, 1), (1, 6), (1, 7)])
    loaded = load_pruned(save_pruned(model, tmp_path / "model"))
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, loaded(ids).logits) and kept_heads(loaded) == kept_heads(model)


def test_what_the_folder_says(tmp_path):
    model = prepared("llama-grouped", removed_then_compensated)
    model.generation_config.max_new_tokens = 11
    save_pruned(model, tmp_path / "model")
    manifest = json.loads((tmp_path / "model" / "plasticity.json").read_text())
    assert manifest["architecture"] == "LlamaForCausalLM" and manifest["dense_heads"] == [4, 4, 4]
    assert manifest["kept_heads"] == [[2, 3], [1, 2], [0, 1, 2, 3]]
    assert manifest["dormant"]["gates"] == [[0, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 1]] and manifest["dormant"]["zeroed"] == [[2, 0]]
    assert set(manifest["files"]) == {path.name for path in (tmp_path / "model").iterdir()} - {"plasticity.json"}
    assert load_pruned(tmp_path / "model").generation_config.max_new_tokens == 11


def test_plain_from_pretrained(tmp_path):
    "Dormant heads: the same logits. Removed heads: an error about sizes, never wrong numbers."
    for state in (gated, zeroed, compensated, warming):
        model = prepared("gpt2", state)
        save_pruned(model, tmp_path / state.__name__)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / state.__name__)
        torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=0)
    save_pruned(prepared("gpt2", removed), tmp_path / "removed")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        GPT2LMHeadModel.from_pretrained(tmp_path / "removed")


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", RANDOM)
def test_export_dense(name, state, tmp_path):
    model = prepared(name, state)
    before, values = fingerprint(model)[:2], weights(model)
    export_dense(model, tmp_path / "dense")
    assert fingerprint(model)[:2] == before and same_weights(model, values)
    plain = type(model).from_pretrained(tmp_path / "dense")
    assert [tuple(p.shape) for p in plain.parameters()] == [tuple(p.shape) for p in build(name).parameters()]
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=0)
    if kept_heads(model):  # the slices of removed heads are zero: gating them changes no bit
        gone = [(layer, head) for layer, kept in enumerate(kept_heads(model)) for head in range(4) if head not in kept]
        with gate_heads(plain, gone):
            gated_logits = logits(plain)
        assert gated_logits.equal(logits(plain))
    export_dense(model, tmp_path / "dense")  # an export can be replaced
    assert logits(load_pruned(tmp_path / "dense")).equal(logits(plain)) and state_of(load_pruned(tmp_path / "dense")) is None


def test_export_dense_keeps_the_tokenizer_and_the_dtype(tmp_path):
    model, tokenizer = load_embedded_model("llama")
    remove_heads(model.to(torch.bfloat16), cuttable("llama-trained"))
    export_dense(model, tmp_path / "dense", tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert plain.dtype == torch.bfloat16 and AutoTokenizer.from_pretrained(tmp_path / "dense").get_vocab() == tokenizer.get_vocab()


# --- folders that are refused ---
@pytest.fixture
def folder(tmp_path):
    save_pruned(prepared("gpt2", removed_then_compensated), tmp_path / "model")
    return tmp_path / "model"


def forge(folder, change):
    "A manifest changed by somebody who knows how to make the checksum right."
    manifest = json.loads((folder / "plasticity.json").read_text())
    change(manifest)
    manifest["checksum"] = folders._checksum(manifest)
    (folder / "plasticity.json").write_text(json.dumps(manifest))


def reseal(folder, name):
    def change(manifest):
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    forge(folder, change)


def refused(folder, words):
    with pytest.raises(StorageError, match=words):
        load_pruned(folder)


@pytest.mark.parametrize("name", ("config.json", "model.safetensors", BANK, "generation_config.json", "plasticity.json"))
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    refused(folder, "missing" if name != "plasticity.json" else "has no plasticity.json")


@pytest.mark.parametrize("name", ("config.json", "model.safetensors", BANK, "generation_config.json"))
@pytest.mark.parametrize("damage", ("changed", "cut short", "longer"))
def test_a_changed_byte(folder, name, damage):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes({"changed": content, "cut short": content[:-1], "longer": content + b" "}[damage])
    refused(folder, "is not the file that was saved")


def test_a_tampered_manifest(folder):
    path = folder / "plasticity.json"
    text = path.read_text()
    path.write_text(text.replace('"architecture": "GPT2LMHeadModel"', '"architecture": "GPT2Model"'))
    refused(folder, "checksum does not match")
    for content in ("", "[]", "null", "{", '{"format": "something"}', text[:-20], "[" * 100_000, "\ud800".encode("utf-8", "surrogatepass")):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        refused(folder, "plasticity.json")


def set_to(*keys, value):
    def change(manifest):
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


@pytest.mark.parametrize("change, words", [
    (set_to("schema", value=3), "this release reads version 2"), (set_to("schema", value=1), "this release reads version 2"), (set_to("schema", value=None), "schema version None"),
    (set_to("format", value="other"), "not written by save_pruned"),
    (set_to("architecture", value="LlamaForCausalLM"), "none of the classes"), (set_to("architecture", value="AutoModel"), "none of the classes"),
    (set_to("architecture", value="os.system"), "none of the classes"), (set_to("architecture", value=None), "must be names"),
    (set_to("architecture", value="GPT2Model"), "does not fit"),
    (set_to("dense_heads", value=[4, 4]), "kept_heads"), (set_to("dense_heads", value="4"), "kept_heads"),
    (set_to("kept_heads", value=[[0], [0], [4]]), "kept_heads"), (set_to("kept_heads", value=[[0], [7], [0]]), "kept_heads"),
    (set_to("kept_heads", value=[[-1], [0], [0]]), "kept_heads"), (set_to("kept_heads", value=[[1, 0], [0], [0]]), "kept_heads"),
    (set_to("kept_heads", value=None), "kept_heads"), 
    (set_to("operations", value=[]), "has shape"), (set_to("operations", value=None), "what was done"), (set_to("operations", value=[{"do": "Exec", "code": "1"}]), "no step of a removal"),
    (set_to("operations", 0, "parameter", value="transformer.wte.nothing"), "does not fit"), (set_to("operations", 0, "gone", value=[0, 10_000]), "does not fit"),
    (set_to("operations", 0, "gone", value=[0, 0]), "does not fit"), (set_to("operations", 0, "do", value="SetSize"), "no step of a removal"),
    (set_to("operations", value=[{"do": "SetSize", "module": "transformer.h.0.attn", "attribute": "forward", "value": 1, "position": None}]), "does not fit"),
    (set_to("operations", value=[{"do": "SetSize", "module": "transformer.h.0.attn", "attribute": "num_heads", "value": 999, "position": None}]), "does not fit"),
    (set_to("operations", value=[{"do": "Silence", "module": "transformer.ln_f", "projection": "yes"}]), "does not fit"),
    (set_to("classes", value=None), "what was done"), (set_to("classes", value={"transformer.h.0.attn": "OtherAttention"}), "is a GPT2Attention in transformers"),
    (set_to("dense_config", value={"n_head": "4"}), "dense_config"), (set_to("dense_config", value={"architectures": 4}), "no number of the config"),
    (set_to("files", value={}), "no config.json"), (set_to("files", value=["model.safetensors"]), "files must give"),
    (set_to("files", "config.json", "sha256", value=7), "files must give"),
    (set_to("dormant", value=[]), "dormant must hold"), (set_to("dormant", "gates", value=[[0, 1], [1, 1], [1, 1]]), "gates of shape"),
    (set_to("dormant", "gates", value="open"), "dormant must hold"), (set_to("dormant", "zeroed", value=[[9, 9]]), "does not describe"),
    (set_to("dormant", "compensation", value={"2": {"ridge": 1.0}}), "does not describe"),
])
def test_a_forged_manifest(folder, change, words):
    forge(folder, change)
    refused(folder, words)


@pytest.mark.parametrize("name", ("../config.json", "/etc/hostname", "a/../../config.json", "..\\config.json", "C:\\config.json", "./config.json", ".hidden", "a//b", ""))
def test_names_that_lead_out_of_the_folder(folder, name):
    (folder.parent / "config.json").write_text("{}")
    forge(folder, lambda manifest: manifest["files"].update({name: {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}}))
    refused(folder, "no name of a file inside the folder")


class Trap:
    def __reduce__(self):
        return (open, ("trapped", "w"))


@pytest.mark.parametrize("name", ("pytorch_model.bin", "model.pt", "extra.pkl", "sub/modeling.py", "TRAINING.PTH"))
def test_files_that_can_carry_code(folder, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(pickle.dumps(Trap()))
    refused(folder, "can carry code")
    reseal(folder, name)
    refused(folder, "can carry code")
    assert not (tmp_path / "trapped").exists()


def test_code_named_in_the_config_is_not_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('trapped', 'w')")
    config = json.loads((folder / "config.json").read_text())
    for change in ({"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}, {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        reseal(folder, "config.json")
        if "model_type" in change:
            refused(folder, "does not describe a model")
        else:
            assert type(load_pruned(folder)) is GPT2LMHeadModel
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("change, words", [
    (lambda tensors: tensors.pop("transformer.wpe.weight"), "transformer.wpe.weight is missing"),
    (lambda tensors: tensors.update({"transformer.wpe.weight": torch.zeros(65, 32)}), r"has shape \(65, 32\), the model \(64, 32\)"),
    (lambda tensors: tensors.update(surplus=torch.zeros(1)), "surplus has no place"),
    (lambda tensors: tensors.update({"transformer.h.0.attn.c_proj.weight": torch.zeros(32, 32)}), "has shape"),
])
def test_weights_that_do_not_fit(folder, change, words):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    reseal(folder, "model.safetensors")
    refused(folder, words)


@pytest.mark.parametrize("name", ("model.safetensors", BANK))
def test_weights_that_are_none(folder, name):
    (folder / name).write_bytes(pickle.dumps({"weight": [1, 2]}))
    reseal(folder, name)
    refused(folder, "cannot be read")


def test_nothing_is_built_before_everything_is_checked(folder, monkeypatch):
    import neural_plasticity.storage as storage

    def never(*arguments, **options):
        raise AssertionError("something was read too early")

    monkeypatch.setattr(storage, "model_class", never)
    monkeypatch.setattr(storage, "load_file", never)
    monkeypatch.setattr(storage, "blank_model", never)
    (folder / BANK).write_bytes(b"")
    refused(folder, "is not the file that was saved")


def test_folders_that_are_none_of_ours(tmp_path):
    refused(tmp_path / "nowhere", "has no plasticity.json")
    refused(embedded_folder() / "gpt2", "plain from_pretrained reads")


def test_models_that_could_not_be_built_again(tmp_path):
    class Mine(GPT2LMHeadModel):
        pass

    for model, words in ((torch.nn.Linear(2, 2), "no transformers model"), (Mine(build("gpt2").config), "none of the classes")):
        for verb in (save_pruned, export_dense):
            with pytest.raises(UnsupportedModel, match=words):
                verb(model, tmp_path / "model")
    Impostor = type("GPT2LMHeadModel", (GPT2LMHeadModel,), {})
    with pytest.raises(UnsupportedModel, match="classes of your own"):
        save_pruned(Impostor(build("gpt2").config), tmp_path / "model")
    assert not any(tmp_path.iterdir())


# --- all or nothing ---
def test_a_later_save_replaces_an_earlier_one(folder):
    save_pruned(prepared("llama", gated), folder)
    assert type(load_pruned(folder)).__name__ == "LlamaForCausalLM" and [path.name for path in folder.parent.iterdir()] == ["model"]


def test_folders_with_other_things_are_not_touched(folder, tmp_path):
    (folder / "notes.md").write_text("mine")
    with pytest.raises(StorageError, match="notes.md"):
        save_pruned(build("gpt2"), folder)
    assert (folder / "notes.md").read_text() == "mine" and load_pruned(folder) is not None
    other = tmp_path / "other"
    other.mkdir()
    save_pruned(build("gpt2"), other)  # empty: welcome
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    for target in (tmp_path / "thesis", tmp_path / "thesis" / "chapter.tex"):
        with pytest.raises(StorageError, match="chapter.tex"):
            save_pruned(build("gpt2"), target)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other", "thesis"]


@pytest.mark.parametrize("error", (OSError, KeyboardInterrupt))
@pytest.mark.parametrize("where", ("save_pretrained", "bank", "manifest", "first move", "second move"))
def test_an_interrupted_save_leaves_the_old_folder(folder, monkeypatch, where, error):
    import neural_plasticity.storage as storage

    expected, model, calls = load_pruned(folder), prepared("llama", compensated), []

    def struck(*arguments, **options):
        raise error("struck")

    def move(source, target):
        calls.append(source)
        if len(calls) == {"first move": 1, "second move": 2}[where]:
            raise error("struck")
        os.rename(source, target)

    if where == "save_pretrained":
        monkeypatch.setattr(model, "save_pretrained", struck)
    elif where.endswith("move"):
        monkeypatch.setattr(folders.os, "replace", move)
    else:
        monkeypatch.setattr(storage, {"bank": "save_file", "manifest": "seal"}[where], struck)
    with pytest.raises(error, match="struck"):
        save_pruned(model, folder)
    monkeypatch.undo()
    assert_same_model(load_pruned(folder), expected)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_process_killed_between_the_moves_loses_nothing(folder):
    os.rename(folder, folder.with_name(".model.previous"))
    refused(folder, "interrupted save left the model in .*previous")
    with pytest.raises(UnsupportedModel):
        save_pruned(torch.nn.Linear(1, 1), folder)
    os.rename(folder.with_name(".model.previous"), folder)
    expected = load_pruned(folder)
    os.rename(folder, folder.with_name(".model.previous"))
    with pytest.raises(RuntimeError, match="struck"), folders.replacing(folder):
        raise RuntimeError("struck")  # the next save puts it back first, whatever becomes of itself
    assert_same_model(load_pruned(folder), expected)


def test_links_and_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pruned(build("gpt2"), "model")
    os.symlink("model", "link", target_is_directory=True)
    save_pruned(prepared("gpt2", gated), "link")  # goes where the link leads
    assert (tmp_path / "link").is_symlink() and dormant_heads(load_pruned("model")) == ASLEEP
    cache = tmp_path / "snapshot"  # a hub cache is a folder of links to files
    cache.mkdir()
    for path in (tmp_path / "model").iterdir():
        os.symlink(path, cache / path.name)
    assert logits(load_pruned(cache), inputs(build("gpt2"))).equal(logits(load_pruned("model")))


# --- the same cut in every layer ---
def small_and_cut(task, model_type, whole_group):
    "A small model without the first head of each group, or without the first group, at every site."
    model = small_model(task, model_type)
    sites = probe(model).sites
    remove_heads(model, [(site.index, head) for site in sites for head in (site.groups[0] if whole_group else [group[0] for group in site.groups if len(group) > 1] or [0])])
    return model


@torch.no_grad()
def zoo_logits(model):
    return model(**example_inputs(model)).logits


GROUPED = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "gpt_oss")
PLAIN = [("causal-lm", model_type, whole_group) for model_type in GROUPED for whole_group in (True, False)] + [("causal-lm", "phi3", True)]
if "head_dim" in inspect.getsource(transformers.models.vit.modeling_vit):  # before, a ViT's head is its width ÷ heads, which a cut one cannot say: it is saved as ragged ones are
    PLAIN += [("image-classification", "vit", False)]


@pytest.mark.parametrize("task, model_type, whole_group", PLAIN)
def test_an_even_cut_is_an_ordinary_model(task, model_type, whole_group, tmp_path):
    "Plain from_pretrained reads it, for the config says the new counts."
    model = small_and_cut(task, model_type, whole_group)
    heads, left = dense_heads(model)[0], len(kept_heads(model)[0])
    save_pruned(model, tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert config.num_attention_heads == left < heads == model.config.num_attention_heads
    plain = getattr(transformers, type(model).__name__).from_pretrained(tmp_path / "model")
    assert type(plain.eval()) is type(model) and zoo_logits(plain).equal(zoo_logits(model)) and kept_heads(plain) is None
    loaded = load_pruned(tmp_path / "model")
    assert zoo_logits(loaded).equal(zoo_logits(model)) and same_weights(loaded, weights(model))
    assert kept_heads(loaded) == kept_heads(model) and dense_heads(loaded) == dense_heads(model)
    original = model.config.to_dict()
    assert {name: value for name, value in loaded.config.to_dict().items() if name in original} == original  # and perhaps the size of a head, written out
    if model.can_generate() and task == "causal-lm":
        ids = example_inputs(model)["input_ids"]
        assert len({str(one.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).tolist()) for one in (plain, loaded, model)}) == 1
    export_dense(loaded, tmp_path / "dense")
    assert AutoConfig.from_pretrained(tmp_path / "dense").num_attention_heads == heads
    dense = type(model).from_pretrained(tmp_path / "dense").eval()
    assert dense.num_parameters() == small_model(task, model_type).num_parameters()
    torch.testing.assert_close(zoo_logits(dense), zoo_logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("heads", (1, 2, 3))
@pytest.mark.parametrize("name", ("gpt2", "bert"))
def test_an_even_cut_that_a_config_cannot_say(name, heads, tmp_path):
    "There heads times head size is the width: a config with fewer heads means larger ones."
    model = build(name)
    remove_heads(model, [(layer, head) for layer in range(3) for head in range(heads)])
    save_pruned(model, tmp_path / "model")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path / "model")
    assert AutoConfig.from_pretrained(tmp_path / "model").num_attention_heads == 4
    assert_same_model(load_pruned(tmp_path / "model"), model)


def test_a_config_that_fits_is_forgotten_with_the_next_cut(tmp_path):
    "Even, saved and loaded, then ragged: the config of the second folder is the dense model's again."
    model = small_and_cut("causal-lm", "llama", False)
    save_pruned(model, tmp_path / "even")
    again = load_pruned(tmp_path / "even")
    for one in (model, again):
        remove_heads(one, [(0, 0)])
    save_pruned(again, tmp_path / "ragged")
    assert AutoConfig.from_pretrained(tmp_path / "ragged").num_attention_heads == 6
    loaded = load_pruned(tmp_path / "ragged")
    assert zoo_logits(loaded).equal(zoo_logits(model)) and kept_heads(loaded) == kept_heads(model)


# --- ragged cuts in another process ---
RAGGED = [  # (task, type, heads to remove, the step that such a cut takes)
    ("causal-lm", "qwen3", [(0, 0), (0, 1), (1, 3), (2, 0), (2, 1), (2, 2)], "MapHeads"),
    ("causal-lm", "codegen", [(0, 0), (1, 1), (1, 3)], "Rewire"),
    ("seq2seq", "bart", [*((1, head) for head in range(6)), (3, 2), (7, 0)], "Silence"),
    ("causal-lm", "bloom", [(0, 0), (1, 1), (1, 2)], "PickArguments"),
]


@pytest.mark.parametrize("task, model_type, heads, step", RAGGED)
def test_ragged_cuts_in_another_process(task, model_type, heads, step, tmp_path):
    model = small_model(task, model_type)
    remove_heads(model, heads)
    assert step in {type(operation).__name__ for operation in operations_of(model)}
    save_pruned(model, tmp_path / "model")
    torch.save({"example": example_inputs(model), "logits": zoo_logits(model), "weights": weights(model), "heads": kept_heads(model)}, tmp_path / "expected.pt")
    script = """
import sys, torch
from neural_plasticity import load_pruned
from neural_plasticity.surgery import kept_heads
torch.set_num_threads(1)
model, expected = load_pruned(sys.argv[1] + "/model"), torch.load(sys.argv[1] + "/expected.pt")
with torch.no_grad():
    assert model(**expected["example"]).logits.equal(expected["logits"])
found = model.state_dict()
assert found.keys() == expected["weights"].keys() and all(value.equal(expected["weights"][name]) for name, value in found.items())
assert kept_heads(model) == expected["heads"]
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0 and done.stdout == "equal\n", done.stderr


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read as Linux tells it")
def test_saving_and_loading_need_the_weights_once(tmp_path):
    "What a process allocates besides, at its highest, is a fraction of the model; pages of files that are mapped do not count."
    script = """
import sys, threading, torch
from transformers import LlamaConfig, LlamaForCausalLM
from neural_plasticity import load_pruned, remove_heads, save_pruned
torch.set_num_threads(1)

def allocated():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def highest(action):
    before, seen, done = allocated(), [], threading.Event()
    def watch():
        while not done.wait(0.001):
            seen.append(allocated())
    thread = threading.Thread(target=watch)
    thread.start()
    result = action()
    done.set()
    thread.join()
    return result, max([*seen, allocated()]) - before

def model(layers):
    made = LlamaForCausalLM(LlamaConfig(vocab_size=100, hidden_size=1024, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=16)).eval()
    remove_heads(made, [(0, 0), (1, 1), (1, 2)])
    return made

load_pruned(save_pruned(model(2), sys.argv[1] + "/first"))  # whatever is imported or set up the first time
large = model(4)
size = sum(parameter.numel() * 4 for parameter in large.parameters())
_, saving = highest(lambda: save_pruned(large, sys.argv[1] + "/model"))
loaded, loading = highest(lambda: load_pruned(sys.argv[1] + "/model"))
print(saving / size, loading / size)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    saving, loading = map(float, done.stdout.split())
    assert saving < 0.5 and loading < 1.5
