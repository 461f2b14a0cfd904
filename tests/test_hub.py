"""`push_pruned` and `load_pruned("owner/name")`, by the real client against a hub on this machine; nothing that can carry code is fetched."""
import json
import os
import pickle
import shutil
import socket

import pytest
from huggingface_hub import HfApi, constants
from models import build, cuttable, logits, same_weights, weights
from transformers import AutoTokenizer

import neural_plasticity.folders as folders
import neural_plasticity.sources as sources
from local_hub import REVISION, local_hub
from neural_plasticity.card import model_card
from neural_plasticity.config import ExperimentConfig
from neural_plasticity.data import load_embedded_model
from neural_plasticity.errors import InvalidArgument, SourceUnavailable, StorageError
from neural_plasticity.experiment import run_experiment
from neural_plasticity.gates import dormant_heads, restore_heads
from neural_plasticity.hub import local_folder, push_pruned
from neural_plasticity.pruning import apply_pruning_mask
from neural_plasticity.storage import load_pruned, save_pruned
from neural_plasticity.surgery import kept_heads, remove_heads


@pytest.fixture(autouse=True)
def alone(tmp_path_factory, monkeypatch):
    "A cache and a token of the test's own, and no request leaves the machine."
    home = tmp_path_factory.mktemp("home")
    for name, value in {"HF_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token"), "HF_HUB_OFFLINE": True, "HF_XET_CACHE": str(home / "xet")}.items():
        monkeypatch.setattr(constants, name, value)
    for name, value in {"NO_PROXY": "127.0.0.1", "HF_TOKEN": "hf_nobodys", "HF_OIDC_RESOURCE": ""}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def online(monkeypatch):
    "From then on the hub is this endpoint."
    def use(endpoint):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")

    return use


@pytest.fixture
def hub(tmp_path, online):
    "A hub that takes uploads; the list of what it was asked for."
    with local_hub({}, tmp_path / "uploads") as (endpoint, asked):
        online(endpoint)
        yield asked


def pruned(name="gpt2"):
    model = build(name)
    remove_heads(model, cuttable(name))
    apply_pruning_mask(model, [(2, 1)], "gate")
    return model


@pytest.fixture
def folder(tmp_path):
    return save_pruned(pruned(), tmp_path / "model")


