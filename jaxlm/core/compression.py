"""Holds the settings of the solvers that make weights small: formats of few bits, what is pruned, ranks of factors, and
how a run says which of its weights are stored so. Nothing here imports jax."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from jaxlm.core.errors import nearest
from jaxlm.core.ranges import BelowOne, Count, Natural, Positive, Share

Kind = Literal["int8", "int4", "fp8", "mxfp4", "nf4"]
GROUPS: dict[Kind, tuple[int, ...]] = {
    "int8": (0,),
    "int4": (128, 64, 32),
    "fp8": (0, 128),
    "mxfp4": (32,),
    "nf4": (64,),
}
"""How many inputs may share a scale, the default first; 0: all of them, so that each output has one scale."""


@dataclass(frozen=True)
class Format:
    """A Format says how the numbers of a matrix are stored in few bits."""

    kind: Kind = "int4"
    group: Natural | None = None
    """Inputs that share a scale: 32, 64 or 128 (int4); 0 for one scale an output, or 128 for one a block of 128 × 128
    (fp8). None: the format's own, which is 128 for int4 and 0 for fp8."""
    zero_point: bool = False
    """int4: codes are counted from a group's least number, not from the middle."""
    dynamic: bool = False
    """int8, and fp8 with one scale an output: what the matrix multiplies is rounded to the same type too, each row by
    its largest magnitude, so that devices multiply eight bits (W8A8 with dynamic activations)."""

    @property
    def inputs(self) -> int:
        """Returns how many inputs share a scale; 0: all. Raises ValueError for a format that doesn't exist."""
        allowed = GROUPS[self.kind]
        if self.group is not None and self.group not in allowed:
            listed = " or ".join(map(str, allowed))
            raise ValueError(f"group: {self.kind} has no groups of {self.group} inputs; it takes {listed}")
        if self.zero_point and self.kind != "int4":
            raise ValueError(f"zero_point: {self.kind} has none; leave it false, or take int4")
        if self.dynamic and (self.kind not in ("int8", "fp8") or self.group):
            raise ValueError("dynamic: inputs are rounded for int8, and for fp8 with one scale an output; take one")
        return allowed[0] if self.group is None else self.group


ZEROS, SVD = "zeros", "svd"


@dataclass(frozen=True)
class Stored:
    """A Stored says how one matrix of every layer is stored."""

    format: Format | None
    """None: its numbers aren't rounded."""
    scaled: bool = False
    """Its inputs are multiplied by a vector first, as AWQ and SmoothQuant leave it."""
    rank: int = 0
    """The rank of two factors that stand for it, without a format; 0: it is one matrix."""

    @property
    def is_array(self) -> bool:
        """Says whether it is stored as it was, with zeros that stay."""
        return self.format is None and not self.rank

    def __str__(self) -> str:
        if self.format is None:
            return f"{SVD}:{self.rank}" if self.rank else ZEROS
        f = self.format
        flags = ["zero"] * f.zero_point + ["dynamic"] * f.dynamic + ["scaled"] * self.scaled
        return ":".join([f.kind, *([str(f.inputs)] if f.inputs else []), *flags])


def stored(text: str) -> Stored:
    """Returns what a text such as `int4:128:zero:scaled` stands for: a kind, the inputs that share a scale, flags; or
    `zeros`, or `svd:64`, two factors of rank 64. ValueError: this version knows no such format."""
    kind, *rest = text.split(":")
    if kind == ZEROS and not rest:
        return Stored(None)
    if kind == SVD and len(rest) == 1 and rest[0].isdecimal() and int(rest[0]):
        return Stored(None, rank=int(rest[0]))
    kinds = (*get_args(Kind), ZEROS, SVD)
    if kind not in get_args(Kind):
        raise ValueError(f"{text!r} is no format that this version knows{nearest(kind, kinds)}")
    group = int(rest.pop(0)) if rest and rest[0].isdecimal() else 0
    if unknown := [flag for flag in rest if flag not in ("zero", "dynamic", "scaled")]:
        raise ValueError(f"{text!r}: no format has {unknown[0]!r}; take what `jaxlm compress` wrote, or update jaxlm")
    f = Format(kind, group or None, "zero" in rest, "dynamic" in rest)  # type: ignore[arg-type]
    _ = f.inputs  # refuses groups that the kind doesn't have
    return Stored(f, "scaled" in rest)


