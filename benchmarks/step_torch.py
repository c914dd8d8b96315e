"""PyTorch's side of `step_time.py`: Hugging Face's model of the same shape, AdamW, on our weights and our batch.

It runs in a Python of its own that has torch and transformers and knows nothing of jaxlm.
"""

import json
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
import transformers
from shapes import ADAMW, SHAPES
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from worker import serve

# Under torch.compile transformers gives its own "sdpa" a causal mask as an array, with which SDPA can't take its flash
# kernel. Under a name that it has no mask for, the same function gets none and says `is_causal=True`.
CAUSAL = "sdpa_without_mask"
transformers.AttentionInterface.register(CAUSAL, sdpa_attention_forward)


def make_model(s: dict[str, Any]) -> torch.nn.Module:
    attention = "sdpa" if s["family"] == "bert" else CAUSAL
    plain = {"vocab_size": s["vocab"], "attn_implementation": attention, "use_cache": False}
    if s["family"] == "gpt2":
        sizes = {"n_layer": s["layers"], "n_embd": s["width"], "n_head": s["heads"], "n_positions": s["seq"]}
        # The same function as gpt2's own gelu_new, in one fused operation.
        quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "activation_function": "gelu_pytorch_tanh"}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**plain, **sizes, **quiet))
    if s["family"] == "t5":
        sizes = {"num_layers": s["layers"], "num_decoder_layers": s["layers"], "d_model": s["width"], "d_ff": s["ffn"]}
        sizes |= {"num_heads": s["heads"], "d_kv": s["width"] // s["heads"], "dropout_rate": 0.0}
        form = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
        plain.pop("attn_implementation")  # its scores have a bias, and it has only the one way
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**plain, **sizes, **form))
        # transformers 5 ties the head to the embedding all the same.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        return model
    sizes = {"num_hidden_layers": s["layers"], "hidden_size": s["width"], "num_attention_heads": s["heads"]}
    sizes |= {"intermediate_size": s["ffn"], "max_position_embeddings": s["seq"]}
    if s["family"] == "bert":
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return transformers.BertForMaskedLM(transformers.BertConfig(**plain, **sizes, **quiet))
    more = {"num_key_value_heads": s["kv_heads"], "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**plain, **sizes, **more))


def named(s: dict[str, Any], w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our weights under Hugging Face's names and in its layouts (a Linear is [out, in], GPT-2's Conv1D [in, out])."""
    D, out = s["width"], {}
    if s["family"] == "t5":
        return named_t5(s, w)
    for i in range(s["layers"]):
        p = {k.removeprefix("blocks/"): v[i] for k, v in w.items() if k.startswith("blocks/")}
        flat = {k: p[k].reshape(-1, D) if k == "o" else p[k].reshape(D, -1) for k in ("q", "k", "v", "o")}
        if s["family"] == "gpt2":
            at = f"transformer.h.{i}."
            out |= {
                f"{at}ln_{n}.{h}": p[f"norm{n}" + b] for n in (1, 2) for h, b in (("weight", ""), ("bias", "_bias"))
            }
            out[f"{at}attn.c_attn.weight"] = np.concatenate([flat[n] for n in "qkv"], 1)
            out[f"{at}attn.c_attn.bias"] = np.concatenate([p[f"{n}_bias"].ravel() for n in "qkv"])
            out |= {f"{at}attn.c_proj.weight": flat["o"], f"{at}attn.c_proj.bias": p["o_bias"]}
            out |= {f"{at}mlp.c_fc.weight": p["up"], f"{at}mlp.c_fc.bias": p["up_bias"]}
            out |= {f"{at}mlp.c_proj.weight": p["down"], f"{at}mlp.c_proj.bias": p["down_bias"]}
        elif s["family"] == "bert":
            at = f"bert.encoder.layer.{i}."
            rows = {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value"}
            rows |= {"o": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"}
            out |= {f"{at}{there}.weight": (p | flat)[here].T for here, there in rows.items()}
            out |= {f"{at}{there}.bias": p[f"{here}_bias"].ravel() for here, there in rows.items()}
            norms = {"norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm"}
            out |= {f"{at}{there}.weight": p[here] for here, there in norms.items()}
            out |= {f"{at}{there}.bias": p[f"{here}_bias"] for here, there in norms.items()}
        else:
            at = f"model.layers.{i}."
            out |= {f"{at}self_attn.{n}_proj.weight": flat[n].T for n in "qkvo"}
            out |= {f"{at}mlp.{n}_proj.weight": p[n].T for n in ("gate", "up", "down")}
            out |= {f"{at}input_layernorm.weight": p["norm1"], f"{at}post_attention_layernorm.weight": p["norm2"]}
    if s["family"] == "gpt2":
        out |= {"transformer.wte.weight": w["embed"], "transformer.wpe.weight": w["position"]}
        out |= {"transformer.ln_f.weight": w["norm"], "transformer.ln_f.bias": w["norm_bias"]}
    elif s["family"] == "bert":
        at = "bert.embeddings."
        out |= {f"{at}word_embeddings.weight": w["embed"], f"{at}position_embeddings.weight": w["position"]}
        out |= {f"{at}token_type_embeddings.weight": w["type"]}
        out |= {f"{at}LayerNorm.weight": w["norm"], f"{at}LayerNorm.bias": w["norm_bias"]}
        at = "cls.predictions."
        out |= {f"{at}transform.dense.weight": w["transform"].T, f"{at}transform.dense.bias": w["transform_bias"]}
        out |= {f"{at}transform.LayerNorm.weight": w["transform_norm"]}
        out |= {f"{at}transform.LayerNorm.bias": w["transform_norm_bias"], f"{at}bias": w["head_bias"]}
    else:
        out |= {"model.embed_tokens.weight": w["embed"], "model.norm.weight": w["norm"], "lm_head.weight": w["head"]}
    return out


def named_t5(s: dict[str, Any], w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    out, D = {"shared.weight": w["embed"], "lm_head.weight": w["head"]}, s["width"]
    for stack, cross in (("encoder", False), ("decoder", True)):
        parts = {"SelfAttention": ("", "norm1")} | ({"EncDecAttention": ("cross_", "norm_cross")} if cross else {})
        for i in range(s["layers"]):
            p = {k.removeprefix(f"{stack}/blocks/"): v[i] for k, v in w.items() if k.startswith(f"{stack}/blocks/")}
            for n, (name, (before, norm)) in enumerate(parts.items()):
                at = f"{stack}.block.{i}.layer.{n}."
                out |= {f"{at}{name}.{x}.weight": p[before + x].reshape(D, -1).T for x in "qkv"}
                out |= {f"{at}{name}.o.weight": p[f"{before}o"].reshape(-1, D).T, f"{at}layer_norm.weight": p[norm]}
            at = f"{stack}.block.{i}.layer.{len(parts)}."
            matrices = {"wi_0": "gate", "wi_1": "up", "wo": "down"}
            out |= {f"{at}DenseReluDense.{there}.weight": p[here].T for there, here in matrices.items()}
            out[f"{at}layer_norm.weight"] = p["norm2"]
        out[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = w[f"{stack}/bias"]
        out[f"{stack}.final_layer_norm.weight"] = w[f"{stack}/norm"]
    return out


class Peer:
    """variant: `plain`, or for BERT `gathered`: only the masked places go through the head, as in ours."""

    def __init__(self, shape: str, file: str, compiled: bool, variant: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.shape, self.variant = SHAPES[shape], variant
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        with self.device:
            self.model = make_model(self.shape).train()
        with np.load(file) as held:
            weights = {k[2:]: held[k] for k in held.files if k.startswith("w/")}
            batch = {k[2:]: torch.from_numpy(held[k]) for k in held.files if k.startswith("b/")}
        values = {k: torch.from_numpy(v) for k, v in named(self.shape, weights).items()}
        missing, unknown = self.model.load_state_dict(values, strict=False)
        tied = {"lm_head.weight", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
        tied |= {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
        assert not unknown and set(missing) <= tied, (missing, unknown)
        self.batch = self.inputs(batch)
        plain = {n for n, p in self.model.named_parameters() if p.ndim < 2 or "relative_attention_bias" in n}
        decayed = [p for n, p in self.model.named_parameters() if n not in plain]
        rest = [p for n, p in self.model.named_parameters() if n in plain]
        groups = [{"params": decayed, "weight_decay": ADAMW["weight_decay"]}, {"params": rest, "weight_decay": 0.0}]
        betas = (ADAMW["beta1"], ADAMW["beta2"])
        self.optimizer = torch.optim.AdamW(groups, lr=ADAMW["lr"], betas=betas, eps=ADAMW["eps"], fused=True)
        self.loss = torch.compile(self._loss) if compiled else self._loss

    def inputs(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        tokens = batch["tokens"].long()
        if self.shape["family"] == "t5":
            labels = torch.where(batch["weights"] > 0, batch["targets"].long(), -100)
            return tuple(x.to(self.device) for x in (batch["source"].long(), tokens, labels))
        if self.shape["family"] != "bert":
            return tokens.to(self.device), batch["targets"].long().to(self.device)
        real = batch["weights"] > 0
        rows = torch.arange(len(tokens))[:, None].expand_as(batch["at"])[real]
        places, targets = batch["at"].long()[real], batch["targets"].long()[real]
        if self.variant == "gathered":
            return tuple(x.to(self.device) for x in (tokens, rows, places, targets))
        labels = torch.full_like(tokens, -100)
        labels[rows, places] = targets
        return tokens.to(self.device), labels.to(self.device)

    def _loss(self, tokens: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.shape["dtype"] == "bfloat16"):
            if self.shape["family"] == "t5":
                return self.model(input_ids=tokens, decoder_input_ids=rest[0], labels=rest[1]).loss
            if self.shape["family"] != "bert":
                logits = self.model(input_ids=tokens).logits
                return functional.cross_entropy(logits.float().flatten(0, 1), rest[0].flatten())
            if self.variant == "plain":
                return self.model(input_ids=tokens, labels=rest[0]).loss
            rows, places, targets = rest
            hidden = self.model.bert(input_ids=tokens).last_hidden_state
            return functional.cross_entropy(self.model.cls(hidden[rows, places]).float(), targets)

    def describe(self) -> dict:
        gpu = self.device.type == "cuda"
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if gpu else "cpu",
        }

    def steps(self, n: int) -> dict:
        losses = []
        started, used = time.perf_counter(), time.process_time()
        for _ in range(n):
            loss = self.loss(*self.batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), ADAMW["clip"])
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        self.wait()
        times = {"seconds": (time.perf_counter() - started) / n, "cpu_seconds": (time.process_time() - used) / n}
        return times | {"losses": [float(x) for x in losses]}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def matmul(self, n: int) -> dict:
        a = torch.randn(n, n, device=self.device).to(getattr(torch, self.shape["dtype"])) / n**0.5
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            b = a
            for _ in range(2):
                b = a @ b
            self.wait()
            seconds.append((time.perf_counter() - started) / 2)
        return {"flops_per_s": 2 * n**3 / min(seconds), "median": 2 * n**3 / statistics.median(seconds)}


if __name__ == "__main__":
    peer = Peer(**json.loads(sys.argv[1]))
    serve({name: getattr(peer, name) for name in ("describe", "steps", "matmul")})
