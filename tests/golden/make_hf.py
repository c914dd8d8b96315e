"""Writes tests/golden/hf: what Hugging Face transformers computes for each row of tests/support.

Run it where PyTorch and transformers are installed: `python tests/golden/make_hf.py [row …]` (default: rows that have
no file yet; `all`: every row). The tests read the files and need neither.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import head_rows, hf_rows

HERE = Path(__file__).parent / "hf"


def make(name: str, row: hf_rows.Row) -> None:
    cls = getattr(transformers, row.model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        cls(cls.config_class(**row.config)).to(torch.float16).save_pretrained(folder)
        with safetensors.safe_open(file, "np") as f:
            shapes = {key: list(f.get_slice(key).get_shape()) for key in f.keys()}  # noqa: SIM118
        shapes |= {key: list(shape) for key, shape in row.more.items()}
        weights = {key: hf_rows.draw(key, tuple(shape)) for key, shape in shapes.items()}
        safetensors.numpy.save_file(weights, file, metadata={"format": "pt"})
        model, report = cls.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(report.values()), report
        config = json.loads((Path(folder) / "config.json").read_text())
    given = hf_rows.inputs(row.inputs)
    with torch.no_grad():
        out = model.eval()(**{k: torch.from_numpy(v).long() for k, v in given.items()})
    expected = hf_rows.compared(out, row.output)
    assert np.isfinite(expected).all() and np.abs(expected).max() < 1e3, name
    np.savez_compressed(HERE / f"{name}.npz", config=json.dumps(config), shapes=json.dumps(shapes), expected=expected)
    print(f"{name}: {sum(int(np.prod(s)) for s in shapes.values()):,} weights, largest {np.abs(expected).max():.2f}")


if __name__ == "__main__":
    rows = hf_rows.ROWS | hf_rows.WRAPPED | head_rows.ROWS
    wanted = sys.argv[1:] or [name for name in rows if not (HERE / f"{name}.npz").exists()]
    for name in rows if wanted == ["all"] else wanted:
        make(name, rows[name])
