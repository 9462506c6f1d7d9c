"""A training that starts with a checkpoint's weights computes at first what the checkpoint computes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import saelab
from saelab.errors import SettingError
from saelab.ranks import Ranks
from saelab.sae.init_from import notes_on_start, start_from
from saelab.sae.input_map import input_map
from saelab.sae.model import SparseAutoencoder
from saelab.sae.settings import AllocationSettings, EncoderSettings, SaeSettings, SparsitySettings
from tests.sae.interop.peers import NAMES, REAL, distance, numbers
from tests.threads import run_threads

X = numbers(400, 16, seed=7) @ numbers(16, 16, seed=8) + 3 * numbers(16, seed=9)
THRESHOLD = AllocationSettings("threshold")
L1, L0 = SparsitySettings("l1"), SparsitySettings("l0")


def settings_for(found: SparseAutoencoder, name: str, **changes: Any) -> SaeSettings:
    """Settings of a training that takes all of `found` over."""
    jumprelu = {"allocation": THRESHOLD, "sparsity": L0, "encoder": EncoderSettings("jumprelu")}
    by_kind = {
        "standard": {"allocation": THRESHOLD, "sparsity": L1},
        "gated": {"allocation": THRESHOLD, "sparsity": L1, "encoder": EncoderSettings("gated")},
        "topk": {"k": found.k},
        "rescaled": {"k": found.k},
        "transcoder": {"allocation": THRESHOLD, "sparsity": L1} if found.threshold is not None else {"k": found.k},
    }
    chosen: dict[str, Any] = by_kind.get(name.rpartition("_")[2], jumprelu) | changes
    chosen |= {"skip": found.W_skip is not None, "unit_norm": False, "init_from": str(REAL / name)}
    return SaeSettings(n_features=found.n_features, **chosen)


def check_same(
    start: SparseAutoencoder, found: SparseAutoencoder, inputs: saelab.InputMap, tolerance: float, scale: float = 1.0
) -> None:
    folded = inputs.folded(start, scale)
    assert distance(folded.encode(X).to_dense(), found.encode(X).to_dense()) < tolerance
    assert distance(folded(X), found(X)) < tolerance


@pytest.mark.parametrize("kind", ["scale", "centre", "whiten"])
@pytest.mark.parametrize("name", NAMES)
def test_without_a_step_it_is_the_checkpoint(name: str, kind: str) -> None:
    found, inputs = saelab.load(REAL / name), input_map(kind, X)
    settings, target_scale = settings_for(found, name), 0.37
    widths = (16, 16) if found.transcodes else (16,)
    assert list(notes_on_start(found, settings, *widths)) == []
    start = start_from(found, settings, inputs(X), inputs, target_scale)
    check_same(start, found, inputs, 1e-6 if kind != "whiten" else 1e-5, target_scale)
    # of x' it has the reconstruction of the checkpoint, as training scales it
    expected = found(X) * target_scale if found.transcodes else inputs(found(X))
    assert distance(start(inputs(X)), expected) < 1e-5


@pytest.mark.parametrize("normalisation", ["layer_norm", "constant_norm_rescale"])
def test_a_checkpoint_that_normalises_tokens_starts_a_training_on_such_inputs(normalisation: str) -> None:
    found, inputs = saelab.load(REAL / "saelens_topk"), input_map(normalisation, X)
    found.normalisation = normalisation
    settings = settings_for(found, "saelens_topk")
    assert list(notes_on_start(found, settings, 16, normalisation=normalisation)) == []
    check_same(start_from(found, settings, inputs(X), inputs), found, inputs, 1e-6)


def test_a_normalisation_other_sites_and_other_sizes_are_refused() -> None:
    found = saelab.load(REAL / "saelens_topk")
    settings = settings_for(found, "saelens_topk")
    with pytest.raises(SettingError, match=r"init_from: .*saelens_topk: has 64 features, .* set sae.n_features=64"):
        list(notes_on_start(found, replace(settings, n_features=48), 16))
    with pytest.raises(SettingError, match="takes activations 16 wide, and the site's are 32"):
        list(notes_on_start(found, settings, 32))
    found.normalisation = "layer_norm"
    with pytest.raises(SettingError, match=r"has layer_norm norm.* training no; set activations.inputs=layer_norm"):
        list(notes_on_start(found, settings, 16))
    skip = saelab.load(REAL / "saelens_skip_transcoder")
    ours = settings_for(skip, "saelens_skip_transcoder")
    with pytest.raises(SettingError, match="is a transcoder, and the run has no target"):
        list(notes_on_start(skip, ours, 16))
    with pytest.raises(SettingError, match="gives activations 16 wide, and the site's are 32"):
        list(notes_on_start(skip, ours, 16, 32))
    with pytest.raises(SettingError, match=r"has a skip connection, and sae\.skip is false"):
        list(notes_on_start(skip, replace(ours, skip=False), 16, 16))


def test_what_is_left_out_is_said() -> None:
    topk, jumprelu = saelab.load(REAL / "saelens_topk"), saelab.load(REAL / "saelens_jumprelu")
    budget = settings_for(topk, "saelens_topk")
    trained = settings_for(jumprelu, "saelens_jumprelu")
    (note,) = notes_on_start(topk, replace(budget, k=topk.k + 1), 16)
    assert note.endswith(f"saelens_topk: k is {topk.k + 1} here and {topk.k} in the checkpoint")
    (note,) = notes_on_start(jumprelu, budget, 16)
    assert note.endswith(f"its thresholds are left out; training has a budget (k {topk.k}) instead")
    (note,) = notes_on_start(topk, trained, 16)
    assert note.endswith(f"its k of {topk.k} is left out; training has thresholds instead of a budget")
    relu = saelab.load(REAL / "saelens_standard")
    (note,) = notes_on_start(relu, budget, 16)
    assert note.endswith(f"its thresholds are left out; training has a budget (k {topk.k}) instead")
    (note,) = notes_on_start(relu, trained, 16)
    assert note.endswith("has no thresholds above 0; those of training begin anew")
    grouped = replace(budget, allocation=AllocationSettings("group_max"))
    (note,) = notes_on_start(topk, grouped, 16)
    assert note.endswith("its allocation is topk, and here it is group_max")
    wrong = replace(trained, encoder=EncoderSettings(), sparsity=L1)
    with pytest.raises(SettingError, match=r"has thresholds, and encoder: linear .* use encoder: jumprelu"):
        list(notes_on_start(jumprelu, wrong, 16))


def test_thresholds_that_a_topk_lacks_are_fitted_as_for_new_weights() -> None:
    found, inputs = saelab.load(REAL / "saelens_topk"), input_map("scale", X)
    settings = settings_for(found, "saelens_jumprelu", k=5)
    start = start_from(found, settings, inputs(X), inputs)
    assert start.encode(inputs(X)).l0().double().mean() == pytest.approx(5, abs=0.1)


def test_a_topk_starts_a_gated_autoencoder_without_a_gate() -> None:
    found, inputs = saelab.load(REAL / "saelens_topk"), input_map("scale", X)
    start = start_from(found, settings_for(found, "saelens_gated"), inputs(X), inputs)
    assert start.b_mag is not None and torch.equal(start.b_mag, start.b_enc)


def test_rows_of_length_1_compute_the_same_or_are_refused() -> None:
    found, inputs = saelab.load(REAL / "saelens_jumprelu"), input_map("centre", X)
    with torch.no_grad():
        found.W_dec.mul_(torch.linspace(0.5, 2, 64)[:, None])
    start = start_from(found, replace(settings_for(found, "saelens_jumprelu"), unit_norm=True), inputs(X), inputs)
    torch.testing.assert_close(torch.linalg.vector_norm(start.W_dec, dim=1), torch.ones(64))
    assert distance(inputs.folded(start)(X), found(X)) < 1e-6
    budget = replace(settings_for(found, "saelens_topk", k=8), unit_norm=True)
    with pytest.raises(SettingError, match=r"have lengths from .*; with length 1 .* sae.unit_norm=false"):
        start_from(found, budget, inputs(X), inputs)
    with torch.no_grad():  # one common length changes no selection
        found.W_dec.div_(torch.linalg.vector_norm(found.W_dec, dim=1, keepdim=True) / 3)
    found.threshold, found.k = None, 8
    assert distance(inputs.folded(start_from(found, budget, inputs(X), inputs))(X), found(X)) < 1e-6


def test_bound_encoders_need_bound_rows() -> None:
    found, inputs = saelab.load(REAL / "saelens_topk"), input_map("scale", X)
    for name in ("tied", "aligned"):
        settings = settings_for(found, "saelens_topk", encoder=EncoderSettings(name))
        with pytest.raises(SettingError, match=f"not bound to its decoder rows as encoder: {name} keeps them"):
            start_from(found, settings, inputs(X), inputs)
        with torch.no_grad():
            found.W_enc.copy_(found.W_dec)
            if name == "aligned":
                found.W_enc.div_(found.W_dec.square().sum(1, keepdim=True))
        start = start_from(found, settings, inputs(X), inputs)
        assert start.tied == (name == "tied") and start.aligned == (name == "aligned")
        check_same(start, found, inputs, 1e-6)
        found = saelab.load(REAL / "saelens_topk")


def test_processes_that_share_the_features_have_their_rows() -> None:
    found, inputs = saelab.load(REAL / "saelens_jumprelu"), input_map("whiten", X)
    settings = settings_for(found, "saelens_jumprelu")
    whole = start_from(found, settings, inputs(X), inputs)

    def part(ranks: Ranks) -> list[Tensor]:
        own = start_from(found, settings, inputs(X), inputs, ranks=ranks)
        assert own.log_threshold is not None and torch.equal(own.b_dec, whole.b_dec)
        return [own.W_enc, own.W_dec, own.b_enc, own.log_threshold]

    parts = run_threads(part, features=3)
    tables = [whole.W_enc, whole.W_dec, whole.b_enc, whole.log_threshold]
    for rows, expected in zip(zip(*parts, strict=True), tables, strict=True):
        assert expected is not None and torch.equal(torch.cat(rows), expected)


def test_settings_without_an_effect_are_refused() -> None:
    with pytest.raises(SettingError, match="b_dec_init: has no effect with init_from"):
        SaeSettings(n_features=64, k=4, init_from="x", b_dec_init="zero")
    assert SaeSettings(init_from="~/x").init_from == str(Path.home() / "x")
