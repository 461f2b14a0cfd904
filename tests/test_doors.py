"""A pruned model in other people's tools: attention maps for BertViz and circuitsvis, LoRA through PEFT and `transformers.Trainer`, and a model card that says what a record says."""
import json
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from models import batches, build, cuttable, logits
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from neural_plasticity.card import head_map, model_card
from neural_plasticity.config import ExperimentConfig
from neural_plasticity.data import load_embedded_model, load_embedded_text, text_dataloader
from neural_plasticity.doors import adapter_targets, attention_of_text
from neural_plasticity.errors import InvalidArgument, StorageError, UnsupportedModel
from neural_plasticity.evaluation import evaluate_model
from neural_plasticity.examples import example_inputs
from neural_plasticity.experiment import run_experiment
from neural_plasticity.folders import read_manifest, seal
from neural_plasticity.gates import dormant_heads, gate_heads
from neural_plasticity.pruning import apply_pruning_mask
from neural_plasticity.storage import load_pruned, save_pruned
from neural_plasticity.surgery import kept_heads, remove_heads
from neural_plasticity.zoo_models import small_model

TEXT = "The House and the Senate met, and the House voted."
GONE = {"gpt2": [(0, 0), (0, 1), (0, 3), (0, 4), (0, 6), *((1, head) for head in range(8)), (5, 2)],
        "llama": [(0, 0), (0, 1), (0, 2), (0, 3), (2, 1), (2, 6), *((3, head) for head in range(8)), (5, 0)]}


def ragged(name):
    "An embedded model with layers of different numbers of heads, one of them with none."
    model, tokenizer = load_embedded_model(name)
    remove_heads(model, GONE[name])
    return model, tokenizer


@torch.no_grad()
def eager_maps(name, tokenizer):
    "What transformers itself says each head of the whole model looks at while the others are silent, [L,H,T,T]."
    model, _ = load_embedded_model(name)
    model.set_attn_implementation("eager")
    with gate_heads(model, GONE[name]):
        return torch.cat(model(**{"input_ids": tokenizer(TEXT, return_tensors="pt")["input_ids"]}, output_attentions=True).attentions)


# ---------------------------------------------------------------- attention maps


@pytest.mark.parametrize("again", (False, True), ids=("removed", "saved and loaded"))
@pytest.mark.parametrize("name", GONE)
def test_every_map_has_the_number_its_head_was_born_with(name, again, tmp_path):
    model, tokenizer = ragged(name)
    model = load_pruned(save_pruned(model, tmp_path / "model")) if again else model
    seen, expected = attention_of_text(model, tokenizer, TEXT), eager_maps(name, tokenizer)
    assert seen.maps.shape == expected.shape and seen.kept == kept_heads(model) and "".join(seen.tokens) == TEXT
    for layer in range(6):
        for head in range(8):
            if (layer, head) in GONE[name]:
                assert seen.maps[layer, head].isnan().all() and (layer, head) not in seen.heads
            else:
                torch.testing.assert_close(seen.maps[layer, head], expected[layer, head], atol=1e-5, rtol=0)
    given = seen.for_bertviz()
    assert [tuple(layer.shape) for layer in given["attention"]] == [(1, 8, len(seen.tokens), len(seen.tokens))] * 6 and given["tokens"] == seen.tokens
    assert torch.cat(given["attention"]).equal(seen.maps.nan_to_num(0.0)) and not given["attention"][GONE[name][-2][0]].isnan().any()
    given = seen.for_circuitsvis()
    assert given["attention_head_names"] == [f"L{layer}H{head}" for layer in range(6) for head in range(8) if (layer, head) not in GONE[name]]
    assert given["attention"].equal(torch.stack([seen.maps[head] for head in seen.heads])) and given["mask_upper_tri"] is True


def test_two_removals_and_a_dormant_head():
    "Removal renumbers twice; the numbers of birth stay."
    model, tokenizer = load_embedded_model("gpt2")
    remove_heads(model, [(2, 0), (2, 4)])
    remove_heads(model, [(2, 0), (2, 5)])  # 1 and 7 by birth
    apply_pruning_mask(model, [(2, 3)], "gate")  # 2, 3, 5, 6 are left: 6
    seen = attention_of_text(model, tokenizer, TEXT)
    assert seen.kept[2] == [2, 3, 5, 6] and seen.dormant == [(2, 6)]
    assert seen.for_circuitsvis([(2, 6), (2, 2)])["attention_head_names"] == ["L2H6 (dormant)", "L2H2"]
    torch.testing.assert_close(seen.maps[2, 6].sum(-1), torch.ones(len(seen.tokens)))  # it still looks


