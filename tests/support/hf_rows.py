"""Tiny models of every published architecture: what transformers makes of them, we must make of them.

`tests/golden/make_hf.py` runs each row through transformers and stores what came out; `test_published.py` compares.
Weights are not stored: both sides draw them from the tensor's name, so a row costs a few kilobytes.
"""

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

GOLDEN = Path(__file__).parents[1] / "golden" / "hf"

V, ROWS_, T, S = 64, 2, 12, 9


class Row(NamedTuple):
    model: str
    """Class of transformers."""
    config: dict[str, Any]
    """Keyword arguments of its configuration class."""
    inputs: str = "decoder"
    """decoder, padded (a ragged decoder), encoder (ragged), types (encoder with token types), choices (the same as the
    choices of one question), or encoder_decoder (ragged source)."""
    output: str = "logits"
    """What is compared: an attribute of transformers' output."""
    more: dict[str, tuple[int, ...]] = {}  # noqa: RUF012
    """Tensors that published files have and a model made from its configuration alone lacks: an untied head."""


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The values of a tensor: a function of its name, the same on every machine, exact in float16."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    values = (raw >> np.uint64(40)).astype(np.float64) / 2**24 - 0.5
    is_scale = name.endswith("weight") and len(shape) == 1  # of a norm: around one
    return (is_scale + values.reshape(shape) * 0.8).astype(np.float16)


def inputs(kind: str, vocab: int = V) -> dict[str, np.ndarray]:
    """Under transformers' names. Padding is on the right."""
    rng = np.random.PCG64(7)
    ids = lambda n: (rng.random_raw(ROWS_ * n) % np.uint64(vocab - 4) + 4).reshape(ROWS_, n).astype(np.int32)  # noqa: E731
    if kind == "encoder_decoder":
        mask = (np.arange(S)[None] < np.array([[S], [S - 4]])).astype(np.int32)
        return dict(input_ids=ids(S), attention_mask=mask, decoder_input_ids=ids(T))
    out = dict(input_ids=ids(T))
    if kind in ("encoder", "types", "choices", "padded"):
        out["attention_mask"] = (np.arange(T)[None] < np.array([[T], [T - 4]])).astype(np.int32)
    if kind in ("types", "choices"):
        out["token_type_ids"] = np.broadcast_to((np.arange(T) >= 5).astype(np.int32), (ROWS_, T)).copy()
    if kind == "padded":
        out["input_ids"] *= out["attention_mask"]
    return {name: x[None] for name, x in out.items()} if kind == "choices" else out


def compared(out: Any, output: str) -> Any:
    """What is compared of an output of transformers: an attribute, or several side by side."""
    if output == "spans":
        return np.stack([out["start_logits"].numpy(), out["end_logits"].numpy()], -1)
    return out[output].numpy()


def directory(name: str, folder: Path) -> dict[str, np.ndarray]:
    """Write the row's files and return its tensors."""
    golden = np.load(GOLDEN / f"{name}.npz")
    tensors = {key: draw(key, tuple(shape)) for key, shape in json.loads(str(golden["shapes"])).items()}
    folder.mkdir()
    (folder / "config.json").write_text(str(golden["config"]))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def batch_of(kind: str, vocab: int = 64) -> dict[str, np.ndarray]:
    """transformers' inputs under our names."""
    given = {name: x.reshape(-1, x.shape[-1]) for name, x in inputs(kind, vocab).items()}
    count = lambda a: np.broadcast_to(np.arange(a.shape[1], dtype=np.int32), a.shape)  # noqa: E731
    tokens = given.get("decoder_input_ids", given["input_ids"])
    out = dict(tokens=tokens, positions=count(tokens))
    if kind == "encoder_decoder":
        source = given["input_ids"]
        out |= dict(source=source, source_positions=count(source), source_segments=given["attention_mask"])
        out |= dict(segments=np.ones_like(tokens))
    elif "attention_mask" in given:
        out["segments"] = given["attention_mask"]
    if "token_type_ids" in given:
        out["types"] = given["token_type_ids"]
    if kind == "padded":
        out["at"] = given["attention_mask"].sum(1, dtype=np.int32) - 1
    return out


