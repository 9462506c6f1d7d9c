"""The text and HTML of an autoencoder in a terminal and in a notebook."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import saelab
from saelab.sae.checkpoint import save_sae
from saelab.sae.initial import initialise
from saelab.sae.model import SparseAutoencoder
from saelab.sae.new import new_autoencoder
from saelab.sae.settings import AllocationSettings, EncoderSettings, SaeSettings, SparsitySettings

GOLDEN = Path(__file__).parents[1] / "data"
FIGURES = {
    "tokens": 300_047,
    "fvu": 0.12514,
    "l0": 31.998,
    "delta_ce": 0.17771,
    "loss_recovered_zero": 0.99123,
    "loss_recovered_mean": None,  # undefined
    "never_active": 7,
}


class Page(HTMLParser):
    """The elements, attributes and text of some HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a checkpoint and an evaluation."""
    torch.manual_seed(0)
    ours = {"tokens": 999_424, "input_scale": 0.123456, "encoder": {"name": "linear"}, "aux": {"name": "none"}}
    ours |= {"allocation": {"name": "token_choice"}}
    sae = SparseAutoencoder(8, 16, 3, {"hook_name": "blocks.1.hook_resid_post", "model_name": "demo", "saelab": ours})
    initialise(sae, torch.randn(50, 8))
    save_sae(sae, tmp_path / "run" / "sae")
    (tmp_path / "run" / "eval.json").write_text(json.dumps(FIGURES))
    return tmp_path / "run"


def test_facts_and_figures_of_a_run(run: Path) -> None:
    sae = saelab.load(run)
    page = Page(sae._repr_html_())
    assert not page.open and {"table", "td"} <= page.elements and page.attributes == {"style"}
    for shown in (
        "d_in 8, 16 features, 280 parameters",
        "float32 on cpu",
        "blocks.1.hook_resid_post",
        "demo",
        "encoder linear, allocation token_choice, k 3",
        "the 3 largest pre-activations of each token, if above 0",
        "999,424 tokens",
        "0.1235 (folded into the weights)",
        "300,047 tokens",
        "0.1251",
        "32 features per token",
        "0.1777 nats per token",
        "0.9912 (zero ablation)",
        "undefined (mean ablation)",
        "7 of 16 features",
    ):
        assert shown in page.pieces and shown in repr(sae)
    assert repr(sae).startswith("SparseAutoencoder\n  size: d_in 8")


def test_figures_are_of_the_run_and_no_part_of_the_checkpoint(run: Path) -> None:
    assert saelab.load(run).figures == FIGURES and saelab.load(run / "sae").figures == {}
    save_sae(saelab.load(run), run / "again")
    assert (run / "again" / "cfg.json").read_bytes() == (run / "sae" / "cfg.json").read_bytes()
    (run / "eval.json").write_text("{")
    assert saelab.load(run).figures == {}
    (run / "eval.json").unlink()
    page = Page(saelab.load(run)._repr_html_())
    assert "Evaluation" not in page.pieces and "token_choice" in repr(saelab.load(run))


HOSTILE = "</td><script>alert('x')</script><img src=x onerror=\"alert(1)\">\x1b[2J\u202egro\n" + "long" * 1000


def test_hostile_metadata_and_figures_are_text(run: Path) -> None:
    sae = saelab.load(run)
    sae.metadata = dict.fromkeys(("hook_name", "model_name", "dataset_path"), HOSTILE)
    sae.metadata["saelab"] = dict.fromkeys(("tokens", "input_scale", "aux"), HOSTILE) | {"allocation": {"name": []}}
    sae.figures = dict.fromkeys(FIGURES, HOSTILE)
    page = Page(sae._repr_html_())
    assert page.elements == {"div", "table", "caption", "tbody", "tr", "th", "td"} and page.attributes == {"style"}
    assert sum("<script>" in piece for piece in page.pieces) > 6
    for shown in (sae._repr_html_(), repr(sae)):
        assert "\x1b" not in shown and "\u202e" not in shown and len(shown) < 10_000
    for metadata in ({"saelab": "text"}, {"saelab": None, "hook_name": {"a": [1]}}, {}):
        sae.metadata = metadata
        assert "16 features" in sae._repr_html_() and "16 features" in repr(sae)


@pytest.mark.parametrize(
    ("architecture", "inference"),
    [
        ("topk", "largest pre-activations of each token"),
        ("jumprelu", "every pre-activation above the feature's threshold, "),
        ("standard", "every pre-activation above 0"),
    ],
)
def test_a_checkpoint_of_saelens_shows_what_it_knows(architecture: str, inference: str) -> None:
    sae = saelab.load(GOLDEN / f"saelens_{architecture}")
    page = Page(sae._repr_html_())
    assert any(inference in piece for piece in page.pieces) and inference in repr(sae)
    assert {"trained on", "method"}.isdisjoint(page.pieces) and page.elements.isdisjoint({"script"})


def test_inference_by_thresholds() -> None:
    sae = SparseAutoencoder(8, 16, 3)
    sae.threshold = torch.tensor([0.25])
    assert "inference: every pre-activation above 0.25, one threshold for all features" in repr(sae)
    sae.threshold = torch.linspace(-1, 2, 16)
    assert "inference: every pre-activation above the feature's threshold, 0 to 2" in repr(sae)
    settings = SaeSettings(
        16,
        3,
        EncoderSettings("jumprelu", threshold=0.5),
        allocation=AllocationSettings("threshold"),
        sparsity=SparsitySettings("l0"),
    )
    sae = new_autoencoder(settings, torch.randn(50, 8), seed=0)
    assert "inference: every pre-activation above 0.5, one threshold" in repr(sae)


def test_a_crosscoder_has_a_scale_for_each_site_and_says_where_ce_is_measured(tmp_path: Path) -> None:
    metadata = {"hook_name": "blocks.0.hook_out", "saelab": {"input_scale": [0.123456, 2.0]}}
    sae = SparseAutoencoder(8, 16, 3, metadata)
    sae.site_widths = (5, 3)
    assert "input scale: 0.1235, 2 (folded into the weights)" in repr(sae) and "delta CE" not in repr(sae)
    sae.figures = FIGURES
    assert "delta CE and loss recovered: with the reconstruction at blocks.0.hook_out" in repr(sae)
