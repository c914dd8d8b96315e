"""PEFT's files of adapters: its own logits from them, and the same from what we write.

The expected values come from `tests/golden/make_peft.py`. Where PEFT is installed, it loads what we write too.
"""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from support import hf_rows
from support.peft_rows import COPY, ROWS, values

from jaxlm.core import config, tree
from jaxlm.formats import huggingface, peft_initial
from jaxlm.formats.peft import describe, load, open_files, save
from jaxlm.models import MODELS
from jaxlm.models.model import Model
from jaxlm.nn import losses
from jaxlm.nn.layout import Layout
from jaxlm.weights import adapters
from jaxlm.weights.adapters import per_row
from jaxlm.weights.adapters.adapted import Adapted

GOLDEN = Path(__file__).parents[1] / "golden" / "peft"
TOLERANCE = 1e-4


def directory(name: str, folder: Path) -> Path:
    """The row's base model, `base`, and its adapter, `theirs`."""
    golden = np.load(GOLDEN / f"{name}.npz")
    base = hf_rows.directory(ROWS[name].base, folder / "base")
    own = folder / "theirs"
    own.mkdir()
    (own / "adapter_config.json").write_text(str(golden["config"]))
    tensors = values(json.loads(str(golden["shapes"])), base)
    safetensors.numpy.save_file(tensors, own / "adapter_model.safetensors")
    return own


def opened(folder: Path, own: Path, base: str = "float32") -> tuple[Model, dict]:
    family, c = huggingface.describe(folder / "base", MODELS)
    layout = Layout(execution=config.Execution(dtype="float32"))
    weights = huggingface.load(folder / "base", family, c, family.specs(c), layout.shardings(family.specs(c), None))
    files = open_files(own)
    adapted = Adapted(dataclasses.replace(describe(files, family, c), base=base), family, c)
    homes = layout.shardings(adapted.specs(), None)
    loaded = load(files, adapted, homes["adapter"], weights)
    return Model(family, c, adapted.base, layout, adapted), weights | {"adapter": loaded}


def logits(name: str, model: Model, weights: dict) -> np.ndarray:
    """Operation by operation: rows of one base share most of these, and no two rows a program."""
    return run(model, weights, hf_rows.batch_of(hf_rows.ROWS[ROWS[name].base].inputs))


def run(model: Model, weights: dict, batch: dict) -> np.ndarray:
    return np.asarray(losses.logits(model.readout(weights, model.forward(weights, batch).x_BTD), model.shard))


@pytest.mark.parametrize("name", ROWS)
def test_logits_equal_peft_and_what_we_write_says_the_same(name, tmp_path):
    model, weights = opened(tmp_path, directory(name, tmp_path))
    expected = np.load(GOLDEN / f"{name}.npz")["expected"]
    where = hf_rows.real(hf_rows.ROWS[ROWS[name].base].inputs)
    got = logits(name, model, weights)
    np.testing.assert_allclose(got[where], expected[where], atol=TOLERANCE, rtol=0)
    own = dataclasses.replace(model, adapter=model.adapter.disabled)
    assert np.abs(logits(name, own, {n: w for n, w in weights.items() if n != "adapter"}) - got)[where].max() > 0.05

    save(tmp_path / "ours", model.adapter, weights["adapter"], str(tmp_path / "base"))
    again, held = opened_again(tmp_path, model, weights)
    np.testing.assert_allclose(logits(name, again, held)[where], got[where], atol=1e-5, rtol=0)
    theirs, ours = (safetensors.numpy.load_file(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "ours"))
    told_otherwise = ("three", "phi3", "adalora", "patterns", "pissa", "olora", "lora_llama_table_and_head")
    if not any(part in name for part in told_otherwise):
        theirs = {key: x for key, x in theirs.items() if not key.endswith(COPY)}
        assert theirs.keys() <= ours.keys()
        for key, x in theirs.items():
            np.testing.assert_array_equal(ours[key], x, err_msg=key)


def opened_again(folder: Path, model: Model, weights: dict) -> tuple[Model, dict]:
    files = open_files(folder / "ours")
    c = describe(files, model.family, model.config)
    adapted = Adapted(c, model.family, model.config)
    loaded = load(files, adapted, model.shard.shardings(adapted.specs(), None)["adapter"], weights)
    return dataclasses.replace(model, adapter=adapted), weights | {"adapter": loaded}


