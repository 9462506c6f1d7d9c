"""A model without its weights: its tensors have shapes and hold no numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn


def no_numbers() -> Any:
    """A context in which tensors have shape, dtype and device, and no memory; they live as long as it does."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


@contextmanager
def one_text_a_row() -> Iterator[None]:
    """Let transformers take rows for what they are here: one sequence each, for which a causal mask will do.

    It finds that out from the positions' values; where there are none, it makes masks ``[rows, context, context]``,
    and other kernels run than otherwise.
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
    """The model of `folder` without its weights; made, and run, within `no_numbers`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
