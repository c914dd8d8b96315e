"""Tiny published models with the heads of labelled tasks, as `hf_rows` has those without: a row of each way in which
classes of transformers read a model's states."""

from typing import Any

from support.hf_rows import (
    DEEPSEEK_V3,
    DISTIL,
    ENCODER,
    GEMMA,
    GPT_OSS,
    LLAMA,
    MIXTRAL,
    MODERN,
    QWEN_MOE,
    ROBERTA,
    Row,
    V,
)

GPT2 = dict(vocab_size=V, n_positions=16, n_embd=16, n_layer=2, n_head=4)
MPNET = ENCODER | dict(layer_norm_eps=1e-5)


def named(*labels: str) -> dict[str, Any]:
    return dict(id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)})


WEATHER, TAGS = named("cold", "mild", "hot"), named("O", "B-PER", "I-PER")
MULTI, NUMBER = WEATHER | dict(problem_type="multi_label_classification"), dict(num_labels=1)
PADDED = dict(pad_token_id=0)

ROWS: dict[str, Row] = {
    "bert_classes": Row("BertForSequenceClassification", ENCODER | WEATHER, "types"),
    "bert_tags": Row("BertForTokenClassification", ENCODER | TAGS, "encoder"),
    "bert_spans": Row("BertForQuestionAnswering", ENCODER, "types", "spans"),
    "bert_choices": Row("BertForMultipleChoice", ENCODER, "choices"),
    "roberta_classes": Row("RobertaForSequenceClassification", ROBERTA | MULTI, "encoder"),
    "roberta_spans": Row("RobertaForQuestionAnswering", ROBERTA, "encoder", "spans"),
    "roberta_choices": Row("RobertaForMultipleChoice", ROBERTA | dict(type_vocab_size=2), "choices"),
    "xlm_roberta_number": Row("XLMRobertaForSequenceClassification", ROBERTA | NUMBER, "encoder"),
    "xlm_roberta_tags": Row("XLMRobertaForTokenClassification", ROBERTA | TAGS, "encoder"),
    "distilbert_classes": Row("DistilBertForSequenceClassification", DISTIL, "encoder"),
    "distilbert_tags": Row("DistilBertForTokenClassification", DISTIL | TAGS, "encoder"),
    "distilbert_spans": Row("DistilBertForQuestionAnswering", DISTIL, "encoder", "spans"),
    "mpnet_classes": Row("MPNetForSequenceClassification", MPNET | WEATHER, "encoder"),
    "modernbert_classes": Row("ModernBertForSequenceClassification", MODERN | WEATHER | dict(
        classifier_pooling="cls", classifier_bias=True, norm_bias=True, classifier_activation="silu"), "encoder"),
    "modernbert_mean": Row("ModernBertForSequenceClassification", MODERN | NUMBER | dict(
        classifier_pooling="mean"), "encoder"),
    "modernbert_tags": Row("ModernBertForTokenClassification", MODERN | TAGS, "encoder"),
    "modernbert_spans": Row("ModernBertForQuestionAnswering", MODERN, "encoder", "spans"),
    "gpt2_classes": Row("GPT2ForSequenceClassification", GPT2 | WEATHER | PADDED, "padded"),
    "gpt2_tags": Row("GPT2ForTokenClassification", GPT2 | TAGS, "padded"),
    "llama_classes": Row("LlamaForSequenceClassification", LLAMA | WEATHER | PADDED, "padded"),
    "llama_tags": Row("LlamaForTokenClassification", LLAMA | TAGS, "padded"),
    "qwen3_number": Row("Qwen3ForSequenceClassification", LLAMA | NUMBER | PADDED | dict(head_dim=8), "padded"),
    "gemma_classes": Row("GemmaForSequenceClassification", GEMMA | WEATHER | PADDED, "padded"),
    "gemma3_classes": Row("Gemma3TextForSequenceClassification", GEMMA | WEATHER | PADDED, "padded"),
    "olmo2_classes": Row("Olmo2ForSequenceClassification", LLAMA | WEATHER | PADDED, "padded"),
    "mixtral_classes": Row("MixtralForSequenceClassification", MIXTRAL | WEATHER | PADDED, "padded"),
    "qwen3_moe_classes": Row("Qwen3MoeForSequenceClassification", QWEN_MOE | WEATHER | PADDED, "padded"),
    "deepseek_v3_classes": Row("DeepseekV3ForSequenceClassification", DEEPSEEK_V3 | WEATHER | PADDED, "padded"),
    "gpt_oss_classes": Row("GptOssForSequenceClassification", GPT_OSS | WEATHER | PADDED, "padded"),
}  # fmt: skip
