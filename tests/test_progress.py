"""What the progress bar reports."""

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
