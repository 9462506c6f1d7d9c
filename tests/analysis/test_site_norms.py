"""Shares of sites in the rows of a crosscoder equal their definition, whatever the scales of the sites."""

from typing import Any

import numpy as np
import pytest
import torch

from saelab.analysis.result import rebuilt, stored, with_arrays
from saelab.analysis.site_norms import SiteNorms, site_norms
from saelab.errors import SaelabError
from saelab.sae.model import SparseAutoencoder


def crosscoder() -> SparseAutoencoder:
    """Rows at the first site alone, at the second alone, twice as long at the first, and none."""
    sae = SparseAutoencoder(5, 4, 2, {"hook_names": ["a", "<b>"], "saelab": {"input_scale": [0.5, 10.0]}})
    sae.site_widths = (3, 2)
    rows = torch.tensor([[3.0, 4, 0, 0, 0], [0, 0, 0, 0, 1], [0, 4, 0, 0, 0.1], [0] * 5])
    sae.W_dec.data.copy_(rows)
    return sae


def test_shares_and_figures() -> None:
    found = site_norms(crosscoder())
    np.testing.assert_allclose(found.shares, [[1, 0], [0, 1], [2 / 3, 1 / 3], [0, 0]], atol=1e-6)
    figures = found.figures()
    assert figures["features of a alone (share above 0.9)"] == figures["features of <b> alone (share above 0.9)"] == 1
    lines: Any = found.plot().data
    assert [(line.name, sum(line.y)) for line in lines] == [("a", 4), ("<b>", 4)]
    assert "&lt;b&gt;" in found._repr_html_()
    plain, arrays = stored(found)
    np.testing.assert_array_equal(rebuilt(SiteNorms, with_arrays(plain, arrays)).shares, found.shares)


def test_an_autoencoder_of_one_site_is_refused() -> None:
    with pytest.raises(SaelabError, match="takes a crosscoder"):
        site_norms(SparseAutoencoder(5, 4, 2))
