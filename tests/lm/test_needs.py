"""What is said of a model without its weights is what the real one has and needs."""

import pytest
import torch

from saelab.errors import SaelabError
from saelab.lm.load import outlined_language_model
from saelab.lm.model import LanguageModel
from saelab.lm.needs import Uncountable, pass_bytes, site_widths, weights_needs
from saelab.lm.settings import ModelSettings
from saelab.memory import peak_bytes
from tests.tiny import CONTEXT, KINDS, NEEDS_NUMBERS, language_model, model_folder, random_rows

SITES = ["blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_pass_counted_without_numbers_holds_what_the_real_one_holds(kind: str, gradients: bool) -> None:
    def held(lm: LanguageModel, rows: torch.Tensor) -> int:
        return peak_bytes(
            lambda: lm.activations_and_gradients(rows, SITES) if gradients else lm.activations(rows, SITES)
        )

    real = language_model(kind)
    measured, widths = held(real, random_rows(real, 6)), {site: real.width(site) for site in SITES}
    with outlined_language_model(ModelSettings(str(model_folder(kind)))) as lm:
        counted = pass_bytes(lm, 6, CONTEXT, SITES, gradients=gradients)
        assert site_widths(lm, SITES) == widths
    assert counted == measured > 2 * 4 * 6 * CONTEXT * 32


def test_weights_are_loaded_through_memory_onto_a_gpu() -> None:
    real = language_model("gpt2")
    held = sum(tensor.nbytes for tensor in [*real.model.parameters(), *real.model.buffers()])
    settings = ModelSettings(str(model_folder("gpt2")))
    with outlined_language_model(settings) as lm:
        assert [(need.where, need.bytes) for need in weights_needs(lm, settings, "memory")] == [("memory", held)]
        places = [(need.where, need.bytes) for need in weights_needs(lm, settings, "gpu")]
        assert places == [("gpu", held), ("memory", held)]


def test_a_model_whose_code_needs_numbers_is_told_from_one_that_is_wrong(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A mixture of experts in float32: its product of groups has no outline in torch."""
    with outlined_language_model(ModelSettings(str(model_folder(NEEDS_NUMBERS)))) as lm:
        assert site_widths(lm, ["blocks.0.hook_resid_pre"]) == {"blocks.0.hook_resid_pre": 32}
        with pytest.raises(Uncountable, match="does not run without its weights"):
            pass_bytes(lm, 2, CONTEXT, ["blocks.0.hook_resid_post"])
        with pytest.raises(SaelabError, match="Nearest") as error:
            site_widths(lm, ["blocks.0.hook_resid_poss"])
        assert not isinstance(error.value, Uncountable)
    assert "Traceback" not in capfd.readouterr().err