@dataclass(frozen=True)
class Compression:
    """A Compression says which weights of a model are stored in few bits or as two factors, or have zeros that stay.
    `jaxlm compress` writes it."""

    weights: tuple[str, ...] = ()
    """PATH=FORMAT of each matrix of the layers that isn't stored as plain numbers, such as blocks/q=int4:128, or as two
    factors of a rank, such as blocks/q=svd:64."""

    aware: str = ""
    """Format that the layers' matrices are rounded to wherever they are used, while their gradients reach them as they
    are, such as int4:128 or fp8 (quantization-aware training); empty: none. `jaxlm compress --method nearest` with that
    format then changes nothing."""

    def aware_format(self) -> Format | None:
        """Returns the format that matrices are trained for; None: they are used as they are. ValueError: there is no
        such format."""
        if not self.aware:
            return None
        try:
            how = stored(self.aware)
        except ValueError as error:
            raise ValueError(f"compression.aware: {error}") from None
        if how.format is None or how.scaled or how.format.dynamic:
            raise ValueError(
                f"compression.aware: {self.aware!r} is no format that numbers are rounded to; take int4:128"
            )
        return how.format

    def by_path(self) -> dict[str, Stored]:
        """Returns how each weight is stored by its path. ValueError: an entry isn't PATH=FORMAT, or its format is not
        known."""
        found = {}
        for entry in self.weights:
            path, sign, text = entry.partition("=")
            if not sign:
                raise ValueError(f"compression.weights: {entry!r} is not PATH=FORMAT; leave it to `jaxlm compress`")
            try:
                found[path] = stored(text)
            except ValueError as error:
                raise ValueError(f"compression.weights: {path}: {error}") from None
        return found


@dataclass(frozen=True)
class Nearest:
    """Nearest rounds each number by itself."""

    format: Format = field(default_factory=Format)


@dataclass(frozen=True)
class Gptq:
    """GPTQ (Frantar et al. 2023) rounds inputs one after another, and the later ones make up for the error."""

    format: Format = field(default_factory=Format)
    act_order: bool = True
    """Inputs of larger squares are rounded first. The scales of groups are then those of the weight as it was; without,
    those of the weight as it is when its group comes."""
    damp: Positive = 0.01
    """What is added to the squares of every input, as a share of their mean."""


@dataclass(frozen=True)
class Awq:
    """AWQ (Lin et al. 2024) multiplies the rows of inputs with large magnitudes before they are rounded."""

    format: Format = field(default_factory=Format)
    ratios: Count = 20
    """How many exponents of the magnitudes are tried: 0, 1/20, 2/20 …"""


@dataclass(frozen=True)
class Smooth:
    """SmoothQuant (Xiao et al. 2023) moves part of the inputs' range into the weight, so that both fit few bits."""

    format: Format = field(default_factory=lambda: Format("int8"))
    alpha: Share = 0.5
    """How much of the range moves: 0 none, 1 all."""


@dataclass(frozen=True)
class Sparsity:
    """A Sparsity says how many of a matrix's numbers become zero."""

    share: BelowOne = 0.5
    """The share of all numbers."""
    kept: Natural = 0
    """With `of`: how many of every `of` inputs of an output stay (2 of 4); `share` then says nothing."""
    of: Natural = 0

    def check(self) -> None:
        """Raises ValueError for a pattern that isn't one."""
        if (self.kept, self.of) != (0, 0) and not 0 < self.kept < self.of:
            raise ValueError(f"kept: {self.kept} of {self.of} is no pattern; it must be such as 2 of 4")


@dataclass(frozen=True)
class Magnitude:
    """Magnitude sets the least numbers of a matrix to zero."""

    sparsity: Sparsity = field(default_factory=Sparsity)


@dataclass(frozen=True)
class Wanda:
    """Wanda (Sun et al. 2024) sets to zero, in each output, the numbers whose magnitude times their input's norm is
    least."""

    sparsity: Sparsity = field(default_factory=Sparsity)


@dataclass(frozen=True)
class SparseGpt:
    """SparseGPT (Frantar and Alistarh 2023) sets numbers to zero input by input, and the later ones make up for the
    error."""

    sparsity: Sparsity = field(default_factory=Sparsity)
    damp: Positive = 0.01
    """What is added to the squares of every input, as a share of their mean."""
    block: Count = 128
    """Inputs among which the share of zeros is kept."""


@dataclass(frozen=True)
class Svd:
    """SVD replaces a matrix by two narrow ones whose products with the recorded inputs are the nearest that their rank
    allows (whitened singular values, as in SVD-LLM, Wang et al. 2025)."""

    rank: Count = 64
    damp: Positive = 0.01
    """What is added to the squares of every input, as a share of their mean: what the text holds little of counts a
    little too."""
