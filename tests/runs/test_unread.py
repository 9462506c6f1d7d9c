"""Settings without effect: which ones a note names, that they have none, and that no shipped config gets a note."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from saelab.errors import SaelabError
from saelab.progress import silent
from saelab.runs import sweep as sweeps
from saelab.runs import train as trainings
from saelab.runs.config import RunSettings, find_config, leaves, settings_from
from saelab.runs.grid import grid
from saelab.runs.job import Job
from saelab.runs.unread import DEFAULTS, RULES, note_unread
from saelab.sae.model import Batch
from saelab.sae.new import new_autoencoder
from saelab.training.trainer import train

BASE = {"out": "runs/x", "site": "blocks.0.hook_resid_post", "sae": {"n_features": 512}}
RELU = "sae.allocation=threshold sae.sparsity=l1"
JUMPRELU = "sae.allocation=threshold sae.sparsity=l1 sae.encoder=jumprelu"
NARROW = "sae.encoder.bandwidth=0.01"  # thresholds begin at half of it at least
FEATURE_CHOICE = "sae.allocation=feature_choice"
CASES = [
    # settings without effect, what leaves them so, the note's words for it, and what gives them an effect
    (
        "sae.k=8",
        f"{RELU} sae.encoder=gated",
        "with allocation: threshold",
        "sae.encoder=linear sae.allocation=token_choice",
    ),
    ("sae.k=8", RELU, "with allocation: threshold", JUMPRELU),
    ("sae.k=8", RELU, "with allocation: threshold", "sae.aux=aux_zipf"),
    ("sae.k_steps=0.5", "", "without k_start", "sae.k_start=64"),
    ("sae.seed=3", "sae.init_from=other", "with init_from", "sae.init_from=null"),
    ("sae.unit_norm=false", "sae.freeze=decoder", "with freeze: decoder", "sae.freeze=encoder"),
    ("sae.unit_norm=false", "sae.freeze=decoder sae.aux=aux_zipf", "with freeze: decoder", "sae.init_from=other"),
    ("sae.encoder.bandwidth=1 sae.encoder.threshold=1", RELU, "with encoder: linear", "sae.encoder.name=jumprelu"),
    ("sae.affinity.beta=0.5", "", "with affinity: activation", "sae.affinity.name=gradient"),
    ("sae.affinity.power=0.5", "", "with affinity: activation", "sae.affinity.name=cosine"),
    (
        "sae.allocation.capacity=uniform sae.allocation.after=0.1 sae.allocation.refresh=2",
        "sae.allocation.name=mutual_choice",
        "with allocation: mutual_choice",
        "sae.allocation.name=feature_choice",
    ),
    (
        "sae.allocation.exponent=1 sae.allocation.shift=2",
        "",
        "with allocation: token_choice",
        "sae.allocation.name=feature_choice",
    ),
    (
        "sae.allocation.exponent=1 sae.allocation.shift=2",
        f"{FEATURE_CHOICE} sae.allocation.capacity=uniform sae.allocation.after=0.2",
        "with capacity: uniform",
        "sae.allocation.capacity=zipf",
    ),
    (
        "sae.allocation.capacity=uniform sae.allocation.refresh=2",
        f"{FEATURE_CHOICE} sae.allocation.after=1",
        "with after: 1",
        "sae.allocation.after=0.9",
    ),
    (
        "sae.aux.coefficient=1 sae.aux.features=2 sae.aux.lift=true",
        "sae.aux.name=none",
        "with aux: none",
        "sae.aux.name=aux_k",
    ),
    (
        "sae.aux.exponent=1 sae.aux.shift=2 sae.aux.share=0.9",
        "",
        "with aux: aux_k",
        "sae.aux.name=aux_zipf",
    ),
    ("sae.sparsity.coefficient=9 sae.sparsity.warmup=1", "", "with sparsity: none", "sae.sparsity.name=l1"),
    ("sae.sparsity.target_l0=3", RELU, "with sparsity: l1", f"sae.encoder=jumprelu {NARROW}"),
    (
        "sae.sparsity.target_l0=3",
        f"{JUMPRELU} {NARROW} sae.encoder.threshold=0.05",
        "with sparsity: l1",
        "sae.sparsity.name=l0",
    ),
    ("sae.sparsity.p=0.25", RELU, "with sparsity: l1", "sae.sparsity.name=lp"),
    ("sae.sparsity.slope=9", RELU, "with sparsity: l1", "sae.sparsity.name=tanh"),
    ("training.schedule=cosine", "training.decay=0", "with decay: 0", "training.decay=0.5"),
    ("corpus.held_out=0.3", "", "with corpus: demo", "corpus.source=book.txt"),
    ("corpus.held_out=0.3", "", "with corpus: demo", "activations=x.npy"),
    (
        "activations.stream.buffer_tokens=9",
        "activations.cache=stored",
        "with activations.cache",
        "activations.cache=null",
    ),
    (
        (
            "activations.stream.rows_per_forward=2 activations.special_tokens=true cache.lanes=2 eval.ce_tokens=9 "
            "model.name=gpt2 model.dtype=float16 corpus.source=c.txt corpus.text_column=t corpus.split=s "
            "corpus.subset=u corpus.revision=r corpus.min_tokens=1 corpus.max_tokens=9"
        ),
        "activations.array.path=x.npy",
        "with activations.array",
        "activations.array=null",
    ),
]


def settings(*overrides: str) -> RunSettings:
    return settings_from(BASE, " ".join(overrides).split())


def note(*runs: RunSettings) -> str | None:
    """The note about `runs`."""
    said: list[str] = []
    note_unread(runs, said.append)
    assert len(said) < 2
    return said[0] if said else None


def name_of(override: str) -> str:
    return override.partition("=")[0]


@pytest.mark.parametrize(("changed", "because", "words", "read"), CASES)
def test_a_setting_is_noted_while_nothing_reads_it(changed: str, because: str, words: str, read: str) -> None:
    found = note(settings(because, changed))
    assert found is not None and found.startswith("note: ") and found.endswith(f" no effect {words}")
    names = found.removeprefix("note: ").removesuffix(f" no effect {words}")
    assert names.rpartition(" ")[2] == ("have" if "," in names else "has")
    assert sorted(names.rpartition(" ")[0].split(", ")) == sorted(map(name_of, changed.split()))
    assert note(settings(because)) is None, "at its default"
    after = settings(because, changed, read)
    names_now = {name for name, value in leaves(asdict(after)).items() if value != DEFAULTS.get(name)}
    assert names_now >= set(map(name_of, changed.split()))
    assert not any(name_of(each) in (note(after) or "") for each in changed.split())


def trained(run: RunSettings) -> list[torch.Tensor]:
    """Weights after ten steps."""
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    sae = new_autoencoder(run.sae, x, seed=0)
    train(sae, map(Batch, x.split(40)), replace(run.training, tokens=400, batch=40), run.sae)
    return list(sae.parameters())


@pytest.mark.parametrize(
    ("changed", "because", "read"),
    [(changed, because, read) for changed, because, _, read in CASES if changed.startswith(("sae.", "training."))],
)
def test_the_weights_depend_on_a_setting_unless_it_is_noted(changed: str, because: str, read: str) -> None:
    def same(*others: str) -> bool:
        pairs = zip(trained(settings(because, *others)), trained(settings(because, changed, *others)), strict=True)
        return all(torch.equal(one, other) for one, other in pairs)

    assert same()
    # aux_zipf ranks features from step 100 on; the others need a language model or a checkpoint
    if not any(word in read for word in ("aux_zipf", "gradient", "init_from")):
        assert not same(read)


def test_the_table_names_settings_that_exist_and_each_is_tested() -> None:
    tested = {name_of(override) for changed, *_ in CASES for override in changed.split()}
    for name in (name for rule in RULES for name in rule.settings.split()):
        meant = {each for each in DEFAULTS if f"{each}.".startswith(f"{name}.")}
        assert meant, f"{name} is no setting"
        assert meant & tested, name


def test_no_shipped_config_gets_a_note() -> None:
    for path in sorted(find_config("quickstart").parent.glob("*.yaml")):
        assert note(*(run.settings for run in grid(path))) is None, path


def test_a_sweep_notes_what_none_of_its_runs_reads() -> None:
    config = BASE | {"sweep": {"sae.k": [8, 32]}}
    assert note(*(run.settings for run in grid(config, RELU.split()))) == (
        "note: sae.k has no effect with allocation: threshold"
    )
    both = [*RELU.split()[1:], "sweep.sae.allocation=[threshold, token_choice]", "sae.sparsity.p=0.25"]
    assert note(*(run.settings for run in grid(config, both))) == "note: sae.sparsity.p has no effect with sparsity: l1"


def test_a_training_and_a_sweep_say_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, said = "note: sae.k has no effect with allocation: threshold", []
    monkeypatch.setattr(trainings, "begin_all", lambda *_: {})
    run = settings(RELU, "sae.k=8", f"out={tmp_path / 'run'}")
    trainings.begin(Job(run, said.append), False, silent)
    assert said == [expected]

    def stop(*_: object) -> None:
        raise SaelabError("stop")

    monkeypatch.setattr(sweeps, "check_log", stop)
    monkeypatch.setattr(Job, "beside", lambda job, settings, say: Job(settings, say))
    said.clear()
    with pytest.raises(SaelabError, match="stop"):
        sweeps.sweep(BASE | {"out": str(tmp_path)}, [*RELU.split(), "sweep.sae.k=[8,16]"], say=said.append)
    assert said == [expected]