class Letters:
    "A tokenizer of single letters."

    def __call__(self, text, **_):
        return {"input_ids": torch.tensor([[ord(letter) % 53 for letter in text]])}

    def decode(self, ids):
        return f"<{ids[0]}>"


def test_a_whole_model_that_looks_both_ways():
    seen = attention_of_text(build("bert"), Letters(), "there and back")
    assert seen.heads == [(layer, head) for layer in range(3) for head in range(4)] and seen.for_circuitsvis()["mask_upper_tri"] is False
    assert len(seen.tokens) == 14 and seen.dormant == [] and not seen.maps.isnan().any()


def test_what_cannot_be_drawn():
    model, tokenizer = ragged("gpt2")
    seen = attention_of_text(model, tokenizer, TEXT)
    for heads, words in (([(1, 0)], r"no head \(1, 0\)"), ([(0, 2), (9, 9)], r"no head \(9, 9\)"), ([], "heads is empty")):
        with pytest.raises(InvalidArgument, match=f"{words}; of each layer these are left"):
            seen.for_circuitsvis(heads)
    for text, count in (("", 0), (TEXT * 50, 650)):
        with pytest.raises(InvalidArgument, match=f"has {count} tokens; there must be at least 1 and at most 512"):
            attention_of_text(model, tokenizer, text)
    with pytest.raises(UnsupportedModel, match="get_encoder"):
        attention_of_text(small_model("seq2seq", "t5"), Letters(), "text")


def numbers_in(page, begin):
    "The first JSON value in a page after some words."
    return json.JSONDecoder().raw_decode(page[re.search(begin, page).end():])[0]


@pytest.mark.parametrize("name", GONE)
def test_bertviz_draws_these_numbers(name):
    bertviz = pytest.importorskip("bertviz")
    model, tokenizer = ragged(name)
    seen = attention_of_text(model, tokenizer, TEXT)
    for view in (bertviz.head_view, bertviz.model_view):
        found = numbers_in(view(**seen.for_bertviz(), html_action="return").data, r"const params = ")
        torch.testing.assert_close(torch.tensor(found["attention"][0]["attn"]), seen.maps.nan_to_num(0.0))
        assert found["include_layers"] == list(range(6)) and found["attention"][0]["left_text"] == seen.tokens


@pytest.mark.parametrize("name", GONE)
def test_circuitsvis_draws_these_numbers(name):
    circuitsvis = pytest.importorskip("circuitsvis.attention")
    model, tokenizer = ragged(name)
    given = attention_of_text(model, tokenizer, TEXT).for_circuitsvis()
    found = numbers_in(circuitsvis.attention_heads(**given).cdn_src, r"AttentionHeads,\s*(?=\{)")
    torch.testing.assert_close(torch.tensor(found["attention"]), given["attention"])
    assert found["attentionHeadNames"] == given["attention_head_names"] and found["tokens"] == given["tokens"] and found["maskUpperTri"] is True


# ---------------------------------------------------------------- LoRA


def adapted(model, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=adapter_targets(model), **options))


@pytest.mark.parametrize("name", GONE)
def test_the_targets_are_the_attention_that_is_left(name):
    model, _ = ragged(name)
    layers = [layer for layer in range(6) if layer != {"gpt2": 1, "llama": 3}[name]]
    expected = {f"transformer.h.{layer}.attn.{part}" for layer in layers for part in ("c_attn", "c_proj")} if name == "gpt2" else {
        f"model.layers.{layer}.self_attn.{part}_proj" for layer in layers for part in "qkvo"}
    assert set(adapter_targets(model)) == expected
    with pytest.raises(ValueError, match="Shell.* is not supported"):  # why there is adapter_targets; once PEFT passes over them, say so on its page
        get_peft_model(model, LoraConfig(target_modules=["c_attn", "c_proj"] if name == "gpt2" else ["q_proj", "o_proj"]))


@pytest.mark.parametrize("task, name", [("causal-lm", name) for name in ("phi3", "olmo2", "falcon", "gpt_neox", "bloom", "deepseek_v3", "gpt_oss")] + [("masked-lm", "bert")])
def test_targets_of_other_models_are_linear_and_take_an_adapter(task, name):
    model = small_model(task, name)
    example = example_inputs(model)
    before = logits(model, example)
    targets = adapter_targets(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=targets)).eval()
    assert {site.removeprefix("base_model.model.") for site, part in wrapped.named_modules() if hasattr(part, "lora_A")} == set(targets)
    assert logits(wrapped, example).equal(before)
    assert adapter_targets(wrapped) == targets  # for a second one


