"""MaxText's own ahead-of-time compilation, run by the Python that has it; its step's text and figures go to a folder.

`PYTHON aot_maxtext.py FOLDER KEY=VALUE …`: what `maxtext.trainers.pre_train.train_compile` takes, after its base.yml.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}

import jax
import maxtext
from maxtext.trainers.pre_train import train_compile

folder, settings = Path(sys.argv[1]), sys.argv[2:]
own = jax.stages.Lowered.compile


def compile_and_keep(self, *args, **more):
    started = time.perf_counter()
    compiled = own(self, *args, **more)
    seconds, m = time.perf_counter() - started, compiled.memory_analysis()
    figures = {
        "seconds": seconds, "arguments": m.argument_size_in_bytes, "temporaries": m.temp_size_in_bytes,
        "copied": m.output_size_in_bytes - m.alias_size_in_bytes,
        "accessed": compiled.cost_analysis()["bytes accessed"], "jax": jax.__version__,
    }  # fmt: skip
    (folder / "maxtext.json").write_text(json.dumps(figures))
    (folder / "maxtext.txt").write_text(compiled.as_text())
    return compiled


jax.stages.Lowered.compile = compile_and_keep
base = Path(maxtext.__file__).parent / "configs" / "base.yml"
train_compile.main(["train_compile", str(base), *settings])
