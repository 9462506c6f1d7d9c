"""The Attention page: a feature of heads' outputs on a typed text as attribution has it, and the table of heads."""

import base64
import json
import re
import shutil
from pathlib import Path
from urllib.parse import parse_qs

import numpy as np
import pytest
import torch
from streamlit.testing.v1 import AppTest

import saelab
from saelab.analysis.attention.direct import direct_attribution
from saelab.runs.live import Live, open_live
from tests.app.shown import html
from tests.app.test_live import captions, components
from tests.tiny import CONTEXT, language_model, model_folder, text

TEXT = "The quick <b>fox</b> jumps over the quick"


def made(folder: Path, site: str, seed: int) -> None:
    """A run of the tiny GPT-2 whose autoencoder has random weights."""
    settings = saelab.settings_of(
        {
            "model": str(model_folder("gpt2")),
            "site": site,
            "corpus": str(folder.parent / "book.txt"),
            "context": CONTEXT,
            "device": "cpu",
            "sae": {"n_features": 64, "k": 4},
            "out": str(folder),
        }
    )
    lm = language_model("gpt2")
    torch.manual_seed(seed)
    sae = saelab.SparseAutoencoder(32, 64, 4, {"hook_name": site, "saelab": {"model_fingerprint": lm.fingerprint}})
    torch.nn.init.normal_(sae.W_enc)
    torch.nn.init.normal_(sae.W_dec)
    with saelab.create_run(settings) as run:
        saelab.save_sae(sae, run / "sae")
        (run / "train.json").write_text(json.dumps({"complete": True, "tokens": 10_000}))


@pytest.fixture(scope="module")
def attention_runs(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`upper` and `lower` are of heads' outputs, `stream` is between them; `upper` has the analysis."""
    folder = tmp_path_factory.mktemp("attention_runs")
    (folder / "book.txt").write_text(text(200))
    made(folder / "upper", "blocks.2.attn.hook_z", 0)
    made(folder / "lower", "blocks.1.attn.hook_z", 1)
    shutil.copytree(trained_run, folder / "stream")  # of blocks.1.hook_resid_post
    saelab.analyse(folder / "upper", "attention", ["analysis.attention.tokens=600"])
    return folder


@pytest.fixture(scope="module")
def live(attention_runs: Path) -> Live:
    return open_live(attention_runs / "upper")


@pytest.fixture
def at(explorer, attention_runs: Path):
    def open_page(run: str = "upper", **link: str) -> AppTest:
        app = explorer(attention_runs, page="attention", run=run, **link)
        assert not app.error
        return app

    return open_page


def shades(app: AppTest) -> np.ndarray:
    (line,) = components(app)["source_tokens"]["lines"]
    return np.array(line["activations"])


def test_a_feature_is_shown_by_source_head_and_as_a_tree(at, live) -> None:
    read = live.read(TEXT)
    last = len(read) - 1
    features, values = read.at(last)
    strongest = int(features[values.argmax()])
    found = direct_attribution(live.sae, live.lm, read.token_ids, strongest, last)
    app = at(text=TEXT)
    assert app.selectbox(key="of").value == strongest
    added = found.by_source.clamp_min(0)
    np.testing.assert_allclose(shades(app), added * (added >= 0.01 * added.max()), rtol=5e-3, atol=1e-6)
    assert f"Feature {strongest} has {found.pre_activation:.3g} here" in captions(app)
    (chart,) = app.get("plotly_chart")
    sent = json.loads(chart.proto.spec)["data"][0]["y"]
    by_head = np.frombuffer(base64.b64decode(sent["bdata"]), sent["dtype"])
    np.testing.assert_allclose(by_head, found.by_head, rtol=1e-4, atol=1e-5)
    tree = html(app)
    assert tree.count("<details open>") == 1 and "stream feature" in tree and "<b>fox" not in tree
    assert re.search(r'href="feature\?run=stream&amp;feature=\d+"', tree)
    assert re.search(rf'href="feature\?run=upper&amp;feature={strongest}"', tree)

    one = at(text=TEXT, head="2", shade="pattern")
    pattern = live.attend(live.circuit(), read.token_ids).heads[2].pattern[0, 2, last]
    np.testing.assert_allclose(shades(one), pattern * (pattern >= 0.01 * pattern.max()), rtol=5e-3, atol=1e-6)
    assert html(at(text=TEXT, depth="3")).count("<details") > tree.count("<details")


def test_another_token_and_one_without_features(at, live) -> None:
    features, values = live.read(TEXT).at(3)
    app = at(text=TEXT, token="3")
    assert app.selectbox(key="of").value == int(features[values.argmax()])
    assert not shades(app)[4:].any()
    assert "No feature is active here" in captions(at(text=TEXT, token="0"))


def test_other_pages_lead_there(explorer, attention_runs: Path) -> None:
    app = explorer(attention_runs, page="prompt", run="upper", text=TEXT, token="3")
    link = next(each.proto for each in app.get("page_link") if each.proto.label == "Heads and sources")
    assert parse_qs(link.query_string) == {"run": ["upper"], "text": [TEXT], "token": ["3"]}
    other = explorer(attention_runs, page="prompt", run="stream", text=TEXT)
    assert "Heads and sources" not in [each.proto.label for each in other.get("page_link")]


def test_the_table_of_heads_is_the_analysis(at, attention_runs: Path) -> None:
    found = saelab.read_analysis(attention_runs / "upper", "attention")
    assert found is not None
    app = at()
    table = app.dataframe[0].value
    assert len(table) == 12 and {"induction", "polysemantic", "distance"} <= set(table.columns)
    heads = found.heads()  # type: ignore[attr-defined]
    np.testing.assert_allclose(table.sort_index()["previous"], heads["previous"])
    own = (heads["layer"] == found.layer).sum()  # type: ignore[attr-defined]
    assert (table["layer"][:own] == found.layer).all() and table["features"][:own].notna().all()  # type: ignore[attr-defined]
    assert "Nothing is typed yet" in captions(app) and f"{found.tokens:,} tokens" in captions(app)  # type: ignore[attr-defined]


def test_runs_without_the_analysis_or_of_another_site_say_what_to_do(at) -> None:
    app = at("lower")
    assert not app.dataframe and "attention` measures the heads" in captions(app)
    (info,) = at("stream").info
    assert "needs one of the outputs of attention heads" in info.value
