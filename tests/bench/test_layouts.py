"""The table of docs/distributed.md is what the script prints."""

from pathlib import Path

import layouts

DOCS = Path(__file__).parents[2] / "docs" / "distributed.md"


def test_the_docs_have_the_table_of_the_script() -> None:
    assert "\n".join(layouts.table()) in DOCS.read_text()
