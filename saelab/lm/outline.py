"""A model without its weights: its tensors have shapes but no numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from saelab.lm.architecture import read_architecture


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


def outline(folder: Path, dtype: torch.dtype = torch.float32, attention: str = "auto") -> nn.Module:
    """The model of `folder` without its weights; call and run it inside `saelab.memory.no_numbers`.

    Raises SaelabError as `read_architecture`.
    """
    from transformers import AutoModelForCausalLM

    architecture = read_architecture(folder, attention)
    model = AutoModelForCausalLM.from_config(
        architecture.config, dtype=dtype, attn_implementation=architecture.attention, trust_remote_code=False
    )
    return model.eval()
