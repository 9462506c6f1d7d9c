"""How torchrun's processes are arranged; tests/runs/test_torchrun.py connects real ones."""

import pytest

from saelab.errors import SaelabError
from saelab.ranks import ALONE
from saelab.training.distributed import connected, mesh_shape
from saelab.training.settings import ParallelSettings


def test_processes_that_no_setting_names_share_the_tokens() -> None:
    assert mesh_shape(ParallelSettings(), 1) == (1, 1)
    assert mesh_shape(ParallelSettings(), 6) == (6, 1)
    assert mesh_shape(ParallelSettings(features=3), 6) == (2, 3)
    assert mesh_shape(ParallelSettings(data=2, features=3), 6) == (2, 3)


@pytest.mark.parametrize(
    ("settings", "world", "message"),
    [
        (ParallelSettings(features=2), 1, "times features 2 is 2 processes, and there is 1 process; start `torchrun"),
        (ParallelSettings(data=2), 1, "data 2 times features 1 is 2 processes"),
        (ParallelSettings(features=2), 5, "data 2 times features 2 is 4 processes, and torchrun started 5"),
        (ParallelSettings(features=4), 2, "data 1 times features 4 is 4 processes, and torchrun started 2"),
    ],
)
def test_a_mesh_of_another_number_of_processes_is_an_error(
    settings: ParallelSettings, world: int, message: str
) -> None:
    with pytest.raises(SaelabError, match=message):
        mesh_shape(settings, world)


def test_without_torchrun_nothing_is_connected() -> None:
    with connected(ParallelSettings()) as ranks:
        assert ranks is ALONE