def assert_same_model(found, expected):
    assert same_weights(found, weights(expected)) and logits(found).equal(logits(expected))
    assert dormant_heads(found) == dormant_heads(expected) == [(2, 1)] and kept_heads(found) == kept_heads(expected)
    restore_heads(found)
    restore_heads(expected)
    assert logits(found).equal(logits(expected))


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("xet", (True, False))  # huggingface_hub has a way of uploading for each
@pytest.mark.parametrize("name", ("gpt2", "llama-grouped"))
def test_there_and_back(name, xet, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    model = pruned(name)
    save_pruned(model, tmp_path / "model")
    address = push_pruned(tmp_path / "model", "owner/name")
    assert "/owner/name/commit/" in address and "api/repos/create" in hub
    served = tmp_path / "uploads" / "models" / "owner" / "name" / address.rpartition("/")[2]
    assert {path.name for path in served.iterdir()} == {path.name for path in (tmp_path / "model").iterdir()} | {".gitattributes", "README.md"}
    shutil.rmtree(tmp_path / "model")
    assert_same_model(load_pruned("owner/name"), model)


def test_a_trained_model_with_its_tokenizer_and_card(hub, tmp_path):
    model, tokenizer = load_embedded_model("llama")
    remove_heads(model, cuttable("llama-trained"))
    save_pruned(model, tmp_path / "model", tokenizer)
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\nA pruned model.\n")
    (tmp_path / "model" / "diary.txt").write_text("private")
    address = push_pruned(tmp_path / "model", "owner/name")
    served = {path.name for path in (tmp_path / "uploads" / "models" / "owner" / "name" / address.rpartition("/")[2]).iterdir()}
    assert "README.md" in served and "diary.txt" not in served
    assert logits(load_pruned("owner/name")).equal(logits(model))
    assert not any(path.endswith("README.md") for path in hub if "resolve" in path)
    assert AutoTokenizer.from_pretrained(local_folder("owner/name")).get_vocab() == tokenizer.get_vocab()


def test_revisions(hub, tmp_path):
    for name in ("gpt2", "llama-grouped"):
        save_pruned(pruned(name), tmp_path / name)
    first = push_pruned(tmp_path / "gpt2", "owner/name").rpartition("/")[2]
    HfApi().create_tag("owner/name", tag="v1.0", revision=first)
    push_pruned(tmp_path / "llama-grouped", "owner/name", message="Another")
    for revision, name in ((None, "llama-grouped"), ("main", "llama-grouped"), (first, "gpt2"), ("v1.0", "gpt2")):
        assert_same_model(load_pruned("owner/name", revision=revision), pruned(name))
    with pytest.raises(SourceUnavailable, match="no revision 'v2.0'.*branch, a tag or a commit"):
        load_pruned("owner/name", revision="v2.0")
    with pytest.raises(InvalidArgument, match="is a folder"):
        load_pruned(tmp_path / "gpt2", revision="v1.0")


def test_weights_of_an_earlier_push_do_not_stay(hub, tmp_path, folder):
    "Plain from_pretrained would read model.safetensors rather than the shards of the later push."
    served = tmp_path / "uploads" / "models" / "owner" / "name"
    push_pruned(folder, "owner/name")
    build("llama").save_pretrained(tmp_path / "other", max_shard_size="20KB")
    (tmp_path / "other" / "README.md").write_text("A card.")
    HfApi().upload_folder(repo_id="owner/name", folder_path=tmp_path / "other")
    commit = push_pruned(folder, "owner/name").rpartition("/")[2]
    assert {path.name for path in (served / commit).iterdir()} == {path.name for path in folder.iterdir()} | {".gitattributes", "README.md"}
    assert_same_model(load_pruned("owner/name"), pruned())


def test_an_altered_folder_is_not_sent(hub, folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1] + b"!")
    with pytest.raises(StorageError, match="is not the file that was saved"):
        push_pruned(folder, "owner/name")
    (folder / "plasticity.json").unlink()
    for source in (folder, folder / "nothing"):
        with pytest.raises(StorageError, match="has no plasticity.json"):
            push_pruned(source, "owner/name")
    assert hub == []


@pytest.mark.parametrize("name", ("name", "owner/", "/name", "a/b/c", "owner/../name", "../name", " owner/name", None, 3))
def test_names_to_push_to(name, hub, folder):
    with pytest.raises(InvalidArgument, match="must be 'owner/name'"):
        push_pruned(folder, name)
    assert hub == []


# ---------------------------------------------------------------- what is fetched


class Trap:
    def __reduce__(self):
        return (open, ("trapped", "w"))


