"""Models whose activations or gradients are NaN or infinite."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import saelab
from saelab.activations.cache.layout import UNFINISHED
from saelab.activations.cache.reader import Cache, open_cache
from saelab.activations.stream import ActivationBatch, Pass
from saelab.errors import SaelabError
from saelab.features.settings import FeatureSettings
from saelab.lm.load import load_language_model
from saelab.lm.model import LanguageModel
from saelab.lm.settings import ModelSettings
from saelab.runs import job
from saelab.runs.calibration import CalibrationRows
from saelab.sae.initial import initialise
from saelab.sae.model import SparseAutoencoder
from tests.activations.cache import made
from tests.faults.tools import (
    command,
    finished_shards_are_whole,
    made_by_command,
    read_an_epoch,
    the_one_error,
    tree,
)
from tests.features.made import index
from tests.tiny import model_folder, random_rows

OTHER = "blocks.1.attn.hook_z"
ROWS = 20
"""Rows of text in each lane; all tokens of them are stored."""
FACTS = made.identity(gradients=True, lanes=2, tokens=10**6)
SKIP = FACTS | {"nonfinite": "skip"}

Bad = dict[tuple[int, int, int], tuple[str, str, float]]
"""By lane, row within the lane and position: the site, activations or gradients, and the bad value."""
BAD: Bad = {
    (0, 2, 3): (made.SITE, "activations", float("nan")),
    (0, 2, 4): (OTHER, "activations", float("inf")),
    (0, 7, 15): (OTHER, "gradients", float("-inf")),
    (1, 12, 1): (made.SITE, "gradients", float("nan")),
    (1, 19, 15): (made.SITE, "activations", float("-inf")),
}


def forward(facts: dict, bad: Bad) -> Callable[[np.ndarray], Pass]:
    """The made-up model with values put into it: recognised by the row's ids."""
    run = made.forward(facts)
    rows = {(lane, row): next(made.Rows(lane, {"row": row})).tobytes() for lane, row, _ in bad}

    def model(ids: np.ndarray) -> Pass:
        result = run(ids)
        number = result.kept.flatten().cumsum(0).view_as(result.kept) - 1
        for (lane, row, position), (site, what, value) in bad.items():
            for i in (i for i, found in enumerate(ids) if found.tobytes() == rows[lane, row]):
                assert result.kept[i, position], "the case is about an ordinary token"
                getattr(result, what)[site][number[i, position], 5] = value
        return result

    return model


def written(cache: Cache, site: str) -> ActivationBatch:
    """All of a cache, in the order written."""
    batches = list(cache.in_order(site, gradients=True))
    parts = [
        torch.cat([getattr(batch, name) for batch in batches])
        for name in ("values", "tokens", "rows", "positions", "gradients")
    ]
    return ActivationBatch(*parts)


@pytest.mark.parametrize("case", BAD, ids=lambda case: "lane{}-row{}-position{}".format(*case))
def test_a_value_that_is_not_finite_is_an_error_with_its_position(case: tuple[int, int, int], tmp_path: Path) -> None:
    """Guaranteed: a NaN or infinite activation or gradient, at any site, is an error that says which it is, the site,
    the row (as the cache numbers rows) and the position; finished shards are kept, and nothing after them."""
    site, what, _ = BAD[case]
    lane, row, position = case
    with pytest.raises(SaelabError) as error:
        made.write(tmp_path / "cache", FACTS, forward(FACTS, {case: BAD[case]}), ROWS)
    assert str(error.value).startswith(f"{site}: ") and what in str(error.value)
    assert f"at row {lane + 2 * row}, position {position}," in str(error.value)
    assert "cache.nonfinite=skip" in str(error.value)
    shards = lane * 2 + row // 12  # of 12 rows each; a lane has two
    assert finished_shards_are_whole(tmp_path / "cache") == 5 * shards
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_after_such_an_error_writing_continues_with_a_repaired_model(tmp_path: Path) -> None:
    """Guaranteed: the error costs only the unfinished shard: written again with finite values, the cache has the bytes
    of one without the error."""
    made.write(tmp_path / "whole", FACTS, stop=ROWS)
    with pytest.raises(SaelabError, match="NaN or infinite"):
        made.write(tmp_path / "cache", FACTS, forward(FACTS, BAD), ROWS)
    made.write(tmp_path / "cache", FACTS, stop=ROWS)
    assert tree(tmp_path / "cache") == tree(tmp_path / "whole")


