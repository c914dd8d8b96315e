"""The lm-evaluation-harness with our model and with its own Hugging Face backend, on local tasks: the same numbers.

    python benchmarks/harness_parity.py MODEL_DIR --data ../shared/data --torch-python TORCH_VENV/bin/python

MODEL_DIR is a Hugging Face directory. Sentiment as a choice of two (SST-2), whole texts (WikiText-2), answers (GSM8K).
Exit status 1 if a likelihood differs by more than 0.01 nats, or an accuracy or answer at all. The weights and logits of
both are float32. The peer's last step, from logits to log probabilities, is asked for in float64: in float32 PyTorch's
loses 7.7e-6 nats a token against float64 on the same logits (49,152 of them), 0.013 nats of a text of 6,000 characters.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from worker import machine, save, table

ALLOWED = 1e-2
TASKS = {
    "sentiment": """
output_type: multiple_choice
doc_to_text: "Review: {{text}}\\nSentiment:"
doc_to_target: "{{label}}"
doc_to_choice: ["negative", "positive"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "whole": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "sums": """
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["Question:"], max_gen_toks: 48, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
PEER = """
import json, sys
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
model, folder, threads, out = sys.argv[1:]
import torch
torch.set_num_threads(int(threads))
found = simple_evaluate(
    model="hf", model_args=f"pretrained={model},dtype=float32,softmax_dtype=float64",
    tasks=["sentiment", "whole", "sums"], batch_size=8, device="cpu", log_samples=True,
    task_manager=TaskManager(include_path=folder, include_defaults=False))
open(out, "w").write(json.dumps(found["samples"], default=str))
"""


def write_tasks(folder: Path, data: Path, n: int) -> None:
    reviews = list(csv.DictReader((data / "sst2/dev.tsv").open(encoding="utf-8"), delimiter="\t"))[:n]
    rows = {"sentiment": [dict(text=r["sentence"].strip(), label=int(r["label"])) for r in reviews]}
    text = (data / "wikitext2/test.txt").read_text("utf-8")
    rows["whole"] = [dict(text=text[i * 6000 : (i + 1) * 6000]) for i in range(max(1, n // 16))]
    questions = (data / "gsm8k/test.jsonl").read_text("utf-8").splitlines()
    rows["sums"] = [json.loads(line) for line in questions[: max(1, n // 8)]]
    for name, task in TASKS.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows[name])))
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        head += f"dataset_kwargs: {{data_files: {{test: {folder / f'{name}.jsonl'}}}}}"
        (folder / f"{name}.yaml").write_text(head + task)


def compare(name: str, ours: list[dict], theirs: list[dict]) -> tuple[float, int]:
    """(largest difference of a likelihood in nats, requests that differ)."""
    key = lambda rows: sorted(rows, key=lambda r: r["doc_id"])  # noqa: E731
    largest, wrong = 0.0, 0
    for a, b in zip(key(ours), key(theirs), strict=True):
        for x, y in zip(a["filtered_resps"], b["filtered_resps"], strict=True):
            if name == "sums":
                wrong += x != y
                continue
            x, y = (x, y) if isinstance(x, list) else ([x], [y])
            off = abs(float(x[0]) - float(y[0]))
            largest, wrong = max(largest, off), wrong + (off > ALLOWED)
            wrong += name == "sentiment" and str(x[1]) != str(y[1])
        wrong += name == "sentiment" and a["acc"] != b["acc"]
    return largest, wrong


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    p.add_argument("--examples", type=int, default=64)
    p.add_argument("--torch-python", required=True, help="a Python that has torch, transformers and lm-eval")
    p.add_argument("--save", default="harness_parity", help="name under results/ (- : don't save)")
    a = p.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    from jaxlm.assembly import evaluate_model

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_tasks(folder, a.data, a.examples)
        os.environ["HF_HOME"] = made
        started = time.perf_counter()
        evaluate_model.evaluate_tasks(str(a.model), list(TASKS), folder / "ours", folder=folder)
        ours_s = time.perf_counter() - started
        started = time.perf_counter()
        threads = str(os.cpu_count())
        subprocess.run([a.torch_python, "-c", PEER, str(a.model), str(folder), threads, str(folder / "theirs.json")],
                       check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": ""})  # fmt: skip
        theirs_s = time.perf_counter() - started
        theirs = json.loads((folder / "theirs.json").read_text())
        found = {}
        for name in TASKS:
            lines = (folder / "ours" / f"{name}.jsonl").read_text().splitlines()
            largest, wrong = compare(name, [json.loads(line) for line in lines], theirs[name])
            found[name] = dict(examples=len(lines), largest_difference_nats=largest, differing=wrong)
    rows = [[n, f["examples"], f["largest_difference_nats"], f["differing"]] for n, f in found.items()]
    print(table(rows, ["task", "examples", "largest difference, nats", "differing"]))
    print(f"all tasks with loading and compilation: {ours_s:.0f} s here, {theirs_s:.0f} s there")
    if a.save != "-":
        save(a.save, {"machine": machine(), "model": a.model.name, "tasks": found, "seconds": [ours_s, theirs_s]})
    sys.exit(any(f["differing"] for f in found.values()))


if __name__ == "__main__":
    main()