@pytest.mark.parametrize("how", ("remove", "gate", "zero_weights"))
@pytest.mark.parametrize("name", ("gpt2", "llama-grouped"))
def test_merged_is_what_was_trained_and_what_is_saved(name, how, tmp_path):
    "The gates of dormant heads move outwards with an adapter, and back when it is merged: no head speaks again through the adapter, or through what it left."
    model, heads = build(name), cuttable(name)
    apply_pruning_mask(model, heads, how)
    wrapped = adapted(model)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.5)
    before = logits(wrapped.eval())
    for batch in batches(model, 3):
        optimizer.zero_grad()
        wrapped(**batch).loss.backward()
        optimizer.step()
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = logits(wrapped)
    assert (expected - before).abs().max() > 1e-3
    merged = wrapped.merge_and_unload()
    asleep = [] if how == "remove" else heads
    assert dormant_heads(merged) == asleep
    found = logits(merged)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    if asleep:
        with gate_heads(merged, asleep):  # they are silent already
            assert logits(merged).equal(found)
    loaded = load_pruned(save_pruned(merged, tmp_path / "merged"))
    assert logits(loaded).equal(found) and dormant_heads(loaded) == asleep and kept_heads(loaded) == kept_heads(merged)
    fresh = build(name)
    apply_pruning_mask(fresh, heads, how)
    apart = PeftModel.from_pretrained(load_pruned(save_pruned(fresh, tmp_path / "pruned")), tmp_path / "adapter").eval()
    assert logits(apart).equal(expected)


@pytest.mark.parametrize("order", ("forward first", "asked first"))
def test_a_second_adapter_on_a_merged_one(order):
    "A gate follows whatever stands in its projection's place, also if nobody looked in between."
    model = build("gpt2")
    apply_pruning_mask(model, [(0, 1), (2, 0)], "gate")
    merged = adapted(model, init_lora_weights=False).merge_and_unload()
    if order == "forward first":
        logits(merged)
    second = adapted(merged, init_lora_weights=False).eval()
    if order == "asked first":
        with gate_heads(merged, [(0, 1), (2, 0)]):
            expected = logits(second)
        assert logits(second).equal(expected)
    found = logits(second)
    last = second.merge_and_unload()
    torch.testing.assert_close(logits(last), found, atol=1e-4, rtol=0)
    assert sum("plasticity_gate" in part._buffers for part in last.modules()) == 3
    with gate_heads(last, [(0, 1), (2, 0)]):
        expected = logits(last)
    assert logits(last).equal(expected)


@pytest.mark.parametrize("name", GONE)
def test_recovery_by_a_trainer_and_an_adapter(name, tmp_path):
    "The README's recovery on an embedded model: whole < recovered < pruned, with the weights of the model itself unmoved, and the merged model on disk the same."
    model, tokenizer = load_embedded_model(name)
    validation = list(text_dataloader(load_embedded_text("validation")[:2], tokenizer, block_size=64, batch_size=8))[:4]
    whole = evaluate_model(model, validation)["perplexity"]
    remove_heads(model, GONE[name])
    pruned = evaluate_model(model, validation)["perplexity"]
    wrapped = adapted(model)
    frozen = {key: value.clone() for key, value in wrapped.named_parameters() if not value.requires_grad}
    train = [row for batch in list(text_dataloader(load_embedded_text("train")[:4], tokenizer, block_size=64, batch_size=1))[:96] for row in [{k: v[0] for k, v in batch.items()}]]
    arguments = TrainingArguments(str(tmp_path / "training"), max_steps=12, per_device_train_batch_size=8, learning_rate=2e-3, report_to=[], use_cpu=True, save_strategy="no", logging_strategy="no",
                                  disable_tqdm=True, seed=0)
    Trainer(wrapped, arguments, train_dataset=train).train()
    recovered = evaluate_model(wrapped, validation)["perplexity"]
    assert whole < recovered < pruned
    assert all(value.equal(frozen[key]) for key, value in wrapped.named_parameters() if key in frozen)
    merged = wrapped.eval().merge_and_unload()
    assert evaluate_model(merged, validation)["perplexity"] == pytest.approx(recovered, rel=1e-5)
    loaded = load_pruned(save_pruned(merged, tmp_path / "merged", tokenizer))
    assert evaluate_model(loaded, validation) == evaluate_model(merged, validation) and kept_heads(loaded) == kept_heads(merged)


