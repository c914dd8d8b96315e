"""The same tokens and scores as Hugging Face's `generate`, from `tests/golden/make_generate.py`."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from support.hf_rows import draw

from jaxlm.core import config
from jaxlm.formats import huggingface
from jaxlm.inference.generate import Generator
from jaxlm.inference.sampling import Sampling, candidates, numeric_settings
from jaxlm.models import MODELS
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout

GOLDEN = Path(__file__).parents[1] / "golden"
FILE = json.loads((GOLDEN / "generate.json").read_text())
QUICK = ("llama", "t5")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """name -> (model, weights), each opened once."""
    held = {}

    def open_model(name: str):
        if name not in held:
            golden, folder = np.load(GOLDEN / "hf" / f"{name}.npz"), tmp_path_factory.mktemp(name)
            tensors = {key: draw(key, tuple(shape)) for key, shape in json.loads(str(golden["shapes"])).items()}
            (folder / "config.json").write_text(str(golden["config"]))
            safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            family, c = huggingface.describe(folder, MODELS)
            layout = Layout(execution=config.Execution(dtype="float32", scan=True))
            specs = family.specs(c)
            weights = huggingface.load(folder, family, c, specs, layout.shardings(specs, None))
            held[name] = Model(family, c, specs, layout), weights
        return held[name]

    return open_model


def setting_of(case: dict) -> Sampling:
    return Sampling(**{k: tuple(v) if isinstance(v, list) else v for k, v in case["setting"].items()})


MODELS_OF_CASES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in dict.fromkeys(case["model"] for case in FILE["generated"])
]


@pytest.mark.parametrize("name", MODELS_OF_CASES)
def test_tokens_and_scores_equal_hugging_face(name, opened):
    model, weights = opened(name)
    generators: dict[tuple, Generator] = {}
    for case in FILE["generated"]:
        if case["model"] != name:
            continue
        s, ends = setting_of(case), tuple(case["ends"])
        generate = generators.setdefault(ends, Generator(model, ends))
        prompts, source = case["prompts"], None
        if case["start"] is not None:
            prompts, source = [[case["start"]]] * len(prompts), prompts
        found = generate(weights, prompts, s, source)
        assert [[a.tokens for a in answers] for answers in found] == case["tokens"], case["setting"]
        if s.beams > 1:
            scores = [[a.score for a in answers] for answers in found]
            np.testing.assert_allclose(scores, case["scores"], atol=1e-4, err_msg=str(case["setting"]))


@pytest.mark.parametrize("case", FILE["warped"], ids=lambda case: str(case["setting"]))
def test_filters_leave_the_same_probabilities_as_hugging_face(case):
    s = Sampling(**case["setting"])
    z_BK, ids_BK = candidates(jnp.array(case["logits"]), numeric_settings(s), s.top_k)
    p_BK = np.asarray(jax.nn.softmax(z_BK, -1))
    if ids_BK is not None:
        whole = np.zeros_like(case["probabilities"])
        np.put_along_axis(whole, np.asarray(ids_BK), p_BK, -1)
        p_BK = whole
    np.testing.assert_allclose(p_BK, case["probabilities"], atol=2e-5)
