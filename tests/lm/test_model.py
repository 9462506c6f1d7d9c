"""Activations read from the Hugging Face modules are those of TransformerLens' bridge, on three architectures."""

import copy
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saelab.errors import SaelabError, SettingError
from saelab.lm import model as lm_module
from saelab.lm.load import load_language_model, model_shape, resolve_device
from saelab.lm.model import LanguageModel
from saelab.lm.settings import ModelSettings, dtype_name
from saelab.lm.sites import Site, hook
from tests.tiny import ADDS_IN_PLACE, CONTEXT, KINDS, language_model, model_folder, random_rows

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


GRADIENT_SITES = [
    "blocks.1.hook_resid_post",
    "blocks.1.hook_resid_pre",
    "blocks.1.attn.hook_z",
    "blocks.1.hook_mlp_out",
]


def summed_loss(lm: LanguageModel, logits: Tensor, rows: Tensor) -> Tensor:
    """The loss as papers define it, token by token."""
    ordinary, log_p = lm.ordinary(rows), logits.log_softmax(-1)
    scored = [
        (row, t)
        for row in range(rows.shape[0])
        for t in range(rows.shape[1] - 1)
        if ordinary[row, t] and ordinary[row, t + 1]
    ]
    assert scored
    return torch.stack([-log_p[row, t, rows[row, t + 1]] for row, t in scored]).sum()


def at_one_site(lm: LanguageModel, rows: Tensor, site: str) -> tuple[Tensor, Tensor]:
    values, gradients = lm.activations_and_gradients(rows, [site])
    assert set(values) == set(gradients) == {site}
    return values[site], gradients[site]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", GRADIENT_SITES)
