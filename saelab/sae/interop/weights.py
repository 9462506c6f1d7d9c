"""From the tensors of a peer's file to an autoencoder, with every size checked before memory is allocated."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from saelab.errors import SaelabError
from saelab.sae.interop.stored import FLOATS, Config, Stored
from saelab.sae.model import SparseAutoencoder


class From(NamedTuple):
    """Where a parameter is in the file."""

    name: str
    turned: bool = False
    """Whether the file has its transpose."""


def built(
    stored: Stored,
    names: Mapping[str, From],
    config: Config,
    sizes: Mapping[str, int | None],
    *,
    transcodes: bool = False,
    also: tuple[str, ...] = (),
) -> SparseAutoencoder:
    """An autoencoder with the weights of `stored`; its k is n_features, so that nothing limits the active features.

    `names` says where W_enc, W_dec, b_enc, b_dec and W_skip are; b_enc and W_skip may be missing in it. `sizes` are
    what `config` says of d_in, d_out and n_features, None if it says nothing. `also` are names of tensors that the
    caller reads. A W_dec that can only be the transpose of what the format says is turned.

    Raises SaelabError if a tensor is missing, unknown, of another shape or no float, or if the sizes contradict.
    """
    wanted = {place.name for place in names.values()} | set(also)
    if missing := sorted(wanted - stored.kinds.keys()):
        raise SaelabError(f"{stored.path}: {missing[0]} is missing; found {stored.found()}")
    if unknown := sorted(stored.kinds.keys() - wanted):
        raise SaelabError(
            f"{stored.path}: has tensors that saelab does not know what to do with: {', '.join(unknown)[:200]}"
        )
    n_features, d_in = _matrix(stored, names["W_enc"])
    d_out = _matrix(stored, names["W_dec"])
    if transcodes:
        d_out = d_out[0] if d_out[1] == n_features != d_out[0] else d_out[1]
    else:
        d_out = d_in
    for what, found in {"d_in": d_in, "d_out": d_out, "n_features": n_features}.items():
        said = sizes.get(what)
        if said is not None and said != found:
            raise SaelabError(
                f"{config.path}: says {what} = {said}, but {names['W_enc'].name} in {stored.path.name} is "
                f"{stored.kinds[names['W_enc'].name]} and {names['W_dec'].name} is {stored.kinds[names['W_dec'].name]}"
            )
    shapes = {
        "W_enc": (n_features, d_in),
        "W_dec": (n_features, d_out),
        "b_enc": (n_features,),
        "b_dec": (d_out,),
        "W_skip": (d_out, d_in),
    }
    turned = {name: check_shape(stored, place, shapes[name]) for name, place in names.items()}
    sae = SparseAutoencoder(d_in, n_features, n_features, d_out=d_out if transcodes else None)
    if "W_skip" in names:
        sae.W_skip = torch.nn.Parameter(torch.zeros(d_out, d_in))
    for name, place in names.items():
        tensor = stored.read(place.name)
        sae.get_parameter(name).data.copy_(tensor.T if turned[name] else tensor)
    return sae


def _matrix(stored: Stored, place: From) -> tuple[int, int]:
    """The shape of a matrix of the file, as ours."""
    shape = stored.kinds[place.name].shape
    if len(shape) != 2 or 0 in shape:
        raise SaelabError(f"{stored.path}: {place.name} is {stored.kinds[place.name]}, not a matrix")
    return (shape[1], shape[0]) if place.turned else (shape[0], shape[1])


def check_shape(stored: Stored, place: From, shape: tuple[int, ...]) -> bool:
    """Whether the tensor must be turned to be ours, of `shape`. Raises SaelabError if it is of another or no float."""
    kind = stored.kinds[place.name]
    here = shape[::-1] if place.turned else shape
    turnable = len(shape) == 2 and kind.shape == here[::-1]
    if (kind.shape != here and not turnable) or kind.dtype not in FLOATS:
        raise SaelabError(f"{stored.path}: {place.name} is {kind}, not {list(here)} float")
    return place.turned if kind.shape == here else not place.turned


def vector(stored: Stored, name: str, n: int) -> Tensor:
    """The tensor `name` as ``[n]`` float32; one number stands for n equal ones. Raises SaelabError if it is neither."""
    kind = stored.kinds.get(name)
    if kind is None:
        raise SaelabError(f"{stored.path}: {name} is missing; found {stored.found()}")
    if kind.shape not in ((n,), (1,), ()) or kind.dtype not in FLOATS:
        raise SaelabError(f"{stored.path}: {name} is {kind}, not [{n}] float")
    return stored.read(name).float().reshape(-1).clone()


@torch.no_grad()
def fold_decoder_norms(sae: SparseAutoencoder) -> None:
    """Give every decoder row length 1 and its encoder row and bias the factor: reconstructions stay the same.

    Selection is then that of pre-activations times decoder norms, and so are the values.
    """
    norms = torch.linalg.vector_norm(sae.W_dec, dim=1).clamp_min(1e-8)
    sae.W_dec.div_(norms[:, None])
    sae.W_enc.mul_(norms[:, None])
    sae.b_enc.mul_(norms)


@torch.no_grad()
def fold_gate(sae: SparseAutoencoder, gate_bias: Tensor, magnitude_bias: Tensor, r_mag: Tensor) -> None:
    """Make it a gated autoencoder, whose W_enc is that of the gate: all three ``[n_features]``.

    With u = x W_enc an entry is active if u + b_gate > 0, and its value is relu(m), m = exp(r) u + b_mag. As exp(r) is
    positive, u > -b_gate if and only if m > b_mag - exp(r) b_gate. So m is a linear encoder's pre-activation, and this
    bound, or 0 if it is larger, the threshold of the feature.
    """
    growth = r_mag.exp()
    sae.W_enc.mul_(growth[:, None])
    sae.b_enc.copy_(magnitude_bias)
    sae.threshold = (magnitude_bias - growth * gate_bias).clamp_min(0)
