"""What evaluations are said to need bounds the tensors that are alive in them."""

from saelab.analysis.fidelity import Evaluation, results
from saelab.analysis.needs import evaluation_needs
from saelab.analysis.settings import EvalSettings
from saelab.encoded import Reader, read_all
from saelab.memory import fullest, peak_bytes
from saelab.sae.new import new_autoencoder
from saelab.sae.settings import SaeSettings
from tests.tiny import CONTEXT, language_model, random_rows

SITE = "blocks.1.hook_resid_post"


def test_what_evaluations_of_several_autoencoders_need_is_bounded() -> None:
    """By no more than three times what is there; each further one adds its reconstructions."""
    lm, settings = language_model("gpt2"), EvalSettings(tokens=4096, ce_tokens=2048, rows_per_forward=16)
    rows = random_rows(lm, settings.tokens // CONTEXT)
    x = lm.activations(rows[:16], [SITE])[SITE].flatten(0, 1)
    saes = [SaeSettings(128, k) for k in (4, 8, 16)]
    made = [new_autoencoder(sae, x, seed=0) for sae in saes]

    def run() -> None:
        evaluations = [Evaluation(sae, lm, SITE, ce_tokens=settings.ce_tokens) for sae in made]
        readings = [
            (sae, SITE, [Reader(each.add, len(rows), settings.rows_per_forward)])
            for sae, each in zip(made, evaluations, strict=True)
        ]
        read_all(lm, rows, readings)
        results(evaluations)

    def bound(n: int) -> int:
        sites = [(sae, SITE) for sae in saes[:n]]
        needs = evaluation_needs(sites, {SITE: x.shape[1]}, lm, settings, CONTEXT, "memory")
        return sum(need.bytes for need in fullest(needs)[1] if need.what != "autoencoder")

    alive = peak_bytes(run)
    assert alive <= bound(3) <= 3 * alive
    assert bound(3) - bound(2) >= 4 * settings.ce_tokens * x.shape[1]
