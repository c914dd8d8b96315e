"""Writes tests/golden/quantized: a tiny Llama quantized and saved by compressed-tensors and transformers, and the
logits that they get of it.

Run it where torch, transformers and compressed-tensors are installed: `python tests/golden/make_quantized.py`. The
tests read the files and need none of them.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import hf_rows

HERE = Path(__file__).parent / "quantized"
LLAMA = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False,
)  # fmt: skip
ALL = ["Linear"]
ACT = dict(num_bits=8, dynamic=True, strategy="token")
ROWS = {
    "packed": [(ALL, dict(num_bits=4, strategy="group", group_size=16), None)],
    "packed_asymmetric": [(ALL, dict(num_bits=4, strategy="group", group_size=16, symmetric=False), None)],
    "packed_channel_8": [(ALL, dict(num_bits=8, strategy="channel"), None)],
    "packed_3": [(ALL, dict(num_bits=3, strategy="group", group_size=16, symmetric=False), None)],
    "int8": [(ALL, dict(num_bits=8, strategy="channel"), ACT)],
    "fp8": [(ALL, dict(num_bits=8, type="float", strategy="channel"), ACT | dict(type="float"))],
    "fp8_tensor": [(ALL, dict(num_bits=8, type="float", strategy="tensor"), ACT | dict(type="float"))],
    "fp8_blocks": [(ALL, dict(num_bits=8, type="float", strategy="block", block_structure=[16, 16]), None)],
    "nvfp4": [(ALL, dict(num_bits=4, type="float", strategy="tensor_group", group_size=16), None)],
    "mixed": [
        (["re:.*self_attn.*"], dict(num_bits=8, strategy="channel"), None),
        (["re:.*mlp.*"], dict(num_bits=4, strategy="group", group_size=16), None),
    ],
}


def fit(module: torch.nn.Module, args: QuantizationArgs) -> None:
    """Sets a module's scales and zero points by the least and largest of what shares them."""
    w, scale = module.weight.data, module.weight_scale
    if args.strategy in ("group", "tensor_group"):
        parts = w.reshape(w.shape[0], -1, args.group_size)
        low, high = parts.amin(-1), parts.amax(-1)
    elif args.strategy == "block":
        rows, columns = args.block_structure
        parts = w.reshape(w.shape[0] // rows, rows, w.shape[1] // columns, columns)
        low, high = parts.amin((1, 3)), parts.amax((1, 3))
    elif args.strategy == "channel":
        low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    else:
        low, high = w.min().reshape(1), w.max().reshape(1)
    extra = {}
    if args.strategy == "tensor_group":
        module.weight_global_scale.data.fill_(float(448 * 6 / w.abs().max()))
        extra["global_scale"] = module.weight_global_scale
    made, zero = calculate_qparams(low, high, args, **extra)
    scale.data.copy_(made.reshape(scale.shape))
    if getattr(module, "weight_zero_point", None) is not None:
        module.weight_zero_point.data.copy_(zero.reshape(scale.shape))


def logits(model: torch.nn.Module) -> np.ndarray:
    """Returns the logits with inputs as they are."""
    for module in model.modules():
        if scheme := getattr(module, "quantization_scheme", None):
            scheme.input_activations = None
    given = {k: torch.from_numpy(v).long() for k, v in hf_rows.inputs("decoder").items()}
    with torch.no_grad():
        return torch.nn.Module.float(model).eval()(**given).logits.numpy()


def make(name: str, groups: list) -> None:
    config = transformers.LlamaConfig(**LLAMA)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for key, w in model.named_parameters():
            w.copy_(torch.from_numpy(hf_rows.draw(key, tuple(w.shape)).astype(np.float32)))
    schemes = {
        f"group_{i}": QuantizationScheme(
            targets=targets, weights=QuantizationArgs(**weights),
            input_activations=None if inputs is None else QuantizationArgs(**inputs),
        )
        for i, (targets, weights, inputs) in enumerate(groups)
    }  # fmt: skip
    q = QuantizationConfig(config_groups=schemes, ignore=["lm_head"], quantization_status=QuantizationStatus.FROZEN)
    apply_quantization_config(model, q)
    for module in model.modules():
        if scheme := getattr(module, "quantization_scheme", None):
            fit(module, scheme.weights)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        compressor.update_config(folder)
        tensors = safetensors.torch.load_file(Path(folder) / "model.safetensors")
        values = (Path(folder) / "config.json").read_text()
        try:
            read = logits(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        except RuntimeError as error:
            # transformers 5.24 can't load the packed zero points that it wrote, nor multiply NVFP4 in float32.
            print(f"{name}: transformers: {error}")
            read = None
    compressor.decompress_model(model)
    expected = logits(model)
    if read is not None:
        np.testing.assert_allclose(read, expected, atol=1e-5)
    kept = {k: v for k, v in tensors.items() if k.split(".")[-2].endswith("_proj")}  # the others are drawn again
    safetensors.torch.save_file(kept, HERE / f"{name}.safetensors")
    np.savez_compressed(HERE / f"{name}.npz", config=json.dumps(json.loads(values)), expected=expected)
    print(
        name, {k.removeprefix("model.layers.0."): (v.dtype, tuple(v.shape)) for k, v in kept.items() if "q_proj" in k}
    )


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for name in sys.argv[1:] or ROWS:
        make(name, ROWS[name])