@pytest.mark.filterwarnings("ignore")  # of their own code
@pytest.mark.parametrize("name", ROWS)
def test_peft_reads_what_we_write(name, tmp_path):
    there = pytest.importorskip("peft", reason="PEFT is not installed: nothing is compared live")
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: nothing is compared live")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing is compared live")
    row = hf_rows.ROWS[ROWS[name].base]
    model, weights = opened(tmp_path, directory(name, tmp_path))
    save(tmp_path / "ours", model.adapter, weights["adapter"], str(tmp_path / "base"))
    base = getattr(transformers, row.model).from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
    )
    loaded = there.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    given = {k: torch.from_numpy(np.array(v)).long() for k, v in hf_rows.inputs(row.inputs).items()}
    with torch.no_grad():
        out = loaded(**given)[row.output].numpy()
    got, where = logits(name, model, weights), hf_rows.real(row.inputs)
    np.testing.assert_allclose(got[where], out[:, out.shape[1] - got.shape[1] :][where], atol=TOLERANCE, rtol=0)


def spoilt(folder: Path, change) -> Path:
    """`lora_llama` with its tensors or settings changed."""
    own = directory("lora_llama", folder)
    file, told = own / "adapter_model.safetensors", own / "adapter_config.json"
    tensors, values = safetensors.numpy.load_file(file), json.loads(told.read_text())
    change(tensors, values)
    safetensors.numpy.save_file(tensors, file)
    told.write_text(json.dumps(values))
    return own


def renamed(tensors, values):
    for key in list(tensors):
        tensors[key.replace("q_proj", "query")] = tensors.pop(key)


def misshapen(tensors, values):
    key = next(k for k in sorted(tensors) if "lora_A" in k)
    tensors[key] = np.zeros((3, 5), np.float32)


@pytest.mark.parametrize(("change", "says"), [
    (renamed, r"self_attn\.query\.lora_A\.weight.* fit no weight of the base model; check that .* \(it names base\)"),
    (misshapen, r"lora_A\.weight is \[3, 5\], and blocks/q of the base model makes it \[3, 16\]"),
    (lambda t, v: v.update(peft_type="LOHA"), r"peft_type 'LOHA' is not read"),
    (lambda t, v: v.update(bias="all"), r"bias 'all' is not read"),
    (lambda t, v: v.update(modules_to_save=["lm_head"]), r"modules_to_save \['lm_head'\] is not read"),
    *((lambda t, v, begun=begun: v.update(init_lora_weights=begun), f"init_lora_weights '{begun}' changed the base")
      for begun in ("pissa_niter_4", "corda", "loftq", "lora_ga", "unheard_of")),
    (lambda t, v: v.update(use_bdlora={"x": 1}), r"use_bdlora"),
])  # fmt: skip
def test_what_does_not_fit_is_named(change, says, tmp_path):
    own = spoilt(tmp_path, change)
    with pytest.raises(ValueError, match=says) as error:
        opened(tmp_path, own)
    assert re.search(r"adapter_(model|config)", str(error.value))


@pytest.mark.parametrize("body", ["model.language_model.", "language_model.model."])
def test_an_adapter_of_a_multimodal_model_goes_onto_its_text_model(body, tmp_path):
    def wrap(tensors, values):
        for key in list(tensors):
            tensors[key.replace("base_model.model.model.", f"base_model.model.{body}")] = tensors.pop(key)

    model, weights = opened(tmp_path, spoilt(tmp_path, wrap))
    expected = np.load(GOLDEN / "lora_llama.npz")["expected"]
    np.testing.assert_allclose(logits("lora_llama", model, weights), expected, atol=TOLERANCE, rtol=0)


def test_where_first_values_can_not_be_told():
    """Equal singular values on both sides of the cut; columns of which one is another's multiple."""
    with pytest.raises(ValueError, match="singular values 2 and 3 are equal"):
        peft_initial.pissa(np.diag([3.0, 2.0, 2.0, 1.0]), 2, 1.0)
    a, b = peft_initial.pissa(np.diag([3.0, 3.0, 2.0, 1.0]), 2, 0.5)
    np.testing.assert_allclose(0.5 * b @ a, np.diag([3.0, 3.0, 0, 0]), atol=1e-6)
    with pytest.raises(ValueError, match="its first 2 columns depend on each other"):
        peft_initial.olora(np.array([[1.0, 2, 3], [2, 4, 1], [3, 6, 7]]), 2, 1.0)


