"""The back-end under test, forced as a user would force it."""

from collections.abc import Iterator

import pytest

from tests.kernels.problems import DEVICES


@pytest.fixture(params=list(DEVICES), scope="module")
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a back-end that can run here; SAELAB_KERNELS is set to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAELAB_KERNELS", request.param)
        yield request.param


@pytest.fixture(scope="module")
def device(backend: str) -> str:
    """Where the tensors of this back-end are."""
    return DEVICES[backend]
