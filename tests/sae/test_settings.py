"""Settings of an autoencoder that cannot be are refused, by name."""

import pytest

from saelab.errors import SettingError
from saelab.sae.settings import AffinitySettings, AllocationSettings, AuxSettings, SaeSettings


@pytest.mark.parametrize(
    ("cls", "setting", "message"),
    [
        (SaeSettings, {"k": 0}, "k: 0"),
        (SaeSettings, {"k": 9, "n_features": 8}, "k: 9"),
        (SaeSettings, {"n_features": 0}, "n_features: 0"),
        (SaeSettings, {"selection": "int8"}, "selection: 'int8' is not float32 or bfloat16"),
        (AffinitySettings, {"beta": -1.0}, "beta: -1"),
        (AffinitySettings, {"name": "grad"}, "name: 'grad' is not activation or gradient"),
        (AllocationSettings, {"name": "batch"}, "name: 'batch' is not token_choice, mutual_choice or feature_choice"),
        (AllocationSettings, {"exponent": 1.0}, "exponent: .*both"),
        (AllocationSettings, {"after": 1.5}, "after: 1.5"),
        (AuxSettings, {"name": "ghost"}, "name: 'ghost'"),
        (AuxSettings, {"coefficient": float("nan")}, "coefficient: nan"),
        (AuxSettings, {"share": 0.0}, "share: 0"),
    ],
)
def test_impossible_settings_name_their_field(cls: type, setting: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        cls(**setting)


def test_the_gradient_weighs_only_where_the_affinity_asks_for_it() -> None:
    assert SaeSettings(affinity=AffinitySettings("activation", 3.0)).beta == 0
    assert SaeSettings(affinity=AffinitySettings("gradient", 3.0)).beta == 3
