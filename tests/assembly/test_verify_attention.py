"""A fused kernel is compared with plain attention once, on the devices and the documents that a run has."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.cudnn import install

from jaxlm.assembly.verify_attention import verify
from jaxlm.core import config
from jaxlm.nn import attention
from jaxlm.nn.kernels import packed_attention
from jaxlm.nn.layout import Layout
from jaxlm.nn.mask import Mask

T = 32


def asked(mask: Mask) -> list[attention.Request]:
    """What one traced layer asks for."""
    x = [jax.ShapeDtypeStruct((2, T, n, 8), jnp.bfloat16) for n in (2, 1, 1)]
    with attention.recorded() as requests:
        jax.eval_shape(lambda *x: attention.attend(*x, mask, shard=Layout()), *x)
    return requests


def program(**execution) -> SimpleNamespace:
    return SimpleNamespace(run=SimpleNamespace(execution=config.Execution(**execution)), layout=Layout(), mesh=None)


@pytest.fixture
def batch() -> dict[str, np.ndarray]:
    return {"segments": np.repeat(np.arange(1, 5, dtype=np.int32), T // 4).reshape(1, 1, T)}


def test_a_kernel_that_mixes_documents_is_refused(monkeypatch, batch):
    install(monkeypatch)
    requests = asked(Mask(True, 12, batch["segments"][0], batch["segments"][0], packed=True))
    assert [(r.shape, r.window, r.choice.implementation) for r in requests] == [((T, 2, 1, 8), 12, "cudnn")]
    assert verify(program(), requests, batch).endswith("of plain attention on the first batch's documents")
    assert verify(program(verify=False), requests, batch) == ""
    monkeypatch.setattr(packed_attention, "number_documents", lambda segments: jnp.zeros_like(segments))
    with pytest.raises(ValueError, match=r"execution\.attention: on cpu cudnn .* gives values that are .*% from"):
        verify(program(), requests, batch)


def test_what_is_not_compared_is_said(monkeypatch, batch):
    assert verify(program(), asked(Mask(True)), batch) == ""  # plain attention needs no comparison
    install(monkeypatch)
    one = dataclasses.replace(asked(Mask(True, None, *[batch["segments"][0]] * 2, packed=True))[0], special="a bias")
    assert verify(program(), [one], batch) == "not compared with plain attention, as it has a bias"