def test_only_what_the_manifest_lists_is_fetched(folder, online, tmp_path, monkeypatch):
    "Beside it, a repository may hold what it likes: nobody looks at it."
    monkeypatch.chdir(tmp_path)
    for name in ("pytorch_model.bin", "modeling.py", "runs/training_args.bin", "events.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(pickle.dumps(Trap()))
    with local_hub({"models/owner/name": folder}) as (endpoint, asked):
        online(endpoint)
        assert_same_model(load_pruned("owner/name"), pruned())
    fetched = {path.rpartition("/")[2] for path in asked if "/resolve/" in path}
    assert fetched == {"plasticity.json", *json.loads((folder / "plasticity.json").read_text())["files"]} and "model.safetensors" in fetched
    assert {path.name for path in local_folder("owner/name").iterdir()} == fetched and not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("name", ("pytorch_model.bin", "modeling.py", "TRAINING.PTH"))
def test_a_manifest_that_lists_what_can_carry_code(name, folder, online, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / name).write_bytes(pickle.dumps(Trap()))
    folders.seal(folder, {key: value for key, value in folders.read_manifest(folder).items() if key not in ("files", "checksum")})
    with local_hub({"models/owner/name": folder}) as (endpoint, asked):
        online(endpoint)
        with pytest.raises(StorageError, match="repository owner/name .*can carry code"):
            load_pruned("owner/name")
    assert not any(path.endswith(name) for path in asked) and not (tmp_path / "trapped").exists()


def test_a_repository_that_save_pruned_did_not_write(online, tmp_path):
    build("gpt2").save_pretrained(tmp_path / "plain")
    with local_hub({"models/owner/name": tmp_path / "plain"}) as (endpoint, asked):
        online(endpoint)
        with pytest.raises(StorageError, match="repository owner/name .*no plasticity.json; plain from_pretrained"):
            load_pruned("owner/name")
    assert not any("/resolve/" in path for path in asked)  # not one weight is fetched for nothing


@pytest.mark.parametrize("damage, words", [("weights", "is not the file that was saved"), ("missing", "model.safetensors is missing"), ("manifest", "checksum does not match")])
def test_a_repository_that_was_altered(damage, words, folder, online):
    path = folder / ("plasticity.json" if damage == "manifest" else "model.safetensors")
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes().replace(b'"attention": "sdpa"', b'"attention": "none"') if damage == "manifest" else path.read_bytes()[:-1] + b"!")
    with local_hub({"models/owner/name": folder}) as (endpoint, _):
        online(endpoint)
        with pytest.raises(StorageError, match=words):
            load_pruned("owner/name")


# ---------------------------------------------------------------- what cannot be had


def test_private_and_missing_repositories(hub, folder, monkeypatch):
    push_pruned(folder, "owner/secret")
    push_pruned(folder, "owner/open", private=False)
    monkeypatch.delenv("HF_TOKEN")
    for name in ("owner/secret", "owner/nothing"):
        with pytest.raises(SourceUnavailable, match=f"no folder '{name}'.*private or gated.*hf auth login"):
            load_pruned(name)
    assert_same_model(load_pruned("owner/open"), pruned())
    for name in ("owner/new", "owner/open"):
        with pytest.raises(SourceUnavailable, match=f"not pushed to '{name}'.*401.*hf auth login"):
            push_pruned(folder, name)


