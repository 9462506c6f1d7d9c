"""The command that makes the table of docs/interop.md, without the other trainers."""

import importlib.util
from pathlib import Path

from tests.sae.interop.peers import NAMES

ROOT = Path(__file__).parents[3]


def test_the_table_has_every_checkpoint_and_no_error_above_the_bound(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("check_interop", ROOT / "scripts" / "check_interop.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rows = script.rows(tmp_path)
    assert [row.checkpoint for row in rows] == NAMES
    for row in rows:
        assert max(value for value in (row.loaded, *row.written.values()) if value is not None) < script.MOST
    page = (ROOT / "docs" / "interop.md").read_text()
    part = page.split(script.BEGIN)[1].split(script.END)[0]
    stored = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines()[3:] if line]
    assert [cells[0] for cells in stored] == NAMES
    refused = [[cell == "no such class" for cell in cells[2:]] for cells in stored]
    assert refused == [[value is None for value in row.written.values()] for row in rows]
