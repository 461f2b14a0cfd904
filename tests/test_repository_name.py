"""Who and where the repository is stands in settings.ini; every address elsewhere agrees with it."""
import json
import re

import pytest
from house import NBS, ROOT, settings

USER, REPO, BRANCH = (settings()[key] for key in ("user", "repo", "branch"))
URL = f"https://github.com/{USER}/{REPO}"
COLAB = f"https://colab.research.google.com/github/{USER}/{REPO}/blob/{BRANCH}/nbs/demo.ipynb"
MAY_NAME_IT = {"settings.ini", "README.md", "nbs/index.ipynb", "nbs/demo.ipynb"}  # readers need whole addresses there
TEXT = {".py", ".md", ".ini", ".in", ".yml", ".yaml", ".txt", ".ipynb", ".toml", ".cfg", ".css", ".html", ""}
ELSEWHERE = {".git", "_proc", "_docs", "build", "dist", "seed_examples", "__pycache__", ".pytest_cache", ".hypothesis", ".carry"}


def text_files():
    "The project's own text files; the first documents in tests/seed_examples are quoted, not ours to correct."
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        skipped = ELSEWHERE & set(parts) or any(part.startswith(".venv") or part.endswith(".egg-info") for part in parts)
        if not skipped and path.is_file() and path.suffix in TEXT and path.name not in ("_modidx.py", "nbdev.yml", "demo-run.ipynb"):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


FILES = dict(text_files())
ADDRESS = re.compile(r"(?:github\.com/|colab\.research\.google\.com/github/)([\w.-]+)/([\w.-]+?)(?=\.git|[/\s)\"'#@>`\\]|[.,;:](?:\s|$)|$)")


def test_the_settings_are_whole():
    assert settings()["git_url"] == "https://github.com/%(user)s/%(repo)s" % settings()
    assert settings()["doc_host"] == "https://%(user)s.github.io" % settings() and settings()["doc_baseurl"] == f"/{REPO}"
    assert {"settings.ini", ".ci/run", ".github/workflows/test.yml", ".github/workflows/docs.yml"} <= set(FILES)


def test_only_readers_pages_name_it():
    named = {name for name, text in FILES.items() if f"{USER}/{REPO}" in text or f"{USER}.github.io" in text}
    assert named <= MAY_NAME_IT, "read it from settings.ini (in workflows: ${{ github.repository }})"


@pytest.mark.parametrize("name", ["README.md", "nbs/index.ipynb", "nbs/demo.ipynb"])
def test_readers_find_the_demo_in_colab(name):
    badges = re.findall(r"https://colab\.research\.google\.com/github/[^)\s\"\\]*", FILES[name])
    assert badges and set(badges) == {COLAB}


def test_the_badge_has_a_cell_of_its_own():
    "nbdev turns the whole title cell into front matter, and a badge in it would be lost."
    for name in ("index.ipynb", "demo.ipynb"):
        sources = ["".join(cell["source"]) for cell in json.loads((NBS / name).read_text(encoding="utf-8"))["cells"]]
        [cell] = [source for source in sources if "colab-badge.svg" in source]
        assert re.fullmatch(r"\[!\[[^\]]+\]\([^)]+\)\]\([^)]+\)", cell.strip())


def test_every_address_of_this_project_is_the_same():
    for name, text in FILES.items():
        if name == "tests/test_repository_name.py":
            continue
        for user, repo in ADDRESS.findall(text):
            if repo.lower().replace("-", "_") in (REPO.lower().replace("-", "_"), settings()["lib_name"]):
                assert (user, repo) == (USER, REPO), f"{name} names {user}/{repo}"


def test_installing_from_git_names_this_repository():
    for name, text in FILES.items():
        if name == "tests/test_repository_name.py":
            continue
        for address in re.findall(r"git\+(https://[^\s\"'`@\\]+)", text):
            assert address.rstrip(".").removesuffix(".git") == URL, f"{name}: {address}"


@pytest.mark.parametrize("text, found", [
    ("see https://github.com/someone/neural_plasticity.", ("someone", "neural_plasticity")),
    ("git+https://github.com/someone/neural_plasticity.git", ("someone", "neural_plasticity")),
    ("(https://colab.research.google.com/github/a/b/blob/main/x.ipynb)", ("a", "b")),
])
def test_addresses_are_recognised(text, found):
    assert ADDRESS.findall(text) == [found]


def test_the_readme_has_both_commands_and_ci_runs_the_second():
    run = "pip install -e '.[dev]' && nbdev_test --n_workers 2 && pytest"
    for command in ("pip install -e '.[demo]' && papermill nbs/demo.ipynb demo-run.ipynb", run):
        assert command in FILES["README.md"].splitlines()
    assert [line.strip() for line in FILES[".ci/run"].splitlines()].count(run) == 1