def test_skipped_tokens_are_in_no_file_and_are_counted(tmp_path: Path) -> None:
    """Guaranteed: with `nonfinite: skip`, a token that is NaN or infinite at one site, in activations or gradients, is
    left out of every file, all others are as they would be without it, and manifest and shards count what is left out;
    so it is when written in one go, and when a damaged shard is written again."""
    manifest = made.write(tmp_path / "cache", SKIP, forward(SKIP, BAD), ROWS)
    made.write(tmp_path / "clean", FACTS, stop=ROWS)
    cache, clean = open_cache(tmp_path / "cache"), open_cache(tmp_path / "clean")
    assert [shard["skipped"] for shard in manifest.shards] == [3, 0, 0, 2]
    assert b'"skipped": 5,' in (tmp_path / "cache" / "manifest.json").read_bytes()
    assert cache.tokens == clean.tokens - len(BAD) == read_an_epoch(tmp_path / "cache")
    for site in made.SITES:
        found, expected = written(cache, site), written(clean, site)
        bad = [(lane + 2 * row, position) for lane, row, position in BAD]
        at = zip(expected.rows.tolist(), expected.positions.tolist(), strict=True)
        kept = torch.tensor([place not in bad for place in at])
        for name in ("values", "tokens", "rows", "positions", "gradients"):
            assert torch.equal(getattr(found, name), getattr(expected, name)[kept]), (site, name)
            assert torch.isfinite(getattr(found, name).float()).all()
    before = tree(tmp_path / "cache")
    (tmp_path / "cache" / OTHER / "00-00000.gradients.safetensors").unlink()
    made.write(tmp_path / "cache", SKIP, forward(SKIP, BAD), ROWS)
    assert tree(tmp_path / "cache") == before


def test_a_shard_without_any_finite_token_is_empty(tmp_path: Path) -> None:
    """Guaranteed: if a model gives only NaN for a while, skipping leaves shards without tokens, which are
    read like others."""
    everywhere: Bad = {}
    for row in range(12):
        ids = next(made.Rows(1, {"row": row}))
        everywhere |= {(1, row, int(at)): (made.SITE, "activations", float("nan")) for at in np.flatnonzero(ids)}
    manifest = made.write(tmp_path / "cache", SKIP, forward(SKIP, everywhere), ROWS)
    assert [shard["tokens"] > 0 for shard in manifest.shards] == [True, True, False, True]
    assert manifest.shards[2]["skipped"] == len(everywhere)
    assert read_an_epoch(tmp_path / "cache") == manifest.tokens
    assert sum(len(batch) for batch in open_cache(tmp_path / "cache").in_order(OTHER)) == manifest.tokens


def test_a_model_without_finite_values_is_an_error_even_if_such_tokens_are_skipped(tmp_path: Path) -> None:
    """Guaranteed: a cache without any token is not made; the error says that all of them were left out, and why."""
    run = made.forward(SKIP)

    def model(ids: np.ndarray) -> Pass:
        result = run(ids)
        return result._replace(activations={site: value * torch.nan for site, value in result.activations.items()})

    with pytest.raises(SaelabError, match=f"all {2 * (15 * ROWS - ROWS // 3)} tokens are NaN or infinite"):
        made.write(tmp_path / "cache", SKIP, model, ROWS)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {UNFINISHED, "tokens", *made.SITES}


@pytest.mark.parametrize(("dtype", "value"), [("float16", 70_000.0), ("bfloat16", 3.4e38)])
def test_a_value_beyond_the_stored_dtype_counts_as_infinite(dtype: str, value: float, tmp_path: Path) -> None:
    """Guaranteed: a value that is finite in the model and infinite in the cache's dtype is found like others, and the
    error names the dtype."""
    facts = FACTS | {"dtype": dtype}
    bad: Bad = {(1, 3, 2): (OTHER, "activations", value)}
    with pytest.raises(SaelabError, match=rf"^{OTHER}: .* row 7, position 2, .*{dtype}"):
        made.write(tmp_path / "error", facts, forward(facts, bad), ROWS)
    facts |= {"nonfinite": "skip"}
    manifest = made.write(tmp_path / "skip", facts, forward(facts, bad), ROWS)
    assert [shard["skipped"] for shard in manifest.shards] == [0, 0, 1, 0]


def test_large_values_whose_sum_overflows_are_finite(tmp_path: Path) -> None:
    """Guaranteed: no token is refused or left out because values are large; only NaN and infinite ones are."""
    bad: Bad = {
        (0, 1, position): (made.SITE, "activations", 3e38) for position in (1, 2, 3, 4)
    }  # their sum overflows float32
    assert made.write(tmp_path / "error", FACTS, forward(FACTS, bad), ROWS).tokens > 0
    manifest = made.write(tmp_path / "skip", SKIP, forward(SKIP, bad), ROWS)
    assert [shard["skipped"] for shard in manifest.shards] == [0, 0, 0, 0]