def test_layers_that_are_no_projections_are_no_targets():
    "What comes after XLNet's einsum is its feed-forward layer, after JetMoE's attention a router."
    with pytest.raises(UnsupportedModel, match="name the layers for the adapter yourself"):
        adapter_targets(small_model("causal-lm", "xlnet"))
    assert all(name.endswith("kv_proj") for name in adapter_targets(small_model("causal-lm", "jetmoe")))


# ---------------------------------------------------------------- the model card


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A finished run with control and random choice, and one without them that kept no model."
    folder, small = tmp_path_factory.mktemp("runs"), dict(prune_level=0.3, strategy="taylor", minimal=True, training_steps=2, eval_interval=2, regrow_every=0, selection_batches=1, device="cpu", output_dir=str(tmp_path_factory.mktemp("unused")))
    return [run_experiment(ExperimentConfig(**small, **more), progress=False, resume=folder / name)
            for name, more in (("whole", {}), ("bare", dict(control=False, keep_model=False)))]


def front(card):
    "A card's metadata as YAML reads it."
    _, block, _ = str(card).split("---\n", 2)
    return yaml.safe_load(block)


def test_a_card_holds_the_numbers_of_the_record_and_no_others(runs):
    result = runs[0]
    card = model_card(result.folder / "model", result.folder, "owner/smaller", base_model="owner/whole", license="mit")
    rows = {row["arm"]: row for row in result.table}
    assert ModelCard(str(card)).text == card.text  # it is read back as it was written
    [entry] = front(card)["model-index"]
    assert entry["name"] == "smaller" and entry["results"] == [{
        "task": {"type": "text-generation"}, "dataset": {"name": "the texts that come with neural_plasticity (validation part)", "type": "embedded"},
        "metrics": [{"type": "perplexity", "value": round(rows["chosen"]["perplexity"], 4), "name": "perplexity"}]}]
    assert {key: front(card)[key] for key in ("base_model", "license", "library_name", "pipeline_tag", "tags", "metrics")} == {
        "base_model": "owner/whole", "license": "mit", "library_name": "neural_plasticity", "pipeline_tag": "text-generation",
        "tags": ["neural_plasticity", "pruned", "attention-heads"], "metrics": ["perplexity"]}
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.text.splitlines() if line.startswith("| ") and "---" not in line]
    assert [row[0] for row in table] == ["", "before pruning", "**this model**", "random heads instead", "nothing pruned, trained as long"]
    for (name, *cells), arm in zip(table[1:], ("before", "chosen", "random", "control")):
        values = rows[arm]
        expected = [values["heads"], values["perplexity"], values["after pruning"], values["compensated"], values["bits_per_byte"], values["parameters"], values["seconds"] * 1000]
        assert [None if cell == "–" else float(cell.replace(",", "")) for cell in cells] == [None if value is None else pytest.approx(value, abs=0.051) for value in expected]
    assert result.removal in card.text and all(text.splitlines()[0] in card.text for text in result.samples.values())
    for arm, words in (("before", "that of the model before pruning"), ("control", "that of the unpruned control"), ("random", "that of a random choice")):
        share = 100 * (rows["chosen"]["perplexity"] / rows[arm]["perplexity"] - 1)
        assert f"{abs(share):.1f} % {'above' if share > 0 else 'below'} {words}" in card.text
    for what in ("no standard error", "seed `0`", "strategy `taylor`", "pip", str(result.config.output_dir), str(result.folder)):
        assert (what in card.text) == (what in ("no standard error", "seed `0`", "strategy `taylor`")), what


def test_a_card_says_what_it_does_not_know(runs):
    result = runs[1]
    folder = save_pruned(result.model, result.folder.parent / "bare-model")
    text = model_card(folder, result.folder).text
    for words in ("names no base model", "names no licence", "no unpruned control and no random choice", "no standard error"):
        assert words in text
    assert "random heads instead" not in text and "AutoTokenizer" not in text
    text = model_card(folder).text
    assert "holds no measurement" in text and "erplexity" not in text and "model-index" not in str(model_card(folder))


def test_a_runs_numbers_are_for_its_own_model(runs, tmp_path):
    whole, bare = runs
    other = load_pruned(whole.folder / "model")
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    for run, words in ((whole, "its weights are not those that the run saved"), (bare, rf"ended with {bare.table[1]['heads']} heads, the model has {bare.table[1]['heads'] - 1}")):
        if run is bare:
            remove_heads(other, [next((site, 0) for site, kept in enumerate(kept_heads(other)) if len(kept) > 1)])
            extra = sum(map(len, kept_heads(other))) - bare.table[1]["heads"] + 1
            remove_heads(other, [(layer, head) for layer, kept in enumerate(kept_heads(other)) for head in range(len(kept))][:extra])
        with pytest.raises(InvalidArgument, match=f"is not the model of the run.*{words}.*evaluate_model"):
            model_card(save_pruned(other, tmp_path / "other"), run.folder)


