"""Language models on JAX: data, pretraining, fine-tuning, compression, evaluation, deployment.

Importing this package loads nothing and changes nothing; import the module that you need (`from jaxlm import config`).
"""

__version__ = "0.1.0"
