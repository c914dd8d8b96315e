"""An encoder turns texts into vectors here: pooled over tokens, as sentence-transformers does and as its files say.

N texts, B texts at a time, T tokens, D model width.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.models.model import Model

POOLING = ("mean", "cls")


@dataclass(frozen=True)
class Recipe:
    """A recipe says how a text becomes tokens, and how these become one vector."""

    pooling: str = "mean"
    """The vector is the mean over all real tokens, special ones too (mean), or the first token's (cls)."""
    normalize: bool = True
    """Each vector is scaled to length one, so that a dot product is the cosine."""
    longest: int | None = None
    """A text is cut off after so many tokens, special ones included; None allows as many as the model can."""
    prompt: str = ""
    """It is put before each text."""
    include_prompt: bool = True
    """The mean counts the tokens of the prompt too, and the special one before it."""
    lower: bool = False


def read_recipe(folder: str | Path) -> Recipe | None:
    """Reads the recipe from the files of sentence-transformers in a model's folder; None if there are none.

    Raises a ValueError that names the file where a module, a pooling or a setting is not known.
    """
    folder = Path(folder)
    modules = _read(folder / "modules.json")
    if modules is None:
        return None
    kinds = [str(m["type"]).rpartition(".")[2] for m in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(
            f"{folder}/modules.json: {', '.join(kinds)}: only Transformer, Pooling and Normalize are known"
        )
    sentence = _settings(folder / modules[0]["path"] / "sentence_bert_config.json", TEXT_SETTINGS)
    prompts = _settings(folder / "config_sentence_transformers.json", PROMPT_SETTINGS)
    pooled = _settings(folder / modules[1]["path"] / "config.json", POOLING_SETTINGS)
    name = prompts.get("default_prompt_name")
    return Recipe(
        _pooling(folder / modules[1]["path"] / "config.json"),
        normalize=len(kinds) == 3,
        include_prompt=bool(pooled.get("include_prompt", True)),
        longest=sentence.get("max_seq_length"),
        prompt=prompts["prompts"][name] if name else "",
        lower=bool(sentence.get("do_lower_case", False)),
    )


# Settings of sentence-transformers' files: those that are read, or that don't change a vector, and for the others the
# only value they may have.
ANY = object()
STATES = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
TEXT_SETTINGS: dict[str, Any] = dict(max_seq_length=ANY, do_lower_case=ANY, transformer_task="feature-extraction")
TEXT_SETTINGS |= dict(module_output_name="token_embeddings", modality_config=STATES)
PROMPT_SETTINGS: dict[str, Any] = dict(prompts=ANY, default_prompt_name=ANY, similarity_fn_name=ANY, __version__=ANY)
PROMPT_SETTINGS["model_type"] = "SentenceTransformer"
POOLING_SETTINGS = dict.fromkeys(
    ("word_embedding_dimension", "embedding_dimension", "include_prompt", "pooling_mode"), ANY
)


def _settings(file: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Returns a file's settings. ValueError: one is set to something and is not known."""
    values = _read(file) or {}
    for name, value in values.items():
        wanted = ANY if name.startswith("pooling_mode_") else known.get(name)
        if value and wanted is not ANY and value != wanted:
            raise ValueError(f"{file}: {name} {value!r} is not known; embed with sentence-transformers")
    return values


def _pooling(file: Path) -> str:
    values = _read(file)
    if values is None:
        raise ValueError(f"{file} is missing, though modules.json names it")
    on = [name.removeprefix("pooling_mode_") for name, v in values.items() if name.startswith("pooling_mode_") and v]
    on += [values["pooling_mode"]] if isinstance(values.get("pooling_mode"), str) else []
    name = {"cls_token": "cls", "mean_tokens": "mean"}.get(on[0], on[0]) if len(on) == 1 else " and ".join(on)
    if name not in POOLING:
        raise ValueError(f"{file}: pooling by {name or 'nothing'} is not known; choose one of {', '.join(POOLING)}")
    return name


def _read(file: Path) -> Any:
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON ({error})") from error


def encode(tokenizer: Tokenizer, texts: Sequence[str], recipe: Recipe, positions: int | None = None) -> list[list[int]]:
    """Returns the tokens `[CLS] text [SEP]` of each text, cut to the recipe's length and to the model's `positions`.

    White space around a text is dropped.
    """
    first = tokenizer.bos_id if tokenizer.cls_id is None else tokenizer.cls_id
    last = tokenizer.eos_id if tokenizer.sep_id is None else tokenizer.sep_id
    if first is None or last is None:
        raise ValueError("embed: the tokenizer has no tokens for the start and end of a text ([CLS] and [SEP])")
    room = min(n for n in (recipe.longest, positions, 1 << 30) if n is not None) - 2
    if room < 1:
        raise ValueError(f"embed: {room + 2} tokens leave no room for text between {first} and {last}")
    texts = [recipe.prompt + text.strip() for text in texts]
    encoded = tokenizer.encode_batch([text.lower() for text in texts] if recipe.lower else texts)
    return [[first, *ids[:room], last] for ids in encoded]


def make_embed(
    model: Model, *, pooling: str = "mean", normalize: bool = True, batch: int = 32, skipped: int = 0
) -> Callable[[Any, Sequence[Sequence[int]]], np.ndarray]:
    """Returns a function `embed(params, token lists) -> float32 [N, D]` that keeps the order of the texts.

    The mean leaves out the first `skipped` tokens of each text. Texts of similar length go together, the
    longest first. Lengths are rounded up, so new ones seldom compile anew.
    """
    if model.family.kind != "encoder":
        raise ValueError("embed: this model reads from left to right; texts are embedded with an encoder such as bert")
    if pooling not in POOLING:
        raise ValueError(f"embed: pooling {pooling!r} is not known; choose one of {', '.join(POOLING)}")

    @jax.jit
    def run(params: Any, inputs: dict[str, jax.Array]) -> jax.Array:
        inputs = {name: model.shard(x_BT, "batch", "seq") for name, x_BT in inputs.items()}
        x_BTD = model.forward(params, inputs).x_BTD.astype(jnp.float32)
        x_BTD = model.shard(x_BTD, "batch", None, None)
        if pooling == "cls":
            out_BD = x_BTD[:, 0]
        else:
            real_BT = model.shard(inputs["segments"], "batch", None).astype(jnp.float32)
            real_BT *= jnp.arange(real_BT.shape[1])[None] >= skipped
            out_BD = (x_BTD * real_BT[..., None]).sum(1) / jnp.maximum(real_BT.sum(1), 1.0)[:, None]
        if normalize:
            out_BD /= jnp.maximum(jnp.linalg.norm(out_BD, axis=-1, keepdims=True), 1e-12)
        return model.shard(out_BD, None, None)

    def embed(params: Any, tokens: Sequence[Sequence[int]]) -> np.ndarray:
        out = np.empty((len(tokens), model.config.width), np.float32)
        pending: list[tuple[list[int], jax.Array]] = []  # the device gets its next batch before we wait for the last

        def collect() -> None:
            for members, vectors_BD in pending:
                out[members] = np.asarray(vectors_BD)[: len(members)]
            pending.clear()

        for members in _groups([len(ids) for ids in tokens], batch):
            vectors_BD = run(params, _padded([tokens[i] for i in members], batch, _batch_devices(model)))
            collect()
            pending.append((members, vectors_BD))
        collect()
        return out

    return embed


def _groups(lengths: Sequence[int], batch: int) -> list[list[int]]:
    """Groups indices of texts: at most `batch` together, the longest first, none less than half as long as another."""
    out: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not out or len(out[-1]) == batch or 2 * length_bucket(lengths[i]) <= length_bucket(lengths[out[-1][0]]):
            out.append([])
        out[-1].append(i)
    return out


def length_bucket(n: int) -> int:
    """Rounds `n` up to 16, 32, 48, 64, 96, 128, 192, 256 …"""
    power = max(16, 1 << (n - 1).bit_length())
    between = power * 3 // 4
    return between if power >= 64 and n <= between else power


def _batch_devices(model: Model) -> int:
    """Counts the devices that share the rows of a batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[a] for a in model.shard.compute["batch"])


def _padded(texts: list[Sequence[int]], batch: int, devices: int) -> dict[str, np.ndarray]:
    """Pads rows to a power of two (at most `batch`) that the devices share evenly, and lengths to their bucket."""
    B, T = min(batch, 1 << (len(texts) - 1).bit_length()), length_bucket(max(map(len, texts)))
    out = {name: np.zeros((-(-B // devices) * devices, T), np.int32) for name in ("tokens", "positions", "segments")}
    for row, ids in enumerate(texts):
        out["tokens"][row, : len(ids)] = ids
        out["positions"][row, : len(ids)] = np.arange(len(ids))
        out["segments"][row, : len(ids)] = 1
    return out


def embed_texts(model: Model, params: Any, tokenizer: Tokenizer, texts: Sequence[str], recipe: Recipe) -> np.ndarray:
    """Returns one vector for each text, `[N, D]`."""
    # The special token before a prompt goes with it, as in sentence-transformers.
    prompt = [] if recipe.include_prompt or not recipe.prompt else encode(tokenizer, [""], recipe)[0][:-1]
    run = make_embed(model, pooling=recipe.pooling, normalize=recipe.normalize, skipped=len(prompt))
    return run(params, encode(tokenizer, texts, recipe, model.config.positions))
