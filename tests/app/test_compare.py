"""The Compare page."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from saelab.analysis.matching import match_decoders
from saelab.analysis.result import stored, with_arrays
from saelab.analysis.similarity import Similarity, compare_decoders, training_of
from saelab.features.database import open_database
from saelab.runs import folder
from saelab.runs.decoder import decoder_rows
from tests.app.shown import check_inert, html, message, unescaped
from tests.app.synthetic_run import OTHER, write_run

ORDER = np.random.default_rng(0).permutation(40)[:30]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Runs `first` and `second`, of which 30 features are the same but for noise, and `third` without a database."""
    folder = tmp_path_factory.mktemp("pair")
    first, second = write_run(folder / "first"), write_run(folder / "second", n_features=48, seed=2)
    write_run(folder / "third", n_features=30, seed=3, features=False)
    path = second / "sae" / "sae_weights.safetensors"
    tensors = load_file(path)
    rows = decoder_rows(first)[ORDER]
    tensors["W_dec"][:30] = rows + 0.1 * np.random.default_rng(1).standard_normal(rows.shape)
    save_file(tensors, path)
    return folder


def components(app) -> dict[str, dict]:
    keys = ("pair_rows", "tokens_a", "tokens_b")
    found = [each.proto for each in app.get("bidi_component")]
    return {key: json.loads(each.bytes) for key in keys for each in found if key in each.id}


def test_figures_stand_side_by_side_with_their_differences(explorer, pair):
    app = explorer(pair, page="compare", run="first", other="second")
    check_inert(app)
    page = html(app)
    assert (
        '<td>Features</td><td class="sl-value">40</td><td class="sl-value">48</td><td class="sl-value">+8</td>' in page
    )
    assert (
        '<td>FVU</td><td class="sl-value">0.1634</td><td class="sl-value">0.1634</td><td class="sl-value">0</td>'
        in page
    )


def test_all_runs_of_the_model_and_site_are_drawn_and_the_two_are_marked(explorer, pair):
    app = explorer(pair, page="compare", run="first", other="second")
    chart = json.loads(app.get("plotly_chart")[0].proto.spec)
    line, points, marked = chart["data"]
    assert sorted(points["text"]) == ["first", "second", "third"] and marked["text"] == ["first", "second"]
    assert line["text"] == ["first"], "the seeds of the others are their further features per token"
    low, high = chart["layout"]["yaxis"]["range"]
    assert 0.1 < low < 0.1634 < high < 0.2, "one value of FVU is in the middle of a wide axis"
    assert chart["layout"]["yaxis"]["title"]["text"] == "FVU"
    app.selectbox(key="axis").set_value("loss_recovered_zero").run()
    assert app.query_params["axis"] == "loss_recovered_zero"
    chart = json.loads(app.get("plotly_chart")[0].proto.spec)
    assert chart["layout"]["yaxis"]["title"]["text"] == "loss recovered, zero ablation"
    assert chart["data"][1]["y"] == [0.965] * 3
    app.selectbox(key="axis").set_value("loss_recovered_mean").run()
    assert not app.get("plotly_chart")[0].key or "pareto" not in app.get("plotly_chart")[0].key


