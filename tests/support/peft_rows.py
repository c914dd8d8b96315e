"""Adapters as Hugging Face PEFT makes them, each on a row of tests/published.py: what PEFT computes, we must compute.

`tests/golden/make_peft.py` runs each row through PEFT and stores what came out; `interop/test_peft_files.py` compares.
"""

from typing import Any, NamedTuple

import numpy as np
from support.hf_rows import draw


class Row(NamedTuple):
    base: str
    """Of tests/published.py."""
    config: str
    """Class of PEFT."""
    settings: dict[str, Any]
    pattern: dict[str, list[bool]] | None = None
    """AdaLoRA: of some modules, which directions are left."""


SIZES = {"lora_E": 5.0, "vera_lambda": 2.0}  # so that what an adapter changes is far above the tolerance


def values(shapes: dict[str, list[int]], base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of an adapter's file: its own, and its copies of the base's table and head."""
    return {name: copied(name, base) if name.endswith(COPY) else value(name, tuple(shape))
            for name, shape in shapes.items()}  # fmt: skip


COPY = ".base_layer.weight"


def copied(name: str, base: dict[str, np.ndarray]) -> np.ndarray:
    own = f"{name.removeprefix('base_model.model.').removesuffix(COPY)}.weight"
    tied = next(n for n in base if n.endswith(("embed_tokens.weight", "wte.weight")))
    return base.get(own, base[tied]).astype(np.float32)


def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Of a tensor of an adapter: a function of its name. Magnitudes are positive, factors lie around one."""
    x = draw(name, shape).astype(np.float32)
    if "magnitude" in name or "ia3" in name:
        return np.abs(x) + 0.5
    return x * next((size for part, size in SIZES.items() if part in name), 0.5)


CAUSAL, SEQ2SEQ = dict(task_type="CAUSAL_LM"), dict(task_type="SEQ_2_SEQ_LM")
Q_V, ADA = ["q_proj", "v_proj"], dict(init_r=4, target_r=2, total_step=10, lora_alpha=3)

ROWS = {
    "lora_llama": Row("llama", "LoraConfig", dict(r=3, lora_alpha=5, **CAUSAL)),
    "lora_llama_all_stabilized": Row("llama", "LoraConfig", dict(r=4, use_rslora=True, target_modules="all-linear")),
    "lora_llama_patterns": Row("llama", "LoraConfig", dict(
        r=4, lora_alpha=6, target_modules=Q_V, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 5}, **CAUSAL)),
    "lora_llama_second_layer": Row("llama", "LoraConfig", dict(target_modules=Q_V, layers_to_transform=[1])),
    "lora_gpt2_one_module_of_three": Row("gpt2", "LoraConfig", dict(
        target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, **CAUSAL)),
    "lora_llama_pissa_patterns": Row("llama", "LoraConfig", dict(
        r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=[*Q_V, "down_proj"], rank_pattern={"v_proj": 2},
        alpha_pattern={"v_proj": 5}, **CAUSAL)),
    "lora_gpt2_pissa": Row("gpt2", "LoraConfig", dict(
        r=2, init_lora_weights="pissa", target_modules=["c_attn"], fan_in_fan_out=True, **CAUSAL)),
    "lora_llama_olora": Row("llama", "LoraConfig", dict(
        r=3, init_lora_weights="olora", use_rslora=True, target_modules=[*Q_V, "o_proj"], **CAUSAL)),
    "dora_llama_pissa": Row("llama", "LoraConfig", dict(
        r=3, use_dora=True, init_lora_weights="pissa", target_modules=Q_V, **CAUSAL)),
    "lora_llama_table_and_head": Row("llama", "LoraConfig", dict(
        r=3, lora_alpha=5, target_modules=["embed_tokens", "lm_head", "q_proj"], alpha_pattern={"lm_head": 9},
        **CAUSAL)),
    "lora_gpt2_tied_head": Row("gpt2", "LoraConfig", dict(target_modules=["lm_head"], **CAUSAL)),
    "lora_gemma2_tied_table_and_head": Row("gemma2", "LoraConfig", dict(
        r=2, target_modules=["embed_tokens", "lm_head"], use_rslora=True, **CAUSAL)),
    "lora_phi3": Row("phi3", "LoraConfig", dict(r=2, target_modules=["qkv_proj", "gate_up_proj", "down_proj"])),
    "lora_bert": Row("bert", "LoraConfig", dict(r=4, target_modules=["query", "value"])),
    "lora_t5": Row("t5", "LoraConfig", dict(r=4, target_modules=["q", "v", "wo"], **SEQ2SEQ)),
    "dora_llama": Row("llama", "LoraConfig", dict(r=4, use_dora=True, target_modules=[*Q_V, "o_proj"], **CAUSAL)),
    "dora_bert": Row("bert", "LoraConfig", dict(r=4, use_dora=True, target_modules=["query", "output.dense"])),
    "dora_t5": Row("t5", "LoraConfig", dict(r=4, use_dora=True, target_modules=["k", "o"], **SEQ2SEQ)),
    "adalora_llama": Row("llama", "AdaLoraConfig", dict(target_modules=Q_V, **ADA, **CAUSAL), {
        "model.layers.0.self_attn.q_proj.lora_E": [True, False, True, True],
        "model.layers.1.self_attn.v_proj.lora_E": [False, False, True, False]}),
    "adalora_bert": Row("bert", "AdaLoraConfig", dict(target_modules=["query", "value"], **ADA)),
    "adalora_t5": Row("t5", "AdaLoraConfig", dict(target_modules=["q", "v"], **ADA, **SEQ2SEQ)),
    "ia3_llama": Row("llama", "IA3Config", CAUSAL),
    "ia3_gpt2": Row("gpt2", "IA3Config", dict(fan_in_fan_out=True, **CAUSAL)),
    "ia3_bert": Row("bert", "IA3Config", {}),
    "ia3_t5": Row("t5", "IA3Config", SEQ2SEQ),
    "vera_llama": Row("llama", "VeraConfig", dict(r=6, target_modules=[*Q_V, "down_proj"], **CAUSAL)),
    "vera_bert": Row("bert", "VeraConfig", dict(r=6, target_modules=["query", "value"])),
    "vera_t5": Row("t5", "VeraConfig", dict(r=6, target_modules=["q", "wi_0"], **SEQ2SEQ)),
    "prompt_llama": Row("llama", "PromptTuningConfig", dict(num_virtual_tokens=3, **CAUSAL)),
    "prompt_bert": Row("bert_one_type", "PromptTuningConfig", dict(
        num_virtual_tokens=3, task_type="FEATURE_EXTRACTION")),
    "prompt_t5": Row("t5", "PromptTuningConfig", dict(
        num_virtual_tokens=3, num_transformer_submodules=1, **SEQ2SEQ)),
    "p_tuning_llama": Row("llama", "PromptEncoderConfig", dict(num_virtual_tokens=3, **CAUSAL)),
}  # fmt: skip
