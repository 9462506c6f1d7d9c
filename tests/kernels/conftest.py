"""The back-end under test, forced as a user would force it."""

from collections.abc import Iterator

import pytest

from tests.kernels.problems import DEVICES


@pytest.fixture(params=list(DEVICES), scope="module")
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a back-end that can run here, with SAELAB_KERNELS set to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAELAB_KERNELS", request.param)
        yield request.param


@pytest.fixture(scope="module")
def device(backend: str) -> str:
    """The device of this back-end's tensors."""
    return DEVICES[backend]
