"""What a model is trained to do, one objective a file. Each module has:

- `Config`: a frozen dataclass.
- `records`: `packed` (windows of documents) or `pairs` (two spans of text), the kind of record its host half takes.
- `specs(c, width)`: weights of its own, such as a classification head.
- `check(c, tokenizer)`: refuses a tokenizer that lacks what the objective needs.
- `example(c, record, tokenizer, rng) -> dict of arrays`: the host half, in numpy; one row of a batch.
- `weights(batch) -> {name: scalar}`: the total weight of each of its losses over a whole batch.
- `loss(c, model, params, batch, key) -> {name: {"loss": sum, …metric sums}}`: the device half. All are sums over
  tokens or rows, so that micro-batches, shards and hosts just add; the step divides once by the total weights.
"""

from types import ModuleType

from jaxlm.objectives import causal, masked, next_sentence

OBJECTIVES: dict[str, ModuleType] = {"causal": causal, "masked": masked, "next_sentence": next_sentence}