def test_gradients_are_autograds_on_the_plain_model(kind: str, site: str) -> None:
    lm = language_model(kind)
    rows = random_rows(lm, 4)
    values, gradients = at_one_site(lm, rows, site)
    torch.testing.assert_close(values, lm.activations(rows, [site])[site], rtol=1e-5, atol=1e-5)

    plain = copy.deepcopy(lm.model).requires_grad_(True)  # nothing is frozen, so the graph has every layer
    kept: list[Tensor] = []

    def keep(value: Tensor) -> None:
        value.retain_grad()
        kept.append(value)

    point = lm.site(site)
    module = plain.get_submodule(point.module)
    if point.side == "hook_in":
        module.register_forward_pre_hook(
            lambda _, args, kwargs: keep(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    else:
        module.register_forward_hook(lambda _, __, out: keep(out[0] if isinstance(out, tuple) else out))
    summed_loss(lm, plain(input_ids=rows, use_cache=False).logits, rows).backward()
    expected = kept[0].grad
    assert expected is not None and expected.norm() > 1
    assert gradients.dtype == torch.float32
    torch.testing.assert_close(gradients, expected.reshape(gradients.shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [*KINDS, ADDS_IN_PLACE])
def test_a_sites_values_do_not_depend_on_which_other_sites_are_requested(kind: str) -> None:
    lm = language_model(kind)
    rows = random_rows(lm, 4)
    sites = ["blocks.0.hook_mlp_out", "blocks.0.hook_attn_out", "blocks.1.hook_resid_pre", "blocks.2.hook_resid_post"]
    values = lm.activations(rows, sites)
    for site in sites:
        assert torch.equal(values[site], lm.activations(rows, [site])[site])


@pytest.mark.parametrize("kind", [*KINDS, ADDS_IN_PLACE])
def test_a_sites_gradient_does_not_depend_on_which_other_sites_are_requested(kind: str) -> None:
    lm = language_model(kind)
    rows = random_rows(lm, 4)
    several = [
        "blocks.2.hook_resid_pre",  # out of order: the first in the model may be the last here
        "blocks.1.ln1.hook_in",  # the skip connection carries this tensor past the module, too
        "blocks.1.hook_resid_pre",
        "blocks.1.attn.hook_z",
        "blocks.1.hook_mlp_out",
        "blocks.1.hook_in",  # another name of the same site
        "blocks.1.hook_resid_post",
        "blocks.0.hook_resid_post",
    ]
    assert lm.site("blocks.1.hook_in") == lm.site("blocks.1.hook_resid_pre")
    values, gradients = lm.activations_and_gradients(rows, several)
    assert list(values) == list(gradients) == several
    for site in several:
        single = at_one_site(lm, rows, site)
        assert torch.equal(values[site], single[0])
        torch.testing.assert_close(values[site], lm.activations(rows, [site])[site])
        torch.testing.assert_close(gradients[site], single[1], rtol=1e-5, atol=1e-6)
        assert not values[site].requires_grad and not gradients[site].requires_grad
    # The modules that read the normalised branch are only some of those that read the residual stream.
    assert (gradients["blocks.1.ln1.hook_in"] - gradients["blocks.1.hook_resid_pre"]).norm() > 1
    torch.testing.assert_close(gradients["blocks.0.hook_resid_post"], gradients["blocks.1.hook_resid_pre"])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_differences_of_the_summed_loss(kind: str) -> None:
    tiny = language_model(kind)
    lm = LanguageModel(kind, copy.deepcopy(tiny.model).double(), tiny.tokenizer, tiny.sites, "")
    rows, site = random_rows(lm, 3), "blocks.1.hook_resid_post"
    step, tolerance = (1e-3, 1e-3) if kind == "llama" else (1e-5, 1e-5)  # Llama's norms are always in float32
    values, gradients = at_one_site(lm, rows, site)
    assert values.dtype == torch.float64
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        direction = torch.randn(values.shape, generator=generator, dtype=torch.float64)

        def loss(sign: float, direction: Tensor = direction) -> float:
            with hook(lm.model, lm.site(site), lambda x: x + sign * step * direction):
                return summed_loss(lm, lm.logits(rows), rows).item()

        slope = (loss(1) - loss(-1)) / (2 * step)
        expected = (gradients.double() * direction).sum().item()
        assert slope == pytest.approx(expected, abs=tolerance * gradients.norm().item())


def test_a_rows_gradients_depend_on_no_other_row_and_not_on_how_rows_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model("gpt2")
    rows, site = random_rows(lm, 7), "blocks.1.hook_resid_post"
    values, gradients = at_one_site(lm, rows, site)
    single = at_one_site(lm, rows[2:3], site)[1]
    torch.testing.assert_close(single, gradients[2:3], rtol=1e-4, atol=1e-5)
    forwards = []
    handle = lm.model.register_forward_hook(lambda *_: forwards.append(1))
    monkeypatch.setattr(lm_module, "LOGITS_AT_ONCE", 2 * CONTEXT * len(lm.unembedding))
    split = at_one_site(lm, rows, site)
    monkeypatch.setattr(lm_module, "LOGITS_AT_ONCE", 1)
    one_by_one = at_one_site(lm, rows, site)
    handle.remove()
    assert len(forwards) == 4 + 7
    for found in (split, one_by_one):
        torch.testing.assert_close(found[0], values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[1], gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_have_seen_the_tokens_that_follow_so_evaluation_does_not_use_them(kind: str) -> None:
    lm = language_model(kind)
    rows, site, position = random_rows(lm, 2), "blocks.1.hook_resid_post", 20
    other = rows.clone()
    other[:, position] = torch.where(rows[:, position] == 50, 51, 50)
    values, gradients = at_one_site(lm, rows, site)
    others, changed = at_one_site(lm, other, site)
    torch.testing.assert_close(values[:, :position], others[:, :position], rtol=1e-4, atol=1e-5)
    moved = (gradients - changed).abs().amax(-1)
    assert (moved[1, 1:position] > 1e-3).all()  # row 0 has a special token at 16; later tokens still matter
    assert moved[0, position - 1] > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_in_no_loss_and_the_last_position_has_no_gradient(kind: str) -> None:
    lm = language_model(kind)
    rows, site = random_rows(lm, 3), "blocks.2.hook_resid_post"  # the last: each position affects only its own logits
    scored = lm.scored(rows)
    assert scored.shape == rows.shape and not scored[:, 0].any() and not scored[:, -1].any()
    middle = CONTEXT // 2
    assert not scored[0, middle - 1 : middle + 1].any() and scored[0, middle + 1] and scored[1, middle]
    assert int(scored.sum()) == 3 * (CONTEXT - 2) - 2
    gradients = at_one_site(lm, rows, site)[1]
    assert torch.equal(gradients.abs().amax(-1) > 0, scored)
    earlier = at_one_site(lm, rows, "blocks.0.hook_resid_post")[1]
    assert (earlier[:, -1] == 0).all() and (earlier[:, 0] != 0).any()
    rows[0, 10:] = lm.tokenizer.eos_token_id
    cut_short = at_one_site(lm, rows, "blocks.0.hook_resid_post")[1]
    assert (cut_short[0, 9:] == 0).all() and (cut_short[0, 8] != 0).any()
    nothing = torch.full((2, 5), lm.tokenizer.bos_token_id)
    assert (at_one_site(lm, nothing, site)[1] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_touch_no_parameter_and_nothing_below_the_site(kind: str) -> None:
    lm = language_model(kind)
    below: list[bool] = []
    module = lm.model.get_submodule(lm.site("blocks.0.hook_out").module)
    handle = module.register_forward_hook(
        lambda _, __, out: below.append((out[0] if isinstance(out, tuple) else out).requires_grad)
    )
    with torch.no_grad():  # the caller's mode makes no difference
        values, gradients = at_one_site(lm, random_rows(lm, 2), "blocks.1.hook_resid_post")
    handle.remove()
    assert below == [False]
    assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())
    assert not values.requires_grad and not gradients.requires_grad


def test_gradients_of_a_bfloat16_model_are_float32_and_errors_name_the_site() -> None:
    tiny = language_model("llama")
    lm = LanguageModel("tiny", copy.deepcopy(tiny.model).bfloat16(), tiny.tokenizer, tiny.sites, "")
    rows, site = random_rows(lm, 2), "blocks.1.hook_resid_post"
    values, gradients = at_one_site(lm, rows, site)
    assert values.dtype == torch.bfloat16 and gradients.dtype == torch.float32
    wide = at_one_site(tiny, rows, site)[1]
    assert F.cosine_similarity(gradients.flatten(), wide.flatten(), dim=0) > 0.99
    with pytest.raises(SaelabError, match="holds token ids"):
        at_one_site(lm, rows, "embed.hook_in")
    with pytest.raises(SaelabError, match=r"Nearest: .*blocks\.1\.hook_resid_post"):
        at_one_site(lm, rows, "blocks.1.hook_residpost")
    module = lm.model.get_submodule(lm.site("blocks.2.hook_out").module)
    module.register_forward_hook(lambda _, __, out: out.detach() if isinstance(out, Tensor) else (out[0].detach(),))
    with pytest.raises(SaelabError, match=r"does not depend on blocks\.1\.hook_resid_post"):
        at_one_site(lm, rows, site)


def test_errors_name_the_nearest_options() -> None:
    lm = language_model("gpt2")
    with pytest.raises(SaelabError, match=r"no 'blocks.1.hook_residpost'. Nearest: .*blocks.1.hook_resid_post"):
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