def test_runs_that_have_nothing_to_say(runs, tmp_path):
    folder = runs[0].folder / "model"
    with pytest.raises(StorageError, match="no record.jsonl"):
        model_card(folder, tmp_path)
    (tmp_path / "config.json").write_text((runs[0].folder / "config.json").read_text())
    (tmp_path / "record.jsonl").write_text((runs[0].folder / "record.jsonl").read_text().splitlines()[0] + "\n")
    with pytest.raises(StorageError, match="no result of its pruned model yet"):
        model_card(folder, tmp_path)


def test_several_seeds_give_a_standard_error(tmp_path):
    folder = save_pruned(build("gpt2"), tmp_path / "model")
    card = model_card(folder, perplexity={"before": 10, "after": [12.0, 14.0, 13.0]}, dataset="owner/texts")
    assert "| after | 13.00 ± 0.58 | 3 |" in card.text and "| before | 10.00 | 1 |" in card.text  # 1 / sqrt(3)
    assert front(card)["datasets"] == ["owner/texts"] and front(card)["model-index"][0]["results"][0]["metrics"][0]["value"] == 13.0
    assert front(card)["library_name"] == "transformers" and "No head is missing" in card.text  # nothing was removed
    for values in ({"after": 0}, {"after": []}, {"after": "12"}, {"after": [1.0, float("nan")]}, {"after": True}):
        with pytest.raises(InvalidArgument, match=r"perplexity\['after'\]"):
            model_card(folder, perplexity=values, dataset="owner/texts")
    for wrong in (dict(perplexity={"after": 1.0}), dict(perplexity={}, dataset="x"), dict(perplexity=[1.0], dataset="x"), dict(perplexity={"a": 1.0}, dataset="x", run="x")):
        with pytest.raises(InvalidArgument, match="perplexity must be a dict"):
            model_card(folder, **wrong)
    with pytest.raises(InvalidArgument, match="base_model is '../gpt2'"):
        model_card(folder, base_model="../gpt2")


@pytest.mark.parametrize("name, source, base", [("distilgpt2", "wikitext", "distilgpt2"), ("owner/model", "owner/text", "owner/model"), ("embedded:gpt2", "embedded", None),
                                                ("/home/somebody/model", "/home/somebody/novel.txt", None), ("model", "novel.txt", None)])
def test_no_path_gets_onto_a_card(name, source, base, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    run = tmp_path / "run"
    run.mkdir()
    for file in ("config.json", "record.jsonl"):
        (run / file).write_text((runs[1].folder / file).read_text())
    config = json.loads((run / "config.json").read_text()) | {"model_name": name, "dataset_name": source}
    (run / "config.json").write_text(json.dumps(config))
    card = model_card(save_pruned(runs[1].model, tmp_path / "saved"), run)
    assert card.data.base_model == base and front(card).get("datasets") == ([source] if base else None)
    assert "/home" not in str(card) and "novel" not in str(card)


def test_what_plain_transformers_reads_is_said_so(tmp_path):
    plain, even, uneven = build("llama-grouped"), build("llama-grouped"), build("llama-grouped")
    remove_heads(even, [(layer, head) for layer in range(3) for head in (0, 2)])  # as many of each layer and group: the config can say it
    remove_heads(uneven, [(0, 0)])
    for number, model in enumerate((plain, even, uneven)):
        folder = save_pruned(model, tmp_path / str(number))
        card = model_card(folder)
        assert (card.data.library_name == "transformers") == (number < 2) == ("reads it as well" in card.text)
        if number < 2:
            assert logits(AutoModelForCausalLM.from_pretrained(folder)).equal(logits(model))


def test_the_map_of_a_manifest():
    manifest = {"dense_heads": [3, 2], "kept_heads": [[0, 2], []], "dormant": {"gates": [[1.0, 0.0], [1.0, 1.0]]}}
    assert head_map(manifest).splitlines()[:2] == ["layer  0  █·○  1 of 3", "layer  1  ··  0 of 2"]


def test_a_manifest_that_tells_no_heads(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    seal(tmp_path, {"architecture": "GPT2LMHeadModel"})
    with pytest.raises(StorageError, match="says nothing of transformers, dense_heads, kept_heads"):
        model_card(tmp_path)
    assert read_manifest(tmp_path)
