"""Reads directories of few bits with transformers and compressed-tensors, and compares their logits with ours.

Run it by hand where these are installed: `python tests/system/read_few_bits.py DIRECTORY=LOGITS.npz …`. An .npz has the
`tokens` and the `logits` that `jaxlm` gets of the model before it was exported. What transformers can't load is loaded
by compressed-tensors alone: its decompressor makes the weights of a plain model.
"""

import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match

TOLERANCE = 1e-4  # of the deviation of the logits


def by_hand(folder: str) -> torch.nn.Module:
    """Returns a plain model with the weights that compressed-tensors' decompressors make."""
    config = transformers.AutoConfig.from_pretrained(folder)
    q = QuantizationConfig.model_validate(dict(config.quantization_config))
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = safetensors.torch.load_file(Path(folder) / "model.safetensors")
    for name, module in model.named_modules():
        for scheme in q.config_groups.values():
            if is_match(name, module, scheme.targets, q.ignore) and f"{name}.weight_packed" in tensors:
                own = {k.removeprefix(f"{name}."): tensors.pop(k) for k in list(tensors) if k.startswith(f"{name}.")}
                own["weight_scale"] = own["weight_scale"].float()  # whose dtype they compute in
                made = BaseCompressor.load_from_registry(scheme.format).decompress(own, scheme)
                tensors[f"{name}.weight"] = made["weight"].float()
    missing, extra = model.load_state_dict(tensors, strict=False)
    assert not extra and set(missing) <= {"lm_head.weight"}, (missing, extra)
    model.tie_weights()
    return model


def main() -> None:
    for pair in sys.argv[1:]:
        folder, _, file = pair.partition("=")
        golden, how = np.load(file), "transformers"
        tokens = torch.from_numpy(golden["tokens"]).long()
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            with torch.no_grad():
                got = model.eval()(tokens).logits.numpy()
        except RuntimeError as error:
            print(f"{folder}: transformers: {str(error)[:200]}")
            model, how = by_hand(folder), "compressed-tensors"
            with torch.no_grad():
                got = model.eval()(tokens).logits.numpy()
        off = np.abs(got - golden["logits"]).max() / golden["logits"].std()
        print(f"{folder}: read by {how}, off by at most {off:.2g} of the deviation")
        assert off < TOLERANCE, folder


if __name__ == "__main__":
    main()