def broken_weight(monkeypatch: pytest.MonkeyPatch, name: str, index: tuple[int, ...], value: float) -> None:
    """Set one weight of every model that a command loads; loading refuses a file with such a weight."""

    def load(*arguments: Any) -> LanguageModel:
        lm = load_language_model(*arguments)
        lm.model.get_parameter(name).data[index] = value
        return lm

    monkeypatch.setattr(job, "load_language_model", load)


def test_the_command_on_a_model_with_a_weight_that_is_nan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guaranteed: `saelab cache` of a broken model ends with exit code 2 and one message with site, row and position;
    with `cache.nonfinite=skip` it writes what is finite and says how many tokens it left out."""
    site = "blocks.0.hook_resid_pre"  # after it, attention spreads the NaN to other positions
    config = made_by_command(tmp_path, sites=[site], gradients=False)
    out = ("--out", tmp_path / "cache")
    broken_weight(monkeypatch, "transformer.wpe.weight", (17, 3), torch.nan)
    code, _, stderr = command(monkeypatch, capsys, "cache", config, f"site={site}", *out)
    assert code == 2
    assert the_one_error(stderr).startswith(f"error: {site}: ") and "at row 0, position 17," in stderr
    assert not any(path.suffix == ".safetensors" for path in (tmp_path / "cache").rglob("*"))

    out = ("--out", tmp_path / "skip")
    code, _, stderr = command(monkeypatch, capsys, "cache", config, f"site={site}", "cache.nonfinite=skip", *out)
    cache = open_cache(tmp_path / "skip")
    rows = sum(shard["rows"] for shard in cache.manifest.shards)
    skipped = sum(shard["skipped"] for shard in cache.manifest.shards)
    assert code == 0 and f"{skipped:,} tokens with NaN or infinite values were left out" in stderr
    assert rows - 5 < skipped <= rows  # one each, unless it is a special token
    for batch in cache.in_order(site):
        assert 17 not in batch.positions.tolist() and torch.isfinite(batch.values.float()).all()


SITE = "blocks.0.hook_resid_pre"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny GPT-2 in `model` and a run on it in `run`."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(model_folder("gpt2"), folder / "model")
    small = ["eval.tokens=1500", "eval.ce_tokens=600", "features.tokens=1500"]
    saelab.run(made_by_command(folder), [f"model={folder / 'model'}", f"site={SITE}", *small])
    return folder


class Broken:
    """The folder `finished`, in which a test breaks weights and runs commands."""

    def __init__(self, folder: Path, run_command: Callable[..., tuple[int, str, str]]) -> None:
        self.run, self.model, self._command = folder / "run", folder / "model", run_command

    def language_model(self) -> LanguageModel:
        return load_language_model(ModelSettings(str(self.model)), "cpu")

    def refused(self, stage: str) -> str:
        """The one message of a stage that ends with exit code 2 and leaves every file as it was.

        An index keeps what it has encoded in a folder of its own.
        """
        before = tree(self.run)
        code, _, stderr = self._command(stage, self.run)
        after = {name: content for name, content in tree(self.run).items() if "unfinished" not in name}
        assert code == 2 and after == before
        shutil.rmtree(self.run / "features" / "unfinished", ignore_errors=True)
        return the_one_error(stderr)


@pytest.fixture
def broken(finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Broken]:
    before = tree(finished)
    yield Broken(finished, partial(command, monkeypatch, capsys))
    for name, content in tree(finished).items():
        if content != before[name]:
            (finished / name).write_bytes(before[name] or b"")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("stage", ["eval", "index"])
def test_evaluation_and_features_stop_at_an_activation_that_is_not_finite(
    stage: str, value: float, broken: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guaranteed: the message is that of training, with site, row and position; nothing is written."""
    broken_weight(monkeypatch, "transformer.wpe.weight", (17, 3), value)
    message = broken.refused(stage)
    assert message.startswith(f"error: {SITE}: ") and "NaN or infinite activations at row 0, position 17;" in message


