"""jaxlm trains language models on JAX: data, pretraining, fine-tuning, compression, evaluation, deployment.

    run = jaxlm.load("quickstart", train={"steps": 200})
    folder = jaxlm.train(run)
    model = jaxlm.open(folder.path)
    print(model.generate("def main(", tokens=64))

The parts of a run's configuration are here, for config files: `from jaxlm import Data, Optim, Run, Train`. Models and
objectives have configurations of their own: `from jaxlm.models import llama`, `from jaxlm.objectives import causal`.
Importing this package loads neither jax nor any other heavy package, and changes nothing; the functions of `jaxlm.api`
are loaded when the first of them is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxlm.core.config import Adapter, Continual, Data, Execution, Mesh, Optim, Run, Train, Transfer

__version__ = "0.1.0"
__all__ = [
    "Adapter", "Between", "Choice", "Continual", "Data", "Execution", "LanguageModel", "MergeBack", "Mesh", "Optim",
    "Plan", "Program", "Run", "RunDirectory", "Sampling", "Stage", "Stream", "Train", "Transfer", "as_linen", "as_nnx",
    "compress", "evaluate", "extract", "from_linen", "from_nnx", "grow", "import_model", "load", "load_plugin", "merge",
    "open", "plan", "register_adapter", "register_model", "register_objective", "register_optimizer",
    "register_schedule", "shrink", "start_processes", "sweep", "train", "train_stream",
]  # fmt: skip

if TYPE_CHECKING:
    from jaxlm.api import (
        Between,
        Choice,
        LanguageModel,
        MergeBack,
        Plan,
        Program,
        RunDirectory,
        Sampling,
        Stage,
        Stream,
        as_linen,
        as_nnx,
        compress,
        evaluate,
        extract,
        from_linen,
        from_nnx,
        grow,
        import_model,
        load,
        load_plugin,
        merge,
        open,
        plan,
        register_adapter,
        register_model,
        register_objective,
        register_optimizer,
        register_schedule,
        shrink,
        start_processes,
        sweep,
        train,
        train_stream,
    )


def __getattr__(name: str) -> Any:
    """Loads the library when one of its names is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")
    return getattr(import_module("jaxlm.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
