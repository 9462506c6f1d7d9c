"""The comparison of remedies: shares are of the features that were dead, and the remedies begin from the same state."""

import argparse

import revive
import torch


def test_each_remedy_goes_on_from_the_same_dead_features(capsys):
    torch.manual_seed(0)
    x = torch.rand(2000, 16).square() @ torch.randn(16, 16)
    sizes = {"n_features": 64, "k": 3, "batch": 50, "before": 12, "after": 12, "dead_after": 150}
    args = argparse.Namespace(lr_before=0.5, lr=2e-3, only=None, **sizes)
    found = revive.study(x, x[-500:], args, seed=0)
    assert list(found) == list(revive.REMEDIES)
    died = found["none"]["died"]
    assert died > 5 and all(each["died"] == died for each in found.values())
    for each in found.values():
        assert 0 <= each["back"] <= 1 and 0 <= each["back_held_out"] <= 1 and each["fvu"] > 0
        assert each["dead"] == round(died * (1 - each["back"])) + each["newly_dead"]
        by_reason = {key: n for key, n in each.items() if key.startswith("died: ")}
        assert 0 < sum(by_reason.values()) <= died and by_reason.items() <= found["none"].items()
        assert all(each[key.replace("died", "back")] <= n for key, n in by_reason.items())
    assert revive.by_reason([found]).count("\n") == 1 + len(revive.REASONS)
    assert found["aux_k, lift"]["back"] > found["none"]["back"]
    assert "dead after 600 tokens" in capsys.readouterr().out
