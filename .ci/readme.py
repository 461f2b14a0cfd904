"""README.md from nbs/index.ipynb, without Quarto: Markdown cells, visible code and its outputs; pictures become files.

    python .ci/readme.py           write README.md and its pictures
    python .ci/readme.py --check   exit 1 if they are out of step
"""
import base64
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURES = Path("nbs/images")  # where the figures of index.ipynb go
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s]+)(?=\))")  # the target of a relative link or picture


def directives(source):
    "The words behind `#|` at the top of a cell, such as `hide` and `echo: false`."
    return {" ".join(line[2:].split()) for line in source.splitlines() if line.startswith("#|")}


def fenced(text, language=""):
    "A code block, closed by a fence that the text does not contain."
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def output_block(output, name, alt):
    "Markdown for one output of a cell, and the picture that it shows (None if it shows none)."
    if output["output_type"] == "stream":
        return (fenced("".join(output["text"])), None) if output["name"] == "stdout" else ("", None)
    data = output.get("data", {})
    if "image/png" in data:
        return f"![{alt}]({(PICTURES / name).as_posix()})", base64.b64decode("".join(data["image/png"]))
    if "text/markdown" in data:
        return "".join(data["text/markdown"]), None
    if "text/plain" in data:
        return fenced("".join(data["text/plain"])), None
    raise ValueError(f"cannot put a {output['output_type']} into README.md; the notebook must run without errors")


def render(notebook):
    "The text of README.md, and its pictures as {path from the top: bytes}."
    blocks, pictures = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(LINK.sub(lambda link: f"nbs/{link[0]}", source))
        if cell["cell_type"] != "code" or "hide" in directives(source):
            continue
        if "echo: false" not in directives(source):
            blocks.append(fenced("\n".join(line for line in source.splitlines() if not line.startswith("#|")), "python"))
        alt = next((line.removeprefix("fig-alt:").strip().strip('"') for line in directives(source) if line.startswith("fig-alt:")), "")
        for output in cell["outputs"]:
            name = f"index-{len(pictures) + 1}.png"
            block, picture = output_block(output, name, alt)
            blocks.append(block)
            if picture:
                pictures[(PICTURES / name).as_posix()] = picture
    return "\n\n".join(block.strip() for block in blocks if block.strip()) + "\n", pictures


def stale(root=ROOT):
    "The files that differ from what index.ipynb makes them, with what they should hold: {path from the top: bytes}."
    text, pictures = render(json.loads((root / "nbs/index.ipynb").read_text(encoding="utf-8")))
    wanted = {"README.md": text.encode(), **pictures}
    return {path: data for path, data in wanted.items() if not (root / path).is_file() or (root / path).read_bytes() != data}


def main():
    files = stale()
    if "--check" in sys.argv[1:] and files:
        sys.exit(f"out of step with nbs/index.ipynb: {', '.join(files)}; run python .ci/readme.py")
    for path, data in files.items():
        (ROOT / path).parent.mkdir(exist_ok=True)
        (ROOT / path).write_bytes(data)
        print("written:", path)


if __name__ == "__main__":
    main()
