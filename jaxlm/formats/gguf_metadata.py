"""The values of a GGUF file's metadata are checked where they are read, before anything is computed of them."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxlm.core.published_config import COUNT, EPSILON, FLAG, LAYERS, POSITIVE, SIZE, TEXT, Rule, checked, keys


def _each(rule: Rule) -> Rule:
    """Returns the rule of a value that may stand once, or in a list once for each layer."""
    return Rule(lambda x: bool(x) and all(map(rule.accepts, x)) if isinstance(x, list) else rule.accepts(x), rule.words)


def _list(accepts: Callable[[Any], bool], words: str) -> Rule:
    return Rule(lambda x: isinstance(x, list) and all(map(accepts, x)), f"a list of {words}")


_TEXTS = _list(lambda x: isinstance(x, str), "texts")
_NUMBERS = _list(lambda x: isinstance(x, int | float) and not isinstance(x, bool), "numbers")
_BYTES = _list(lambda x: isinstance(x, int) and 0 <= x < 256, "bytes")

# By the key, or by what of it follows the name of the architecture.
RULES: dict[str, Rule] = {
    **keys(_each(SIZE), "", "attention.head_count attention.head_count_kv attention.key_length embedding_length "
           "feed_forward_length context_length expert_feed_forward_length expert_used_count"),
    **keys(SIZE, "", "attention.value_length attention.sliding_window rope.dimension_count "
           "rope.scaling.original_context_length"),
    **keys(_each(EPSILON), "", "attention.layer_norm_rms_epsilon attention.layer_norm_epsilon"),
    **keys(POSITIVE, "", "rope.freq_base_swa rope.scaling.factor rope.scaling.attn_factor "
           "rope.scaling.yarn_attn_factor rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow "
           "attn_logit_softcapping final_logit_softcapping"),
    **keys(_each(POSITIVE), "", "rope.freq_base"),
    **keys(LAYERS, "", "block_count"),
    **keys(COUNT, "", "expert_count split.count"),
    **{f"tokenizer.ggml.{kind}_token_id": COUNT for kind in
       ("bos", "eos", "unknown", "padding", "seperator", "cls", "mask", "eot", "eom")},
    **keys(TEXT, "", "general.architecture general.license rope.scaling.type tokenizer.ggml.model tokenizer.ggml.pre "
           "tokenizer.chat_template"),
    **keys(_TEXTS, "", "tokenizer.ggml.tokens tokenizer.ggml.merges"),
    **keys(_NUMBERS, "", "tokenizer.ggml.scores tokenizer.ggml.token_type"),
    **keys(_BYTES, "", "tokenizer.ggml.precompiled_charsmap"),
    **keys(FLAG, "", "tokenizer.ggml.add_bos_token tokenizer.ggml.add_space_prefix "
           "tokenizer.ggml.remove_extra_whitespaces"),
}  # fmt: skip


class Metadata(dict[str, Any]):
    """A file's metadata, whose values are checked by `RULES` when they are read by their key.

    Reading one that its rule doesn't allow raises a ValueError that names the key.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)

    def __getitem__(self, key: str) -> Any:
        return checked(rule_of(key), "metadata", key, super().__getitem__(key))

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key, `default` where there is none."""
        return self[key] if key in self else default  # noqa: SIM401  it would not end


def rule_of(key: str) -> Rule | None:
    """Returns the rule of a key; None: there is none."""
    return RULES.get(key) or RULES.get(key.partition(".")[2])
