"""Autoencoders of attention heads' outputs (`hook_z`, heads side by side), after Kissane et al. 2024, arXiv 2406.17759.

heads.py      each feature's share of each head, by decoder norms
direct.py     direct feature attribution: a pre-activation as a sum over heads and source positions
sources.py    the same as a sum over the features of a residual-stream autoencoder at the sources
tree.py       the same again for the features found, down to the embedding
logits.py     what features add to a logit
overview.py   what heads attend to (scores.py), families of features (families.py), polysemantic heads (polysemantic.py)
induction.py  how much earlier text must come back for heads and features to act
ablation.py   what changes without a feature, the error kept; causal.py tests attributions by it

Everything linear is computed in float64 from one pass in the model's own precision. What is not linear is frozen as
it is in that pass: attention patterns, and the scale by which a norm divides. So a contribution is what a part adds,
not what would change without it: with the part removed, patterns and scales would change too.
"""
