"""The buffers that are planned are those that a source makes."""

import numpy as np
import pytest
import torch

from saelab.activations.needs import stream_needs
from saelab.activations.settings import StreamSettings
from saelab.activations.shuffle import Group, cut_group, group_tokens
from saelab.activations.stream import ActivationBatch


@pytest.mark.parametrize("gradients", [False, True])
def test_a_stream_needs_its_buffer_or_its_sample_and_an_order(gradients: bool) -> None:
    def planned(buffer: int) -> dict[str, int]:
        needs = stream_needs(
            StreamSettings(buffer), 32, "memory", batch_tokens=256, sample_tokens=4096, gradients=gradients
        )
        return {need.what: need.bytes for need in needs}

    def held(tokens: int) -> int:
        ids, x = torch.zeros(3, dtype=torch.long), torch.zeros(3, 32)
        group = Group(tokens)
        group.add(ActivationBatch(x, ids, ids, ids, x if gradients else None))
        assert group._memory
        return sum(field.nbytes for field in group._memory.fields)

    group = 19 * 256
    assert planned(5000)["shuffle buffer"] == held(group)
    assert planned(5000)["order of the buffer"] == sum(index.nbytes for index in cut_group(group, 256, 0, 0))
    assert planned(1000)["shuffle buffer"] == held(4096) > held(group_tokens(1000, 256))  # all tokens are sampled
    assert planned(1000)["sample"] == 2 * np.zeros((4096, 32), np.float32).nbytes
