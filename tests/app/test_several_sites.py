"""The pages of a transcoder and of a crosscoder, whose features do not write where they read."""

import json
from pathlib import Path

import numpy as np
import pytest
import streamlit as st

from saelab.runs.decoder import decoder_rows
from tests.app.conftest import serving
from tests.app.shown import html
from tests.app.synthetic_run import D_IN, write_run
from tests.app.test_run import component

READ, GIVEN = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
FURTHER = {"transcoder": {"target": GIVEN}, "crosscoder": {"more_sites": [GIVEN]}}
"""What the settings and the database of a run of each kind name beside `READ`."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each kind, without logits, and another transcoder, `zoo`."""
    made = tmp_path_factory.mktemp("several_sites")
    for name, kind in (("an_autoencoder", ""), *((kind, kind) for kind in FURTHER), ("zoo", "transcoder")):
        run, further = write_run(made / name, site=READ), FURTHER.get(kind, {})
        settings, manifest = run / "config.yaml", run / "features" / "manifest.json"
        settings.write_text(settings.read_text() + "".join(f"{key}: {each}\n" for key, each in further.items()))
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | further))
        if kind == "crosscoder":
            checkpoint = run / "sae" / "cfg.json"
            checkpoint.write_text(json.dumps(json.loads(checkpoint.read_text()) | {"site_widths": [D_IN - 4, 4]}))
        tokens = run / "features" / "table.top_logit_tokens.npy"
        np.save(tokens, np.full_like(np.load(tokens), -1))
    return made


@pytest.mark.parametrize("page", ["steer", "dark_matter"])
@pytest.mark.parametrize("run", list(FURTHER))
def test_pages_about_one_site_say_that_the_run_is_no_autoencoder(explorer, folder, run: str, page: str) -> None:
    app = explorer(folder, page=page, run=run)
    assert not app.error and app.info[0].value.endswith(f"This run is a {run}.") and "analyse" not in html(app)
    assert "This run is" not in explorer(folder, page=page, run="an_autoencoder").info[0].value


def test_the_feature_page_says_why_there_is_no_logit_lens(explorer, folder) -> None:
    for run, reason in (("crosscoder", "of a crosscoder writes to several"), ("transcoder", "is neither the residual")):
        app = explorer(folder, page="feature", run=run, feature="1")
        assert not app.error and any(reason in caption.value for caption in app.caption)
        assert ("Sites" in [each.value for each in app.subheader]) == (run == "crosscoder")


def test_the_feature_page_of_a_crosscoder_has_the_share_of_each_site(explorer, folder) -> None:
    row = decoder_rows(folder / "crosscoder")[1].astype(float)
    first, second = np.linalg.norm(row[: D_IN - 4]), np.linalg.norm(row[D_IN - 4 :])
    page = html(explorer(folder, page="feature", run="crosscoder", feature="1"))
    for site, length in ((READ, first), (GIVEN, second)):
        assert f'<td>{site}</td><td class="sl-value">{length / (first + second):.3f}</td>' in page


def test_the_list_of_a_crosscoder_has_the_share_of_the_second_site_and_sorts_by_it(explorer, folder) -> None:
    rows = decoder_rows(folder / "crosscoder").astype(float)
    first, second = np.linalg.norm(rows[:, : D_IN - 4], axis=1), np.linalg.norm(rows[:, D_IN - 4 :], axis=1)
    shares = second / (first + second)
    for order, expected in (("desc", np.argsort(-shares)), ("asc", np.argsort(shares))):
        app = explorer(folder, page="features", run="crosscoder", sort=GIVEN, order=order, show="all")
        found = component(app, "rows")["rows"]
        assert not app.error and [each["id"] for each in found[:5]] == expected[:5].tolist()
        assert [each[f"number:{GIVEN}"][0] for each in found[:5]] == [f"{shares[i]:.3f}" for i in expected[:5]]
    other = component(explorer(folder, page="features", run="an_autoencoder", sort=GIVEN), "rows")
    assert GIVEN not in str(other["columns"])


def test_a_feature_of_a_crosscoder_reads_no_other_row_of_the_decoder(explorer, folder, monkeypatch) -> None:
    """A decoder may have gigabytes."""
    read = []

    def counted(run, features=slice(None)):
        read.append(features)
        return decoder_rows(run, features)

    monkeypatch.setattr("saelab.runs.decoder.decoder_rows", counted)
    st.cache_data.clear()
    app = explorer(folder, page="feature", run="crosscoder", feature="2")
    assert not app.error and read == [slice(2, 3)]


def test_a_run_is_compared_with_one_of_the_same_sites_first(explorer, folder) -> None:
    for run, other in (("transcoder", "zoo"), ("crosscoder", "an_autoencoder")):
        app = explorer(folder, page="compare", run=run)
        assert app.selectbox(key="other").value == other
        assert any("saelab analyse" in each.value for each in app.caption) == (run == "transcoder")


@pytest.mark.slow
def test_long_names_fit_on_a_phone(browser, main_script, tmp_path: Path) -> None:
    """The figures of each site, whose names have no blanks, and the origin of an adopted run, with its SHA-256."""
    sites = [f"blocks.{i}.a_name_without_blanks.hook_resid_post" for i in range(2)]
    figures = [{"site": site, "fvu": 0.5, "delta_ce": 0.25} for site in sites]
    write_run(tmp_path / "figures")
    evaluation = json.loads((tmp_path / "figures" / "eval.json").read_text()) | {"sites": figures}
    (tmp_path / "figures" / "eval.json").write_text(json.dumps(evaluation))
    write_run(tmp_path / "origin", features=False)
    record = {"inputs": "adopted", "complete": True, "tokens": 0, "adopted": {"from": "/a/folder", "sha256": "0" * 64}}
    (tmp_path / "origin" / "train.json").write_text(json.dumps(record))
    page = browser.new_page(viewport={"width": 390, "height": 844})
    with serving(main_script, tmp_path, tmp_path / "log.txt") as address:
        for run in ("figures", "origin"):
            page.goto(f"{address}/run?run={run}")
            page.get_by_text("All figures, with definitions").click(timeout=60_000)
            page.wait_for_selector("table.sl-facts", timeout=60_000)
            page.wait_for_selector({"figures": "text=a_name_without", "origin": ".st-key-origin"}[run])
            right = "[...document.querySelectorAll('table.sl-facts')].map((each) => each.getBoundingClientRect().right)"
            assert all(edge <= 390 for edge in page.evaluate(right)), run
    page.close()
