"""Bad input of every kind, made by hypothesis. A case is a valid job in which one thing is wrong: a setting, an
argument, the text, or a file of the run folder."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from saelab.errors import printable
from saelab.runs.config import RunSettings
from saelab.runs.resume import leaves
from tests.tiny import text

VALID: dict[str, Any] = {
    "out": "run",
    "model": {"name": "model"},
    "corpus": {"source": "book.txt"},
    "site": "blocks.1.hook_resid_post",
    "context": 8,
    "activations": {"stream": {"buffer_tokens": 100, "rows_per_forward": 8}},
    "cache": {"rows_per_forward": 8},
    "sae": {"n_features": 16, "k": 2},
    "training": {"tokens": 300, "batch": 50},
    "eval": {"tokens": 100, "ce_tokens": 50},
    "features": {"tokens": 100},
}
METHODS: list[dict[str, Any]] = [
    {},
    {"affinity": "gradient"},
    {"allocation": "mutual_choice", "aux": "aux_zipf"},
    {"allocation": "feature_choice", "multi_topk": True},
    {"allocation": "threshold", "aux": "none", "sparsity": {"name": "l1", "coefficient": 0.1}},
    {"allocation": "threshold", "encoder": "jumprelu", "sparsity": {"name": "l0", "target_l0": 2}},
]
SETTINGS = leaves(asdict(RunSettings("run", "site"))) | {
    "activations.cache.path": "",
    "activations.cache.buffer_tokens": 1,
}
words = str.split
SECTIONS = words("sae model corpus training activations sae.encoder sae.aux cache eval")
COUNTS = words("-1 0 1 2 3 7 8 9 64 65 300 1e9 2147483648 9223372036854775807 9223372036854775808 1e18 1.5 1e300")
SHARES = words("-0.1 0.0 1e-400 1e-9 0.5 1 1.0000001 2 1e30 1e308 1e400 .nan .inf -.inf 1e6.5")
# A middle dot stands for a space.
ODD_WORDS = words("""
    null ~ true no [] {} [1,2] {a:·1} -1 0x10 1_000 '32' '1e-3' "" auto none cuda cuda:99 meta fp16 ../x run run/sae .
    model book.txt config.yaml c.yaml demo gpt2 a/b a/b/c ~nobody blocks.1.hook_resid_pst hook_embed unembed.hook_out
    blocks.0.attn.hook_pattern 2026-01-02 12:30:45 !!python/object:os.system·{} !!python/name:os.system !!binary·aGk=
    !!int·x !!timestamp·x !!float·x !!bool·x !!set·{a} !!omap·[a:·1] !x·3 &a·[*a] *missing << {<<:·3} {<<:·{k:·3}}
    {k:·1,·k:·2} "\\ud800" "\\0" "\\u202e" "\\x1b[2J" [/b] % @ ` | ? } сontext --- ... #
""")
ODD = [word.replace("·", " ") for word in ODD_WORDS]
ODD += ["1" + "0" * 400, "9" * 5000, "[" * 3000, "{a: " * 500, "x" * 100_000, "-" * 50, "? " * 100, "é" * 300]
LEAVES = st.none() | st.booleans() | st.text(max_size=3)
ANYTHING = st.one_of(
    st.sampled_from(ODD),
    st.sampled_from(COUNTS + SHARES),
    st.text(max_size=12).map(json.dumps),
    st.recursive(LEAVES, st.lists, max_leaves=5).map(json.dumps),
)


def doubling(begin: str, item: str) -> bytes:
    """YAML of 20 lines, in which each repeats the line before it nine times."""
    names = "abcdefghijklmnopqrst"
    lines = [f"{b}: &{b} {item % ', '.join([f'*{a}'] * 9)}\n" for a, b in pairwise(names)]
    return (f"a: &a {begin}\n" + "".join(lines)).encode()


TEXT_DOCUMENTS = words(r"""
    --- ---\n--- a:·1\n---\nb:·2 -·a %YAML·9.9\n---\na:·1 \ufeffout:·x out:·x\nout:·y <<:·*a \t
    out:·x\r\nout:·x [a]:·b 1:·2
""")
DOCUMENTS = [document.replace("·", " ").encode().decode("unicode_escape").encode() for document in TEXT_DOCUMENTS]
DOCUMENTS += [b"", b"\x00" * 9, b"\xff\xfeo\x00", doubling("[x, x]", "[%s]"), doubling("{k: 3}", "{<<: [%s]}")]
PATHS = words(
    ". .. missing c.yaml book.txt run run/sae run/train.json run/train.json/x ~nobody model cache /dev/null - --"
)
PATHS += ["", "a" * 300, "a/" * 3000, "\udcff", "new\nline", "[/b]", "\x1b[2J"]
NUMBERS = ["nan", "inf", "-1", "0", "1", "0.5", "1e400", "x", "", "70000", "1" + "0" * 400, "0x10", "½", "10"]
VALUES = [None, True, -1, 0, 10**30, 1e308, float("nan"), "x", [], {}, "\ud800", [1, "a"], {"a": None}]


@dataclass
class Case:
    """A command, and the change to the files of a valid job that comes before it."""

    arguments: list[str]
    blamed: list[str]
    """Words of which an error has at least one, in any case."""
    change: Callable[[], object] = field(default=lambda: None, repr=False)
    what: str = ""
    """The change, in words."""


def write(path: str, content: str | bytes) -> None:
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


def yaml_text(changes: dict[str, str], method: dict[str, Any] | None = None) -> str:
    """The valid config with the text of `changes` in place of the values of some settings."""
    tree = json.loads(json.dumps({**VALID, "sae": VALID["sae"] | (method or {})}))
    for name in changes:  # settings that the valid config leaves out
        *above, last = name.split(".")
        section = tree
        for key in above:
            inner = section.get(key) or {}
            section[key] = {"name": inner} if isinstance(inner, str) else inner
            section = section[key]
        section.setdefault(last, None)

    def entries(section: dict[str, Any], above: str) -> list[str]:
        """`key: value` of each setting in a section."""
        found = []
        for key, value in section.items():
            name = f"{above}{key}"
            inner = f"{{{', '.join(entries(value, name + '.'))}}}" if isinstance(value, dict) else json.dumps(value)
            found.append(f"{key}: {changes.get(name, inner)}")
        return found

    return "\n".join(entries(tree, "")) + "\n"


COMMANDS = [words(command) for command in ("run c.yaml --force", "plan c.yaml", "cache c.yaml --out new")]
COMMANDS.append(words("train c.yaml --force"))


@st.composite
def bad_setting(draw: st.DrawFn) -> Case:
    """One setting has an odd value, in the file or as an override, whose form may be odd as well."""
    name = draw(st.sampled_from(sorted(SETTINGS)) | st.sampled_from(SECTIONS))
    default = SETTINGS.get(name)
    likely = COUNTS if type(default) is int else SHARES if type(default) is float else ODD
    raw = draw(st.sampled_from(likely) if draw(st.booleans()) else ANYTHING)
    if name in ("training", "training.tokens") and raw not in ("-1", "0", "null", "[]"):
        raw = "301"  # not a training of days
    command, content = draw(st.sampled_from(COMMANDS)), draw(st.sampled_from(METHODS))
    blamed = [*name.split("."), "c.yaml"]
    if draw(st.booleans()):
        change = partial(write, "c.yaml", yaml_text({name: raw}, content))
        return Case(command, blamed, change, f"{name}: {raw[:99]}")
    forms = [f"{name}.", f".{name}", f"{name}x", name.upper(), f"{name}[0]", f"{name} ", ""]
    equals = draw(st.sampled_from(["="] * 8 + ["", "==", ":", " = "]))
    override = draw(st.sampled_from([name] * 7 + forms)) + equals + raw
    change = partial(write, "c.yaml", yaml_text({}, content))
    return Case([*command, override[:100_000].replace("\0", "")], [*blamed, "override", "Usage"], change)


def cut(content: bytes) -> st.SearchStrategy[bytes]:
    """`content`, cut off, with a byte changed, or with a part left out or repeated."""
    at = st.integers(0, max(0, len(content) - 1))
    return st.one_of(
        at.map(lambda i: content[:i]),
        st.builds(lambda i, byte: content[:i] + bytes([byte]) + content[i + 1 :], at, st.integers(0, 255)),
        st.builds(lambda i, j: content[:j] + content[i:], at, at),
    )


@st.composite
def bad_document(draw: st.DrawFn) -> Case:
    """The config is no config."""
    whole = cut(yaml_text({}).replace("300", "30").encode())
    content = draw(st.sampled_from(DOCUMENTS) | st.text(max_size=60) | st.binary(max_size=60) | whole)
    change = partial(write, "c.yaml", content)
    return Case(draw(st.sampled_from(COMMANDS)), ["c.yaml", *VALID], change, repr(content[:300]))


@st.composite
def bad_argument(draw: st.DrawFn) -> Case:
    """A path or a number on the command line is odd."""
    path = draw(st.sampled_from(PATHS) | st.text(st.characters(exclude_characters="/.\0"), max_size=9))
    number = draw(st.sampled_from(NUMBERS))
    patterns = """
        eval·@ index·@ features·@ analyse·@·dead run·@ plan·@ train·@ app·@ @ @·run train·c.yaml·out=@ train·c.yaml·@
        train·c.yaml·--force·corpus=@ train·c.yaml·--force·model=@ train·c.yaml·--force·activations.cache=@
        plan·c.yaml·--out·@ train·c.yaml·--force·site=@ train·--resume·@ train·--resume·run·@ cache·c.yaml·--out·@
        cache·--verify·--out·@
        app·run·--port·# eval·run·eval.tokens=# train·--resume·run·training.tokens=# plan·c.yaml·--tokens·#
        cache·c.yaml·--out·new·--tokens·# index·run·features.tokens=#
    """
    pattern = draw(st.sampled_from(words(patterns))).split("·")
    settings = [word.partition("=")[0] for word in pattern if "=" in word]
    command = [word.replace("@", path).replace("#", number) for word in pattern]
    names = [printable(name)[:40] or "." for name in (path, os.path.expanduser(path))]
    return Case(command, [*names, number, "out", "override", *settings])


TEXTS = [
    b"",
    b"\n \n\t\n",
    b"one",
    b"<|endoftext|>" * 300,
    b"na\xefve " * 50,
    b"\0" * 50,
    b"a" * 3000,
    b'"' * 51,
    b"text\n",
]
TEXTS += [b"[]", b"{}", b"null", b"[null]\n", b'{"text": []}\n', b"PAR1" * 9, b"text\n" * 99, b"\n\na b\n" * 400]
TEXTS += [b"\xef\xbb\xbf" + text(9).encode(), text(40).replace(".", "<|endoftext|>").encode()]
ROWS: list[Any] = [[True] * 8, [-1] * 8, [10**9] * 8, [0] * 8, [1.5] * 8, [5] * 9, ["a"] * 8, "", "<|endoftext|>" * 20]


@cache
def parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    target = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": text(30).splitlines()}), target)
    return target.getvalue().to_pybytes()


@st.composite
def bad_corpus(draw: st.DrawFn) -> Case:
    """The text is odd: its bytes, one of its rows, or the name of one of its files."""
    rows: list[Any] = [{"text": line} for line in text(40).splitlines()]
    if draw(st.booleans()):
        rows = [{"input_ids": [(7 * i + j) % 300 + 2 for j in range(8)]} for i in range(40)]
    odd = draw(st.sampled_from(VALUES) | st.sampled_from(ROWS))
    rows[draw(st.integers(0, 39))] = draw(st.sampled_from([rows[0], {next(iter(rows[0])): odd}, odd, {"other": odd}]))
    lines, json_list = "".join(f"{json.dumps(row)}\n" for row in rows).encode(), json.dumps(rows).encode()
    csv = ("text,n\n" + "".join(f'"{line}",1\n' for line in text(40).splitlines())).encode()
    names = words(
        "c.txt c c.parquet c.jsonl c.json c.csv d/dataset_dict.json d/state.json d/README.md d/a.parquet d/x.TXT"
    )
    names += ["d/\udcff.txt", "d/new\nline.txt", "d/[b].txt"]
    any_text = st.sampled_from(TEXTS) | st.binary(max_size=30) | st.just(text(20).encode())
    name, content = draw(
        st.one_of(
            st.tuples(st.just("c.jsonl"), st.just(lines) | cut(lines)),
            st.tuples(st.just("c.json"), st.just(json_list) | cut(json_list)),
            st.tuples(st.sampled_from(["c.csv", "c.tsv"]), st.just(csv) | cut(csv)),
            st.tuples(st.just("c.parquet"), cut(parquet())),
            st.tuples(st.sampled_from(names), any_text),
        )
    )
    source, beside = name.split("/")[0], draw(st.booleans())

    def change() -> None:
        if source == "d":
            shutil.copytree("book", "d") if beside else Path("d").mkdir()
        write(name, content)

    command, method = draw(st.sampled_from([*COMMANDS, ["eval", "run"]])), draw(st.sampled_from(METHODS[:3]))
    overrides = [f"sae.{key}={json.dumps(value)}" for key, value in method.items() if command[0] != "eval"]
    return Case([*command, f"corpus={source}", *overrides], ["corpus", source], change, f"{name}: {content[:300]!r}")


@st.composite
def bad_run(draw: st.DrawFn) -> Case:
    """A file of the run folder is damaged."""
    files = words("config.yaml train.json eval.json metrics.jsonl sae/cfg.json sae/sae_weights.safetensors")
    files += words("state/*/state.json state/*/state.safetensors features/manifest.json features/table.mass.npy")
    pattern, how = draw(st.sampled_from(files)), draw(st.sampled_from(words("gone folder content value value value")))
    spot, value = draw(st.floats(0, 1, exclude_max=True)), draw(st.sampled_from(VALUES))
    content = draw(st.sampled_from([b"", b"{}", b"[]", b"null", b"\xff\xfe", b"3", b"x: y\n"]) | st.binary(max_size=20))

    def change() -> None:
        for path in Path("run").glob(pattern):
            before = path.read_bytes()
            path.unlink()
            if how == "folder":
                path.mkdir()
            elif how == "content":
                path.write_bytes(content)
            elif how == "value" and path.suffix == ".json":
                path.write_text(json.dumps(replaced(json.loads(before), spot, value)))
            elif how == "value":  # cut off, or with another byte
                at = int(spot * len(before))
                path.write_bytes(before[:at] + (content[:1] + before[at + 1 :] if content else b""))

    resume, run = ["train", "--resume", "run"], ["run", "c.yaml"]
    commands = [["eval", "run"], ["index", "run"], [*resume, "training.tokens=400"], resume, run, [*run, "--force"]]
    what = f"{pattern}: {how} {spot} {value!r} {content!r}"
    return Case(draw(st.sampled_from([*commands, ["app", "run"]])), ["run"], change, what)


def replaced(tree: Any, spot: float, value: Any) -> Any:
    """`tree` with `value` in place of the part that `spot` in [0, 1) chooses."""
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []
    if not keys:
        return value
    at, rest = divmod(spot * len(keys), 1)
    key = keys[int(at)]
    nested = isinstance(tree[key], dict | list) and rest >= 0.3
    new = replaced(tree[key], (rest - 0.3) / 0.7, value) if nested else value
    return {**tree, key: new} if isinstance(tree, dict) else [*tree[: int(at)], new, *tree[int(at) + 1 :]]


_TWICE = (bad_setting(), bad_corpus(), bad_run())
CASES = st.one_of(*_TWICE, *_TWICE, bad_document(), bad_argument())