def test_the_same_features_are_pairs_and_the_others_are_lists(explorer, pair):
    app = explorer(pair, page="compare", run="first", other="second", threshold="0.9")
    match = match_decoders(decoder_rows(pair / "first"), decoder_rows(pair / "second"))
    rows = components(app)["pair_rows"]
    shown = list(zip(rows["sides"]["a"]["ids"], rows["sides"]["b"]["ids"], strict=True))
    assert shown == [tuple(each) for each in match.pairs.tolist()] and len(shown) >= 30
    assert {(int(ORDER[b]), b) for b in range(30)} <= set(shown)
    density = open_database(pair / "second" / "features").table["density"]
    assert [float(d) for d in rows["sides"]["b"]["density"]] == pytest.approx(density[match.pairs[:, 1]], rel=0.05)
    figures = {metric.label: metric.value for metric in app.metric}
    assert figures["Each other's best"] == f"{len(shown)} pairs"
    assert figures["Only in the first"] == f"{len(match.died(0.9))} of 40" == "10 of 40"
    assert figures["Only in the second"] == f"{len(match.born(0.9))} of 48" == "18 of 48"
    found = compare_decoders(decoder_rows(pair / "first"), decoder_rows(pair / "second"))
    assert figures["Mean cosine of one-to-one pairs"] == f"{found.one_to_one.mean_cosine:.3f}"
    assert figures["The same, second to first"] == f"{match.mean_max_cosine_of_b:.3f}"
    chance = f"{found.cosine_of_b_by_chance.mean():.3f} and {found.one_to_one_by_chance.mean_cosine:.3f}"
    assert any(chance in caption.value for caption in app.caption)
    app.segmented_control(key="list").set_value("born").run()
    rows = components(app)["pair_rows"]
    assert rows["sides"]["b"]["ids"] == match.born(0.9).tolist()
    assert rows["sides"]["a"]["ids"] == match.best_of_b[match.born(0.9)].tolist()
    app.segmented_control(key="threshold").set_value(0.5).run()
    assert app.query_params["threshold"] == "0.5" and components(app)["pair_rows"]["total"] == len(match.born(0.5))


def test_one_selection_shows_both_features(explorer, pair):
    app = explorer(pair, page="compare", run="first", other="second", a=str(ORDER[3]), b="3")
    labels = [link.proto.label for link in app.main.get("page_link")]
    assert labels[-2:] == [f"**Feature {ORDER[3]}** of first", "**Feature 3** of second"]
    found = components(app)
    for key, run, feature in (("tokens_a", "first", int(ORDER[3])), ("tokens_b", "second", 3)):
        database = open_database(pair / run / "features")
        assert found[key]["lines"][0]["row"] == database.examples(feature)[0].row
        assert found[key]["link"] == f"feature?run={run}&feature="
    assert found["pair_rows"]["chosen"] == [ORDER[3], 3]


def test_lists_are_sorted_on_the_server(explorer, pair):
    app = explorer(pair, page="compare", run="first", other="second", sort="density_b", order="asc")
    rows = components(app)["pair_rows"]
    density = open_database(pair / "second" / "features").table["density"][rows["sides"]["b"]["ids"]]
    assert (np.diff(density) >= 0).all() and rows["size"] == 200 and rows["total"] == len(density)


def test_a_run_without_a_database_is_matched_without_examples(explorer, pair):
    app = explorer(pair, page="compare", run="first", other="third")
    rows = components(app)["pair_rows"]
    assert "density" not in rows["sides"]["b"] and "density" in rows["sides"]["a"]
    assert any("no feature database" in caption.value for caption in app.caption)


def write_result(run: Path, others: list[dict]) -> None:
    """A stored analysis of the run beside others; arrays are among their values."""
    arrays: dict[str, np.ndarray] = {}

    def taken(value, name: str):
        if isinstance(value, np.ndarray):
            arrays[name] = value
            return {"$array": name}
        if isinstance(value, dict):
            return {key: taken(item, f"{name}.{key}") for key, item in value.items()}
        return [taken(item, f"{name}.{i}") for i, item in enumerate(value)] if isinstance(value, list) else value

    own = {"c_dec": 0.21, "c_dec_by_chance": 0.2, "meta": None}
    path = run / folder.ANALYSES / "similarity"
    path.mkdir(parents=True, exist_ok=True)
    (path / folder.FIGURES).write_text(json.dumps({"inputs": "0", "run": own, "others": taken(others, "others")}))
    save_file(arrays, path / folder.ARRAYS)


def other_of(run: Path, decoders: Similarity | None) -> dict:
    meta = {"meta_features": 7, "explained": near(0.4), "explained_by_chance": near(0.25)}
    training = training_of(folder.training_record(run))
    weights = {"training": training, "c_dec": 0.23, "c_dec_by_chance": 0.2, "meta": meta}
    found = None
    if decoders is not None:
        figures, arrays = stored(decoders)
        found = with_arrays(figures, arrays)
    return {"weights": weights, "cka": {"cka": near(0.71), "by_chance": 0.05, "tokens": 1234}, "decoders": found}


