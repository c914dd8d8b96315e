"""Gives a model initial weights and learning rates under which the settings that are best for a smaller one are best
for it too: μP for the width (Yang et al. 2022), CompleteP for the depth (Dey et al. 2025).

A formula multiplies logits by 1/m (m: width over base width), scores by 1/√C once more (C: head width) and each half of
a layer by d^-α (d: layers over base layers). Here these factors are part of weights: of the head, or of the norm before
a tied one; of the queries; of what writes to the residual stream. A weight θ·w whose gradient is taken as that of w,
and whose update is θ times that of w, is trained as the formula says, so that no forward pass and no published file has
to know.
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxlm.core import spec, tree
from jaxlm.core.spec import Constant, EachLayer, FanIn, Init, Normal, Spec, is_spec
from jaxlm.core.transfer import Transfer
from jaxlm.nn.family import Family, ModelConfig
from jaxlm.training.rate_scales import Scale, Scales
from jaxlm.weights.grow.depth import silent

Flat = Mapping[str, Spec]


def scaled(c: Transfer, family: Family, config: Any) -> tuple[Any, Scales]:
    """Returns the specs of a model with the initial weights that the transfer asks for, and how each weight is trained.

    Without a transfer, and for a model of the base's own sizes, these are the family's specs and no scales. ValueError:
    the family doesn't say what is needed, or the transfer can't be had.
    """
    specs = family.specs(config)
    if c.method == "none":
        return specs, {}
    _check(c, family, config)
    flat = tree.flatten(specs, is_spec)
    m, d = config.width / c.base_width, config.layers / (c.base_layers or config.layers)
    base = _base_depth(c, family, config, flat)
    _check_laws(flat, family, config)
    folds = _folds(c, specs, flat, config.tied, m, d)
    found = {path: _scale(s, folds.get(path, 1.0), m, d, c.depth_alpha) for path, s in flat.items()}
    if all(scale == Scale() for scale in found.values()):
        return specs, {}

    def one(path: str, s: Spec) -> Spec:
        strength = _strength(s.init)
        by = found[path].fold * _width_factor(s, m)
        if strength:
            by *= _strength(base[path].init) / strength  # type: ignore[operator]
        return s._replace(init=_times(s.init, by))

    return tree.map_named(one, specs), found


def _check(c: Transfer, family: Family, config: ModelConfig) -> None:
    """Refuses what a transfer can't be had for. ValueError: one line says what."""
    if c.base_width is None:
        raise ValueError(
            "transfer.base_width: mup needs the width of the model that the settings were tuned on; set it (this one's "
            f"model.width is {config.width})"
        )
    if family.kind == "encoder_decoder":
        raise ValueError(
            "transfer.method: mup is for decoders and encoders; how the settings of an encoder-decoder change with its "
            "width isn't known here; set it to none"
        )
    if c.base_layers is not None and family.kind != "decoder":
        raise ValueError(
            "transfer.base_layers: only decoders add what a layer computes to the residual stream as it is; an encoder "
            "is tuned at its own depth; leave it out"
        )


def _base_depth(c: Transfer, family: Family, config: Any, flat: Flat) -> Flat:
    """Returns the specs of the model with the base's number of layers, whose initial weights this one's have."""
    if c.base_layers is None or c.base_layers == config.layers:
        return flat
    base = tree.flatten(family.specs(config.at_depth(c.base_layers)), is_spec)
    if base.keys() != flat.keys():
        raise ValueError(f"transfer.base_layers: a model of {c.base_layers} layers has other weights; choose more")
    return base


def _check_laws(flat: Flat, family: Family, config: Any) -> None:
    """Refuses initial weights of which it isn't known how they change with the width. ValueError: there are such."""
    for path, s in flat.items():
        if _strength(s.init) is None:
            raise ValueError(
                f"transfer.method: {path} begins with an initializer of its own, and how that changes with the width "
                "isn't known; set it to none"
            )
    wider = tree.flatten(family.specs(config.at_width(2 * config.width)), is_spec)
    for path, s in flat.items():
        if _strength(s.init) != _strength(wider[path].init):
            raise ValueError(
                f"transfer.method: {path} of this family changes with the width by a law of its own, which mup doesn't "
                "know; set it to none"
            )


