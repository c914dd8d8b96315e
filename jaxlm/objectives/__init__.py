"""What a model is trained to do, one objective a file. Each module has:

- `Config`: a frozen dataclass.
- `records`: what its host half takes: `packed` (windows of documents), `pairs` (two spans of text), `texts` (pairs of
  texts in two fields, which `fields(c)` names; `fit` says what such a pair takes of a row), or `examples`: what its own
  `read(c, source, tokenizer, row) -> (records, notes)` makes of a source, where `row` has the model's chat `template`
  too, and notes are lines that a user should see.
- `models`: the kinds of families that it trains.
- `specs(c, width)`: weights of its own, such as a classification head.
- `check(c, tokenizer)`: refuses a tokenizer that lacks what the objective needs.
- `window(c, seq_len)`: tokens of text in a record, where a row of `seq_len` holds another number.
- `vocab(c, tokenizer)`: rows of the vocabulary in use, where it uses more than the tokenizer's.
- `places(c, seq_len)`: positions in a row that are predicted, where these are fewer or more.
- `example(c, record, tokenizer, rng) -> dict of arrays`: the host half, in numpy; one row of a batch.
  Beside its arrays a record holds what the row must fit: `seq_len`, `length` (the window), `kind` of the family and
  `decoder_start`, the model's own or None.
- `prompt(c, tokenizer, text, row) -> (tokens, what an encoder reads or None)`: what a model reads before it goes on,
  where that is more than BOS and the text.
- `asked(c, source, tokenizer, row, prompts) -> (prompts, what an encoder reads or None, true texts, notes)`, where what
  the model writes can be compared with what should be written; `prompts` makes token ids of texts.
- `both_ways`: True where it teaches a decoder to read prompts both ways.
- `reference(c, model, params, batch)`, where `needs_reference(c)`: what the weights that training starts from find of
  each row; it stands in the records as `reference`.
- `settle(c, sources) -> Config`, where its configuration takes something from the training data: names of labels.
- `packs`: True where a row may hold several texts as segments, whatever `example` made; `trims`: True where rows, of
  one text each, may lose the columns that are padding in all of them.
- `predict(c, model, params, batch) -> [B, …]`, `answers(c, records, predictions) -> (true, predicted)` and `scores`
  (a row of `eval/answers.py`), where predictions are scored beside the loss.
- `weights(batch) -> {name: scalar}`: the total weight of each of its losses over a whole batch.
- `loss(c, model, params, batch, key) -> {name: {"loss": sum, …metric sums}}`: the device half. All are sums over
  tokens or rows, so that micro-batches, shards and hosts just add; the step divides once by the total weights.
"""

from typing import Any

from jaxlm.core.registry import Table
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

OBJECTIVES: Table[Any] = Table(
    "objective",
    {
        "causal": causal,
        "prefix": prefix,
        "infill": infill,
        "masked": masked,
        "next_sentence": next_sentence,
        "sft": sft,
        "preference": preference,
        "classify": classify,
        "tag": tag,
        "answer": answer,
        "relate": relate,
        "choice": choice,
        "span_corruption": span_corruption,
        "seq2seq": seq2seq,
    },
)
