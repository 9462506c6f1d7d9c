"""The whole study at a small size: three widths and three other sites of a tiny model."""

from pathlib import Path

import dark_matter
import pytest

import saelab
from saelab.analysis.dark_matter import DarkMatter
from saelab.runs.grid import grid
from tests.runs.test_stages import small


@pytest.mark.slow
def test_the_study_trains_analyses_and_reports_and_repeats_nothing(tmp_path: Path) -> None:
    config = small(tmp_path) | {"out": str(tmp_path / "study"), "sweep": {"sae.n_features": [32, 48, 64]}}
    config["training"] = config["training"] | {"tokens": 2000}
    config["eval"] = {"tokens": 600, "ce_tokens": 200}
    few = [f"analysis.dark_matter.{each}" for each in ("tokens=1200", "ce_tokens=200")]
    dark_matter.PART_TOKENS = 500
    both = dark_matter.main(config, few, seeds=2)
    out = both / "seed0"
    report = (out / "dark_matter.md").read_text()
    for title in ("| FVU, nonlinear", "| error, intercept, ridge", "| recovered by nonlinear", "| 32 to 48"):
        assert title in report
    assert "48: nonlinear part from blocks.0.hook_resid_post" in report and "missing features of the widest" in report
    assert (
        "48: FVU of an autoencoder trained on the nonlinear part (" in report and (out / "dark_matter.html").is_file()
    )
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert len(stamps) == 4  # three widths and the control
    assert "| 48 features, random decoder" in report
    dark_matter.main(config, few, seeds=2)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} == stamps
    found = [saelab.read_analysis(both / seed / "n_features32", "dark_matter") for seed in ("seed0", "seed1")]
    first, second = (each.decomposition.fvu.value for each in found if isinstance(each, DarkMatter))
    assert f"{(first + second) / 2:.4f} ± {abs(first - second) / 2:.4f}" in (both / "dark_matter.md").read_text()
    assert first != second


def test_the_config_has_the_widths_of_the_study() -> None:
    assert [run.settings.sae.n_features for run in grid("dark_matter")] == [1024, 2048, 4096, 8192, 16384]
    assert dark_matter.other_sites("blocks.0.hook_resid_post")[0] == "blocks.0.hook_resid_pre"
