"""A recursive attribution is complete at every level, and each contribution is the formula's."""

import json

import pytest
import torch

from saelab.analysis.attention.circuit import open_circuit, parts
from saelab.analysis.attention.tree import Node, attribution_tree, grow
from saelab.errors import SaelabError
from saelab.sae.model import SparseAutoencoder
from tests.analysis.attention.made import RESID, Z, active_feature, autoencoder, double_model, ids_of, lm_of
from tests.tiny import KINDS

POSITION = 9


def autoencoders(kind: str, stream: bool) -> dict[str, SparseAutoencoder]:
    lm = double_model(kind)
    sites = [f"blocks.{layer}.attn.hook_z" for layer in range(3)]
    sites += ["blocks.0.hook_resid_post", RESID] if stream else []
    return {site: autoencoder(lm, site, seed=n) for n, site in enumerate(sites)}


def kinds(node: Node) -> set[str]:
    return {each.kind for _, each in node.walk()}


@pytest.mark.parametrize("stream", [True, False], ids=["with stream", "without"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_level_adds_up(kind: str, stream: bool) -> None:
    lm, saes = double_model(kind), autoencoders(kind, stream)
    ids = ids_of(lm)
    feature = active_feature(saes[Z], lm, ids, POSITION)
    circuit = open_circuit(lm, saes)
    prompt = circuit.read(ids)
    tree = grow(circuit, prompt, 2, feature, POSITION, depth=3, branches=3, least=0.0)
    x = lm.activations(ids[None], [Z])[Z][0, POSITION]
    expected = float((x - saes[Z].b_dec.double()) @ saes[Z].W_enc[feature].double() + saes[Z].b_enc[feature])
    assert tree.contribution == tree.activation == pytest.approx(expected, abs=1e-9)
    assert tree.gap() < 1e-9
    found = kinds(tree)
    assert {"source", "attention feature", "error", "bias", "rest", "mlp"} <= found
    assert ("stream feature" in found) == stream
    layers = {node.layer for _, node in tree.walk() if node.kind == "attention feature" and node.children}
    assert layers >= {1, 2}
    rounding = max(abs(node.contribution) for _, node in tree.walk() if node.kind == "rounding")
    assert rounding < 1e-4  # no part of the model is hidden in it
    shallow = grow(circuit, prompt, 2, feature, POSITION, depth=1, branches=10**6, least=0.0)
    assert shallow.gap() < 1e-9 and "rest" not in kinds(shallow)
    assert all(not node.children for _, node in shallow.walk() if node.feature is not None and node is not shallow)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lower_feature_adds_its_decoder_row_through_the_output_to_a_stream_feature(kind: str) -> None:
    lm, saes = double_model(kind), autoencoders(kind, stream=True)
    ids = ids_of(lm)
    feature = active_feature(saes[Z], lm, ids, POSITION)
    tree = attribution_tree(saes, lm, ids, 2, feature, POSITION, depth=2, branches=40, least=0.0)
    o = lm.model.get_submodule(lm.sites["blocks.1.attn.hook_z"].module)
    zero = torch.zeros(32, dtype=torch.float64)
    seen = 0
    for _, parent in tree.walk():
        for child in parent.children:
            if parent.kind == "stream feature" and child.kind == "attention feature" and child.layer == 1:
                assert child.activation is not None and child.feature is not None and parent.feature is not None
                row = saes["blocks.1.attn.hook_z"].W_dec[child.feature].double()
                reader = saes[RESID].W_enc[parent.feature].double()
                expected = child.activation * (o(row) - o(zero)) @ reader
                assert child.contribution == pytest.approx(float(expected), abs=1e-9)
                seen += 1
    assert seen > 20


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_are_the_residual_stream_and_special_tokens_have_no_features(kind: str) -> None:
    lm = double_model(kind)
    circuit = open_circuit(lm, autoencoders(kind, stream=False))
    prompt = circuit.read(ids_of(lm))
    for position in (0, 5):
        found = parts(circuit, prompt, 2, position)
        total = sum((part.vector for part in found), torch.zeros(32, dtype=torch.float64))
        torch.testing.assert_close(total, prompt.values[RESID][position], rtol=0, atol=1e-9)
        assert ("attention feature" in {part.kind for part in found}) == (position > 0)


def test_a_tree_as_dictionary_frame_and_page() -> None:
    lm, saes = lm_of("gpt2"), autoencoders("gpt2", stream=True)
    tree = attribution_tree(saes, lm, ids_of(lm), 2, 4, POSITION)
    assert tree.gap() < 1e-9  # in float32 too: roundings are leaves
    text = json.loads(json.dumps(tree.to_dict()))
    assert text["kind"] == "attention feature" and text["feature"] == 4 and text["children"]
    frame = tree.to_frame()
    assert len(frame) == len(list(tree.walk())) and set(frame["depth"]) == {0, 1, 2, 3}
    page = tree._repr_html_()
    assert page.count("<summary>") == sum(bool(node.children) for _, node in tree.walk())
    assert "attention feature 4 of layer 2 at 9" in page and page.count(" open>") == 1
    assert frame["feature"][0] == 4 and str(frame["feature"].dtype) == "Int64"


def test_what_has_no_tree_is_an_error() -> None:
    lm, saes = lm_of("gpt2"), autoencoders("gpt2", stream=True)
    with pytest.raises(SaelabError, match="none of the autoencoders is of blocks"):
        open_circuit(lm, {RESID: saes[RESID]})
    with pytest.raises(SaelabError, match="hook_mlp_out is neither"):
        open_circuit(lm, {"blocks.1.hook_mlp_out": saes[RESID]})
    circuit = open_circuit(lm, {Z: saes[Z]})
    prompt = circuit.read(ids_of(lm))
    with pytest.raises(SaelabError, match=r"no autoencoder of layer 1: choose \[2\]"):
        grow(circuit, prompt, 1, 0, POSITION)
    with pytest.raises(SaelabError, match="depth 0 and branches 4 must be positive"):
        grow(circuit, prompt, 2, 0, POSITION, depth=0)
    names = dict(lm.sites) | {"blocks.1.hook_mlp_out": lm.sites["blocks.1.hook_attn_out"]}
    other = type(lm)("scaled", lm.model, lm.tokenizer, names, "")
    with pytest.raises(SaelabError, match="the residual stream of scaled is not the sum"):
        open_circuit(other, {Z: saes[Z]}).read(ids_of(lm))
