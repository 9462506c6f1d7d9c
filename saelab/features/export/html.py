"""One HTML page with some features: no script and no request, so that it can be mailed and opened as a file."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from saelab.features.card import STYLE, card
from saelab.features.database import Database
from saelab.features.marks import visible
from saelab.files import write_whole

# What a browser may load for the page: nothing, should text ever get past the escaping.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """<style>
body { margin: 0 auto; max-width: 78rem; padding: .5rem; background: #f4f5f7; color: #1b1c1e;
  font: .9rem/1.45 system-ui, sans-serif; }
nav a { color: #8a4b00; margin-right: .6rem; }
@media (prefers-color-scheme: dark) {
  body { background: #121315; color: #e9eaec; }
  nav a { color: #ffb45c; } }
</style>"""


def page(database: Database, features: Sequence[int]) -> str:
    """The page: a card for each of `features`, in this order. Raises SaelabError if there is no such feature."""
    title = escape(visible(f"Features of {database.folder.resolve().parent.name}"))
    links = " ".join(f'<a href="#feature-{index}">{index}</a>' for index in features)
    linked = frozenset(features)
    cards = "\n".join(card(database.feature(index), linked, whole=True) for index in features)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n{_STYLE}\n{STYLE}\n</head>\n<body>\n<nav>{links}</nav>\n{cards}\n</body>\n</html>\n"
    )


def write(database: Database, features: Sequence[int], path: Path) -> None:
    """Write the page to the file `path`. Raises OSError, and SaelabError as `page` does."""
    write_whole(path, page(database, features))