def real(kind: str) -> np.ndarray:
    """[B, T]: positions whose output means something."""
    given = inputs(kind)
    ones = np.ones_like(given.get("decoder_input_ids", given["input_ids"]))
    return ones.astype(bool) if kind == "encoder_decoder" else given.get("attention_mask", ones).astype(bool)


# What every row of a family shares; 2 or more layers, grouped heads, and no two sizes alike, so that a mix-up shows.
LLAMA = dict(
    vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32, rms_norm_eps=1e-5, tie_word_embeddings=False,
)  # fmt: skip
GEMMA = LLAMA | dict(head_dim=8, tie_word_embeddings=True)
LONG = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0, 1.1], long_factor=[1.5, 4.0])

ROWS: dict[str, Row] = {
    "gpt2": Row("GPT2LMHeadModel", dict(vocab_size=V, n_positions=16, n_embd=16, n_layer=2, n_head=4)),
    "gpt2_untied": Row("GPT2LMHeadModel", dict(vocab_size=V, n_positions=16, n_embd=20, n_layer=3, n_head=2,
                       tie_word_embeddings=False)),
    "gpt2_ffn_relu": Row("GPT2LMHeadModel", dict(vocab_size=V, n_positions=16, n_embd=16, n_layer=2, n_head=4,
                         n_inner=24, activation_function="relu")),
    "llama": Row("LlamaForCausalLM", LLAMA | dict(rope_parameters=dict(rope_type="default", rope_theta=500.0))),
    "llama_tied_wide_heads": Row("LlamaForCausalLM", LLAMA | dict(tie_word_embeddings=True, head_dim=6)),
    "llama_biases": Row("LlamaForCausalLM", LLAMA | dict(attention_bias=True, mlp_bias=True, num_key_value_heads=4)),
    "llama_3.1": Row("LlamaForCausalLM", LLAMA | dict(head_dim=16, rope_parameters=dict(
        rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8))),
    "llama_linear": Row("LlamaForCausalLM", LLAMA | dict(rope_parameters=dict(
        rope_type="linear", rope_theta=1e3, factor=3.0))),
    "llama_dynamic": Row("LlamaForCausalLM", LLAMA | dict(max_position_embeddings=8, rope_parameters=dict(
        rope_type="dynamic", rope_theta=1e3, factor=2.0))),
    "llama_yarn": Row("LlamaForCausalLM", LLAMA | dict(head_dim=16, rope_parameters=dict(
        rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=8))),
    "mistral": Row("MistralForCausalLM", LLAMA | dict(sliding_window=None, head_dim=4)),
    "mistral_window": Row("MistralForCausalLM", LLAMA | dict(sliding_window=4, num_key_value_heads=1)),
    "mistral_wide_tied": Row("MistralForCausalLM", LLAMA | dict(sliding_window=5, head_dim=8,
                              tie_word_embeddings=True)),
    "smollm3": Row("SmolLM3ForCausalLM", LLAMA | dict(num_hidden_layers=5, pad_token_id=0)),
    "smollm3_window": Row("SmolLM3ForCausalLM", LLAMA | dict(
        num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0], use_sliding_window=True, sliding_window=4, pad_token_id=0)),
    "smollm3_biases_tied": Row("SmolLM3ForCausalLM", LLAMA | dict(
        attention_bias=True, tie_word_embeddings=True, pad_token_id=0)),
    "qwen2": Row("Qwen2ForCausalLM", LLAMA | dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen2_tied": Row("Qwen2ForCausalLM", LLAMA | dict(tie_word_embeddings=True, num_key_value_heads=1)),
    "qwen2_window": Row("Qwen2ForCausalLM", LLAMA | dict(
        num_hidden_layers=4, use_sliding_window=True, sliding_window=4, max_window_layers=2)),
    "qwen3": Row("Qwen3ForCausalLM", LLAMA | dict(head_dim=8)),
    "qwen3_tied_biases": Row("Qwen3ForCausalLM", LLAMA | dict(
        head_dim=4, tie_word_embeddings=True, attention_bias=True)),
    "qwen3_window": Row("Qwen3ForCausalLM", LLAMA | dict(
        head_dim=6, num_hidden_layers=3, use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "phi3": Row("Phi3ForCausalLM", LLAMA | dict(pad_token_id=0)),
    "phi3_short": Row("Phi3ForCausalLM", LLAMA | dict(
        original_max_position_embeddings=16, rope_parameters=LONG, pad_token_id=0)),
    "phi3_long_partial": Row("Phi3ForCausalLM", LLAMA | dict(
        num_attention_heads=2, original_max_position_embeddings=6, pad_token_id=0, sliding_window=5,
        rope_parameters=LONG | dict(partial_rotary_factor=0.5))),
    "gemma": Row("GemmaForCausalLM", GEMMA),
    "gemma_many_heads": Row("GemmaForCausalLM", GEMMA | dict(num_key_value_heads=1, head_dim=6)),
    "gemma_untied_biases": Row("GemmaForCausalLM", GEMMA | dict(tie_word_embeddings=False, attention_bias=True)),
    "gemma2": Row("Gemma2ForCausalLM", GEMMA | dict(num_hidden_layers=3, sliding_window=4, query_pre_attn_scalar=5,
                  attn_logit_softcapping=0.7, final_logit_softcapping=1.5)),
    "gemma2_no_caps": Row("Gemma2ForCausalLM", GEMMA | dict(sliding_window=16, query_pre_attn_scalar=8,
                          attn_logit_softcapping=None, final_logit_softcapping=None)),
    "gemma2_untied": Row("Gemma2ForCausalLM", GEMMA | dict(num_hidden_layers=4, sliding_window=3, head_dim=4,
                         tie_word_embeddings=False, layer_types=["full_attention"] * 2 + ["sliding_attention"] * 2)),
    "gemma3": Row("Gemma3ForCausalLM", GEMMA | dict(num_hidden_layers=4, sliding_window=4, query_pre_attn_scalar=8,
                  sliding_window_pattern=3)),
    "gemma3_scaled": Row("Gemma3ForCausalLM", GEMMA | dict(
        num_hidden_layers=3, sliding_window=5, query_pre_attn_scalar=6, num_key_value_heads=1,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=dict(full_attention=dict(rope_type="linear", rope_theta=1e3, factor=8.0),
                             sliding_attention=dict(rope_type="default", rope_theta=1e2)))),
    "gemma3_untied_cap": Row("Gemma3ForCausalLM", GEMMA | dict(
        num_hidden_layers=2, sliding_window=4, tie_word_embeddings=False, final_logit_softcapping=2.0)),
    "olmo2": Row("Olmo2ForCausalLM", LLAMA | dict(rope_parameters=dict(rope_type="default", rope_theta=5e5))),
    "olmo2_tied": Row("Olmo2ForCausalLM", LLAMA | dict(tie_word_embeddings=True, num_key_value_heads=4)),
    "olmo2_biases_yarn": Row("Olmo2ForCausalLM", LLAMA | dict(attention_bias=True, num_attention_heads=2,
        num_key_value_heads=1, rope_parameters=dict(
        rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=8))),
}  # fmt: skip

ENCODER = dict(
    vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
    max_position_embeddings=20,
)  # fmt: skip
DISTIL = dict(vocab_size=V, dim=16, n_layers=2, n_heads=4, hidden_dim=24, max_position_embeddings=20)
ROBERTA = ENCODER | dict(type_vocab_size=1, layer_norm_eps=1e-5)
MODERN = ENCODER | dict(  # the second half of a sequence is out of reach of the first in local layers
    num_hidden_layers=4, local_attention=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
    sep_token_id=2,
)  # fmt: skip
HIDDEN = "last_hidden_state"

ROWS |= {
    "bert": Row("BertForPreTraining", ENCODER, "types", "prediction_logits"),
    "bert_masked_relu": Row("BertForMaskedLM", ENCODER | dict(hidden_act="relu", num_attention_heads=2,
                            num_hidden_layers=3, layer_norm_eps=1e-5), "types"),
    "bert_one_type": Row("BertForMaskedLM", ENCODER | dict(type_vocab_size=1, hidden_act="gelu_new"), "encoder"),
    "minilm": Row("BertModel", ENCODER, "encoder", HIDDEN),
    "minilm_wide_ffn": Row("BertModel", ENCODER | dict(intermediate_size=40, num_hidden_layers=3), "types", HIDDEN),
    "minilm_gelu_new": Row("BertModel", ENCODER | dict(hidden_act="gelu_new", num_attention_heads=1), "encoder",
                           HIDDEN),
    "roberta": Row("RobertaForMaskedLM", ROBERTA, "encoder"),
    "roberta_bare": Row("RobertaModel", ROBERTA | dict(num_hidden_layers=3), "encoder", HIDDEN),
    "roberta_relu_types": Row("RobertaForMaskedLM", ROBERTA | dict(hidden_act="relu", type_vocab_size=2,
                              pad_token_id=3), "types"),
    "xlm_roberta": Row("XLMRobertaForMaskedLM", ROBERTA, "encoder"),
    "xlm_roberta_bare": Row("XLMRobertaModel", ROBERTA, "encoder", HIDDEN),
    "xlm_roberta_gelu_new": Row("XLMRobertaForMaskedLM", ROBERTA | dict(hidden_act="gelu_new", num_attention_heads=2),
                                "encoder"),
    "distilbert": Row("DistilBertForMaskedLM", DISTIL, "encoder"),
    "distilbert_bare": Row("DistilBertModel", DISTIL | dict(n_layers=3, n_heads=2), "encoder", HIDDEN),
    "distilbert_relu": Row("DistilBertForMaskedLM", DISTIL | dict(activation="relu", hidden_dim=40), "encoder"),
    "mpnet": Row("MPNetForMaskedLM", ENCODER, "encoder"),
    "mpnet_bare": Row("MPNetModel", ENCODER | dict(num_hidden_layers=3, layer_norm_eps=1e-5), "encoder", HIDDEN),
    "mpnet_relu": Row("MPNetForMaskedLM", ENCODER | dict(hidden_act="relu", num_attention_heads=2), "encoder"),
    "modernbert": Row("ModernBertForMaskedLM", MODERN, "encoder"),
    "modernbert_bare": Row("ModernBertModel", MODERN | dict(num_hidden_layers=7, local_attention=4), "encoder", HIDDEN),
    "modernbert_biases": Row("ModernBertForMaskedLM", MODERN | dict(
        norm_bias=True, attention_bias=True, mlp_bias=True, classifier_bias=True, hidden_activation="gelu_new",
        classifier_activation="silu", layer_types=["sliding_attention", "full_attention"] * 2), "encoder"),
    "modernbert_plain": Row("ModernBertForMaskedLM", MODERN | dict(
        decoder_bias=False, tie_word_embeddings=False, hidden_activation="relu", rope_parameters=dict(
            full_attention=dict(rope_type="default", rope_theta=500.0),
            sliding_attention=dict(rope_type="default", rope_theta=20.0))), "encoder"),
}  # fmt: skip

T5 = dict(
    vocab_size=V, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
    relative_attention_max_distance=10,
)  # fmt: skip
FLAN = T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
BART = dict(
    vocab_size=V, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=20,
)  # fmt: skip
HEAD = {"lm_head.weight": (V, 16)}

ROWS |= {
    "t5": Row("T5ForConditionalGeneration", T5, "encoder_decoder"),
    "t5_deep_decoder": Row("T5ForConditionalGeneration", T5 | dict(
        num_decoder_layers=3, d_kv=4, num_heads=2, relative_attention_num_buckets=12), "encoder_decoder"),
    "t5_gelu": Row("T5ForConditionalGeneration", T5 | dict(
        feed_forward_proj="gelu", relative_attention_max_distance=128, layer_norm_epsilon=1e-3), "encoder_decoder"),
    "flan_t5": Row("T5ForConditionalGeneration", FLAN, "encoder_decoder", more=HEAD),
    "flan_t5_deep_encoder": Row("T5ForConditionalGeneration", FLAN | dict(
        num_layers=3, num_decoder_layers=1, d_ff=40), "encoder_decoder", more=HEAD),
    "flan_t5_silu": Row("T5ForConditionalGeneration", FLAN | dict(
        feed_forward_proj="gated-silu", d_kv=2), "encoder_decoder", more=HEAD),
    "mt5": Row("MT5ForConditionalGeneration", T5, "encoder_decoder", more=HEAD),
    "mt5_narrow_heads": Row("MT5ForConditionalGeneration", T5 | dict(
        num_heads=6, d_kv=2, num_decoder_layers=3), "encoder_decoder", more=HEAD),
    "mt5_relu": Row("MT5ForConditionalGeneration", T5 | dict(feed_forward_proj="relu"), "encoder_decoder", more=HEAD),
    "bart": Row("BartForConditionalGeneration", BART, "encoder_decoder"),
    "bart_relu_scaled": Row("BartForConditionalGeneration", BART | dict(
        activation_function="relu", scale_embedding=True, decoder_attention_heads=2), "encoder_decoder"),
    "bart_shallow_decoder": Row("BartForConditionalGeneration", BART | dict(
        encoder_layers=3, decoder_layers=1, decoder_ffn_dim=40, activation_function="gelu_new"), "encoder_decoder"),
    "bart_untied": Row("BartForConditionalGeneration", BART | dict(tie_word_embeddings=False), "encoder_decoder"),
    "mbart": Row("MBartForConditionalGeneration", BART | dict(scale_embedding=True), "encoder_decoder"),
    "mbart_deep_decoder": Row("MBartForConditionalGeneration", BART | dict(
        encoder_layers=1, decoder_layers=3, encoder_attention_heads=2), "encoder_decoder"),
    "mbart_relu": Row("MBartForConditionalGeneration", BART | dict(
        activation_function="relu", encoder_ffn_dim=40), "encoder_decoder"),
}  # fmt: skip

MIXTRAL = LLAMA | dict(num_local_experts=8, num_experts_per_tok=2)
QWEN_MOE = LLAMA | dict(head_dim=6, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=12)

ROWS |= {
    "mixtral": Row("MixtralForCausalLM", MIXTRAL),
    "mixtral_window_tied": Row("MixtralForCausalLM", MIXTRAL | dict(
        sliding_window=4, tie_word_embeddings=True, head_dim=6, num_key_value_heads=1)),
    "mixtral_one_choice": Row("MixtralForCausalLM", MIXTRAL | dict(
        num_local_experts=3, num_experts_per_tok=1, num_key_value_heads=4, num_hidden_layers=3)),
    "qwen3_moe": Row("Qwen3MoeForCausalLM", QWEN_MOE | dict(norm_topk_prob=True)),
    "qwen3_moe_dense_first": Row("Qwen3MoeForCausalLM", QWEN_MOE | dict(
        num_hidden_layers=4, mlp_only_layers=[0, 1], attention_bias=True)),
    "qwen3_moe_window_tied": Row("Qwen3MoeForCausalLM", QWEN_MOE | dict(
        use_sliding_window=True, sliding_window=4, tie_word_embeddings=True, num_experts=16, norm_topk_prob=False)),
}  # fmt: skip

DEEPSEEK = LLAMA | dict(
    num_key_value_heads=4, num_hidden_layers=3, q_lora_rank=10, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4,
    v_head_dim=5, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=12, first_k_dense_replace=1,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=8, beta_fast=32.0,
            beta_slow=1.0)  # fmt: skip
DEEPSEEK_V3 = DEEPSEEK | dict(n_group=4, topk_group=2, n_shared_experts=1)

ROWS |= {
    "deepseek_v2": Row("DeepseekV2ForCausalLM", DEEPSEEK),
    "deepseek_v2_groups_yarn": Row("DeepseekV2ForCausalLM", DEEPSEEK | dict(
        topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=2.5, q_lora_rank=None,
        rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=0.9), n_shared_experts=1)),
    "deepseek_v2_tied_biases": Row("DeepseekV2ForCausalLM", DEEPSEEK | dict(
        tie_word_embeddings=True, attention_bias=True, first_k_dense_replace=0)),
    "deepseek_v3": Row("DeepseekV3ForCausalLM", DEEPSEEK_V3),
    "deepseek_v3_yarn_halves": Row("DeepseekV3ForCausalLM", DEEPSEEK_V3 | dict(
        rope_interleave=False, norm_topk_prob=False, first_k_dense_replace=2, num_hidden_layers=4, n_shared_experts=2,
        rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0))),
    "deepseek_v3_one_group_tied_biases": Row("DeepseekV3ForCausalLM", DEEPSEEK_V3 | dict(
        tie_word_embeddings=True, attention_bias=True, n_group=1, topk_group=1, q_lora_rank=None,
        routed_scaling_factor=1.0, first_k_dense_replace=0)),
}  # fmt: skip

