"""The values of a published config.json are checked where they are read, before anything is computed of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

MAX_SIZE = 1 << 31
MAX_LAYERS = 10_000
MAX_NUMBER = 1e30  # a float32
MAX_TEXT = 200  # characters of a value that an error shows


class Rule(NamedTuple):
    """A rule says which values a key may have, besides null where it is `optional`."""

    accepts: Callable[[Any], bool]
    words: str
    optional: bool = False


def _whole(x: Any, least: int, most: int) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and least <= x <= most


def _number(x: Any) -> bool:
    return (isinstance(x, float) and abs(x) < MAX_NUMBER) or _whole(x, -MAX_SIZE, MAX_SIZE)


def _list(x: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(x, list | tuple) and len(x) <= MAX_LAYERS and all(map(of, x))


SIZE = Rule(lambda x: _whole(x, 1, MAX_SIZE), "a whole number, at least 1")
COUNT = Rule(lambda x: _whole(x, 0, MAX_SIZE), "a whole number, at least 0")
LAYERS = Rule(lambda x: _whole(x, 1, MAX_LAYERS), f"a whole number from 1 to {MAX_LAYERS:,}")
POSITIVE = Rule(lambda x: _number(x) and x > 0, "a number above 0")
SHARE = Rule(lambda x: _number(x) and 0 < x <= 1, "a number above 0 and at most 1")
DROPOUT = Rule(lambda x: _number(x) and 0 <= x < 1, "a number from 0 to below 1")
EPSILON = Rule(lambda x: _number(x) and 0 <= x < 1, "a number from 0 to below 1")
FLAG = Rule(lambda x: isinstance(x, bool) or x in (0, 1), "true or false", True)
TEXT = Rule(lambda x: isinstance(x, str), "a text", True)
TEXTS = Rule(lambda x: _list(x, lambda t: isinstance(t, str)), "a list of texts", True)
FLAGS = Rule(lambda x: _list(x, lambda t: isinstance(t, bool) or t in (0, 1)), "a list of 0 and 1", True)
COUNTS = Rule(lambda x: _list(x, lambda n: _whole(n, 0, MAX_SIZE)), "a list of whole numbers", True)
NUMBERS = Rule(lambda x: _list(x, lambda n: _number(n) and n > 0), "a list of numbers above 0", True)
IDS = Rule(lambda x: COUNT.accepts(x) or COUNTS.accepts(x), "a token id or a list of them", True)
OBJECT = Rule(lambda x: isinstance(x, dict), "an object", True)


def keys(rule: Rule, optional: str = "", required: str = "") -> dict[str, Rule]:
    """Returns the rule by each key of two texts, whose keys blanks part; the value of an optional one may be null."""
    return {k: rule._replace(optional=True) for k in optional.split()} | dict.fromkeys(required.split(), rule)


RULES: dict[str, Rule] = {
    **keys(LAYERS, "num_decoder_layers",
            "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers"),
    **keys(SIZE, "num_key_value_heads head_dim max_position_embeddings original_max_position_embeddings n_inner "
            "sliding_window sliding_window_pattern q_lora_rank n_group topk_group no_rope_layer_interval "
            "moe_layer_freq n_ctx",
            "vocab_size hidden_size intermediate_size num_attention_heads n_embd n_head n_positions d_model num_heads "
            "d_kv d_ff encoder_attention_heads decoder_attention_heads encoder_ffn_dim decoder_ffn_dim dim n_heads "
            "hidden_dim moe_intermediate_size qk_nope_head_dim qk_rope_head_dim v_head_dim kv_lora_rank "
            "num_local_experts num_experts n_routed_experts num_experts_per_tok experts_per_token "
            "relative_attention_num_buckets relative_attention_max_distance local_attention "
            "global_attn_every_n_layers"),
    **keys(COUNT, "n_shared_experts first_k_dense_replace pad_token_id decoder_start_token_id extra_pos_embeddings "
            "num_labels",
            "type_vocab_size max_window_layers decoder_sparse_step"),
    **keys(POSITIVE, "rope_theta local_rope_theta global_rope_theta rope_local_base_freq attn_logit_softcapping "
            "final_logit_softcapping factor attention_factor low_freq_factor high_freq_factor beta_fast beta_slow "
            "short_mscale long_mscale",
            "query_pre_attn_scalar routed_scaling_factor swiglu_alpha swiglu_limit"),
    **keys(Rule(lambda x: _number(x) and x >= 0, "a number, at least 0"), "mscale mscale_all_dim"),
    **keys(SHARE, "partial_rotary_factor"),
    **keys(EPSILON, "", "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps"),
    **keys(DROPOUT, "", "dropout dropout_rate resid_pdrop embd_pdrop attn_pdrop hidden_dropout_prob "
            "attention_dropout mlp_dropout embedding_dropout"),
    **keys(FLAG, "attention_bias mlp_bias tie_word_embeddings norm_topk_prob use_sliding_window scale_embedding "
            "scale_decoder_outputs use_bidirectional_attention add_pooling_layer rope_interleave norm_bias "
            "classifier_bias decoder_bias truncate add_cross_attention is_decoder scale_attn_weights "
            "load_in_4bit load_in_8bit is_marlin_format "
            "scale_attn_by_inverse_layer_idx normalize_before normalize_embedding add_final_layer_norm "
            "static_position_embeddings add_bias_logits"),
    **keys(TEXT, "hidden_act hidden_activation activation activation_function feed_forward_proj topk_method "
            "scoring_func classifier_activation quant_method rope_type type position_embedding_type problem_type "
            "quant_algo checkpoint_format format version backend quantization_status rotation",
            "model_type"),
    **keys(Rule(lambda x: x in ("cls", "mean"), "cls or mean"), "", "classifier_pooling"),
    **keys(TEXTS, "layer_types architectures targets"),
    **keys(FLAGS, "no_rope_layers"),
    **keys(COUNTS, "mlp_only_layers"),
    **keys(NUMBERS, "short_factor long_factor"),
    **keys(IDS, "eos_token_id bos_token_id"),
    **keys(OBJECT, "rope_parameters rope_scaling full_attention sliding_attention quantization_config id2label "
            "text_config compression_config config_groups weights dynamic sparsity_config transform_config "
            "quantization"),
    **keys(Rule(lambda x: _whole(x, 1, 64), "a whole number from 1 to 64"), "bits w_bit num_bits"),
    **keys(Rule(lambda x: x == -1 or _whole(x, 1, MAX_SIZE), "a whole number above 0, or -1 for all inputs"),
            "group_size q_group_size"),
}  # fmt: skip
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")
BY_LAYER = ("layer_types", "no_rope_layers")  # lists that have an entry for each layer


def checked(rule: Rule | None, where: str, key: str, value: Any) -> Any:
    """Returns the value of a key; raises a ValueError that names `where` and the key if the rule doesn't allow it."""
    if rule is not None and not (value is None and rule.optional) and not rule.accepts(value):
        shown = repr(value) if len(repr(value)) <= MAX_TEXT else f"{repr(value)[:MAX_TEXT]}…"
        raise ValueError(f"{where}: {key} is {shown}; it must be {rule.words}")
    return value


