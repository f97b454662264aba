"""No built page loads anything from another host, and no link inside the site is dead.

Called by ``make docs-quick`` after the build: ``python docs/check_pages.py docs/_build/html``.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}


class Page(HTMLParser):
    """Collects what a page loads and where it links."""

    def __init__(self):
        super().__init__()
        self.loads, self.links = [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        for name, value in attrs.items():
            if (tag, name) in LOADS and value:
                self.loads.append(value)
            elif (tag, name) == ("a", "href") and value:
                self.links.append(value)


def main(root):
    """Print every violation; return how many there are."""
    root, bad, count = Path(root).resolve(), [], 0
    for path in sorted(p for p in root.rglob("*.html") if "_static" not in p.parts):
        count += 1
        page = Page()
        page.feed(path.read_text(encoding="utf-8"))
        for url in page.loads:
            if urlsplit(url).netloc:
                bad.append(f"{path.relative_to(root)}: loads {url}")
        for url in [*page.loads, *page.links]:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc or not parts.path:
                continue
            if not (path.parent / unquote(parts.path)).resolve().exists():
                bad.append(f"{path.relative_to(root)}: {url} does not exist")
    for path in root.rglob("*.css"):
        for url in re.findall(r"(?:@import\s+|url\()['\"]?(https?:[^'\")]+)", path.read_text()):
            bad.append(f"{path.relative_to(root)}: loads {url}")
    print(*bad, sep="\n", end="\n" if bad else "")
    print(f"{count} pages, {len(bad)} of them load from elsewhere or link to nothing")
    return len(bad)


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1]) else 0)
