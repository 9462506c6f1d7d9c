"""The files of a training's state: what is damaged is not loaded."""

import json
from pathlib import Path

import pytest
import torch

from saelab.errors import SaelabError
from saelab.training.state import VALUES, load_state, save_state

STATE = {"steps": 3, "rate": 0.1, "curve": (1.5, 2.0), "nested": {"moments": torch.arange(4.0), "none": None}}


def test_a_number_that_is_changed_is_found(tmp_path: Path) -> None:
    save_state(tmp_path, STATE)
    loaded = load_state(tmp_path)
    assert loaded["steps"] == 3 and loaded["nested"]["moments"].tolist() == [0, 1, 2, 3]
    content = json.loads((tmp_path / VALUES).read_text())
    for value in (4, "3", None, [3]):
        (tmp_path / VALUES).write_text(json.dumps(content | {"state": content["state"] | {"steps": value}}))
        with pytest.raises(SaelabError, match=r"does not match its checksum.*; delete this folder to go on"):
            load_state(tmp_path)
    (tmp_path / VALUES).write_text(json.dumps({"format": content["format"], "state": content["state"]}))
    with pytest.raises(SaelabError, match="cannot be read"):
        load_state(tmp_path)


def test_only_the_rows_that_a_process_asks_for_are_loaded(tmp_path: Path) -> None:
    weights, scalar = torch.rand(6, 2), torch.tensor(3.0)
    save_state(tmp_path, {"sae": {"W_enc": weights, "b_dec": weights[0]}, "step": scalar, "rng": weights})
    loaded = load_state(tmp_path, own=lambda name, rows: slice(2, 5) if name == "sae/W_enc" else slice(rows))
    assert torch.equal(loaded["sae"]["W_enc"], weights[2:5]) and torch.equal(loaded["sae"]["b_dec"], weights[0])
    assert loaded["step"] == 3 and torch.equal(loaded["rng"], weights)