def test_first_values_need_the_base_whole(tmp_path):
    own = directory("lora_llama_olora", tmp_path)
    model, weights = opened(tmp_path, own)
    few = tree.put(weights, "blocks/q", {"codes": weights["blocks"]["q"]})
    with pytest.raises(ValueError, match=r"blocks/q of the base model is stored in few bits, and olora adapters need"):
        load(open_files(own), model.adapter, None, few)


def test_a_copy_of_another_table_is_refused(tmp_path):
    own = directory("lora_gpt2_tied_head", tmp_path)
    file = own / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["base_model.model.lm_head.base_layer.weight"][5] += 0.5
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(ValueError, match=r"lm_head\.base_layer\.weight is another table than the base model's"):
        opened(tmp_path, own)


def test_an_adapter_of_a_wider_model_is_refused(tmp_path):
    own = directory("prompt_llama", tmp_path)
    safetensors.numpy.save_file({"prompt_embeddings": np.zeros((3, 8), np.float32)}, own / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="prompt_embeddings is 3 x 8, and the base model is 16 wide"):
        opened(tmp_path, own)


def test_pissa_is_written_as_what_it_adds(tmp_path):
    """On the base as it was: an update of twice the rank."""
    directory("lora_llama", tmp_path)
    model, weights = opened(tmp_path, tmp_path / "theirs")
    c = adapters.Pissa(rank=2, alpha=3.0)
    adapted = Adapted(c, model.family, model.config)
    plain = {n: w for n, w in weights.items() if n != "adapter"}
    fresh = adapted.init(adapted.specs(), jax.random.key(0), existing=plain)
    moved = tree.map_named(lambda p, x: x + 0.2 if adapted.trainable(p) else x, fresh)
    pissa = dataclasses.replace(model, adapter=adapted)
    save(tmp_path / "ours", adapted, moved["adapter"], "base")
    again, held = opened_again(tmp_path, model, weights)
    assert again.adapter.c.rank == 4
    np.testing.assert_allclose(logits("lora_llama", again, held), logits("lora_llama", pissa, moved), atol=1e-4)
    assert np.abs(logits("lora_llama", pissa, moved) - logits("lora_llama", pissa, fresh)).max() > 0.05


@pytest.mark.parametrize("method", ["houlsby", "prefix", "norms"])
def test_methods_without_files_say_so(method, tmp_path):
    directory("lora_llama", tmp_path)
    model, _ = opened(tmp_path, tmp_path / "theirs")
    adapted = Adapted(adapters.METHODS[method].Config(), model.family, model.config)
    with pytest.raises(ValueError, match=f"PEFT has no files for {method}; export the merged model"):
        save(tmp_path / "ours", adapted, {}, "base")


def test_rows_of_a_batch_go_through_adapters_of_their_own(tmp_path):
    names = ("lora_llama_patterns", "adalora_llama", "vera_llama")
    each = []
    for name in names:
        (tmp_path / name).mkdir()
        each.append(opened(tmp_path / name, directory(name, tmp_path / name)))
    model, weights = each[0]
    plain = {name: w for name, w in weights.items() if name != "adapter"}
    alone = model.adapter.disabled
    rows = [2, None, 0, 1]
    adapter, own = per_row.mix([(m.adapter, w["adapter"]) for m, w in each], rows, alone)
    batch = {k: np.repeat(v[:1], 4, 0) for k, v in hf_rows.batch_of("decoder").items()}

    two = {k: v[:2] for k, v in batch.items()}  # of the size that all tests here share
    got = run(dataclasses.replace(model, adapter=adapter), plain | {"adapter": own}, batch)
    for row, i in enumerate(rows):
        expected = run(dataclasses.replace(model, adapter=alone), plain, two) if i is None else run(*each[i], two)
        np.testing.assert_allclose(got[row], expected[0], atol=TOLERANCE)
    assert min(np.abs(got[i] - got[j]).max() for i in range(4) for j in range(i)) > 0.05
    twice = run(
        dataclasses.replace(model, adapter=adapter),
        plain | {"adapter": own},
        {k: np.repeat(v, 2, 0) for k, v in batch.items()},
    )
    np.testing.assert_allclose(twice[1::2], got, atol=TOLERANCE)
    with pytest.raises(ValueError, match="ia3 can't be mixed with others in a batch"):
        per_row.mix([(dataclasses.replace(alone, c=adapters.Ia3()), {})], [0], alone)
