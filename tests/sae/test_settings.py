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
        (AffinitySettings, {"name": "grad"}, "name: 'grad' is not activation or gradient"),
        (AllocationSettings, {"name": "batch"}, "'batch' is not token_choice, mutual_choice, feature_choice or thres"),
        (AllocationSettings, {"exponent": 1.0}, "exponent: .*both"),
        (AllocationSettings, {"after": 1.5}, "after: 1.5"),
        (AuxSettings, {"name": "ghost"}, "name: 'ghost'"),
        (AuxSettings, {"coefficient": float("nan")}, "coefficient: nan"),
        (AuxSettings, {"share": 0.0}, "share: 0"),
        (EncoderSettings, {"name": "gated"}, "name: 'gated' is not linear or jumprelu"),
        (EncoderSettings, {"bandwidth": 0.0}, "bandwidth: 0"),
        (EncoderSettings, {"threshold": -1.0}, "threshold: -1"),
        (SparsitySettings, {"name": "l2"}, "name: 'l2' is not none, l1 or l0"),
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


def test_beta_is_zero_unless_the_affinity_is_gradient() -> None:
    assert SaeSettings(affinity=AffinitySettings("activation", 3.0)).beta == 0
    assert SaeSettings(affinity=AffinitySettings("gradient", 3.0)).beta == 3
