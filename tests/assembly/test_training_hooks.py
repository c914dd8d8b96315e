"""What the hooks of the training loop say."""

from types import SimpleNamespace
from typing import Any, cast

from jaxlm.assembly.training_hooks import Keeper
from jaxlm.core.config import Run, Train
from jaxlm.models import bert
from jaxlm.objectives import next_sentence


def test_a_validation_tells_each_losss_accuracy() -> None:
    """Masked tokens and next sentences have one each."""
    said: list[str] = []
    metrics = {"loss": 3.0, "masked/accuracy": 0.25, "masked/nll": 2.0, "next/accuracy": 0.5, "next/nll": 1.0}
    run = Run(
        "r", bert.Config(vocab=64, layers=1, width=8, heads=1, ffn=8), next_sentence.Config(), train=Train(steps=1)
    )
    parts: dict[str, Any] = dict.fromkeys(("loader", "checkpoints", "log", "watch"))
    keeper = Keeper(
        p=cast(Any, SimpleNamespace(run=run)), meter=cast(Any, SimpleNamespace(pause=lambda: None)),
        progress=cast(Any, SimpleNamespace(say=said.append)), validation=lambda step, state: (metrics, {}),
        gain=lambda step, samples, best: None, **parts,
    )  # fmt: skip
    assert keeper.validate(7, None)["score"] == 3.0
    assert said == ["step 7: validation loss 3.0000, masked/accuracy 0.2500, next/accuracy 0.5000"]
