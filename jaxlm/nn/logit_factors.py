"""Finds what a traced model's logits are the product of: states and a matrix, so that a loss can multiply them itself.

A model that returns logits has made `[B, T, V]` of them, where a `Readout` wants their factors. Its program says what
they are: from its result backward there may only be casts, constant factors, a bias and a softcap, until the product of
the states and a weight. The program up to the states then stands for the model, and the product is never made twice.

D model width, V vocabulary.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core
from jax.extend.core import primitives as p
from jax.interpreters import partial_eval

UNCHANGED = (p.convert_element_type_p, p.sharding_constraint_p, p.copy_p)
"""What changes no value but for its rounding, or where it is."""


class LogitFactors(NamedTuple):
    """logits = softcap(scale · x · W + bias_scale · bias), where W and bias are inputs of the program."""

    states: core.ClosedJaxpr
    """The program of the same inputs that ends with x, `[…, D]`."""
    head: int
    """Which input is W."""
    vocab_first: bool
    """Whether W is `[V, D]`, and not `[D, V]`."""
    scale: float
    bias: int | None
    """Which input is the bias `[V]`; None: there is none."""
    bias_scale: float
    softcap: float | None


def ending_at(program: core.ClosedJaxpr, values: list[Any]) -> core.ClosedJaxpr:
    """Returns the program of the same inputs whose results are `values`, without what they don't need."""
    jaxpr = program.jaxpr.replace(outvars=values)
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(values), instantiate=True)
    return core.ClosedJaxpr(needed, program.consts)


def depends(program: core.ClosedJaxpr, on: set[int]) -> list[bool]:
    """Returns which results of a program depend on any of its inputs `on`."""
    reached = _reached(program, [v for i, v in enumerate(program.jaxpr.invars) if i in on])
    return [not isinstance(v, core.Literal) and v in reached for v in program.jaxpr.outvars]


def _reached(program: core.ClosedJaxpr, inputs: list[Any]) -> set[Any]:
    reached = set(inputs)
    for eqn in program.jaxpr.eqns:
        if any(not isinstance(v, core.Literal) and v in reached for v in eqn.invars):
            reached |= set(eqn.outvars)
    return reached


def logit_factors(program: core.ClosedJaxpr) -> LogitFactors:
    """Returns the factors of a program's only result.

    ValueError: it is no product of states and one of the inputs; the message ends a sentence.
    """
    while True:
        walk = _Walk(program)
        try:
            return walk.factors()
        except _Jitted:
            program = _inlined(program)


class _Jitted(Exception):
    """The way back leads into a function that was jitted by itself."""