def near(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def test_a_stored_comparison_is_shown_with_what_only_it_knows(explorer, pair, tmp_path, monkeypatch):
    for name in ("first", "second"):
        shutil.copytree(pair / name, tmp_path / "runs" / name)
    first, second = tmp_path / "runs" / "first", tmp_path / "runs" / "second"
    record = json.loads((second / "train.json").read_text())
    (second / "train.json").write_text(json.dumps(record | {"inputs": "1" * 64}))
    link = {"page": "compare", "run": "first", "other": "second"}
    app = explorer(tmp_path / "runs", **link)
    command = f'`saelab analyse {first} similarity "analysis.similarity.other=[{second}]"`'
    assert command in app.caption[-1].value and "Linear CKA of codes" not in {metric.label for metric in app.metric}

    b = decoder_rows(second)
    write_result(first, [other_of(second, compare_decoders(b[::-1][:40], b))])  # as if 40 features were B's own
    with monkeypatch.context() as patch:
        patch.setattr("saelab.analysis.similarity.compare_decoders", None)
        app = explorer(tmp_path / "runs", **link)
    assert not app.error and not any("saelab analyse" in caption.value for caption in app.caption)
    figures = {metric.label: metric.value for metric in app.metric}
    assert figures["Linear CKA of codes"] == "0.710" and figures["CKA by chance"] == "0.050"
    assert figures["c_dec, first"] == "0.2100" and figures["c_dec, second"] == "0.2300"
    assert figures["Rows explained, second"] == "40.0%" and "Rows explained, first" not in figures
    assert figures["Each other's best"] == "40 pairs", "the stored match, not one of these decoders"

    back = explorer(tmp_path / "runs", page="compare", run="second", other="first")
    assert any("the other way round" in link.proto.label for link in back.main.get("page_link"))
    (second / "train.json").write_text(json.dumps(record | {"inputs": "2" * 64}))  # trained again
    assert command in explorer(tmp_path / "runs", **link).caption[-1].value
    (first / folder.ANALYSES / "similarity" / folder.FIGURES).write_text(json.dumps({"others": [{}]}))
    assert "similarity --force" in message(explorer(tmp_path / "runs", **link))


def test_codes_at_different_sites_compare_if_that_is_stored(explorer, pair, tmp_path):
    run = Path(shutil.copytree(pair / "first", tmp_path / "runs" / "first"))
    elsewhere = write_run(tmp_path / "runs" / "elsewhere", features=False, site="blocks.0.hook_mlp_out")
    write_result(run, [other_of(elsewhere, None)])
    app = explorer(tmp_path / "runs", page="compare", run="first", other="elsewhere")
    assert "different sites" in unescaped(app.info[0].value) and not components(app)
    assert {metric.label: metric.value for metric in app.metric}["Linear CKA of codes"] == "0.710"


def test_what_cannot_be_compared_is_said(explorer, pair, runs, tmp_path):
    app = explorer(runs, page="compare", run="whole", other=OTHER)
    assert "different models (demo and <script>" in unescaped(app.info[0].value) and not components(app)
    for name in ("trained", "changed"):
        config = write_run(tmp_path / name, features=False) / "sae" / "cfg.json"
        config.write_text(json.dumps({"metadata": {"saelab": {"model_fingerprint": name}}}))
    app = explorer(tmp_path, page="compare", run="trained", other="changed")
    assert "different models of one name, demo, so" in unescaped(app.info[0].value)
    elsewhere = write_run(tmp_path / "elsewhere", features=False, site="blocks.0.hook_mlp_out")
    app = explorer(pair, elsewhere, page="compare", run="first", other="elsewhere")
    assert "different sites (blocks.2.hook_resid_post and blocks.0.hook_mlp_out)" in unescaped(app.info[0].value)
    assert "There is no run 'nope'" in message(explorer(pair, page="compare", run="first", other="nope"))
    assert "no other run" in explorer(elsewhere, page="compare").info[0].value
    (elsewhere / "sae" / "sae_weights.safetensors").write_bytes(b"no weights")
    (elsewhere / "config.yaml").write_text((pair / "first" / "config.yaml").read_text())
    shown = message(explorer(pair, elsewhere, page="compare", run="first", other="elsewhere"))
    assert "sae_weights.safetensors: the decoder cannot be read" in shown
