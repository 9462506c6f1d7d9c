"""`saelab analyse`: a result in the run, made again only if something that it depends on has changed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import saelab
from saelab.analysis.dark_matter import DarkMatter
from saelab.analysis.dead import Dead
from saelab.analysis.settings import ExplanationsSettings
from saelab.analysis.similarities import Similarities
from saelab.analysis.similarity import training_of
from saelab.analysis.steering_report import SteeringEffects
from saelab.autointerp.settings import ContextSettings
from saelab.autointerp.similarity import ExplanationSimilarities
from saelab.cli import app
from saelab.errors import SaelabError
from saelab.runs import folder
from saelab.runs.analyses import ANALYSES
from saelab.runs.config import RunSettings
from tests.runs.test_stages import small


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("analysed")
    return saelab.train(small(path), ["analysis.dead.tokens=1500"])


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_result_is_stored_read_back_and_made_again_only_if_settings_or_weights_change(run: Path) -> None:
    said: list[str] = []
    result = saelab.analyse(run, "dead", say=said.append)
    assert isinstance(result, Dead) and result.tokens >= 1500 and "dead: up to date" not in said
    assert folder.analyses(run) == ["dead"]
    found = folder.analysis(run, "dead")
    assert found is not None and found["settings"]["tokens"] == 1500 and (found["density"] == result.density).all()
    again = saelab.read_analysis(run, "dead")
    assert isinstance(again, Dead) and repr(again) == repr(result) and again.reasons == result.reasons
    assert again.silent_for is not None and len(again.silent_for) == 64

    stamp = (run / "analyses/dead/result.json").stat().st_mtime_ns
    assert repr(saelab.analyse(run, "dead", say=said.append)) == repr(result) and said[-1] == "dead: up to date"
    assert (run / "analyses/dead/result.json").stat().st_mtime_ns == stamp
    other = saelab.analyse(run, "dead", ["analysis.dead.dense=0.5"])
    assert isinstance(other, Dead) and other.density_of_dense == 0.5
    saelab.analyse(run, "dead", ["analysis.dead.dense=0.5"], force=True)
    assert (run / "analyses/dead/result.json").stat().st_mtime_ns > stamp

    (run / folder.AUTOINTERP).mkdir()
    saelab.resume(run, ["training.tokens=6200"])
    assert folder.analyses(run) == [] and saelab.read_analysis(run, "dead") is None
    assert not (run / folder.AUTOINTERP).exists()


def test_errors_name_the_mistake(run: Path, tmp_path: Path) -> None:
    with pytest.raises(SaelabError, match=r"deed: no such analysis \(.*\). Nearest: dead"):
        saelab.analyse(run, "deed")
    with pytest.raises(SaelabError, match="not a run folder with a checkpoint"):
        saelab.analyse(tmp_path, "dead")
    with pytest.raises(SaelabError, match=r"analysis.dead.share: 2.0 is not a number above 0"):
        saelab.analyse(run, "dead", ["analysis.dead.share=2"])
    with pytest.raises(SaelabError, match=r"`saelab analyse` takes only analysis.*"):
        saelab.analyse(run, "dead", ["sae.k=3"])
    with pytest.raises(SaelabError, match="is not the output of attention heads"):
        saelab.analyse(run, "attention")
    saelab.analyse(run, "dead")
    (run / "analyses/dead/arrays.safetensors").write_bytes(b"x")
    with pytest.raises(SaelabError, match=r"saelab analyse .* dead --force"):
        saelab.read_analysis(run, "dead")
    assert np.isfinite(saelab.analyse(run, "dead", force=True).density).all()  # type: ignore[attr-defined]
    record = json.loads((run / "analyses/dead/result.json").read_text())
    del record["density"]
    (run / "analyses/dead/result.json").write_text(json.dumps(record))
    with pytest.raises(SaelabError, match="cannot be read as a result"):
        saelab.read_analysis(run, "dead")


def test_the_command_prints_the_figures(run: Path) -> None:
    done = CliRunner().invoke(app, ["analyse", str(run), "dead"])
    assert done.exit_code == 0, done.output
    assert "L0 (active features per token)" in done.output and (run / "analyses/dead/result.json").is_file()


def test_steering_is_stored_and_read_back(run: Path) -> None:
    options = ["analysis.steering.tokens=1500", "analysis.steering.features=2", "analysis.steering.contexts=2"]
    result = saelab.analyse(run, "steering", options)
    again = saelab.read_analysis(run, "steering")
    assert isinstance(result, SteeringEffects) and isinstance(again, SteeringEffects)
    assert repr(again) == repr(result) and result.kl.shape == (2, 2, 3, 2) and (again.position == result.position).all()


def test_similarity_names_the_runs_it_compares_with(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    with pytest.raises(SaelabError, match=r"analysis.similarity.other: name the runs to compare with: .*=\[RUN"):
        saelab.analyse(run, "similarity")
    options = ["analysis.similarity.tokens=1500", f"analysis.similarity.other=[{other}]"]
    result = saelab.analyse(run, "similarity", options)
    again = saelab.read_analysis(run, "similarity")
    assert isinstance(result, Similarities) and repr(again) == repr(result)
    (compared,) = result.others
    assert compared.weights.name == str(other) and compared.cka.cka.value == pytest.approx(1, abs=1e-5)
    assert compared.weights.training == training_of(folder.training_record(other)) is not None
    said: list[str] = []
    saelab.analyse(run, "similarity", options, say=said.append)
    assert said[-1] == "similarity: up to date"


def test_explanations_are_compared_with_those_of_other_runs_and_again_if_they_change(run: Path, tmp_path: Path) -> None:
    saelab.index(run, ["features.tokens=1500"])
    other = Path(shutil.copytree(run, tmp_path / "other"))
    with pytest.raises(SaelabError, match=r"analysis.explanations.other: name the runs to compare with: .*=\[RUN"):
        saelab.analyse(run, "explanations")
    options = [f"analysis.explanations.other=[{other}]"]
    with pytest.raises(SaelabError, match=r"has no explanations; `saelab explain .* --features 0:` makes them"):
        saelab.analyse(run, "explanations", options)
    for each in (run, other):
        saelab.explain(each, "0:")
    result = saelab.analyse(run, "explanations", options)
    assert isinstance(result, ExplanationSimilarities) and repr(saelab.read_analysis(run, "explanations")) == repr(
        result
    )
    (compared,) = result.others
    assert (compared.pairs[:, 0] == compared.pairs[:, 1]).all() and len(compared.pairs) == compared.explained > 10
    assert compared.name == str(other) and compared.matched_by == "decoder" and compared.explainers == "lexical"
    np.testing.assert_allclose(compared.cosine, 1, atol=1e-6)
    said: list[str] = []
    saelab.analyse(run, "explanations", options, say=said.append)
    assert said[-1] == "explanations: up to date"
    saelab.explain(other, "0:", settings=ContextSettings(sampling="top"))
    saelab.analyse(run, "explanations", options, say=said.append)
    assert said[-1] != "explanations: up to date"
    with pytest.raises(SaelabError, match=r"threshold: 2 is no cosine"):
        ExplanationsSettings(threshold=2)


def test_every_analysis_has_a_section_of_settings_of_its_name() -> None:
    sections = vars(RunSettings("out", "site").analysis)
    assert sections.keys() == ANALYSES.keys()


def test_dark_matter_reads_other_runs_and_is_made_again_if_they_change(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    few = [
        "analysis.dark_matter.tokens=1500",
        "analysis.dark_matter.ce_tokens=300",
        "analysis.dark_matter.pursuit_tokens=0",
        f"analysis.dark_matter.sources=[{other}]",
        f"analysis.dark_matter.wider={other}",
    ]
    found = saelab.analyse(run, "dark_matter", few)
    assert isinstance(found, DarkMatter) and found.site == "blocks.1.hook_resid_post"
    assert list(found.from_sites) == ["here", found.site, "others", "all"] and found.missing["known"].features == 64
    again = saelab.read_analysis(run, "dark_matter")
    assert isinstance(again, DarkMatter) and repr(again) == repr(found)
    assert (again.decomposition.token == found.decomposition.token).all()

    said: list[str] = []
    saelab.analyse(run, "dark_matter", few, say=said.append)
    assert said[-1] == "dark_matter: up to date"
    saelab.resume(other, ["training.tokens=6200"])
    saelab.analyse(run, "dark_matter", few, say=said.append)
    assert said[-1] != "dark_matter: up to date"

    with pytest.raises(SaelabError, match="not a run folder with a checkpoint"):
        saelab.analyse(run, "dark_matter", [f"analysis.dark_matter.wider={tmp_path}"])
    with pytest.raises(SaelabError, match=r"analysis.dark_matter.part_tokens: -1 is negative"):
        saelab.analyse(run, "dark_matter", ["analysis.dark_matter.part_tokens=-1"])