GPT_OSS = LLAMA | dict(
    head_dim=6, num_local_experts=8, num_experts_per_tok=3, sliding_window=4, num_hidden_layers=3,
    rope_parameters=YARN | dict(truncate=False, rope_theta=150000.0),
)  # fmt: skip

ROWS |= {
    "gpt_oss": Row("GptOssForCausalLM", GPT_OSS),
    "gpt_oss_clamped_tied": Row("GptOssForCausalLM", GPT_OSS | dict(
        tie_word_embeddings=True, swiglu_limit=0.3, swiglu_alpha=1.1, num_key_value_heads=1, num_local_experts=4)),
    "gpt_oss_no_biases_full_first": Row("GptOssForCausalLM", GPT_OSS | dict(
        attention_bias=False, num_hidden_layers=4, num_key_value_heads=4, num_experts_per_tok=1,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters=dict(rope_type="default", rope_theta=1e4))),
}  # fmt: skip

# Multimodal models, whose text part is read. What is asked of them is text.
SIGLIP = dict(
    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
)  # fmt: skip
PIXELS = dict(image_token_id=5, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8)

WRAPPED: dict[str, Row] = {
    "multimodal_gemma3": Row("Gemma3ForConditionalGeneration", dict(  # a cap that only the text model alone has
        text_config=GEMMA | dict(
            model_type="gemma3_text", num_hidden_layers=3, sliding_window=4, sliding_window_pattern=3,
            query_pre_attn_scalar=8, final_logit_softcapping=1.0, rope_scaling=dict(rope_type="linear", factor=8.0)),
        vision_config=SIGLIP | dict(model_type="siglip_vision_model"), mm_tokens_per_image=4, image_token_index=5)),
    "multimodal_mistral3": Row("Mistral3ForConditionalGeneration", dict(  # tied, whatever its text_config says
        text_config=LLAMA | dict(model_type="mistral", head_dim=8, sliding_window=4),
        vision_config=SIGLIP | dict(model_type="pixtral", head_dim=4), image_token_index=5)),
    "multimodal_llava": Row("LlavaForConditionalGeneration", dict(
        text_config=LLAMA | dict(model_type="llama"),
        vision_config=SIGLIP | dict(model_type="clip_vision_model", projection_dim=4), image_token_index=5)),
    "multimodal_smolvlm": Row("SmolVLMForConditionalGeneration", dict(
        text_config=LLAMA | dict(model_type="llama", pad_token_id=0), vision_config=SIGLIP, image_token_id=5)),
    "multimodal_qwen2_vl": Row("Qwen2VLForConditionalGeneration", dict(
        text_config=LLAMA | dict(rope_scaling=dict(type="mrope", mrope_section=[1, 1, 0])),
        vision_config=dict(depth=1, embed_dim=8, hidden_size=16, num_heads=2, patch_size=4), **PIXELS)),
    "multimodal_qwen3_vl": Row("Qwen3VLForConditionalGeneration", dict(
        text_config=LLAMA | dict(head_dim=8, use_sliding_window=True, sliding_window=2, max_window_layers=0,
                                 rope_scaling=dict(rope_type="default", mrope_section=[2, 1, 1])),
        vision_config=dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=2, out_hidden_size=16, patch_size=4,
                           deepstack_visual_indexes=[0], num_position_embeddings=4), **PIXELS)),
}  # fmt: skip
