"""Writes tests/golden/peft: what Hugging Face PEFT computes for each row of tests/adapters.py.

Run it where PyTorch, transformers and PEFT are installed: `python tests/golden/make_peft.py [row …]` (default: rows
that have no file yet; `all`: every row). The tests read the files and need none of them.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import peft
import safetensors.numpy
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import hf_rows, peft_rows

HERE = Path(__file__).parent / "peft"


def make(name: str, row: peft_rows.Row) -> None:
    base = hf_rows.ROWS[row.base]
    with tempfile.TemporaryDirectory() as folder:
        tensors = hf_rows.directory(row.base, Path(folder) / "base")
        load = lambda: getattr(transformers, base.model).from_pretrained(  # noqa: E731
            Path(folder) / "base", dtype=torch.float32, attn_implementation="eager"
        )
        own = Path(folder) / "adapter"
        peft.get_peft_model(load(), getattr(peft, row.config)(**row.settings)).save_pretrained(own)
        file = own / "adapter_model.safetensors"
        shapes = {key: list(x.shape) for key, x in safetensors.numpy.load_file(file).items()}
        config = json.loads((own / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "base"
        if row.pattern:
            config["rank_pattern"] = row.pattern
            for module, left in row.pattern.items():
                for part in "ABE":
                    key = f"base_model.model.{module.removesuffix('E')}{part}"
                    shapes[key][1 if part == "B" else 0] = sum(left)
        safetensors.numpy.save_file(peft_rows.values(shapes, tensors), file)
        (own / "adapter_config.json").write_text(json.dumps(config))
        model = peft.PeftModel.from_pretrained(load(), own).eval()
        given = {k: torch.from_numpy(v).long() for k, v in hf_rows.inputs(base.inputs).items()}
        with torch.no_grad():
            out, plain = model(**given)[base.output].numpy(), load().eval()(**given)[base.output].numpy()
    out = out[:, out.shape[1] - plain.shape[1] :]  # what comes of virtual tokens stands first
    moved = np.abs(out - plain).max()
    assert np.isfinite(out).all() and 0.05 < moved < 1e3, f"{name}: off the base by {moved}"
    np.savez_compressed(HERE / f"{name}.npz", config=json.dumps(config), shapes=json.dumps(shapes), expected=out)
    print(f"{name}: {len(shapes)} tensors, largest {np.abs(out).max():.2f}, off the base by {moved:.2f}")


if __name__ == "__main__":
    wanted = sys.argv[1:] or [name for name in peft_rows.ROWS if not (HERE / f"{name}.npz").exists()]
    for name in peft_rows.ROWS if wanted == ["all"] else wanted:
        make(name, peft_rows.ROWS[name])
