"""Writes the golden files of this folder: what PyTorch and Hugging Face transformers compute from tiny random weights.

Run it where both are installed: `python tests/golden/make.py`. The tests read the files and need neither.
Weights are stored under our own paths, rounded to half precision, so the files stay small and lose nothing.
"""

from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
B, T, V, D, H, F, LAYERS = 2, 12, 48, 16, 4, 32, 2
C = D // H


def randomize(model) -> dict[str, np.ndarray]:
    """Every weight random, biases and norm scales too: a forgotten one must show."""
    model.eval()
    with torch.no_grad():
        for name, w in model.named_parameters():
            is_scale = name.endswith("weight") and ("norm" in name.lower() or ".ln_" in name)
            w.copy_((float(is_scale) + 0.3 * torch.randn(w.shape)).half().float())
    return {k: v.detach().numpy() for k, v in model.state_dict().items()}


def stack(f) -> dict[str, np.ndarray]:
    rows = [f(i) for i in range(LAYERS)]
    return {f"blocks/{k}": np.stack([row[k] for row in rows]) for k in rows[0]}


def save(name: str, weights: dict, **rest: np.ndarray) -> None:
    stored = {f"weights:{k}": w.astype(np.float16) for k, w in weights.items()}
    assert all((stored[f"weights:{k}"].astype(np.float32) == w).all() for k, w in weights.items())
    np.savez_compressed(HERE / f"{name}.npz", **stored, **rest)


def gpt2() -> None:
    c = transformers.GPT2Config(vocab_size=V, n_positions=T, n_embd=D, n_layer=LAYERS, n_head=H, use_cache=False)
    model = transformers.GPT2LMHeadModel(c)
    w = randomize(model)

    def layer(i: int) -> dict[str, np.ndarray]:
        p = {k.removeprefix(f"transformer.h.{i}."): v for k, v in w.items() if k.startswith(f"transformer.h.{i}.")}
        q, k, v = np.split(p["attn.c_attn.weight"], 3, 1)
        qb, kb, vb = np.split(p["attn.c_attn.bias"], 3)
        return dict(
            norm1=p["ln_1.weight"], norm1_bias=p["ln_1.bias"], norm2=p["ln_2.weight"], norm2_bias=p["ln_2.bias"],
            q=q.reshape(D, H, C), k=k.reshape(D, H, C), v=v.reshape(D, H, C),
            q_bias=qb.reshape(H, C), k_bias=kb.reshape(H, C), v_bias=vb.reshape(H, C),
            o=p["attn.c_proj.weight"].reshape(H, C, D), o_bias=p["attn.c_proj.bias"],
            up=p["mlp.c_fc.weight"], up_bias=p["mlp.c_fc.bias"],
            down=p["mlp.c_proj.weight"], down_bias=p["mlp.c_proj.bias"],
        )  # fmt: skip

    ours = stack(layer) | {
        "embed": w["transformer.wte.weight"],
        "position": w["transformer.wpe.weight"],
        "norm": w["transformer.ln_f.weight"],
        "norm_bias": w["transformer.ln_f.bias"],
    }
    tokens = torch.randint(0, V, (B, T))
    save("gpt2", ours, tokens=tokens.numpy().astype(np.int32), logits=model(tokens).logits.detach().numpy())


def llama(name: str, tied: bool) -> None:
    c = transformers.LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS, num_attention_heads=H,
        num_key_value_heads=2, head_dim=6, rms_norm_eps=1e-5, rope_theta=500.0,
        tie_word_embeddings=tied, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(c)
    w = randomize(model)

    def layer(i: int) -> dict[str, np.ndarray]:
        p = {k.removeprefix(f"model.layers.{i}."): v for k, v in w.items() if k.startswith(f"model.layers.{i}.")}
        return dict(
            norm1=p["input_layernorm.weight"], norm2=p["post_attention_layernorm.weight"],
            q=p["self_attn.q_proj.weight"].T.reshape(D, H, 6), k=p["self_attn.k_proj.weight"].T.reshape(D, 2, 6),
            v=p["self_attn.v_proj.weight"].T.reshape(D, 2, 6), o=p["self_attn.o_proj.weight"].T.reshape(H, 6, D),
            gate=p["mlp.gate_proj.weight"].T, up=p["mlp.up_proj.weight"].T, down=p["mlp.down_proj.weight"].T,
        )  # fmt: skip

    ours = stack(layer) | {"embed": w["model.embed_tokens.weight"], "norm": w["model.norm.weight"]}
    if not tied:
        ours["head"] = w["lm_head.weight"]
    tokens = torch.randint(0, V, (B, T))
    save(name, ours, tokens=tokens.numpy().astype(np.int32), logits=model(tokens).logits.detach().numpy())


