"""The peer of finetune_sst2.py: Hugging Face's Trainer by its usual recipe for sentences, dynamic padding and all.

    python finetune_sst2_torch.py '{"model": DIR, "train": TSV, "valid": TSV, "folder": DIR, "steps": 300, …}'

Needs torch, transformers and accelerate, nothing of ours.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers


def read(file: str) -> list[tuple[str, int]]:
    """Sentences with their labels."""
    rows = Path(file).read_text("utf-8").splitlines()[1:]
    return [(text, int(label)) for text, label in (row.rsplit("\t", 1) for row in rows)]


class Clock(transformers.TrainerCallback):
    """The seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args, **more) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *args, **more) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def main(a: dict) -> None:
    torch.set_num_threads(a["threads"])
    transformers.set_seed(a["seed"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(a["model"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(a["model"], num_labels=2).float()

    def rows(file: str) -> list[dict]:
        texts, labels = zip(*read(file), strict=True)
        out = tokenizer(list(texts), truncation=True, max_length=a["longest"])
        return [{"input_ids": ids, "attention_mask": mask, "labels": label}
                for ids, mask, label in zip(out["input_ids"], out["attention_mask"], labels, strict=True)]  # fmt: skip

    arguments = transformers.TrainingArguments(
        output_dir=a["folder"], per_device_train_batch_size=a["batch"], per_device_eval_batch_size=a["batch"],
        use_cpu=True, report_to="none", disable_tqdm=True, seed=a["seed"], max_steps=a["steps"], learning_rate=a["lr"],
        lr_scheduler_type="linear", warmup_steps=0, weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.999,
        adam_epsilon=1e-8, max_grad_norm=1.0, save_strategy="no", logging_steps=50)  # fmt: skip
    clock = Clock()
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows(a["train"]), eval_dataset=rows(a["valid"]),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        processing_class=tokenizer, data_collator=transformers.DataCollatorWithPadding(tokenizer),
        callbacks=[clock])  # fmt: skip
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.save_model(str(Path(a["folder"]) / "model"))
    told = {"accuracy": accuracy, "step_s": float(np.median(clock.seconds))}
    Path(a["folder"], "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
