"""The study of explanations at a small size: it goes on after a kill, and writes only between its marks."""

import json
import re
from pathlib import Path

import autointerp
import pytest
from autointerp_report import LEXICAL, Study, report

import saelab
from saelab.analysis.intervals import Interval
from saelab.autointerp.scoring import DEFAULT
from saelab.autointerp.summary import Difference, Line, ScoreTable
from saelab.errors import SaelabError
from tests.runs.test_controls import made

MARKED = "a\n<!-- autointerp -->\nearlier figures\n<!-- /autointerp -->\n b\n"


@pytest.mark.slow
def test_the_study_goes_on_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, file = made(tmp_path), tmp_path / "results.md"
    options, score, scored = autointerp.Options(run, out=tmp_path / "study", features=20), saelab.score, []
    file.write_text(MARKED)
    with pytest.raises(SaelabError, match="has no scores yet"):
        autointerp.write(options, file)

    def killed(*arguments, **named):
        if len(scored) == 7:
            raise KeyboardInterrupt
        scored.append(score(*arguments, **named))

    monkeypatch.setattr(saelab, "score", killed)
    with pytest.raises(KeyboardInterrupt):
        autointerp.main(options)
    before = (run / "autointerp" / "scores.jsonl").read_bytes()
    seconds = json.loads((tmp_path / "study" / "seconds.json").read_text())
    monkeypatch.setattr(saelab, "score", score)
    text = autointerp.main(options)
    assert (run / "autointerp" / "scores.jsonl").read_bytes().startswith(before)
    after = json.loads((tmp_path / "study" / "seconds.json").read_text())
    assert all(after["run"][name] == seconds["run"][name] for name in ("explain", *DEFAULT))
    assert text.startswith(LEXICAL) and all(f"| {name} " in text for name in (*DEFAULT, "surprisal"))
    assert all(f"| {path.name} " in text for path in (run / "controls").iterdir())
    autointerp.write(options, file)
    assert re.sub(r"(?s)-->.*<!--", "--><!--", file.read_text()) == "a\n<!-- autointerp --><!-- /autointerp -->\n b\n"
    assert text in file.read_text()


def test_the_report_marks_controls_that_are_not_beaten() -> None:
    def difference(name: str, low: float, reseed: bool = False) -> Difference:
        return Difference(name, 200, Interval(low + 0.1, low, low + 0.2), 1.01, 1.4, reseed)

    differences = (
        difference("shuffled", 0.1),
        difference("neurons", -0.1),
        difference("reseed1", -0.1, reseed=True),
    )
    mean = Interval(0.8, 0.7, 0.9)
    line = Line(
        "fuzzing", "lexical", "lexical", "lexical", "AUROC", 200, 0, 0.8, mean, 0, 0, differences, (), (0.8, 0.7)
    )
    study = Study("run", saelab.settings_of("quickstart"), ScoreTable((line,)), {"run": 10, "neurons": 0}, {})
    text = report(study)
    assert "0.000 (-0.100 to 0.100) !" in text and text.count(" !") == 1 and "0.200 (0.100 to 0.300)" in text
    assert "Controls that are not beaten: fuzzing: neurons." in text and "0.700 to 0.800 (2)" in text
    assert "10 training tokens each for run." in text and "Times were not measured." in text


def test_features_of_slow_scores_are_spread_over_those_explained() -> None:
    assert autointerp.spread(range(0, 400, 2), 20) == list(range(0, 400, 20))
    assert autointerp.spread([3, 5], 20) == [3, 5]
