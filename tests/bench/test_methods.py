"""The methods side by side, at a small size: the study goes on after a kill and writes only between its marks."""

import json
import re
from pathlib import Path

import methods
import numpy as np
import pytest
from methods_claims import FROZEN, GRADIENT, MUTUAL, TITLES, TOPK, by_seed, students
from methods_report import rewritten

import saelab
from saelab.errors import SaelabError
from saelab.runs.grid import grid
from tests.runs.test_stages import small

MARKED = (
    "a\n<!-- methods -->\nearlier figures\n<!-- /methods -->\n b \n"
    "<!-- methods: gradient --><!-- /methods: gradient -->\n\nc"
)


def outside(text: str) -> str:
    """The text without what is between marks."""
    return re.sub(r"(?s)(<!-- (methods.*?) -->).*?(<!-- /\2 -->)", r"\1\3", text)


@pytest.mark.slow
def test_the_study_trains_measures_goes_on_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(tmp_path) | {"training": {"tokens": 2000, "batch": 200, "lr": 3e-3}}
    options = methods.Options(
        config, ["eval.tokens=900", "analysis.steering.tokens=900"], tmp_path / "study", seeds=2, steered=3
    )
    file = tmp_path / "results.md"
    file.write_text(MARKED)
    with pytest.raises(SaelabError, match="no run of the study is finished"):
        methods.write(options, file)

    assert methods.main(options._replace(only=[TOPK])) == ""  # as one of several commands at a time
    assert methods.finished_run(options.out / TOPK / "seed1") and not (options.out / MUTUAL).exists()

    sweep, trained = saelab.sweep, []

    def killed(*arguments, **named):
        if len(trained) == 4:
            raise KeyboardInterrupt
        trained.append(sweep(*arguments, **named))

    monkeypatch.setattr(saelab, "sweep", killed)
    with pytest.raises(KeyboardInterrupt):
        methods.main(options)
    methods.found(options, measure=True)  # of the four methods that are finished
    methods.write(options, file)
    text = file.read_text()
    assert outside(text) == outside(MARKED) and "earlier figures" not in text
    assert TITLES[MUTUAL] in text and TITLES[GRADIENT] not in text and "M9" in text and "G4" not in text
    states = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("*.safetensors")}

    monkeypatch.setattr(saelab, "sweep", sweep)
    report = methods.main(options)
    assert {path: path.stat().st_mtime_ns for path in states} == states  # nothing that was finished is made again
    for title in TITLES.values():
        assert f"| {title} " in report
    for claim in ("M1", "M2", "M3", "M4", "M5", "M6", "M7", "M8", "M9", "M10", "G2", "G3", "G4", "G5"):
        assert f"| {claim} " in report
    methods.write(options, file)
    written = file.read_text()
    assert all(part in written for part in report.split("\n\n")) and outside(written) == outside(MARKED)
    methods.write(options, file)
    assert file.read_text() == written

    measured = tmp_path / "study" / "measured"
    dealt = json.loads((measured / "dealt.json").read_text())["result"]
    run = options.out / MUTUAL / "seed0"
    evaluated = json.loads((run / "eval.json").read_text())
    assert dealt["fvu"]["own"][0] == pytest.approx(evaluated["fvu"], rel=1e-4)
    assert dealt["l0"]["own"][0] == pytest.approx(evaluated["l0"])
    frozen = saelab.load(options.out / f"{TOPK}{FROZEN}" / "seed0").W_dec
    assert not np.allclose(frozen, saelab.load(options.out / TOPK / "seed0").W_dec)


def test_every_method_is_a_valid_setting() -> None:
    for name, settings in methods.methods().items():
        (run,) = grid("quickstart", [*settings, "sweep.sae.seed=[0]"])
        assert run.settings.sae.needs_gradients == name.startswith(GRADIENT)
        assert (run.settings.sae.freeze == "decoder") == name.endswith(FROZEN)


def test_only_the_text_between_the_marks_changes() -> None:
    made = {"methods": "new", "methods: gradient": "newer"}
    once = rewritten(MARKED, made, "file")
    assert once == (
        "a\n<!-- methods -->\n\nnew\n\n<!-- /methods -->\n b \n"
        "<!-- methods: gradient -->\n\nnewer\n\n<!-- /methods: gradient -->\n\nc"
    )
    assert rewritten(once, made, "file") == once
    begin, end = "<!-- methods -->", "<!-- /methods -->"
    for wrong in ("a", f"{end} {begin}", f"{begin} {begin} {end}", f"{begin} {end} {end}"):
        with pytest.raises(SaelabError, match="once each"):
            rewritten(wrong, {"methods": "new"}, "file")


def test_the_interval_over_seeds_is_students() -> None:
    low, high = students([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), rel=1e-4)
    seeds = {
        "topk": [{"seed": i, "fvu": fvu} for i, fvu in enumerate((0.2, 0.21, 0.2, 9))],
        "mutual": [{"seed": i, "fvu": fvu} for i, fvu in ((2, 0.1), (0, 0.1), (1, 0.11))],
        "gradient": [{"seed": 5, "fvu": 0.1}],
    }
    line = by_seed(seeds, "M8", "mutual", "topk", "fvu")
    assert line is not None and line[3] == "shown" and by_seed(seeds, "M8", "feature", "topk", "fvu") is None
    assert "seeds -0.1000, -0.1000, -0.1000" in line[2] and by_seed(seeds, "M8", "gradient", "topk", "fvu") is None
    worse = by_seed(seeds, "M8", "topk", "mutual", "fvu")
    assert worse is not None and worse[3] == "the opposite"


def test_features_are_matched_by_the_nearest_value_and_only_once() -> None:
    a, b = np.array([0.0, 1.0, 2.0, 3.0]), np.array([2.1, 2.2, 0.9])
    pairs = methods.matched(a, np.array([0, 2, 3]), b, np.array([1, 0, 2]), 9)
    assert (
        pairs.tolist() == [[2, 1], [3, 0], [0, 2]] and len(methods.matched(a, np.array([1]), b, np.array([0]), 9)) == 1
    )
