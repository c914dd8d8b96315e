"""Tiny published models with a tokenizer, as Hugging Face directories: to label with, fine-tune and compare."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm.assembly import task_heads
from jaxlm.core import tree
from jaxlm.formats import huggingface
from jaxlm.models import MODELS
from jaxlm.objectives import OBJECTIVES

TEXT = "the a good bad film was it so ann bob lives in paris london who where . , ? yes no"
WORDS = TEXT.split()
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
VOCAB = len(SPECIAL) + len(WORDS)


def tokenizer(folder: Path, kind: str) -> None:
    """Writes a tokenizer of whole words: BERT's for an encoder, else one that puts nothing around a text."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors

    vocab = {word: i for i, word in enumerate([*SPECIAL.values(), *WORDS])}
    inner = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    inner.decoder = tokenizers.decoders.WordPiece()
    if kind == "encoder":
        inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    inner.add_special_tokens(list(SPECIAL.values()))
    inner.save(str(folder / "tokenizer.json"))
    about = {f"{name}_token": piece for name, piece in SPECIAL.items()}
    about["tokenizer_class"] = "BertTokenizer" if kind == "encoder" else "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def directory(folder: Path, c: Any, settings: Any = None) -> Path:
    """Writes a model of this config with random weights, with the head of an objective's settings if they are given."""
    family, rng = MODELS.of(c), np.random.default_rng(3)
    text = folder.with_name(f"{folder.name}_text")
    text.mkdir(parents=True)
    tokenizer(text, family.kind)
    specs, more = family.specs(c), {}
    if settings is not None:
        specs |= OBJECTIVES.of(settings).specs(settings, c.width)

    def draw(path: str, s: Any) -> Any:
        return jnp.asarray(rng.standard_normal(s.shape) * 0.3 + (s.role == "norm"), jnp.float32)

    weights = tree.map_named(draw, specs)
    if settings is not None:
        made = task_heads.export(family, c, settings, weights)
        more, specs = dict(names=made.names, values=made.values), made.specs
    huggingface.save(folder, family, c, specs, weights, dtype="float32", extra_files_from=text, card=False, **more)
    return folder
