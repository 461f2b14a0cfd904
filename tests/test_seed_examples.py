"""Every code block of the user's documents runs unchanged.

`seed_examples/` holds the blocks as they stand there, one file each, in order. `utils.neural_plasticity` is read as
`neural_plasticity`, the embedded model stands in for distilgpt2, and the names that the documents leave undefined are
supplied. The blocks of one document share their names, as they do in the text. Shell blocks name scripts; each of those
has a living successor in the docs.
"""

import json
import re
from pathlib import Path

import matplotlib.figure
import pytest
import torch

from neural_plasticity.data import load_embedded_model, load_embedded_text, text_dataloader
from neural_plasticity.gates import dormant_heads

FOLDER = Path(__file__).parent / "seed_examples"
DOCUMENTS = sorted({path.name[:-6] for path in FOLDER.glob("*.py")})


class EmbeddedModel:
    """Stands in for AutoModelForCausalLM: what the documents call distilgpt2 is the embedded model."""

    @staticmethod
    def from_pretrained(name):
        assert name == "distilgpt2"
        return load_embedded_model("gpt2")[0]


def get_dataloaders():
    """Small loaders that begin again whenever they are used up."""
    tokenizer = load_embedded_model("gpt2")[1]
    train = text_dataloader(load_embedded_text("train")[:4], tokenizer, block_size=16, batch_size=2)
    validation = text_dataloader([load_embedded_text("validation")[0][:1500]], tokenizer, block_size=16, batch_size=8)
    return train, validation


@pytest.fixture
def supplied():
    model, tokenizer = load_embedded_model("gpt2")
    train, validation = get_dataloaders()
    batch = tokenizer(["Four score and seven years ago"] * 2, return_tensors="pt")
    return dict(model=model, tokenizer=tokenizer, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], train_dataloader=train,
                eval_dataloader=validation, device=torch.device("cpu"), AutoModelForCausalLM=EmbeddedModel, get_dataloaders=get_dataloaders)


def run_document(document, names):
    blocks = sorted(FOLDER.glob(f"{document}_*.py"))
    assert blocks
    for path in blocks:
        code = path.read_text().replace("utils.neural_plasticity", "neural_plasticity")
        exec(compile(code, path.name, "exec"), names)
    return names


def check_cycle(results, level, heads=48):
    history = results["training_metrics"]
    assert len(results["pruned_heads"]) == int(heads * level) == int(results["pruning_mask"].sum())
    assert len({len(values) for values in history.values()}) == 1
    assert results["final_metrics"]["perplexity"] == history["perplexity"][-1]
    assert dormant_heads(results["model"]) == sorted(set(results["pruned_heads"]) - set(results["revived_heads"]))


def test_cross_platform_api(supplied, capsys):
    names = run_document("cross_platform_api", supplied)
    assert f"Device: {names['env_info']['device']}" in capsys.readouterr().out
    assert len(names["attention_tensors"]) == 6 and names["entropy_values"].shape == (2, 6, 8)
    assert names["grad_norms"].shape == names["pruning_mask"].shape == (6, 8)
    assert len(names["pruned_heads"]) == 9 == int(names["pruning_mask"].sum())  # floor(48 × 0.2)
    assert all(isinstance(names[figure], matplotlib.figure.Figure) for figure in ("entropy_fig", "grad_fig", "mask_fig"))
    # the last block prunes again, on top of the nine heads that are dormant already
    assert len(names["results"]["pruned_heads"]) == 9 and not set(names["results"]["pruned_heads"]) & set(names["pruned_heads"])
    assert names["results"]["strategy"] == "combined"


def test_whole_loop(supplied):
    names = run_document("module_readme", supplied)
    check_cycle(names["results"] | {"model": names["model"]}, level=0.2)
    assert names["results"]["training_metrics"]["step"][-1] == 500
    assert names["results"]["final_metrics"]["perplexity"] < names["results"]["pruned_metrics"]["perplexity"]


def test_the_summary_is_the_beginning_of_the_whole_loop():
    "So it need not run once more."
    summary, whole = ([path.read_text().strip() for path in sorted(FOLDER.glob(f"{name}_*.py"))] for name in ("modularization_summary", "module_readme"))
    assert len(summary) == len(whole) == 1 and whole[0].startswith(summary[0])


def test_every_document_is_run():
    assert DOCUMENTS == ["cross_platform_api", "modularization_summary", "module_readme"]


def test_scripts_have_successors():
    page = json.loads((Path(__file__).parents[1] / "nbs" / "explanations" / "seeds.ipynb").read_text())
    text = "".join("".join(cell["source"]) for cell in page["cells"])
    scripts = {name for path in FOLDER.glob("*.sh") for name in re.findall(r"scripts/(\w+)\.py", path.read_text())}
    assert scripts
    assert not {name for name in scripts if name not in text}
