"""Impossible settings of an autoencoder are refused by name."""

import pytest

from saelab.errors import SettingError
from saelab.sae.settings import (
    AffinitySettings,
    AllocationSettings,
    AuxSettings,
    EncoderSettings,
    SaeSettings,
    SparsitySettings,
)


@pytest.mark.parametrize(
    ("cls", "setting", "message"),
    [
        (SaeSettings, {"k": 0}, "k: 0"),
        (SaeSettings, {"k": 9, "n_features": 8}, "k: 9"),
        (SaeSettings, {"n_features": 0}, "n_features: 0"),
        (SaeSettings, {"selection": "int8"}, "selection: 'int8' is not float32 or bfloat16"),
        (AffinitySettings, {"beta": -1.0}, "beta: -1"),
        (AffinitySettings, {"name": "grad"}, "name: 'grad' is not activation, gradient or cosine"),
        (
            AllocationSettings,
            {"name": "batch"},
            "'batch' is not token_choice, mutual_choice, feature_choice, group_max or ",
        ),
        (AllocationSettings, {"exponent": 1.0}, "exponent: .*both"),
        (AllocationSettings, {"after": 1.5}, "after: 1.5"),
        (AuxSettings, {"name": "ghost"}, "name: 'ghost'"),
        (AuxSettings, {"coefficient": float("nan")}, "coefficient: nan"),
        (AuxSettings, {"share": 0.0}, "share: 0"),
        (EncoderSettings, {"name": "gate"}, "name: 'gate' is not linear, jumprelu, gated, tied or aligned"),
        (EncoderSettings, {"bandwidth": 0.0}, "bandwidth: 0"),
        (EncoderSettings, {"threshold": -1.0}, "threshold: -1"),
        (SparsitySettings, {"name": "l2"}, "name: 'l2' is not none, l1, lp, tanh or l0"),
        (SparsitySettings, {"p": 1.5}, "p: 1.5"),
        (SparsitySettings, {"slope": 0.0}, "slope: 0"),
        (SaeSettings, {"prefixes": (0.5, 3.5)}, "prefixes: .0.5, 3.5. are not numbers of features"),
        (SaeSettings, {"prefixes": (64, 16)}, "prefixes: 64, 16 of 4096 features: each must be larger"),
        (
            SaeSettings,
            {"prefixes": (0.00001, 16)},
            "prefixes: 0, 16 of 4096 .*, at least 1",
        ),
        (SaeSettings, {"prefixes": (5000,)}, "prefixes: 5000 of 4096 features: .* below n_features"),
        (SaeSettings, {"allocation": AllocationSettings("group_max"), "k": 30}, "4096 cannot .* 30 .* to 4110"),
        (SaeSettings, {"allocation": AllocationSettings("group_max"), "k_start": 64}, "k_start: allocation: group_max"),
        (
            SaeSettings,
            {"allocation": AllocationSettings("group_max"), "n_features": 96, "multi_topk": True},
            "96 cannot .* 128 equal groups .4 k, of multi_topk",
        ),
        (SparsitySettings, {"target_l0": 0.0}, "target_l0: 0"),
        (SparsitySettings, {"warmup": 2.0}, "warmup: 2"),
        (SaeSettings, {"freeze": "both"}, "freeze: 'both' is not none, decoder or encoder"),
    ],
)
def test_impossible_settings_name_their_field(cls: type, setting: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        cls(**setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"encoder": EncoderSettings("jumprelu")}, "encoder: jumprelu .* allocation: threshold"),
        ({"encoder": EncoderSettings("gated")}, "encoder: gated .* allocation: threshold"),
        ({"encoder": EncoderSettings("tied"), "freeze": "decoder"}, "freeze: decoder: encoder: tied has one table"),
        ({"encoder": EncoderSettings("aligned"), "freeze": "encoder"}, "freeze: encoder: aligned"),
        ({"aux": AuxSettings(lift=True), "freeze": "encoder"}, "aux: lift raises the encoder's biases"),
        ({"sparsity": SparsitySettings("l0")}, "sparsity: l0 .* jumprelu"),
        ({"sparsity": SparsitySettings("none")}, "sparsity: .*no budget"),
        ({"affinity": AffinitySettings("gradient")}, "affinity: gradient goes with a budget"),
        ({"multi_topk": True}, "multi_topk: goes with a budget"),
        ({"selection": "bfloat16"}, "selection: .*float32"),
    ],
)
def test_methods_that_do_not_combine_are_refused(setting: dict, message: str) -> None:
    allocation = "token_choice" if "encoder" in setting else "threshold"
    given = {"allocation": AllocationSettings(allocation), "sparsity": SparsitySettings("l1")} | setting
    with pytest.raises(SettingError, match=message):
        SaeSettings(**given)


def test_prefixes_are_numbers_or_shares_and_end_with_the_whole() -> None:
    found = [SaeSettings(64, 4, prefixes=sizes).prefix_sizes for sizes in ((), (64.0,), (0.25, 32), (2, 16, 64))]
    assert found == [(64,), (64,), (16, 32, 64), (2, 16, 64)]


def test_beta_is_zero_unless_the_affinity_is_gradient() -> None:
    assert SaeSettings(affinity=AffinitySettings("activation", 3.0)).beta == 0
    assert SaeSettings(affinity=AffinitySettings("gradient", 3.0)).beta == 3
