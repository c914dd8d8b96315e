"""Writes tests/golden/generate.json: what Hugging Face's `generate` and its logits processors make of tiny models.

Run it where PyTorch and transformers are installed: `python tests/golden/make_generate.py`. Models are rows of
tests/published.py; the test reads the file and needs neither.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.generation import logits_process

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import hf_rows

HERE = Path(__file__).parent
ENDS = [5, 9, 17, 30, 44, 61]
BEAMS = dict(beams=3, samples=3, tokens=9)
# model, our settings, tokens that end
CASES = [
    *[(model, dict(tokens=9), []) for model in ("llama", "gpt2", "mistral_window", "gemma3", "t5", "bart")],
    ("llama", dict(tokens=14), ENDS),
    ("llama", dict(tokens=14, repetition_penalty=1.7), []),
    ("gpt2", dict(tokens=9, repetition_penalty=0.6), ENDS),
    ("llama", dict(tokens=14, min_tokens=6), ENDS),
    ("llama", dict(tokens=9, banned_ids=[3, 12, 20, 33, 41, 50]), []),
    *[
        (model, BEAMS | dict(early_stopping=early, length_penalty=penalty), ENDS)
        for model in ("llama", "gpt2", "mistral_window")
        for early, penalty in (("no", 1.0), ("yes", 0.3), ("never", 1.5), ("never", 0.0), ("no", -0.7))
    ],
    ("llama", BEAMS | dict(beams=5, samples=2, repetition_penalty=1.4, min_tokens=3), ENDS),
    ("llama", BEAMS, []),
    ("t5", BEAMS, ENDS),
    ("bart", BEAMS | dict(early_stopping="yes"), ENDS),
    ("llama", dict(tokens=64, length=10, min_length=8, no_repeat_ngram=2), ENDS),
    ("llama", dict(tokens=64, length=9, no_repeat_ngram=1, last_id=7), []),
    ("llama", BEAMS | dict(tokens=64, length=9, min_length=7, no_repeat_ngram=2, early_stopping="never"), ENDS),
    ("t5", dict(tokens=64, length=9, first_id=7, last_id=3), ENDS),
    ("t5", BEAMS | dict(tokens=64, length=9, min_length=5, no_repeat_ngram=1, first_id=7, last_id=5), ENDS),
    ("bart", BEAMS | dict(tokens=64, length=12, min_length=8, no_repeat_ngram=3, first_id=0, last_id=61), ENDS),
]
# transformers counts padding as part of a prompt, and forces tokens by the length of a batch: these prompts go alone.
ALONE = {"length", "no_repeat_ngram", "first_id", "last_id"}
STARTS = {"t5": 0, "bart": 2}
EARLY = {"no": False, "yes": True, "never": "never"}
LOGITS = [
    dict(temperature=0.7), dict(temperature=1.0, top_k=7), dict(temperature=1.3, top_p=0.6),
    dict(temperature=0.8, top_p=0.05), dict(temperature=1.5, min_p=0.2), dict(temperature=0.9, top_k=20, top_p=0.7),
    dict(temperature=1.1, top_k=20, top_p=0.9, min_p=0.15), dict(temperature=1.2, top_p=0.97, min_p=0.05),
]  # fmt: skip


def model_of(name: str) -> torch.nn.Module:
    cls, golden = getattr(transformers, hf_rows.ROWS[name].model), np.load(HERE / "hf" / f"{name}.npz")
    model = cls(cls.config_class(**json.loads(str(golden["config"])))).eval()
    shapes = json.loads(str(golden["shapes"]))
    values = {k: torch.from_numpy(hf_rows.draw(k, tuple(s)).astype(np.float32)) for k, s in shapes.items()}
    missing, unknown = model.load_state_dict(values, strict=False)
    model.tie_weights()
    assert not unknown, (missing, unknown)
    return model


def prompts(seed: int, n: int = 3) -> list[list[int]]:
    raw = np.random.PCG64(seed).random_raw(32).astype(np.int64) % 64
    return [raw[8 * i : 8 * i + length].tolist() for i, length in enumerate((4, 1, 6)[:n])]


def generated(name: str, setting: dict, ends: list[int], given: list[list[int]]) -> dict:
    if len(given) > 1 and setting.keys() & ALONE:
        each = [generated(name, setting, ends, [one]) for one in given]
        several = {key: [one for found in each for one in found[key]] for key in ("tokens", "scores") if key in each[0]}
        return each[0] | dict(prompts=given) | several
    model = model_of(name)
    whole = max(map(len, given))
    encoder_decoder = model.config.is_encoder_decoder
    pad = [[0] * (whole - len(p)) for p in given]
    ids = [p + z if encoder_decoder else z + p for p, z in zip(given, pad, strict=True)]
    mask = [
        [1] * len(p) + [0] * len(z) if encoder_decoder else [0] * len(z) + [1] * len(p)
        for p, z in zip(given, pad, strict=True)
    ]
    start = STARTS.get(name)
    c = transformers.GenerationConfig(
        max_new_tokens=None if "length" in setting else setting["tokens"],
        max_length=setting.get("length"),
        min_length=setting.get("min_length"),
        no_repeat_ngram_size=setting.get("no_repeat_ngram"),
        forced_bos_token_id=setting.get("first_id"),
        forced_eos_token_id=setting.get("last_id"),
        min_new_tokens=setting.get("min_tokens"),
        repetition_penalty=setting.get("repetition_penalty", 1.0),
        suppress_tokens=setting.get("banned_ids"),
        num_beams=setting.get("beams", 1),
        num_return_sequences=setting.get("samples", 1),
        early_stopping=EARLY[setting.get("early_stopping", "no")],
        length_penalty=setting.get("length_penalty", 1.0),
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=0,
        decoder_start_token_id=start,
        return_dict_in_generate=True,
        output_scores=True,
    )
    model.generation_config = transformers.GenerationConfig(decoder_start_token_id=start)
    with torch.no_grad():
        out = model.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), generation_config=c)
    rows = out.sequences[:, 1 if encoder_decoder else whole :].tolist()
    cut = []
    for row in rows:
        at = next((i for i, t in enumerate(row) if t in ends), len(row))
        cut.append(row[:at])
    n = setting.get("samples", 1)
    result = dict(model=name, setting=setting, ends=ends, prompts=given, start=start)
    result["tokens"] = [cut[i : i + n] for i in range(0, len(cut), n)]
    if setting.get("beams", 1) > 1:
        scores = [round(float(x), 5) for x in out.sequences_scores]
        result["scores"] = [scores[i : i + n] for i in range(0, len(scores), n)]
    return result


def warped(setting: dict) -> dict:
    """Hugging Face's order: temperature, top-k, top-p, min-p."""
    z = (np.random.PCG64(11).random_raw(3 * 40) >> np.uint64(40)).astype(np.float64).reshape(3, 40) / 2**24 * 9
    z = torch.tensor(z.round(4), dtype=torch.float32)
    made = [
        logits_process.TemperatureLogitsWarper(setting["temperature"]),
        *([logits_process.TopKLogitsWarper(setting["top_k"])] if "top_k" in setting else []),
        *([logits_process.TopPLogitsWarper(setting["top_p"])] if "top_p" in setting else []),
        *([logits_process.MinPLogitsWarper(setting["min_p"])] if "min_p" in setting else []),
    ]
    p = logits_process.LogitsProcessorList(made)(torch.zeros(3, 1, dtype=torch.long), z).softmax(-1)
    return dict(setting=setting, logits=z.tolist(), probabilities=[[round(float(x), 6) for x in row] for row in p])


if __name__ == "__main__":
    torch.manual_seed(0)
    cases = [generated(*case, prompts(seed)) for case in CASES for seed in (1, 2)]
    lengths = {len(t) for case in cases if case["ends"] for answers in case["tokens"] for t in answers}
    assert len(lengths) > 5, "answers must end at many places"
    lines = [json.dumps(x) for x in cases]
    text = '{"generated": [\n' + ",\n".join(lines) + '\n],\n"warped": [\n'
    text += ",\n".join(json.dumps(warped(s)) for s in LOGITS) + "\n]}\n"
    (HERE / "generate.json").write_text(text)
    print(len(cases), "cases, lengths", sorted(lengths))
