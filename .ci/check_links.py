"""Check a built site: every link, anchor, picture, script and style sheet inside it must exist.

    python .ci/check_links.py _proc/_docs
"""
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    "The anchors that a page offers and the addresses that it uses."

    def __init__(self, text):
        super().__init__()
        self.anchors, self.used, self.errors = {"", "top"}, [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        self.errors += "cell-output-error" in (attributes.get("class") or "")
        if not (tag == "link" and attributes.get("rel") in ("canonical", "preconnect")):
            self.used += [attributes[key] for key in ("href", "src") if attributes.get(key)]


def broken(folder):
    "Lines that say what is wrong with the site in `folder`."
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html")) if "site_libs" not in path.parts}
    for path, page in pages.items():
        where = path.relative_to(folder)
        if page.errors:
            yield f"{where}: shows a cell that ended with an error"
        for address in page.used:
            url = urlsplit(address)
            if url.scheme or url.netloc:
                continue  # out of the site, or a picture inside the page
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_relative_to(folder) or not target.is_file():
                yield f"{where}: {address} does not exist"
            elif target in pages and unquote(url.fragment) not in pages[target].anchors:
                yield f"{where}: {address} has no such anchor"


def main():
    folder = Path(sys.argv[1]).resolve()
    count = sum(1 for _ in folder.rglob("*.html"))
    if not (folder / "index.html").is_file():
        sys.exit(f"{folder} holds no site")
    lines = list(broken(folder))
    print(*lines, sep="\n", end="\n" if lines else "")
    print(f"{count} pages, {len(lines)} broken links")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
