"""Holds the settings of the solvers that make weights small: formats of few bits, what is pruned, and how a run says
which of its weights are stored so. Nothing here imports jax."""

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

    @property
    def inputs(self) -> int:
        """Returns how many inputs share a scale; 0: all. Raises ValueError for a format that doesn't exist."""
        allowed = GROUPS[self.kind]
        if self.group is not None and self.group not in allowed:
            listed = " or ".join(map(str, allowed))
            raise ValueError(f"group: {self.kind} has no groups of {self.group} inputs; it takes {listed}")
        if self.zero_point and self.kind != "int4":
            raise ValueError(f"zero_point: {self.kind} has none; leave it false, or take int4")
        return allowed[0] if self.group is None else self.group


ZEROS = "zeros"


@dataclass(frozen=True)
class Stored:
    """A Stored says how one matrix of every layer is stored."""

    format: Format | None
    """None: as it was, with zeros that stay."""
    scaled: bool = False
    """Its inputs are multiplied by a vector first, as AWQ and SmoothQuant leave it."""

    def __str__(self) -> str:
        if self.format is None:
            return ZEROS
        f = self.format
        flags = ["zero"] * f.zero_point + ["scaled"] * self.scaled
        return ":".join([f.kind, *([str(f.inputs)] if f.inputs else []), *flags])


def stored(text: str) -> Stored:
    """Returns what a text such as `int4:128:zero:scaled` stands for: a kind, the inputs that share a scale, flags; or
    `zeros`. ValueError: this version knows no such format."""
    kind, *rest = text.split(":")
    if kind == ZEROS and not rest:
        return Stored(None)
    kinds = (*get_args(Kind), ZEROS)
    if kind not in kinds or kind == ZEROS:
        raise ValueError(f"{text!r} is no format that this version knows{nearest(kind, kinds)}")
    group = int(rest.pop(0)) if rest and rest[0].isdecimal() else 0
    if unknown := [flag for flag in rest if flag not in ("zero", "scaled")]:
        raise ValueError(f"{text!r}: no format has {unknown[0]!r}; take what `jaxlm compress` wrote, or update jaxlm")
    f = Format(kind, group or None, "zero" in rest)  # type: ignore[arg-type]
    _ = f.inputs  # refuses groups that the kind doesn't have
    return Stored(f, "scaled" in rest)


@dataclass(frozen=True)
class Compression:
    """A Compression says which weights of a model are stored in few bits, or have zeros that stay. `jaxlm compress`
    writes it."""

    weights: tuple[str, ...] = ()
    """PATH=FORMAT of each matrix of the layers that isn't stored as plain numbers, such as blocks/q=int4:128."""

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


MethodName = Literal["nearest", "gptq", "awq", "smooth", "magnitude", "wanda", "sparsegpt"]
PRUNES = ("magnitude", "wanda", "sparsegpt")
SETTINGS: dict[MethodName, tuple[str, ...]] = {
    "nearest": ("format", "group", "zero_point", "budget"),
    "gptq": ("format", "group", "zero_point", "budget", "act_order", "damp"),
    "awq": ("format", "group", "zero_point", "budget", "ratios"),
    "smooth": ("format", "alpha"),
    "magnitude": ("share", "pattern"),
    "wanda": ("share", "pattern"),
    "sparsegpt": ("share", "pattern", "damp", "block"),
}
"""What can be set of each method."""