@pytest.mark.parametrize("where", ("nobody there", "never answers", "offline"))
def test_no_hub(where, folder, online, monkeypatch):
    monkeypatch.setattr(sources, "HUB_PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        words = "offline mode is on"
        if where != "offline":
            online(f"http://127.0.0.1:{9 if where == 'nobody there' else silent.getsockname()[1]}")
            words = "cannot be reached"
        with pytest.raises(SourceUnavailable, match=f"no folder 'owner/name'.*{words}"):
            load_pruned("owner/name")
        with pytest.raises(SourceUnavailable, match=f"was not pushed: .*{words}"):
            push_pruned(folder, "owner/name")


def test_a_hub_that_fails_while_it_is_asked(folder, online, monkeypatch):
    "Whatever the client or its HTTP library raises."
    import neural_plasticity.hub as hub

    class Broken(Exception):
        pass

    def broken(*arguments, **options):
        raise Broken("the line\n  is dead")

    monkeypatch.setattr(hub, "snapshot_download", broken)
    monkeypatch.setattr(hub.HfApi, "create_commit", broken)
    with local_hub({"models/owner/name": folder}, folder.parent / "uploads") as (endpoint, _):
        online(endpoint)
        for verb in (lambda: load_pruned("owner/name"), lambda: push_pruned(folder, "owner/name")):
            with pytest.raises(SourceUnavailable, match="Broken: the line is dead"):
                verb()


@pytest.mark.parametrize("name", ("nothing", "./nothing", "../nothing", "a/b/c", "/nothing/here", "~/nothing", "owner/", "owner/name:main", "C:\\models\\name", " ", "owner/\u00fcber"))
def test_names_that_are_neither(name, online, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with local_hub({}) as (endpoint, asked):
        online(endpoint)
        with pytest.raises(StorageError, match="there is no folder .*called owner/name"):
            load_pruned(name)
    assert asked == []


# ---------------------------------------------------------------- the cache


def test_the_cache_serves_when_the_hub_is_gone(folder, online, monkeypatch):
    with local_hub({"models/owner/name": folder}) as (endpoint, _):
        online(endpoint)
        load_pruned("owner/name")
    for revision in (None, REVISION):  # the endpoint is dead now
        assert_same_model(load_pruned("owner/name", revision=revision), pruned())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same_model(load_pruned("owner/name"), pruned())
    with pytest.raises(SourceUnavailable, match="offline mode is on"):
        load_pruned("owner/name", revision="v1.0")


def test_a_folder_as_the_cache_lays_it_out(folder, monkeypatch):
    "As somebody may have carried it to a machine without network: blobs, a ref, and a snapshot of links."
    home = folder.parent / "carried" / "models--owner--name"
    snapshot = home / "snapshots" / REVISION
    for path in (home / "blobs", home / "refs", snapshot):
        path.mkdir(parents=True)
    (home / "refs" / "main").write_text(REVISION)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.move(path, home / "blobs" / str(number))
        os.symlink(f"../../blobs/{number}", snapshot / path.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home.parent))
    for source, revision in (("owner/name", None), ("owner/name", "main"), ("owner/name", REVISION), (snapshot, None)):
        assert_same_model(load_pruned(source, revision=revision), pruned())
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(StorageError, match="model.safetensors is missing"):
        load_pruned("owner/name")


def test_a_folder_goes_before_a_repository(folder, hub, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder.parent / "owner").mkdir()
    shutil.copytree(folder, "owner/name")
    assert_same_model(load_pruned("owner/name"), pruned())
    os.rename("owner/name", "owner/.name.previous")  # as a save leaves it that was killed between its last two steps
    with pytest.raises(StorageError, match="interrupted save"):
        load_pruned("owner/name")
    assert hub == []


# ---------------------------------------------------------------- the model card


def card_on(tmp_path, address):
    return (tmp_path / "uploads" / "models" / "owner" / "name" / address.rpartition("/")[2] / "README.md").read_text(encoding="utf-8")


def test_a_card_goes_along_and_none_is_overwritten_unasked(hub, tmp_path, folder):
    card = card_on(tmp_path, push_pruned(folder, "owner/name"))
    assert card == str(model_card(folder, repository="owner/name")) and 'load_pruned("owner/name")' in card
    HfApi().upload_file(repo_id="owner/name", path_or_fileobj=b"Mine.", path_in_repo="README.md")
    assert card_on(tmp_path, push_pruned(folder, "owner/name")) == "Mine."
    (folder / "README.md").write_text("From the folder.")
    assert card_on(tmp_path, push_pruned(folder, "owner/name")) == "From the folder."
    assert {path.name for path in folder.iterdir()} >= {"README.md"} and load_pruned(folder) is not None


def test_a_card_with_the_evidence_of_a_run(hub, tmp_path):
    result = run_experiment(ExperimentConfig(prune_level=0.3, strategy="taylor", minimal=True, training_steps=2, eval_interval=2, regrow_every=0, selection_batches=1, control=False, device="cpu", output_dir=str(tmp_path / "unused")), progress=False, resume=tmp_path / "run")
    folder = result.folder / "model"
    push_pruned(folder, "owner/name")
    card = card_on(tmp_path, push_pruned(folder, "owner/name", run=result.folder))  # replaces the one that was there
    assert card == str(model_card(folder, result.folder, "owner/name")) and f"{result.table[1]['perplexity']:.2f}" in card
    assert logits(load_pruned("owner/name")).equal(logits(load_pruned(folder)))
    (folder / "README.md").write_text("Mine.")
    with pytest.raises(InvalidArgument, match="has a README.md already"):
        push_pruned(folder, "owner/name", run=result.folder)
