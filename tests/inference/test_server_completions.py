"""Texts and token ids are continued over HTTP, with the log probabilities that the lm-evaluation-harness reads; and the
smaller answers: vectors, labels, tokens, counters."""

import base64
from collections.abc import Iterator

import numpy as np
import openai
import pytest
from support import served
from support.served import TOKENS, Served

pytest.importorskip("jinja2")


def embed(texts):
    return np.array([[len(t), 0.5, -1.0] for t in texts], np.float32), sum(map(len, texts))


def classify(inputs):
    if "bad" in inputs:
        raise ValueError("input 1: is bad")
    return [{"label": "good", "probabilities": {"good": 0.75, "bad": 0.25}} for _ in inputs]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served.fake("café au lait", changes=dict(embed=embed, classify=classify)) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def http(server: Served) -> Iterator[served.Http]:
    with served.Http(server.url) as made:
        yield made


def test_a_text_is_continued(server, client):
    found = client.completions.create(model="tiny", prompt="Say </s>")
    assert found.choices[0].text == "café au lait" and found.choices[0].finish_reason == "stop"
    assert found.object == "text_completion" and found.id.startswith("cmpl-") and found.usage.prompt_tokens == 9
    assert server.prompt == "<s>Say </s>" and server.asked.prompt.count(TOKENS.eos_id) == 0
    assert server.asked.sampling.tokens == 16, "as OpenAI has it"
    client.completions.create(
        model="tiny", prompt="</s>", extra_body=dict(add_special_tokens=False, parse_special=True)
    )
    assert server.asked.prompt == (TOKENS.eos_id,)


def test_a_stream(client):
    chunks = list(
        client.completions.create(model="tiny", prompt="x", stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 13
    assert "".join(c.choices[0].text for c in chunks[:-1]) == "café au lait"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]


def test_several_prompts_of_every_kind(server, client):
    found = client.completions.create(model="tiny", prompt=["a", "b"], n=2, temperature=1.0, max_tokens=2)
    assert [c.index for c in found.choices] == [0, 1, 2, 3] and found.usage.completion_tokens == 8
    assert {c.finish_reason for c in found.choices} == {"length"}
    client.completions.create(model="tiny", prompt=[5, 6, 7])
    assert server.asked.prompt == (5, 6, 7), "token ids as they are"
    found = client.completions.create(model="tiny", prompt=[[5], [6, 7]])
    assert {r.prompt for r in server.engine.requests[-2:]} == {(5,), (6, 7)} and len(found.choices) == 2


def test_log_probabilities_and_offsets(client):
    [choice] = client.completions.create(model="tiny", prompt="x", logprobs=1, max_tokens=16).choices
    found = choice.logprobs
    assert found.tokens[:3] == ["c", "a", "f"] and found.token_logprobs == [-1.5] * 13
    assert found.top_logprobs[0] == {"c": -1.5, "b": -2.0}
    assert found.text_offset == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10, 11], "é is two tokens, and begins once"


@pytest.mark.parametrize("most", [1, 0])
def test_what_the_evaluation_harness_asks(server, client, most):
    ids = list(b"abcd")
    ask = dict(model="tiny", prompt=[ids, ids[:2]], max_tokens=most, logprobs=1, echo=True, temperature=0, seed=1)
    first, second = client.completions.create(**ask).choices
    assert first.text == "abcd" + "c" * most and first.finish_reason == "length"
    assert first.logprobs.token_logprobs == [None, -0.5, -1.0, -1.5, *[-1.5] * most]
    assert first.logprobs.top_logprobs[:3] == [None, {"b": -0.5, "a": -0.25}, {"c": -1.0, "a": -0.25}]
    assert first.logprobs.text_offset == [0, 1, 2, 3, 4][: 4 + most] and len(second.logprobs.tokens) == 2 + most
    assert server.asked.prompt_logprobs == 1
    streamed = list(client.completions.create(**ask, stream=True))
    mine = [c.choices[0] for c in streamed if c.choices[0].index == 0]
    assert "".join(c.text for c in mine) == first.text
    assert [v for c in mine if c.logprobs for v in c.logprobs.token_logprobs] == first.logprobs.token_logprobs


