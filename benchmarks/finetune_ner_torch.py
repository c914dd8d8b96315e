"""The peer of finetune_ner.py: Hugging Face's Trainer by the usual recipe for tagging. Needs torch, transformers,
accelerate and seqeval, nothing of ours; it reads the CoNLL files by itself.

    python finetune_ner_torch.py '{"do": "train", "model": DIR, "data": DIR, "folder": DIR, "seed": 0, …}'
    python finetune_ner_torch.py '{"do": "predict", "data": DIR, "folder": DIR, …}'
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from seqeval.metrics import f1_score
from seqeval.scheme import IOB2

LOST = -100  # what the loss leaves out


def read(file: Path) -> list[tuple[list[str], list[str]]]:
    """Sentences as words and IOB2 tags."""
    found: list[tuple[list[str], list[str]]] = []
    for block in file.read_text("utf-8").split("\n\n"):
        rows = [line.split() for line in block.splitlines() if line.strip() and not line.startswith("-DOCSTART-")]
        tags = [row[-1] for row in rows]
        for i, tag in enumerate(tags):
            before = tags[i - 1] if i else "O"
            if tag[:2] == "I-" and before[2:] != tag[2:]:
                tags[i] = f"B-{tag[2:]}"
        if rows:
            found.append(([row[0] for row in rows], tags))
    return found


def encode(tokenizer, sentences, labels, longest):
    """A word's label stands at its first piece."""
    out = tokenizer([words for words, _ in sentences], is_split_into_words=True, truncation=True, max_length=longest)
    out["labels"] = []
    for i, (_, tags) in enumerate(sentences):
        words, row, before = out.word_ids(i), [], None
        for word in words:
            row.append(LOST if word is None or word == before else labels.index(tags[word]))
            before = word
        assert set(words) - {None} == set(range(sum(k != LOST for k in row))), "a word has no pieces"
        out["labels"].append(row)
    keys = ("input_ids", "attention_mask", "token_type_ids", "labels")
    return [{key: out[key][i] for key in keys if key in out} for i in range(len(sentences))]


def answers(logits, numbers, sentences, labels):
    """Predicted tags of each sentence's words; words that were cut off are untagged."""
    best, out = logits.argmax(-1), []
    for row, number, (words, _) in zip(best, numbers, sentences, strict=True):
        found = [labels[k] for k in row[number != LOST]]
        out.append(found + ["O"] * (len(words) - len(found)))
    return out


def settings(a: dict, folder: Path, **more) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=a["batch"], per_device_eval_batch_size=a["batch"],
        use_cpu=True, report_to="none", disable_tqdm=True, **more)  # fmt: skip


def train(a: dict) -> None:
    folder, data = Path(a["folder"]), Path(a["data"])
    transformers.set_seed(a["seed"])
    sentences = {part: read(data / f"{part}.txt") for part in ("train", "valid")}
    labels = sorted({tag for _, tags in sentences["train"] for tag in tags})
    tokenizer = transformers.AutoTokenizer.from_pretrained(a["model"])
    model = transformers.AutoModelForTokenClassification.from_pretrained(
        a["model"], num_labels=len(labels), id2label=dict(enumerate(labels))
    )
    model = model.float()
    rows = {part: encode(tokenizer, found, labels, a["longest"]) for part, found in sentences.items()}

    def score(found) -> dict:
        told = answers(found.predictions, found.label_ids, sentences["valid"], labels)
        true = [tags for _, tags in sentences["valid"]]
        return {"f1": float(f1_score(true, told, mode="strict", scheme=IOB2, zero_division=0))}

    arguments = settings(
        a, folder / "checkpoints", seed=a["seed"], num_train_epochs=a["epochs"], learning_rate=a["lr"],
        lr_scheduler_type="linear", warmup_steps=0, weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.999,
        adam_epsilon=1e-8, max_grad_norm=1.0, eval_strategy="epoch", save_strategy="epoch", logging_steps=50,
        load_best_model_at_end=True, metric_for_best_model="f1", greater_is_better=True)  # fmt: skip
    collator = transformers.DataCollatorForTokenClassification(tokenizer)
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows["train"], eval_dataset=rows["valid"], compute_metrics=score,
        processing_class=tokenizer, data_collator=collator)  # fmt: skip
    trainer.train()
    trainer.save_model(str(folder / "best"))
    lines = trainer.state.log_history
    evaluations = [line for line in lines if "eval_f1" in line]
    told = {
        "steps": trainer.state.global_step,
        "valid_f1": [line["eval_f1"] for line in evaluations],
        "validation_s": sum(line["eval_runtime"] for line in evaluations),
        "loss": [[line["step"], line["loss"]] for line in lines if "loss" in line],
        "about": {"torch": torch.__version__, "transformers": transformers.__version__,
                  "optimizer": str(arguments.optim), "attention": model.config._attn_implementation,
                  "attention_dropout": model.config.attention_probs_dropout_prob,
                  "hidden_dropout": model.config.hidden_dropout_prob},
    }  # fmt: skip
    (folder / "told.json").write_text(json.dumps(told))


def predict(a: dict) -> None:
    folder = Path(a["folder"])
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder / "best")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "best")
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    sentences = read(Path(a["data"]) / "test.txt")
    trainer = transformers.Trainer(
        model=model, args=settings(a, folder / "predictions"),
        data_collator=transformers.DataCollatorForTokenClassification(tokenizer))  # fmt: skip
    found = trainer.predict(encode(tokenizer, sentences, labels, a["longest"]))
    told = answers(found.predictions, np.asarray(found.label_ids), sentences, labels)
    (folder / "predictions.json").write_text(json.dumps({"true": [tags for _, tags in sentences], "found": told}))


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    {"train": train, "predict": predict}[given.pop("do")](given)
