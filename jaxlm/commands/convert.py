"""`jaxlm import` and `jaxlm export` read and write other people's files."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from jaxlm.commands.arguments import Command, Done, Model, start_processes
from jaxlm.core.ranges import Natural


@dataclass(frozen=True)
class Import(Command):
    """Makes a run directory of a published model.

    example: jaxlm import hf:HuggingFaceTB/SmolLM2-135M models/smollm2
    """

    model: Model
    target: Annotated[Positional[str], arg(metavar="RUN_DIR", help="a new directory")]

    def run(self, rest: list[str]) -> Done:
        start_processes(self)
        from jaxlm.assembly import convert

        notes = convert.import_model(self.model, self.target)
        print(*notes, sep="\n")
        return Done({"folder": self.target, "notes": notes})


@dataclass(frozen=True)
class Export(Command):
    """Writes a model for others to read, and checks that what was written computes the same.

    example: jaxlm export runs/quickstart quickstart-hf --format hf --dtype bfloat16
    """

    model: Model
    target: Annotated[Positional[str], arg(metavar="TARGET", help="a new directory; gguf: a new file")]
    format: str = "hf"
    """hf: safetensors as transformers reads them; compressed-tensors, gptq, awq: the same with the few bits of a
    compressed model, for vLLM and transformers; gguf: for llama.cpp; stablehlo: programs that run without this package;
    peft: its adapter alone, which the others merge."""
    dtype: str | None = None
    """hf: float32, bfloat16, float16 (None: as it is); of few bits: float32 (None), bfloat16, float16, for what stays
    plain; gguf: f16 (None); stablehlo: float32 (None), bfloat16."""
    quantize: str | None = None
    """gguf: the type of the file as llama.cpp calls it: q8_0, q6_k, q5_k_m, q5_k_s, q5_1, q5_0, q4_k_m, q4_k_s, q4_1 or
    q4_0. None: as `dtype` says."""
    calibration: str | None = None
    """With `quantize`: a text (a file, or a source as for training) on which mean squares of inputs are measured, so
    that columns that matter more are rounded better; or llama.cpp's importance matrix of the model (imatrix.gguf)."""
    step: Natural | None = None
    """The checkpoint's; None: the newest."""

    def run(self, rest: list[str]) -> Done:
        start_processes(self)
        from jaxlm.assembly import convert

        notes, record = convert.export(
            self.model, self.target, format=self.format, dtype=self.dtype, step=self.step, quantize=self.quantize,
            calibration=self.calibration,
        )  # fmt: skip
        print(*notes, sep="\n")
        print(
            f"logits before and after: off by {record['relative_difference']:.2g} of their deviation, at most by "
            f"{record['max_abs_difference']:.2g}; same likeliest token at {record['same_top_token']:.1%} of places"
        )
        return Done(record)