class _Walk:
    """A walk from a program's result back to the product."""

    def __init__(self, program: core.ClosedJaxpr) -> None:
        self.program, jaxpr = program, program.jaxpr
        self.made_by: dict[Any, Any] = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        self.inputs = {v: i for i, v in enumerate(jaxpr.invars)}
        self.variable = _reached(program, list(jaxpr.invars))

    def factors(self) -> LogitFactors:
        """Returns the factors; see `logit_factors`."""
        z: Any = self.program.jaxpr.outvars[0]
        V = z.aval.shape[-1]
        scale, bias, bias_scale, softcap = 1.0, None, 1.0, None
        while (eqn := self._eqn(z)).primitive is not p.dot_general_p:
            kind, first = eqn.primitive, eqn.invars[0]
            if kind in UNCHANGED or (kind is p.reshape_p and first.aval.shape[-1:] == (V,)):
                z = first
            elif kind is p.tanh_p and softcap is None and bias is None:
                # What was a factor of the result until here is the cap; x then is what is divided by it.
                softcap, z = scale, first
            elif kind in (p.mul_p, p.div_p) and (found := self._times(eqn)) is not None:
                z, factor = found
                scale *= factor
            elif kind is p.add_p and bias is None and (added := self._bias(eqn, V)) is not None:
                z, bias = added
                bias_scale = scale
            else:
                raise ValueError(f"{kind.name} comes between the product with the head and the logits")
        return self._product(eqn, V, scale, bias, bias_scale, softcap)

    def _product(
        self, eqn: Any, V: int, scale: float, bias: int | None, bias_scale: float, softcap: float | None
    ) -> LogitFactors:
        (over_x, over_w), (batched, _) = eqn.params["dimension_numbers"]
        x, w = eqn.invars
        matrix = self._matrix(w)
        if batched or tuple(over_x) != (x.aval.ndim - 1,) or matrix is None or w.aval.shape[1 - over_w[0]] != V:
            raise ValueError("the last product is not that of states with a weight as it is")
        head, transposed = matrix
        states = ending_at(self.program, [x])
        return LogitFactors(states, head, (over_w[0] == 1) != transposed, scale, bias, bias_scale, softcap)

    def _eqn(self, v: Any) -> Any:
        """Returns the equation that makes a value."""
        eqn = None if isinstance(v, core.Literal) else self.made_by.get(v)
        if eqn is None:
            raise ValueError("they are no product at all")
        if eqn.primitive is p.jit_p:
            raise _Jitted
        return eqn

    def _times(self, eqn: Any) -> tuple[Any, float] | None:
        """Returns (value, constant) of a product or quotient of the two, or None."""
        a, b = eqn.invars
        if (factor := self._constant(b)) is not None:
            return a, factor if eqn.primitive is p.mul_p else 1 / factor
        if eqn.primitive is p.mul_p and (factor := self._constant(a)) is not None:
            return b, factor
        return None

    def _constant(self, v: Any) -> float | None:
        """Returns a value that depends on no input and is one number, or None."""
        if isinstance(v, core.Literal):
            return float(v.val) if np.size(v.val) == 1 else None
        while v in self.made_by and (eqn := self.made_by[v]).primitive in (p.broadcast_in_dim_p, p.reshape_p):
            v = eqn.invars[0]
            if isinstance(v, core.Literal):
                return float(v.val)
        if v in self.variable or v.aval.size != 1:
            return None
        jaxpr = ending_at(self.program, [v]).jaxpr.replace(invars=[])
        with jax.ensure_compile_time_eval():
            return float(np.asarray(core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, self.program.consts))()[0]).item())

    def _bias(self, eqn: Any, V: int) -> tuple[Any, int] | None:
        """Returns (value, number of the input that is added to it along the vocabulary), or None."""
        for z, v in (eqn.invars, eqn.invars[::-1]):
            while not isinstance(v, core.Literal) and v in self.made_by:
                made = self.made_by[v]
                along_last = made.primitive in UNCHANGED or v.aval.shape[-1:] == (V,)
                if made.primitive is p.broadcast_in_dim_p and made.invars[0].aval.ndim:
                    along_last &= made.params["broadcast_dimensions"][-1] == v.aval.ndim - 1
                elif made.primitive is not p.reshape_p and made.primitive not in UNCHANGED:
                    break
                if not along_last:
                    break
                v = made.invars[0]
            if not isinstance(v, core.Literal) and v in self.inputs and v.aval.shape == (V,):
                return z, self.inputs[v]
        return None

    def _matrix(self, v: Any) -> tuple[int, bool] | None:
        """Returns (number of the input that a matrix is, whether it is its transpose), or None."""
        transposed = False
        while not isinstance(v, core.Literal) and v in self.made_by:
            eqn = self._eqn(v)
            if eqn.primitive is p.transpose_p:
                transposed = not transposed
            elif eqn.primitive not in UNCHANGED:
                return None
            v = eqn.invars[0]
        return (self.inputs[v], transposed) if v in self.inputs and v.aval.ndim == 2 else None


def _inlined(program: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """Returns the program with its jitted functions written out."""

    def run(jaxpr: Any, consts: Any, inputs: Any) -> list[Any]:
        values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
        read = lambda v: v.val if isinstance(v, core.Literal) else values[v]  # noqa: E731
        for eqn in jaxpr.eqns:
            if eqn.primitive is p.jit_p:
                inner = eqn.params["jaxpr"]
                outputs, made = eqn.outvars, run(inner.jaxpr, inner.consts, [read(v) for v in eqn.invars])
            else:
                given = list({v: None for v in eqn.invars if not isinstance(v, core.Literal)})
                outputs = [v for v in eqn.outvars if not isinstance(v, core.DropVar)]
                one = jaxpr.replace(constvars=[], invars=given, outvars=outputs, eqns=[eqn])
                made = core.jaxpr_as_fun(core.ClosedJaxpr(one, []))(*[values[v] for v in given])
            values |= zip(outputs, made, strict=True)
        return [read(v) for v in jaxpr.outvars]

    avals: list[Any] = list(program.in_avals)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
    return jax.make_jaxpr(lambda *inputs: run(program.jaxpr, program.consts, inputs))(*shapes)
