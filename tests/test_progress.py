"""What the progress bar reports, and where."""

import re
import time

import pytest

from saelab.progress import bar


def test_speed_is_all_tokens_over_the_whole_time(capsys: pytest.CaptureFixture[str]) -> None:
    def items():
        for _ in range(10):
            time.sleep(0.02)
            yield 100

    begin = time.monotonic()
    assert sum(bar(items(), "reading", 200, int)) == 1000  # five times as many as announced
    elapsed = time.monotonic() - begin
    line = re.fullmatch(r"reading: 1,000 tokens in (.*) s \(([\d,]+) tokens/s\)\n", capsys.readouterr().err)
    assert line is not None and 0.15 <= float(line[1]) <= elapsed + 0.05
    assert 1000 / elapsed <= int(line[2].replace(",", "")) <= 1000 / 0.2


@pytest.mark.parametrize("counted", [40, 10_000])
def test_in_a_terminal_of_80_columns_all_of_it_is_on_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, counted: int
) -> None:
    """Also if the items end before their announced total: the speed at the end is that of what was counted."""
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "80", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    note = "FVU 0.163, L0 1,032.0, 131,072 dead"

    def items():
        for _ in range(4):
            time.sleep(0.15)
            yield counted

    for _ in bar(items(), "training", 40_000, int, lambda: note):
        pass
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    lines = [line for line in re.split(r"[\r\n]+", shown) if line.strip()]
    assert all(len(line) <= 80 for line in lines)
    assert any(re.search(rf"left {note}", line) for line in lines[:-1])
    found = re.fullmatch(rf"training .* 100% ([\d,]+) tokens/s in 0:00:01 {note}\s*", lines[-1])
    assert found is not None and 0.4 < int(found[1].replace(",", "")) / (4 * counted / 0.6) <= 1


def test_elsewhere_nothing_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in bar(iter([1, 2]), "training", 3, int, lambda: "FVU 0.163"):
        pass
    assert re.fullmatch(r"training: 3 tokens in .*\n", capsys.readouterr().err)
