"""Many prompts at once: the answers that each gets alone, by the library and by an engine of one's own."""

from support.tiny_models import published

import jaxlm
from jaxlm.inference.engine import Request, Settings


def test_more_prompts_than_a_batch_holds_get_the_answers_that_each_gets_alone(tmp_path):
    model = jaxlm.open(published(tmp_path / "model"))
    prompts = [f"{'so ' * (i % 5)}number {i}" for i in range(40)]
    got = model.generate(prompts, tokens=6, stop=("e",))
    few = [0, 3, 17, 39]
    assert [got[i] for i in few] == model.generate([prompts[i] for i in few], tokens=6, stop=("e",))
    assert len(set(got)) > 20


def test_equal_prompts_draw_unlike_answers_as_they_do_in_one_batch(tmp_path):
    model = jaxlm.open(published(tmp_path / "model"))
    settings = dict(tokens=6, temperature=1.5, seed=5)
    many = model.generate(["the same"] * 40, **settings)
    assert len(set(many)) > 30
    assert many[:8] == model.generate(["the same"] * 8, **settings)


def test_a_model_gives_an_engine(tmp_path):
    model = jaxlm.open(published(tmp_path / "model"))
    engine = model.engine(Settings(length=32, rows=(2,), lengths=(32,), chunks=(16,)))
    try:
        answering = engine.submit(Request(tuple(model.encode("one")), jaxlm.Sampling(tokens=5)))
        assert "".join(piece.text for piece in answering) == model.generate("one", tokens=5)
    finally:
        engine.close()
