"""The keys of a batch are documented here: objectives make them of records, the loader stacks them, and losses and
models read them.

T positions of a row, S positions of an encoder's text, K predictions of a row, N choices of a question, L labels,
A answers of a prompt. Shapes are those of one row; a batch has a dimension of rows before them, and what travels to the
devices one of micro-batches before that. Where texts share rows, `at`, `target` and `rows` have a dimension of texts
after that of rows.
"""

from typing import Generic, TypedDict, TypeVar

Array = TypeVar("Array")
"""numpy's array in the host half, JAX's in the device half."""
COUNTED = ("weights", "rows")
"""Keys that say how much a target or a row counts: sums are linear in them, and no model reads them."""


class Batch(TypedDict, Generic[Array], total=False):
    """A batch is a row of arrays, or many rows. An objective sets the same keys in all of its rows; a model reads those
    that it knows.

    A row of zeros is padding: its weights, segments and `rows` are zero, so that it adds nothing to any loss or total.
    """

    tokens: Array
    """int32 [T], of a decoder or an encoder; [N, T] where each choice of a question is read by itself."""
    segments: Array
    """int32, the shape of `tokens`: 1, 2, … for the texts that share a row, none of which sees another; 0: padding."""
    positions: Array
    """int32, the shape of `tokens`: from 0 in each segment."""
    types: Array
    """int32, the shape of `tokens`: 0 for the first text of a pair, 1 for the second (BERT's token types)."""
    origin: Array
    """int32, the shape of `targets`: the segment of its record that each target is of, where `segments` has another
    order."""
    unit: Array
    """int32, the shape of `segments`, in evaluation: the number of the document or example that each position belongs
    to, from 1; 0: none."""
    checksum: Array
    """int32, the shape of `unit`: of the row, to tell whether two models read the same."""
    prefix: Array
    """bool [T]: tokens that all of their segment sees, as a prefix LM reads its beginning both ways."""

    source: Array
    """int32 [S]: what an encoder-decoder's encoder reads; `tokens` are then its decoder's."""
    source_segments: Array
    """int32 [S]: segment i of the decoder sees segment i of the encoder."""
    source_positions: Array
    """int32 [S]: from 0 in each segment."""

    targets: Array
    """int32 [T]: the token, or the number of the label, to predict at each position; [K] at the positions `at`."""
    weights: Array
    """float32, the shape of `targets`: how much each target counts; 0 where nothing is to be predicted."""
    at: Array
    """int32: positions that are predicted or read: [K] of masked tokens, [2] of two entities, [] of a text, [N] of
    choices."""
    target: Array
    """What a row as a whole should give: float32 [L], 1 at its labels or the number itself; float32 [N], 1 at the right
    choice; int32 [2], the first and the last position of an answer."""
    rows: Array
    """float32 []: how much the row counts."""
    is_next: Array
    """int32 []: 1 where the second text follows the first one in its document."""
    allowed: Array
    """int32 [T]: 1 where an answer may begin and end."""
    choice_mask: Array
    """int32 [N]: 1 where there is a choice, 0 where the question has fewer than N."""
    reference: Array
    """float32 [A]: log likelihood of each answer under the reference model."""

    teacher_values: Array
    """float32 [N, K]: log probabilities of the teacher's likeliest classes at each of N places, or its outputs."""
    teacher_classes: Array
    """int32 [N, K]: the classes that they are of."""
    teacher_rest: Array
    """float32 [N]: log probability of all other classes together."""
    sampled: Array
    """float32 []: it is there where the model wrote the texts of a batch itself."""
