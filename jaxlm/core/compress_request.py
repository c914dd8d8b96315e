"""Holds what is asked of `jaxlm compress`: a method and its settings, the text that it is calibrated on, and how the
model is compared with what it was. Nothing here imports jax."""

from dataclasses import dataclass
from typing import Literal

from jaxlm.core.compression import (
    Awq,
    Format,
    Gptq,
    Kind,
    Magnitude,
    Nearest,
    Smooth,
    SparseGpt,
    Sparsity,
    Stored,
    Svd,
    Wanda,
)
from jaxlm.core.ranges import BelowOne, Count, Natural, Positive, Share

MethodName = Literal["nearest", "gptq", "awq", "smooth", "magnitude", "wanda", "sparsegpt", "svd"]
PRUNES = ("magnitude", "wanda", "sparsegpt")
SETTINGS: dict[MethodName, tuple[str, ...]] = {
    "nearest": ("format", "group", "zero_point", "dynamic", "budget"),
    "gptq": ("format", "group", "zero_point", "dynamic", "budget", "act_order", "damp"),
    "awq": ("format", "group", "zero_point", "dynamic", "budget", "ratios", "own_scales"),
    "smooth": ("format", "dynamic", "alpha", "own_scales"),
    "magnitude": ("share", "pattern"),
    "wanda": ("share", "pattern"),
    "sparsegpt": ("share", "pattern", "damp", "block"),
    "svd": ("share", "rank", "damp"),
}
"""What can be set of each method."""


@dataclass(frozen=True)
class Settings:
    """These settings say how a model is made small; None is the method's own value, where it has one."""

    method: MethodName = "gptq"
    """nearest, gptq, awq: few bits, rounded each by itself, with later inputs making up for earlier errors, or with
    large inputs scaled first; smooth: int8 with part of the inputs' range moved into the weights; magnitude, wanda,
    sparsegpt: zeros, by magnitude, by magnitude times the inputs' norm, or with later inputs making up for them; svd:
    two narrow matrices instead of each, of the least error on the inputs that the rank allows."""
    format: Kind | None = None
    """Of few bits (int4; smooth: int8)."""
    group: Natural | None = None
    """Inputs that share a scale (int4: 128, or 64 or 32; fp8: 0 for one an output, or blocks of 128)."""
    zero_point: bool | None = None
    """int4: codes are counted from a group's least number (no)."""
    dynamic: bool | None = None
    """int8, fp8: what the matrices multiply is rounded too, each row by its largest magnitude (no); GPUs then multiply
    eight bits."""
    budget: str | None = None
    """Bits of each compressed weight on average, such as 5.5bits, or bytes of all of them together, such as 80MB: each
    matrix then gets int4 in groups of 128 or of 32, or int8, by the error that a byte saves, instead of one format."""
    act_order: bool | None = None
    """gptq: inputs of larger squares are rounded first (yes)."""
    damp: Positive | None = None
    """gptq, sparsegpt, svd: what is added to the squares of every input, as a share of their mean (0.01)."""
    ratios: Count | None = None
    """awq: how many exponents of the magnitudes are tried (20)."""
    alpha: Share | None = None
    """smooth: how much of the inputs' range moves (0.5)."""
    own_scales: bool | None = None
    """awq, smooth: matrices whose factors no norm or matrix before them can take multiply their inputs by a vector of
    their own, which other programs' files can't hold; otherwise they are rounded to the nearest (no)."""
    share: BelowOne | None = None
    """Pruning: the share of each matrix's numbers that become zero (0.5); svd: the share that its factors have fewer
    (0.2)."""
    pattern: str | None = None
    """Pruning: how many of every few inputs stay instead of a share of all, such as 2:4."""
    block: Count | None = None
    """sparsegpt: inputs among which the share of zeros is kept (128)."""
    rank: Count | None = None
    """svd: the rank of the factors of every matrix instead of a share; a matrix that they wouldn't make smaller stays
    as it is."""
    skip: tuple[str, ...] = ()
    """Patterns of matrices that stay as they are, such as blocks/down. Embeddings, heads, norms, routers and biases
    always do."""

    @property
    def prunes(self) -> bool:
        """Says whether numbers become zero."""
        return self.method in PRUNES

    @property
    def scales(self) -> bool:
        """Says whether the method multiplies rows of matrices before it rounds, and divides their inputs."""
        return "own_scales" in SETTINGS[self.method]

    def rank_of(self, inputs: int, outputs: int) -> int:
        """Returns the rank of the factors of a matrix (svd); 0: they would be no smaller than it. ValueError: none is
        as small as `share` says."""
        whole, each = inputs * outputs, inputs + outputs
        share = 0.2 if self.share is None else self.share
        rank = self.rank or int(whole * (1 - share) / each)
        if not rank:
            raise ValueError(f"share: {share:g} leaves no rank of a matrix of {inputs} x {outputs}")
        return rank if rank * each < whole else 0

    def solver(self, how: Stored | None = None) -> "Solver":
        """Returns the settings of the method's solver; the format or rank of `how` take the place of its own.
        ValueError, which names a field: it isn't the method's, or out of its range."""
        given = {name for names in SETTINGS.values() for name in names if getattr(self, name) is not None}
        for name in sorted(given - set(SETTINGS[self.method])):
            owners = [method for method, names in SETTINGS.items() if name in names]
            raise ValueError(f"{name}: {self.method} has no such setting; leave it out, or choose {', '.join(owners)}")
        if {"share", "rank"} <= given:
            raise ValueError("rank: says how many numbers stay, and so does share; leave one out")
        if self.budget and given & {"format", "group", "zero_point", "dynamic"}:
            raise ValueError("budget: chooses formats itself; leave format, group, zero_point and dynamic out")
        own = {name: getattr(self, name) for name in ("act_order", "damp", "ratios", "alpha", "block") if name in given}
        if self.prunes:
            sparsity = _sparsity(self.share, self.pattern)
            if self.method == "magnitude":
                return Magnitude(sparsity)
            return Wanda(sparsity) if self.method == "wanda" else SparseGpt(sparsity, **own)
        if self.method == "svd":
            return Svd(rank, **own) if (rank := how.rank if how else self.rank) else Svd(**own)
        kind = self.format or ("int8" if self.method == "smooth" else "int4")
        f = how.format if how and how.format else Format(kind, self.group, bool(self.zero_point), bool(self.dynamic))
        _ = f.inputs
        if f.kind == "nf4" and self.method != "nearest":
            raise ValueError(f"format: nf4 is rounded to the nearest alone; {self.method} takes int4, int8, fp8, mxfp4")
        made: Nearest | Gptq | Awq | Smooth = {"nearest": Nearest, "gptq": Gptq, "awq": Awq, "smooth": Smooth}[
            self.method
        ](f, **own)
        return made


Solver = Nearest | Gptq | Awq | Smooth | Magnitude | Wanda | SparseGpt | Svd


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
    window: Count | None = None
    """Tokens of a row of it; None: those of the run, or 1024 of a published model."""
    compare: Literal["all", "quality", "sizes"] = "all"
    """all: bytes, losses and scores, divergence of predictions, and the speed of writing text; quality: all but the
    speed; sizes: bytes alone. All but sizes hold both models in memory."""
