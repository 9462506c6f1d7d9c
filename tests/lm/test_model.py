"""Activations read from the Hugging Face modules are those of TransformerLens' bridge, on three architectures."""

import copy
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from saelab.errors import SaelabError, SettingError
from saelab.lm.load import load_language_model, model_shape, resolve_device
from saelab.lm.model import LanguageModel
from saelab.lm.settings import ModelSettings, dtype_name
from saelab.lm.sites import Site, hook
from tests.lm.test_gradients import GRADIENT_SITES, at_one_site
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
    with hook(lm.model, lm.site("blocks.2.hook_resid_pre"), lambda x: after.update(x=x)):
        logits = lm.spliced_logits(rows, site, ruin)
    assert torch.equal(after["x"][~ordinary], clean[~ordinary]) and (after["x"][ordinary] == 7).all()
    assert seen == [int(ordinary.sum())]
    # Nothing before BOS can differ, so its logits are the clean ones to the last bit.
    assert torch.equal(logits[:, 0], lm.logits(rows)[:, 0])


class Layouts(nn.Module):
    """A language model without layers; each of its modules lays out one vector per token in another way."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(max_position_embeddings=CONTEXT)
        self.embed, self.unembed = nn.Embedding(vocabulary, 12), nn.Linear(12, vocabulary, bias=False)
        self.plain, self.heads, self.heads_first, self.one_list, self.turned = (nn.Identity() for _ in range(5))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.unembed

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        n, positions = input_ids.shape
        x = self.plain(self.embed(input_ids))
        x = self.heads(x.view(n, positions, 3, 4))
        x = self.heads_first(x.transpose(1, 2)).transpose(1, 2)
        x = self.one_list(x.reshape(n * positions, 12))
        x = self.turned(x.view(n, positions, 12).transpose(0, 1)).transpose(0, 1)
        return SimpleNamespace(logits=self.unembed(x))


@pytest.mark.parametrize("site", ["plain", "heads", "heads_first", "one_list", "turned"])
@pytest.mark.parametrize("context", [3, 4, CONTEXT])  # 3 and 4 are also the number of heads and their width
def test_every_layout_is_one_vector_per_token_and_is_put_back(site: str, context: int) -> None:
    tokenizer = language_model("gpt2").tokenizer
    model = Layouts(len(tokenizer))
    lm = LanguageModel("layouts", model, tokenizer, {name: Site(name, "hook_out") for name in ("plain", site)}, "")
    rows = random_rows(lm, 3, context)
    x = lm.model.embed(rows)
    assert torch.equal(lm.activations(rows, [site])[site], x) and lm.width(site) == 12
    values, gradients = lm.activations_and_gradients(rows, ["plain", site])
    assert torch.equal(values[site], x) and gradients[site].norm() > 0
    torch.testing.assert_close(gradients[site], gradients["plain"])
    changed = torch.where(lm.ordinary(rows)[..., None], x * torch.arange(12.0), x)
    spliced = lm.spliced_logits(rows, site, lambda flat: flat * torch.arange(12.0))
    torch.testing.assert_close(spliced, lm.model.unembed(changed))


def test_a_value_of_another_shape_than_at_first_is_an_error_that_shows_both_shapes() -> None:
    lm = LanguageModel(
        "layouts",
        Layouts(len(language_model("gpt2").tokenizer)),
        language_model("gpt2").tokenizer,
        {"plain": Site("plain", "hook_out")},
        "",
    )
    lm.width("plain")
    lm.model.plain.forward = lambda x: x.flatten(1)[:, :-1]
    with pytest.raises(SaelabError, match=r"plain of layouts has shape \[3, 383\] for rows of shape \[3, 32\]"):
        lm.activations(random_rows(lm, 3), ["plain"])


def test_errors_name_the_nearest_options() -> None:
    lm = language_model("gpt2")
    with pytest.raises(SaelabError, match=r"no site 'blocks.1.hook_residpost'. Nearest: .*blocks.1.hook_resid_post"):
        lm.site("blocks.1.hook_residpost")
    with pytest.raises(SaelabError, match="takes at most 64 tokens"):
        lm.logits(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(SaelabError, match="device: torch finds no cuda:99"):
        resolve_device("cuda:99")
    with pytest.raises(SaelabError, match="device: 'tpu-ish' is not auto, cpu, cuda or cuda:N"):
        resolve_device("tpu-ish")
    with pytest.raises(SaelabError, match="dtype: 'int8' is not float32"):
        ModelSettings(dtype="int8")
    with pytest.raises(SaelabError, match="device_map: 'all' is not auto"):
        ModelSettings(device_map="all")


def test_dtypes_have_a_short_and_a_long_name() -> None:
    for short, long in (("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")):
        assert dtype_name(short) == dtype_name(long) == ModelSettings(dtype=short).dtype == long
        assert ModelSettings(dtype=short) == ModelSettings(dtype=long)
    for other in ("float64", "half", "torch.float32", ""):
        with pytest.raises(SettingError, match=r"^dtype: "):
            dtype_name(other)


@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential"])
def test_a_device_map_changes_no_value_and_chooses_the_devices(device_map: str) -> None:
    name = str(model_folder("llama"))
    settings = ModelSettings(name, device_map=device_map)
    lm, plain = load_language_model(settings), load_language_model(ModelSettings(name))
    rows, site = random_rows(lm, 3), "blocks.1.hook_resid_post"
    assert lm.device == plain.device and lm.fingerprint == plain.fingerprint
    assert torch.equal(lm.logits(rows), plain.logits(rows))
    values, gradients = at_one_site(lm, rows, site)
    expected = at_one_site(plain, rows, site)
    assert torch.equal(values, expected[0]) and torch.equal(gradients, expected[1])
    with pytest.raises(SaelabError, match="device: cpu cannot be combined with"):
        load_language_model(settings, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_layers_on_several_devices_give_values_on_the_first() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    plain = language_model("llama")
    model = copy.deepcopy(plain.model).cuda()
    for layer in (1, 2):  # as accelerate spreads layers, with the CPU in place of a second GPU
        module = model.get_submodule(plain.site(f"blocks.{layer}.hook_out").module).cpu()
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    for module in (model.model.norm, model.lm_head):
        add_hook_to_module(module, AlignDevicesHook("cuda:0"))
    lm = LanguageModel("spread", model, plain.tokenizer, plain.sites, "")
    rows = random_rows(lm, 3)
    found, expected = (m.activations_and_gradients(rows, GRADIENT_SITES) for m in (lm, plain))
    for site in GRADIENT_SITES:
        assert lm.activations(rows, [site])[site].device == lm.device
        for i in (0, 1):
            assert found[i][site].device == lm.device
            torch.testing.assert_close(found[i][site].cpu(), expected[i][site], rtol=1e-3, atol=1e-3)
        spliced = lm.spliced_logits(rows, site, lambda x: x.neg())
        torch.testing.assert_close(
            spliced.cpu(), plain.spliced_logits(rows, site, lambda x: x.neg()), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("name", ["demo", *KINDS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_shape_of_a_model_does_not_need_its_weights(name: str, dtype: str, tmp_path: Path) -> None:
    settings = ModelSettings("demo" if name == "demo" else str(model_folder(name)), dtype)
    lm = load_language_model(settings, "cpu")
    if name != "demo":
        shutil.copytree(settings.name, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
        settings = ModelSettings(str(tmp_path / name), dtype)
    sites = ["blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "blocks.0.mlp.hook_in"]
    shape = model_shape(settings, sites)
    parameters = list(lm.model.parameters())
    assert shape.parameters == sum(p.numel() for p in parameters)
    assert shape.bytes == sum(t.nbytes for t in [*parameters, *lm.model.buffers()])
    assert (shape.vocabulary, shape.hidden) == lm.unembedding.shape
    assert shape.layers == len([site for site in lm.sites if site.endswith(".hook_resid_post")])
    assert shape.widths == {site: lm.width(site) for site in sites}
    assert shape == lm.shape(sites)
    with pytest.raises(SaelabError, match=r"Nearest: .*blocks\.1\.hook_resid_post"):
        model_shape(settings, ["blocks.1.hook_residpost"])


def test_a_cached_hub_model_has_a_shape_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0" * 40
    cached = tmp_path / "models--some--model"
    shutil.copytree(model_folder("gpt2"), cached / "snapshots" / commit, ignore=shutil.ignore_patterns("*.safetensors"))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    expected = model_shape(ModelSettings(str(model_folder("gpt2"))), ["blocks.1.hook_resid_post"])
    assert model_shape(ModelSettings("some/model"), ["blocks.1.hook_resid_post"]) == expected
    with pytest.raises(SaelabError, match="HF_HUB_OFFLINE is set"):  # its weights are not in the cache
        load_language_model(ModelSettings("some/model"))


def test_a_model_that_cannot_be_loaded_is_one_message_within_five_seconds(
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
