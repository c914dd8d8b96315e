"""jaxlm trains language models on JAX: data, pretraining, fine-tuning, compression, evaluation, deployment.

The parts of a run's configuration are here, for config files: `from jaxlm import Data, Optim, Run, Train`. Models and
objectives have configurations of their own: `from jaxlm.models import llama`, `from jaxlm.objectives import causal`.
Importing this package loads neither jax nor any other heavy package, and changes nothing.
"""

from jaxlm.core.config import Adapter, Data, Execution, Mesh, Optim, Run, Train

__version__ = "0.1.0"
__all__ = ["Adapter", "Data", "Execution", "Mesh", "Optim", "Run", "Train"]