@dataclass(frozen=True)
class Settings:
    """These settings say how a model is made small; None is the method's own value, where it has one."""

    method: MethodName = "gptq"
    """nearest, gptq, awq: few bits, rounded each by itself, with later inputs making up for earlier errors, or with
    large inputs scaled first; smooth: int8 with part of the inputs' range moved into the weights; magnitude, wanda,
    sparsegpt: zeros, by magnitude, by magnitude times the inputs' norm, or with later inputs making up for them."""
    format: Kind | None = None
    """Of few bits (int4; smooth: int8)."""
    group: Natural | None = None
    """Inputs that share a scale (int4: 128, or 64 or 32; fp8: 0 for one an output, or blocks of 128)."""
    zero_point: bool | None = None
    """int4: codes are counted from a group's least number (no)."""
    budget: str | None = None
    """Bits of each compressed weight on average, such as 5.5bits, or bytes of all of them together, such as 80MB: each
    matrix then gets int4, int8 or fp8 by the error that a byte saves, instead of one format."""
    act_order: bool | None = None
    """gptq: inputs of larger squares are rounded first (yes)."""
    damp: Positive | None = None
    """gptq, sparsegpt: what is added to the squares of every input, as a share of their mean (0.01)."""
    ratios: Count | None = None
    """awq: how many exponents of the magnitudes are tried (20)."""
    alpha: Share | None = None
    """smooth: how much of the inputs' range moves (0.5)."""
    share: BelowOne | None = None
    """Pruning: the share of each matrix's numbers that become zero (0.5)."""
    pattern: str | None = None
    """Pruning: how many of every few inputs stay instead of a share of all, such as 2:4."""
    block: Count | None = None
    """sparsegpt: inputs among which the share of zeros is kept (128)."""
    skip: tuple[str, ...] = ()
    """Patterns of matrices that stay as they are, such as blocks/down. Embeddings, heads, norms, routers and biases
    always do."""

    @property
    def prunes(self) -> bool:
        """Says whether numbers become zero; else they get few bits."""
        return self.method in PRUNES

    def solver(self, f: Format | None = None) -> "Nearest | Gptq | Awq | Smooth | Magnitude | Wanda | SparseGpt":
        """Returns the settings of the method's solver; `f` takes the place of the format. ValueError, which names a
        field: it isn't the method's, or out of its range."""
        given = {name for names in SETTINGS.values() for name in names if getattr(self, name) is not None}
        for name in sorted(given - set(SETTINGS[self.method])):
            owners = [method for method, names in SETTINGS.items() if name in names]
            raise ValueError(f"{name}: {self.method} has no such setting; leave it out, or choose {', '.join(owners)}")
        if self.budget and given & {"format", "group", "zero_point"}:
            raise ValueError("budget: chooses formats itself; leave format, group and zero_point out")
        own = {name: getattr(self, name) for name in ("act_order", "damp", "ratios", "alpha", "block") if name in given}
        if self.prunes:
            kinds = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGpt}
            return kinds[self.method](_sparsity(self.share, self.pattern), **own)
        if f is None:
            f = Format(
                self.format or ("int8" if self.method == "smooth" else "int4"), self.group, bool(self.zero_point)
            )
        _ = f.inputs
        if f.kind == "nf4" and self.method != "nearest":
            raise ValueError(f"format: nf4 is rounded to the nearest alone; {self.method} takes int4, int8, fp8, mxfp4")
        return {"nearest": Nearest, "gptq": Gptq, "awq": Awq, "smooth": Smooth}[self.method](f, **own)


def _sparsity(share: float | None, pattern: str | None) -> Sparsity:
    if pattern is None:
        return Sparsity(0.5 if share is None else share)
    if share is not None:
        raise ValueError("pattern: says how many numbers stay, and so does share; leave one out")
    kept, _, of = pattern.partition(":")
    if not (kept.isdecimal() and of.isdecimal()):
        raise ValueError(f"pattern: {pattern!r} is not KEPT:OF, such as 2:4")
    made = Sparsity(kept=int(kept), of=int(of))
    try:
        made.check()
    except ValueError as error:
        raise ValueError(str(error).replace("kept:", "pattern:")) from None
    return made


@dataclass(frozen=True)
class Calibration:
    """A Calibration says which text a model is made small on."""

    calibration: tuple[str, ...] = ()
    """Sources, as `data.train` takes them, read as the model's own training or task would read them."""
    rows: Count = 128
    """Rows of it that are read, from the beginning of each source."""
    length: Count | None = None
    """Tokens of a row; None: 512, or as many as the model has positions."""
    batch_size: Count = 8
    """Rows that are computed at once."""


@dataclass(frozen=True)
class Comparison:
    """A Comparison says how a model that was made small is compared with what it was."""

    data: tuple[str, ...] = ()
    """Sources that both are evaluated on; none: the data of the run that the model is. They must not be those of the
    calibration."""
    batches: Natural = 0
    """At most so many batches of each source; 0: all."""
    compare: Literal["all", "quality", "sizes"] = "all"
    """all: bytes, losses and scores, divergence of predictions, and the speed of writing text; quality: all but the
    speed; sizes: bytes alone. All but sizes hold both models in memory."""