class PublishedConfig(dict[str, Any]):
    """A config.json's content, whose values are checked by `RULES` when they are read; so are objects in it.

    `where` says whose values these are. Reading one that its rule doesn't allow raises a ValueError that names the key.
    """

    def __init__(self, values: dict[str, Any], where: str = "config.json") -> None:
        super().__init__(values)
        self.where = where

    def __getitem__(self, key: str) -> Any:
        return self._checked(key, super().__getitem__(key))

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key, `default` where there is none."""
        return self[key] if key in self else default  # noqa: SIM401  it would not end

    def pop(self, key: str, default: Any = None) -> Any:
        """Takes out the value of a key and returns it, `default` where there is none."""
        return self._checked(key, super().pop(key)) if key in self else default

    def without(self, *keys: str) -> "PublishedConfig":
        """Returns the values without those of some keys."""
        return PublishedConfig({k: v for k, v in dict.items(self) if k not in keys}, self.where)

    def _checked(self, key: str, value: Any) -> Any:
        checked(RULES.get(key), self.where, key, value)
        if key in BY_LAYER and value:
            depth = next((self[name] for name in DEPTHS if name in self), len(value))
            if len(value) != depth:
                raise ValueError(f"{self.where}: {key} has {len(value)} entries for {depth} layers; give one for each")
        return PublishedConfig(value, f"{self.where}: {key}") if isinstance(value, dict) else value