def test_evaluation_stops_at_a_loss_that_is_not_finite(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guaranteed: NaN after the site, as where float16 overflows, is named by row and position too."""
    broken_weight(monkeypatch, "transformer.h.2.mlp.c_proj.bias", (3,), torch.nan)
    assert "gives NaN or infinite losses in the clean run at row 0, position 1;" in broken.refused("eval")


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_weights_of_an_autoencoder_that_are_not_finite_are_refused(name: str, broken: Broken, tmp_path: Path) -> None:
    """Guaranteed: a checkpoint with such weights does not load, and an autoencoder in a notebook with such weights has
    no figures and no features."""
    sae, lm = saelab.load(broken.run), broken.language_model()
    getattr(sae, name).data.view(-1)[5] = torch.nan
    rows = random_rows(lm, 6)
    for attempt in (
        lambda: saelab.fidelity(sae, lm, rows),
        lambda: index(sae, lm, rows, SITE, tmp_path / "features", FeatureSettings()),
    ):
        with pytest.raises(SaelabError, match=rf"^the autoencoder: 1 of [0-9,]+ values of {name} are NaN or infinite"):
            attempt()
    path = broken.run / "sae" / "sae_weights.safetensors"
    weights = load_file(path)
    weights[name].view(-1)[:2] = torch.tensor([torch.inf, torch.nan])
    save_file(weights, path)
    for stage in ("eval", "index"):
        assert f"{path}: 2 of " in broken.refused(stage)


def test_a_threshold_may_be_infinite_and_not_nan(tmp_path: Path) -> None:
    """Guaranteed: an infinite threshold, with which other tools switch features off, loads; NaN does not."""
    sae = SparseAutoencoder(4, 6, 2)
    initialise(sae, torch.randn(50, 4))
    sae.threshold = torch.tensor([0.1] * 5 + [torch.inf])
    saelab.save_sae(sae, tmp_path / "sae")
    assert saelab.load(tmp_path / "sae").encode(torch.randn(200, 4)).firing_counts()[5] == 0
    sae.threshold[0] = torch.nan
    saelab.save_sae(sae, tmp_path / "sae")
    with pytest.raises(SaelabError, match="1 of 6 values of threshold"):
        saelab.load(tmp_path / "sae")


def test_reconstructions_that_overflow_are_named(broken: Broken) -> None:
    sae, lm = saelab.load(broken.run), broken.language_model()
    sae.W_enc.data.mul_(1e3)
    sae.W_dec.data.fill_(3e38)
    with pytest.raises(
        SaelabError, match=r"the autoencoder gives NaN or infinite reconstructions at row 0, position 1"
    ):
        saelab.fidelity(sae, lm, random_rows(lm, 6))


def test_gradients_of_the_oracle_that_are_not_finite_are_named(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, lm = saelab.load(broken.run), broken.language_model()
    clean = lm.activations_and_gradients

    def spoilt(ids: torch.Tensor, sites: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        values, gradients = clean(ids, sites)
        gradients[SITE][1, 9, 3] = torch.inf if torch.equal(ids, rows[2:4]) else 0.0
        return values, gradients

    rows = random_rows(lm, 6)
    monkeypatch.setattr(lm, "activations_and_gradients", spoilt)
    with pytest.raises(SaelabError, match=r"infinite gradients at row 3, position 9"):
        saelab.fidelity(sae, lm, rows, oracle=True, rows_per_forward=2)


def test_thresholds_are_not_set_on_activations_that_are_not_finite(broken: Broken) -> None:
    sae, lm = saelab.load(broken.run), broken.language_model()
    lm.model.get_parameter("transformer.wpe.weight").data[17, 3] = torch.nan
    densities = torch.tensor(0.05, dtype=torch.float64)
    with pytest.raises(SaelabError, match=rf"^{SITE}: .* at row 0, position 17;"):
        saelab.calibrate(sae, lm, CalibrationRows(random_rows(lm, 6), random_rows(lm, 6)), SITE, densities)
    assert sae.threshold is None


def test_tokens_that_a_cache_skips_are_an_error_in_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guaranteed: training on a cache with `nonfinite: skip` goes on without such tokens; evaluation, which would have
    to leave out their losses too, stops with the message."""
    site, out = "blocks.0.hook_resid_pre", tmp_path / "cache"
    config = made_by_command(tmp_path, sites=[site], gradients=False, nonfinite="skip")
    options = [config, f"site={site}"]
    broken_weight(monkeypatch, "transformer.wpe.weight", (17, 3), torch.nan)
    assert command(monkeypatch, capsys, "cache", *options, "--out", out)[0] == 0
    assert command(monkeypatch, capsys, "train", *options, f"activations.cache={out}")[0] == 0
    code, _, stderr = command(monkeypatch, capsys, "eval", tmp_path / "run")
    assert code == 2 and "at row 0, position 17;" in the_one_error(stderr)
