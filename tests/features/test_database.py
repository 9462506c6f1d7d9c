import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from saelab.errors import SaelabError
from saelab.features import database
from tests.app.synthetic_run import HOSTILE, N_TOKENS, NEVER_ACTIVE, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # "[", "=" and "*" mean something to tools that take paths for patterns or partitions.
    return write_run(tmp_path_factory.mktemp("runs") / "a=1[x]*") / "features"


def test_the_table_has_every_feature_once_in_order(folder):
    table = database.feature_table(folder)
    assert table["feature"].tolist() == list(range(40))
    assert np.allclose(table["density"], table["n_active"] / N_TOKENS)
    assert table["top_logit_tokens"].tolist()[0] == HOSTILE[:10]


def test_the_peak_tokens_are_those_of_the_contexts_strongest_first_and_once_each(folder):
    table = database.feature_table(folder)
    for index in (0, 3, NEVER_ACTIVE, 39):
        peaks = [context.tokens[context.peak] for context in database.contexts(folder, index)]
        assert table["peak_tokens"].tolist()[index] == list(dict.fromkeys(peaks))


def test_a_feature_is_its_line(folder):
    line = pq.read_table(folder / database.FEATURES).to_pylist()[5]
    found = database.feature(folder, 5)
    assert (found.index, found.density, found.histogram) == (5, line["density"], line["histogram"])
    assert [token for token, _ in found.bottom_logits] == line["bottom_logit_tokens"]
    assert [cosine for _, cosine in found.neighbours] == line["neighbour_cosines"]
    assert len(found.bin_centres) == 50 and found.bin_centres[-1] < found.max_activation


def test_contexts_are_sorted_by_strength_and_whole(folder):
    found = database.contexts(folder, 0)
    assert [context.rank for context in found] == list(range(20))
    strengths = [context.activation for context in found]
    assert strengths == sorted(strengths, reverse=True)
    for context in found:
        assert context.activations[context.peak] == context.activation
        assert len(context.tokens) == len(context.activations) == 32
    assert "" in found[0].tokens and "\n" in found[0].tokens


def test_a_never_active_feature_is_one_and_has_no_contexts(folder):
    assert database.feature(folder, NEVER_ACTIVE).never_active
    assert database.contexts(folder, NEVER_ACTIVE) == []


def test_searching_tokens_equals_looking_at_each(folder):
    table = database.feature_table(folder)
    for text in ("script", "DEF", "$x$", ".*", "\n", "🦊", "nothing has this"):
        expected = [
            any(text.lower() in token.lower() for token in [*top, *peaks])
            for top, peaks in zip(table["top_logit_tokens"], table["peak_tokens"], strict=True)
        ]
        assert database.search_tokens(table, text).tolist() == expected


def test_a_search_of_contexts_crosses_tokens(folder):
    texts = {i: ["".join(c.tokens).lower() for c in database.contexts(folder, i)] for i in range(40)}
    for text in ("import numpy", "return self", "<SCRIPT>", "nothing has this"):
        expected = [i for i, windows in texts.items() if any(text.lower() in window for window in windows)]
        assert database.search_contexts(folder, text).tolist() == expected


def test_the_density_histogram_counts_every_active_feature(folder):
    edges, counts = database.density_histogram(database.feature_table(folder))
    assert counts.sum() == 39 and len(edges) == len(counts) + 1
    nothing = database.feature_table(folder).query("n_active == 0")
    assert database.density_histogram(nothing)[1].sum() == 0


def test_a_run_without_features_is_an_error_that_names_the_command(tmp_path):
    run = write_run(tmp_path / "run", features=False)
    for read in (
        database.summary,
        database.feature_table,
        lambda r: database.feature(r, 0),
        lambda r: database.contexts(r, 0),
    ):
        with pytest.raises(SaelabError, match=f"`saelab index {run}`"):
            read(run / "features")


def test_an_index_out_of_range_is_an_error_with_the_range(folder):
    for index in (40, -1, 10**12):
        with pytest.raises(SaelabError, match="0 to 39"):
            database.feature(folder, index)


@pytest.mark.parametrize("name", ["features.parquet", "contexts.parquet", "summary.json"])
@pytest.mark.parametrize("content", [b"", b"not what it says", b"\xff\xfe\x00PAR1"])
def test_a_corrupt_file_is_named(tmp_path, name, content):
    folder = write_run(tmp_path / "run") / "features"
    (folder / name).write_bytes(content)
    messages = []
    for read in [database.feature_table, database.summary, lambda folder: database.contexts(folder, 0)]:
        try:
            read(folder)
        except SaelabError as error:
            messages.append(str(error))
    assert messages and all(str(folder / name) in message for message in messages)


def test_half_a_file_and_a_file_without_a_column_are_named(tmp_path):
    folder = write_run(tmp_path / "run") / "features"
    path = folder / database.FEATURES
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SaelabError, match=r"features\.parquet"):
        database.feature_table(folder)
    path.write_bytes(whole)
    pq.write_table(pq.read_table(path).drop_columns(["density"]), path)
    with pytest.raises(SaelabError, match="density"):
        database.feature_table(folder)
    (folder / database.SUMMARY).write_text(json.dumps({"n_tokens": 3}))
    with pytest.raises(SaelabError, match=r"summary\.json"):
        database.summary(folder)


def test_reading_loads_no_language_model_library_and_no_torch(folder):
    heavy = ["torch", "transformers", "transformer_lens", "datasets", "streamlit"]
    code = (
        "import sys\nfrom saelab.features import database\n"
        f"database.feature_table({str(folder)!r}); database.contexts({str(folder)!r}, 0)\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
