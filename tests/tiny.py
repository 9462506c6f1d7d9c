"""Small random-weight models of several architectures, with a tokenizer of their own, as local Hugging Face folders."""

import copy
import functools
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from saelab.lm.load import load_language_model
from saelab.lm.model import LanguageModel
from saelab.lm.settings import ModelSettings

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "for i in range(10): print(i, i ** 2)  # squares",
    "A sparse autoencoder writes an activation as a sum of few directions.",
    "def f(x):\n    return x + 1\n",
]
KINDS = ("gpt2", "gpt_neox", "llama")
ADDS_IN_PLACE = "falcon"
"""Not one of `KINDS`: a model that adds attention's output in place to the MLP's."""
NEEDS_NUMBERS = "mixtral"
"""Not one of `KINDS`: a mixture of experts, which does not run without its weights."""
CONTEXT = 32


def text(n: int) -> str:
    """Some `n` lines of text in which words come back."""
    return "\n".join(f"{SENTENCES[i % 4]} Line {i % 17}, word{i % 23} and word{i % 5}." for i in range(n))


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="saelab-tiny-")


@functools.cache
def model_folder(kind: str, width: int = 32) -> Path:
    """A 3-layer model with random weights, of a `width` if gpt2; GPT-2 and NeoX style tokenizers have BOS = EOS."""
    from transformers import (
        FalconConfig,
        FalconForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        PreTrainedTokenizerFast,
    )

    folder = Path(_root().name) / f"{kind}{width}"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"] if kind in ("llama", NEEDS_NUMBERS) else ["<|endoftext|>"]
    bpe.train_from_iterator(
        [text(50)],
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=special[0], eos_token=special[-1])
    n = len(tokenizer)
    torch.manual_seed(0)
    shared = {"vocab_size": n, "bos_token_id": 0, "eos_token_id": len(special) - 1}
    rest = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=3, n_head=4, n_positions=64, **shared))
    elif kind == "gpt_neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(max_position_embeddings=64, **rest, **shared))
    elif kind == ADDS_IN_PLACE:
        del rest["intermediate_size"]
        options = {"parallel_attn": True, "multi_query": True, "bias": False, "alibi": False}
        model = FalconForCausalLM(FalconConfig(max_position_embeddings=64, **options, **rest, **shared))
    elif kind == NEEDS_NUMBERS:
        options = {"num_key_value_heads": 2, "num_local_experts": 2}
        model = MixtralForCausalLM(MixtralConfig(max_position_embeddings=64, **options, **rest, **shared))
    else:
        model = LlamaForCausalLM(
            LlamaConfig(max_position_embeddings=64, num_key_value_heads=2, tie_word_embeddings=False, **rest, **shared)
        )
    with torch.no_grad():  # default weights are so small that every next token looks alike
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@functools.cache
def planted_folder() -> Path:
    """The GPT-2, except that the embedding of every seventh token has a common `planted_direction` added to it."""
    from transformers import AutoModelForCausalLM

    folder = Path(_root().name) / "planted"
    shutil.copytree(model_folder("gpt2"), folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[::7] += planted_direction()
    model.save_pretrained(folder)
    return folder


def planted_direction(width: int = 32) -> torch.Tensor:
    """Some vector six times as long as an embedding of the GPT-2, ``[width]``."""
    return torch.randn(width, generator=torch.Generator().manual_seed(7)) / 2


@functools.cache
def language_model(kind: str) -> LanguageModel:
    return load_language_model(ModelSettings(str(model_folder(kind))), "cpu")


@functools.cache
def long_language_model() -> LanguageModel:
    """The Llama in float64, with room for 512 tokens and logits so large that predictions can differ by nats."""
    lm = language_model("llama")
    found = LanguageModel("long", copy.deepcopy(lm.model).double(), lm.tokenizer, lm.sites, lm.fingerprint)
    found.unembedding.data.mul_(5)
    found.max_context = 512
    return found


def random_rows(lm: LanguageModel, n: int, context: int = CONTEXT, seed: int = 0) -> torch.Tensor:
    """Rows of ordinary tokens behind BOS, with one more special token inside every third row."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, len(lm.tokenizer), (n, context), generator=generator)
    rows[:, 0] = lm.tokenizer.bos_token_id
    rows[::3, context // 2] = lm.tokenizer.eos_token_id
    return rows
