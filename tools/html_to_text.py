#!/usr/bin/env python3
"""Prints the prose of HTML pages, one paragraph a line: what stands in <p>, without listings, tables and repetitions.

Needs nothing beyond Python's standard library. Used by tools/demo_text.sh.
"""

import argparse
import re
from html.parser import HTMLParser
from pathlib import Path

SKIPPED = {"script", "style", "pre", "table", "nav", "head", "footer"}


class Paragraphs(HTMLParser):
    """Collects the text of every <p> that is not inside a skipped element."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self.skipping = 0
        self.text: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in SKIPPED:
            self.skipping += 1
        elif tag == "p":
            self.finish()
            self.text = []

    def handle_endtag(self, tag: str) -> None:
        if tag in SKIPPED:
            self.skipping = max(0, self.skipping - 1)
        elif tag in {"p", "li", "div", "section", "dd"}:
            self.finish()

    def handle_data(self, data: str) -> None:
        if self.text is not None and not self.skipping:
            self.text.append(data)

    def finish(self) -> None:
        if self.text is not None:
            self.found.append(re.sub(r"\s+", " ", "".join(self.text)).replace("¶", "").strip())
        self.text = None


def prose(html: str) -> list[str]:
    """The paragraphs of a page that read like sentences: long enough, and mostly letters."""
    parser = Paragraphs()
    parser.feed(html)
    parser.finish()
    return [p for p in parser.found if len(p) >= 80 and sum(c.isalpha() or c == " " for c in p) >= 0.9 * len(p)]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("pages", nargs="+", type=Path, metavar="PAGE.html")
    pages: list[Path] = arguments.parse_args().pages
    paragraphs = dict.fromkeys(p for page in pages for p in prose(page.read_text("utf-8", errors="replace")))
    print("\n".join(paragraphs))


if __name__ == "__main__":
    main()
