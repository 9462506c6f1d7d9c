"""A model without its weights: its tensors have shapes but no numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn


@contextmanager
def one_text_a_row() -> Iterator[None]:
    """Have transformers treat each row as one sequence, which a causal mask serves.

    transformers normally reads this from the positions' values. Without values it would make masks ``[rows, context,
    context]``, and other kernels would run than in a real pass.
    """
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    look = getattr(masking_utils, name, None)
    if look is not None:
        setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        if look is not None:
            setattr(masking_utils, name, look)


def outline(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of `folder` without its weights; call and run it inside `saelab.memory.no_numbers`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
