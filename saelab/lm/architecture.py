"""Which language model a folder holds, from its config.json: transformers' class for it, and how it computes attention.

A model that also reads images or sound holds a language model under a config of its own (`text_config`). If
transformers has a class for that language model, it is loaded without the rest: its sites have the names of the text
model, and the weights of the other parts need no memory.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from saelab.errors import SaelabError, did_you_mean

_SAME = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
"""Model types of text models without a class that predicts the next token, and the types that compute the same on text.
They give a token three positions, for images; in a text all three are the same."""


@dataclass(frozen=True)
class Architecture:
    model_class: Any
    """A subclass of transformers' PreTrainedModel."""
    config: Any
    """The config that the class takes."""
    attention: Literal["sdpa", "eager"]
    renamed: dict[str, str] | None
    """Patterns of the checkpoint's names, and what `model_class` calls them; None if it uses the names as they are."""


def read_architecture(folder: Path, attention: str = "auto") -> Architecture:
    """The language model in `folder`, with `attention` as `ModelSettings` has it.

    Raises SaelabError, to be completed with the model's name, if saelab cannot use such a model.
    """
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers import __version__ as version

    facts = _facts(folder)
    kind = facts["model_type"]
    if kind not in CONFIG_MAPPING:
        if facts.get("auto_map"):
            raise SaelabError("it comes with code of its own (auto_map), and saelab runs no code from model folders")
        raise SaelabError(
            f"transformers {version} does not know its model_type {kind!r}; a newer version may."
            f"{did_you_mean(kind, CONFIG_MAPPING.keys())}"
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    text = config.get_text_config()
    if any(getattr(part, "is_encoder_decoder", False) for part in (config, text)):
        raise SaelabError(
            f"it is an encoder-decoder ({kind}), and saelab reads models that only predict the next token"
        )
    if _is_encoder(text):
        raise SaelabError(
            f"it is an encoder ({kind}), in which a token sees those that follow, and saelab reads models that predict "
            "the next token"
        )
    model_class, config, renamed = _text_model(config)
    if model_class is None:
        what = "has a language model that transformers only loads with the rest" if text is not config else ""
        raise SaelabError(
            f"it {what or 'is not a language model'} ({kind}), and saelab reads models that predict the next token of "
            "text; name a text model, such as the one that it was made from"
        )
    return Architecture(model_class, config, _attention(attention, model_class, config), renamed)


def _facts(folder: Path) -> dict[str, Any]:
    """The content of config.json."""
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SaelabError(f"its config.json is not JSON ({error})") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("model_type"), str):
        raise SaelabError("its config.json has no model_type, so transformers does not know what it is")
    text = facts.get("text_config")
    for part in (facts, text if isinstance(text, dict) else {}):
        quantized = part.get("quantization_config") or part.get("compression_config")
        if quantized:
            how = quantized.get("quant_method") if isinstance(quantized, dict) else None
            raise SaelabError(
                f"it is quantised{f' ({how})' if how else ''}, and saelab runs models in float32, bfloat16 or float16; "
                "use the model that it was made from, or save it with transformers after `model.dequantize()`"
            )
    return facts


def _is_encoder(text: Any) -> bool:
    """Whether a token sees those that follow it: in BERT, in encoders made from decoders, in PaliGemma's prompts."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    masked = type(text) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(text, "is_decoder", False)
    return masked or getattr(text, "use_bidirectional_attention", None) in (True, "all")


def _text_model(config: Any) -> tuple[Any, Any, dict[str, str] | None]:
    """The class, config and renaming of the language model of `config`; the class is None if there is none."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    text = config.get_text_config()
    nested = text is not config
    if text.model_type in _SAME:
        facts = {name: value for name, value in text.to_dict().items() if name != "model_type"}
        text = CONFIG_MAPPING[_SAME[text.model_type]](**facts)
    found: Any = [MODEL_FOR_CAUSAL_LM_MAPPING.get(type(part), None) for part in (config, text)]
    whole, inner = found
    if not nested or inner is None or (whole and inner.__name__ not in SUPPORTED_ARCHITECTURES):
        return whole, (text if whole and whole.config_class is type(text) else config), None
    if hasattr(config, "tie_word_embeddings"):  # the whole model goes by its own
        text.tie_word_embeddings = config.tie_word_embeddings
    if whole is inner:  # transformers renames the weights itself
        return inner, text, None
    prefix = r"^(?:model\.)?(?:language_model|text_model)\."
    base = re.escape(inner.base_model_prefix)
    return inner, text, {rf"{prefix}lm_head\.": "lm_head.", rf"{prefix}(?:{base}\.)?(?!lm_head\.)": f"{base}."}


def _attention(choice: str, model_class: Any, config: Any) -> Literal["sdpa", "eager"]:
    # sdpa would leave the cap out
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    fused = getattr(model_class, "_supports_sdpa", False) and not capped
    if choice == "sdpa" and not fused:
        why = "which caps its attention scores" if capped else "for which transformers does not have it"
        raise SaelabError(
            f"sdpa attention is not possible with {model_class.__name__}, {why}; set model.attention=auto or eager"
        )
    if choice == "eager" and adds_biases_twice(config):
        raise SaelabError("transformers' eager attention adds Falcon's position biases twice; set model.attention=auto")
    return "sdpa" if fused and choice != "eager" else "eager"


def adds_biases_twice(config: Any) -> bool:
    """Whether transformers' eager attention adds the position biases twice, as in a Falcon with ALiBi."""
    return config.model_type == "falcon" and config.alibi