def _folds(c: Transfer, specs: Any, flat: Flat, tied: bool, m: float, d: float) -> dict[str, float]:
    """Returns by path the factors of products that weights take into themselves."""
    logits = c.output_factor / m
    out = {path: c.input_factor for path, s in flat.items() if s.role == "table"}
    out |= {path: logits for path, s in flat.items() if s.role == "head"}
    out |= {path: 1 / m for path, s in flat.items() if s.role == "router"}
    if tied and (logits != 1 or c.input_factor != 1):
        last = [path for path, s in flat.items() if s.before_head]
        if not last:
            raise ValueError(
                "transfer.method: this family doesn't say which norm stands before its tied head (Spec.before_head); "
                "set model.tied to false"
            )
        out |= dict.fromkeys(last, logits / c.input_factor)
    if not any(s.scores for s in flat.values()):
        raise ValueError(
            "transfer.method: this family doesn't say which weights attention's scores grow with (Spec.scores); set it "
            "to none"
        )
    for stack, inner in spec.stacks(specs).items():
        scores = {path: s for path, s in inner.items() if s.scores}
        norms = {path: s for path, s in scores.items() if s.role == "norm"}
        for path, s in (norms or scores).items():
            out[f"{stack}/{path}"] = math.sqrt(c.base_head_width / s.shape[-1])
        for path in silent(inner) if d != 1 else ():
            out[f"{stack}/{path}"] = out.get(f"{stack}/{path}", 1.0) * d**-c.depth_alpha
    return out


def _scale(s: Spec, fold: float, m: float, d: float, alpha: float) -> Scale:
    """Returns how a weight is trained, by what it does.

    A hidden matrix has Adam's rate over m. Muon's updates are as large as a wider matrix needs them already, but for a
    router, whose outputs don't get more: with its fold of 1/m its rate falls by √m.
    """
    in_layers = "layers" in s.axes
    depth = d ** (alpha - 1) if in_layers else 1.0
    return Scale(
        fold,
        adam=depth / m if _hidden(s) else depth,
        muon=depth * math.sqrt(m) if s.role == "router" else depth,
        eps=(d**-alpha if in_layers else 1.0) / m,
    )


def _hidden(s: Spec) -> bool:
    """Returns whether a weight has inputs and outputs that get more with the width."""
    return s.is_matrix and s.role in ("matrix", "absorbed") and not s.below_layers


def _width_factor(s: Spec, m: float) -> float:
    """Returns what the deviation of the family's initial weights is multiplied by: that of hidden matrices falls by √m,
    that of others stays."""
    one = s.init.one if isinstance(s.init, EachLayer) else s.init
    if isinstance(one, FanIn):
        return 1.0 if _hidden(s) else math.sqrt(m)
    return 1 / math.sqrt(m) if isinstance(one, Normal) and _hidden(s) else 1.0


def _strength(init: Init) -> float | None:
    """Returns the constant of an initializer; None: it isn't one of `core.spec`."""
    if isinstance(init, EachLayer):
        return _strength(init.one)
    if isinstance(init, Normal):
        return init.std
    if isinstance(init, FanIn):
        return init.scale
    if isinstance(init, Constant):
        return init.value
    return 0.0 if init is spec.zeros else 1.0 if init is spec.ones else None


def _times(init: Init, by: float) -> Init:
    """Returns the initializer whose values are `by` times those of another."""
    if by == 1 or init is spec.zeros:
        return init
    if isinstance(init, EachLayer):
        return EachLayer(_times(init.one, by))
    if isinstance(init, Normal):
        return Normal(init.std * by)
    if isinstance(init, FanIn):
        return FanIn(init.axes, init.scale * by)
    strength = _strength(init)
    assert strength is not None
    return Constant(strength * by)
