"""An objective is what a model is trained to do, one a file; `objective.py` says what it consists of."""

from jaxlm.core.registry import ConfigTable
from jaxlm.objectives import (
    answer,
    causal,
    choice,
    classify,
    infill,
    masked,
    next_sentence,
    preference,
    prefix,
    relate,
    seq2seq,
    sft,
    span_corruption,
    tag,
)
from jaxlm.objectives.objective import Objective

OBJECTIVES: ConfigTable[Objective] = ConfigTable(
    "objective",
    {
        "causal": causal.objective,
        "prefix": prefix.objective,
        "infill": infill.objective,
        "masked": masked.objective,
        "next_sentence": next_sentence.objective,
        "sft": sft.objective,
        "preference": preference.objective,
        "classify": classify.objective,
        "tag": tag.objective,
        "answer": answer.objective,
        "relate": relate.objective,
        "choice": choice.objective,
        "span_corruption": span_corruption.objective,
        "seq2seq": seq2seq.objective,
    },
)
