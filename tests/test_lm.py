"""Activations read from the Hugging Face modules are those of TransformerLens' bridge, on three architectures."""

import time
from pathlib import Path

import pytest
import torch

from saelab.errors import SaelabError
from saelab.lm import ModelSettings, load_language_model, resolve_device
from tests.tiny import CONTEXT, KINDS, language_model, model_folder, random_rows

SITES = [
    "blocks.0.hook_resid_pre",
    "blocks.1.hook_resid_post",
    "blocks.1.attn.hook_z",
    "blocks.2.hook_mlp_out",
    "blocks.2.hook_attn_out",
    "blocks.2.hook_resid_post",
]


@pytest.mark.parametrize("kind", KINDS)
def test_activations_equal_the_bridges_own_cache(kind: str) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    lm = language_model(kind)
    rows = random_rows(lm, 3)
    bridge = TransformerBridge.boot_transformers(str(model_folder(kind)), device="cpu", dtype=torch.float32)
    logits, cache = bridge.run_with_cache(rows)
    found = lm.activations(rows, SITES)
    assert set(found) == set(SITES)
    for site in SITES:
        torch.testing.assert_close(found[site], cache[site].reshape(3, CONTEXT, -1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lm.logits(rows), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_pass_stops_after_the_last_site(kind: str) -> None:
    lm = language_model(kind)
    ran = []
    last = lm.model.get_submodule(lm.site("blocks.2.hook_out").module)
    handle = last.register_forward_hook(lambda *_: ran.append(1))
    lm.activations(random_rows(lm, 1), ["blocks.1.hook_resid_post", "blocks.0.hook_resid_post"])
    assert not ran
    lm.logits(random_rows(lm, 1))
    handle.remove()
    assert ran
    assert lm.width("blocks.1.hook_resid_post") == 32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "site", ["blocks.1.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.1.hook_mlp_out"]
)
def test_splicing_in_the_same_activations_changes_nothing(kind: str, site: str) -> None:
    lm = language_model(kind)
    rows = random_rows(lm, 3)
    assert torch.equal(lm.spliced_logits(rows, site, lambda x: x), lm.logits(rows))
    assert not torch.equal(lm.spliced_logits(rows, site, torch.zeros_like), lm.logits(rows))


@pytest.mark.parametrize("kind", KINDS)
def test_bos_and_other_special_positions_stay_clean_in_a_splice(kind: str) -> None:
    lm = language_model(kind)
    rows = random_rows(lm, 6)
    ordinary = lm.ordinary(rows)
    assert not ordinary[:, 0].any() and not ordinary[::3, CONTEXT // 2].any()
    site, seen = "blocks.1.hook_resid_post", []

    def ruin(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return torch.full_like(x, 7.0)

    clean = lm.activations(rows, [site])[site]
    after: dict[str, torch.Tensor] = {}
    with (
        lm._hook(lm.site(site), ruin_at(ordinary, ruin)),
        lm._hook(lm.site("blocks.2.hook_resid_pre"), lambda x: after.update(x=x)),
    ):
        lm.logits(rows)
    assert torch.equal(after["x"][~ordinary], clean[~ordinary])
    lm.spliced_logits(rows, site, ruin)
    assert seen == [int(ordinary.sum())] * 2
    # at BOS nothing earlier can differ, so its logits are the clean ones to the last bit
    assert torch.equal(lm.spliced_logits(rows, site, ruin)[:, 0], lm.logits(rows)[:, 0])


def ruin_at(ordinary: torch.Tensor, ruin):
    def splice(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[ordinary] = ruin(value[ordinary])
        return value

    return splice


def test_errors_name_what_is_near() -> None:
    lm = language_model("gpt2")
    with pytest.raises(SaelabError, match=r"no 'blocks.1.hook_residpost'. Nearest: .*blocks.1.hook_resid_post"):
        lm.site("blocks.1.hook_residpost")
    with pytest.raises(SaelabError, match="takes at most 64 tokens"):
        lm.logits(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(SaelabError, match="device"):
        resolve_device("cuda:99")
    with pytest.raises(SaelabError, match="device"):
        resolve_device("tpu-ish")
    with pytest.raises(SaelabError, match="dtype"):
        ModelSettings(dtype="int8")


def test_a_model_that_cannot_be_had_is_one_message_within_five_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SaelabError, match=r"no config\.json"):
        load_language_model(ModelSettings(str(tmp_path)))
    with pytest.raises(SaelabError, match="there is no folder"):
        load_language_model(ModelSettings(str(tmp_path / "nowhere")))
    begin = time.monotonic()
    with pytest.raises(SaelabError, match="HF_HUB_OFFLINE is set"):
        load_language_model(ModelSettings("some/model"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SaelabError, match=r"the Hub cannot be reached .*hf download some/model"):
        load_language_model(ModelSettings("some/model"))
    assert time.monotonic() - begin < 5
