"""Architectures, one family a file: modules that satisfy `nn.family.Family`, by their registered names."""

from jaxlm.core.registry import ConfigTable
from jaxlm.models import bart, bert, deepseek, gemma, gpt2, gpt_oss, llama, mixtral, modernbert, olmo, t5
from jaxlm.nn.family import Family

MODELS: ConfigTable[Family] = ConfigTable(
    "model",
    {
        "gpt2": gpt2,
        "llama": llama,
        "gemma": gemma,
        "olmo": olmo,
        "mixtral": mixtral,
        "deepseek": deepseek,
        "gpt_oss": gpt_oss,
        "bert": bert,
        "modernbert": modernbert,
        "t5": t5,
        "bart": bart,
    },
)