@pytest.mark.parametrize("given, field", [
    (dict(prompt=None), "prompt"), (dict(prompt=[]), "prompt"), (dict(prompt=[[5, "x"]]), "prompt"),
    (dict(prompt=[264]), "prompt"), (dict(prompt="x", suffix="y"), "suffix"), (dict(prompt="x", best_of=3), "best_of"),
    (dict(prompt="x", logprobs=99), "logprobs"), (dict(prompt="x" * 2000), "prompt"),
    (dict(prompt=["x"] * 3000), "prompt"),
])  # fmt: skip
def test_errors_name_fields(http, given, field):
    found = http.post("/v1/completions", json={"model": "tiny"} | given)
    assert found.status_code == 400 and found.json()["error"]["param"] == field


def test_a_full_queue_is_told_with_when_to_come_again(server, http):
    server.engine.queue = 2
    found = http.post("/v1/completions", json=dict(model="tiny", prompt=["a", "b", "c"]))
    server.engine.queue = 64
    assert found.status_code == 429 and found.headers["retry-after"] == "1"
    assert found.json()["error"]["code"] == "queue_full" and not server.engine.live, "the first two were ended"


def test_vectors(client, http):
    found = client.embeddings.create(model="tiny", input=["ab", "c"])
    assert found.data[0].embedding == [2.0, 0.5, -1.0] and found.usage.prompt_tokens == 3, "base64 to the client"
    plain = http.post("/v1/embeddings", json=dict(model="tiny", input=[5, 6, 7])).json()
    assert plain["data"][0]["embedding"] == [3.0, 0.5, -1.0]
    coded = http.post("/v1/embeddings", json=dict(model="tiny", input="ab", encoding_format="base64")).json()
    assert np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4").tolist() == [2.0, 0.5, -1.0]
    for given in (
        dict(input=""),
        dict(input=[]),
        dict(input="x", encoding_format="int8"),
        dict(input="x", dimensions=2),
    ):
        assert http.post("/v1/embeddings", json=given).status_code == 400


def test_labels(http):
    found = http.post("/v1/classify", json=dict(model="tiny", input=["a", {"text": "b"}])).json()
    assert [d["label"] for d in found["data"]] == ["good", "good"] and found["data"][1]["index"] == 1
    bad = http.post("/v1/classify", json=dict(input="bad"))
    assert bad.status_code == 400 and bad.json()["error"]["message"] == "input: input 1: is bad"


def test_tokens_of_texts_and_conversations(http):
    found = http.post("/tokenize", json=dict(model="tiny", prompt="a</s>", return_token_strs=True)).json()
    assert found["tokens"] == [TOKENS.bos_id, 97, TOKENS.eos_id] and found["count"] == 3
    assert found["token_strs"] == ["<s>", "a", "</s>"] and found["max_model_len"] == 1024
    plain = dict(prompt="a</s>", add_special_tokens=False, parse_special=False)
    assert http.post("/tokenize", json=plain).json()["tokens"] == list(b"a</s>")
    talk = dict(messages=[dict(role="user", content="</s>")])
    ids = http.post("/tokenize", json=talk).json()["tokens"]
    assert ids.count(TOKENS.eos_id) == 1, "the template's own"
    assert http.post("/detokenize", json=dict(tokens=list(b"caf\xc3\xa9"))).json() == {"prompt": "café"}
    assert http.get("/tokenizer_info").json()["eos_token"] == "</s>"
    for given in (dict(), dict(tokens=[999])):
        assert http.post("/detokenize" if given else "/tokenize", json=given).status_code == 400


def test_counters_have_the_names_that_dashboards_know(server, http):
    http.post("/v1/completions", json=dict(model="tiny", prompt="count"))
    text = http.get("/metrics").text
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total",
                 "prefix_cache_hits_total", "prompt_tokens_total", "generation_tokens_total",
                 "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_count",
                 "e2e_request_latency_seconds_sum", "request_queue_time_seconds_count", "request_prompt_tokens_bucket",
                 "request_generation_tokens_bucket", "request_prefill_time_seconds_count",
                 "request_decode_time_seconds_count"):  # fmt: skip
        assert f"vllm:{name}{{" in text and 'model_name="tiny"' in text, name
    assert 'vllm:request_success_total{finished_reason="stop",model_name="tiny"}' in text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/classify"])
def test_what_a_model_can_t_do_is_said(path):
    changes = dict(engine=None, encode_chat=None, encode_prompt=None, kind="an encoder")
    with served.fake(changes=changes) as made:
        body = dict(model="tiny", messages=[dict(role="user", content="x")], prompt="x", input="x")
        found = served.Http(made.url).post(path, json=body)
    assert found.status_code == 400 and found.json()["error"]["message"].startswith("model: tiny is an encoder and")