def bert() -> None:
    c = transformers.BertConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=H, intermediate_size=F,
        max_position_embeddings=T, hidden_act="gelu",
    )  # fmt: skip
    model = transformers.BertForPreTraining(c)
    w = randomize(model)

    def layer(i: int) -> dict[str, np.ndarray]:
        prefix = f"bert.encoder.layer.{i}."
        p = {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}
        out = {}
        for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value")):
            out[ours] = p[f"attention.self.{theirs}.weight"].T.reshape(D, H, C)
            out[f"{ours}_bias"] = p[f"attention.self.{theirs}.bias"].reshape(H, C)
        return out | dict(
            o=p["attention.output.dense.weight"].T.reshape(H, C, D), o_bias=p["attention.output.dense.bias"],
            norm1=p["attention.output.LayerNorm.weight"], norm1_bias=p["attention.output.LayerNorm.bias"],
            up=p["intermediate.dense.weight"].T, up_bias=p["intermediate.dense.bias"],
            down=p["output.dense.weight"].T, down_bias=p["output.dense.bias"],
            norm2=p["output.LayerNorm.weight"], norm2_bias=p["output.LayerNorm.bias"],
        )  # fmt: skip

    ours = stack(layer) | {
        "embed": w["bert.embeddings.word_embeddings.weight"],
        "position": w["bert.embeddings.position_embeddings.weight"],
        "type": w["bert.embeddings.token_type_embeddings.weight"],
        "norm": w["bert.embeddings.LayerNorm.weight"],
        "norm_bias": w["bert.embeddings.LayerNorm.bias"],
        "pooler": w["bert.pooler.dense.weight"].T,
        "pooler_bias": w["bert.pooler.dense.bias"],
        "transform": w["cls.predictions.transform.dense.weight"].T,
        "transform_bias": w["cls.predictions.transform.dense.bias"],
        "transform_norm": w["cls.predictions.transform.LayerNorm.weight"],
        "transform_norm_bias": w["cls.predictions.transform.LayerNorm.bias"],
        "head_bias": w["cls.predictions.bias"],
    }
    tokens, types = torch.randint(0, V, (B, T)), (torch.arange(T) >= 5).long().expand(B, T)
    real = torch.arange(T)[None] < torch.tensor([T, 8])[:, None]
    hidden = model.bert(tokens, attention_mask=real.long(), token_type_ids=types)
    out = model(tokens, attention_mask=real.long(), token_type_ids=types)
    save(
        "bert", ours, tokens=tokens.numpy().astype(np.int32), types=types.numpy().astype(np.int32),
        segments=real.numpy().astype(np.int32), logits=out.prediction_logits.detach().numpy(),
        pooled=hidden.pooler_output.detach().numpy(),
    )  # fmt: skip


def adamw() -> None:
    w = torch.randn(4, 3).requires_grad_()
    first, gradients, after = w.detach().numpy().copy(), torch.randn(6, 4, 3), []
    optimizer = torch.optim.AdamW([w], lr=0.03, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for g in gradients:
        w.grad = g
        optimizer.step()
        after.append(w.detach().numpy().copy())
    np.savez_compressed(HERE / "adamw.npz", first=first, gradients=gradients.numpy(), after=np.stack(after))


if __name__ == "__main__":
    torch.manual_seed(0)
    gpt2()
    llama("llama", tied=False)
    llama("llama_tied", tied=True)
    bert()
    adamw()
