"""Opens a model, asks it how likely texts are, and lets it go on.

python examples/score_texts.py MODEL         # a run directory, a Hugging Face directory, hf:OWNER/NAME, a .gguf file
python examples/score_texts.py               # trains a tiny model first
"""

import sys

import numpy as np

import jaxlm


def log_likelihood(model: jaxlm.LanguageModel, text: str) -> float:
    """Returns log p(text) in nats, of every token after the first."""
    ids, [logits_TV] = np.array(model.encode(text)), model.logits(text)
    log_p_TV = logits_TV - np.logaddexp.reduce(logits_TV, axis=-1, keepdims=True)
    return float(log_p_TV[np.arange(len(ids) - 1), ids[1:]].sum())


def main(place: str) -> list[float]:
    model = jaxlm.open(place)
    texts = ["import jaxlm", "jaxlm import"]
    scores = [log_likelihood(model, text) for text in texts]
    for text, score in zip(texts, scores, strict=True):
        print(f"{score:10.2f} nats  {text!r}")
    print("goes on:", repr(model.generate("import ", tokens=16, temperature=0.8, top_k=20, seed=1)))
    return scores


if __name__ == "__main__":
    if sys.argv[1:]:
        main(sys.argv[1])
    else:
        import training_loop

        main(str(training_loop.main().path))
