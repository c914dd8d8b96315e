"""A model that is served says what it says in this process: texts, log probabilities, vectors, labels, by adapters too;
and the lm-evaluation-harness finds the same over HTTP."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import openai
import pytest
from safetensors.numpy import save_file
from support import served, tiny_published
from support.harness_tasks import TASKS
from support.served import Http, Served
from support.tiny_models import published, random_weights

from jaxlm.assembly import generate_text, predict, serving
from jaxlm.assembly.open_model import open_model
from jaxlm.commands import cli
from jaxlm.data.tokenizer import Bytes, HuggingFace
from jaxlm.evaluation import harness
from jaxlm.formats import huggingface
from jaxlm.inference.engine import Settings
from jaxlm.inference.sampling import Sampling
from jaxlm.models import bert, llama
from jaxlm.objectives import classify
from jaxlm.runtime import mesh

pytest.importorskip("jinja2")
SMALL = Settings(length=320, rows=(4,), lengths=(320,), chunks=(64,), page_tokens=8)
SIZES = dict(vocab=264, layers=1, width=16, heads=2, kv_heads=1, head_width=8, ffn=24, positions=320)


def tokens() -> HuggingFace:
    """Bytes as a tokenizer.json that puts nothing before a text, as many chat models' do."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return HuggingFace(made.to_str(), {"bos": "<s>", "eos": "</s>"})


def lora(folder: Path) -> Path:
    """Writes an adapter of PEFT's for the query matrix."""
    folder.mkdir()
    rng, at = np.random.default_rng(5), "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({f"{at}.lora_A.weight": rng.standard_normal((2, 16)).astype(np.float32) * 4,
               f"{at}.lora_B.weight": rng.standard_normal((16, 2)).astype(np.float32) * 4},
              folder / "adapter_model.safetensors")  # fmt: skip
    settings = dict(peft_type="LORA", task_type="CAUSAL_LM", r=2, lora_alpha=2, target_modules=["q_proj"], bias="none")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    text = folder / "text"
    tokens().save(text)
    (text / "chat_template.jinja").write_text(served.TEMPLATE)
    c = llama.Config(**SIZES)
    specs = llama.specs(c)
    weights = jax.tree.map(lambda w: 2 * w, random_weights(specs, 3))
    huggingface.save(folder / "model", llama, c, specs, jax.device_put(weights), dtype="float32",
                     extra_files_from=text, card=False)  # fmt: skip
    lora(folder / "poems")
    return folder


@pytest.fixture(scope="module")
def server(home) -> Iterator[Served]:
    with mesh.on_devices(jax.devices()[:1]):
        service = serving.open_service(home / "model", SMALL, adapters={"poems": str(home / "poems")})
    with served.running(service) as made:
        yield made


@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def alone(home):
    with mesh.on_devices(jax.devices()[:1]):
        return open_model(home / "model")


def test_texts_are_those_of_this_process(client, alone, home, one_device):
    prompts = ["abc", "once upon", "x"]
    wanted = [a.text for [a] in generate_text.generate(alone, prompts, Sampling(tokens=12))]
    found = client.completions.create(model="model", prompt=prompts, max_tokens=12, temperature=0)
    assert [c.text for c in found.choices] == wanted and len(set(wanted)) == 3
    streamed = client.completions.create(model="model", prompt="abc", max_tokens=12, temperature=0, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == wanted[0]
    [[changed]] = generate_text.generate(alone, ["abc"], Sampling(tokens=12), adapters=[str(home / "poems")])
    found = client.completions.create(model="poems", prompt="abc", max_tokens=12, temperature=0)
    assert found.choices[0].text == changed.text != wanted[0]
    same = [client.completions.create(model="model", prompt="abc", max_tokens=12, seed=7).choices[0].text for _ in "ab"]
    assert same[0] == same[1], "a seed says what is drawn"
    for seed in ({"seed": 7}, {}):
        found = client.completions.create(model="model", prompt=["abc"] * 4, max_tokens=12, temperature=2, **seed)
        assert len({c.text for c in found.choices}) == 4, "equal prompts of one request draw unlike answers"


def test_chats_are_those_of_the_template(client, alone, one_device):
    messages = [{"role": "user", "content": "Hi </s>"}]
    found = client.chat.completions.create(model="model", messages=messages, max_tokens=8, temperature=0)
    text = "<s>[user]Hi </s></s>[assistant]"
    ids = [alone.tokens.bos_id, *alone.tokens.encode("[user]Hi </s>"), alone.tokens.eos_id,
           *alone.tokens.encode("[assistant]")]  # fmt: skip
    wanted = client.completions.create(model="model", prompt=ids, max_tokens=8, temperature=0).choices[0].text
    assert found.choices[0].message.content == wanted and found.usage.prompt_tokens == len(ids)
    assert len(alone.tokens.encode_special(text)) < len(ids), "the message's </s> is text"


def test_log_likelihoods_are_those_of_the_evaluation_harness(client, alone, one_device):
    with mesh.on_mesh(alone.mesh):
        run = alone.generator()
        lm = harness.Harness(alone.model, run, run.prepare(alone.params), alone.tokens, alone.boundary_ids, rows=4)
        rows = [("Question?", " yes"), ("Question?", " no"), ("a b", " c d e")]
        wanted = lm.loglikelihood([type("Asked", (), {"args": row}) for row in rows])
    encode = alone.tokens.encode
    ids, starts = [encode(a + b) for a, b in rows], [len(encode(a)) for a, _ in rows]
    found = client.completions.create(model="model", prompt=ids, max_tokens=1, logprobs=1, echo=True, temperature=0)
    for choice, start, (likelihood, greedy) in zip(found.choices, starts, wanted, strict=True):
        values, tops = choice.logprobs.token_logprobs[start:-1], choice.logprobs.top_logprobs[start:-1]
        assert sum(values) == pytest.approx(likelihood, abs=2e-5)
        assert all(v == max(top.values()) for v, top in zip(values, tops, strict=True)) == greedy


def test_schemas_and_forced_calls_are_kept(client):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"],
              "additionalProperties": False, "x-guidance": {"whitespace_flexible": False}}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    messages = [{"role": "user", "content": "x"}]
    ask = dict(model="model", messages=messages, seed=1)
    [choice] = client.chat.completions.create(**ask, response_format=form, max_tokens=60).choices
    assert json.loads(choice.message.content)["a"] in "xy" and choice.finish_reason == "stop"
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    [choice] = client.chat.completions.create(**ask, tools=[tool], tool_choice="required", max_tokens=60).choices
    assert json.loads(choice.message.tool_calls[0].function.arguments)["a"] in "xy"
    assert choice.finish_reason == "tool_calls"
    [choice] = client.chat.completions.create(**ask, tools=[tool], tool_choice="required", max_tokens=9).choices
    assert choice.finish_reason == "length" and not choice.message.tool_calls
    with pytest.raises(openai.BadRequestError, match="response_format") as caught:
        bad = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "nonsense"}}}
        client.chat.completions.create(**ask, response_format=bad)
    assert caught.value.param == "response_format"


def test_shared_beginnings_are_found_in_the_cache(client):
    ask = dict(model="model", prompt="a beginning that two requests share, and an end", max_tokens=2, temperature=0)
    client.completions.create(**ask)
    assert client.completions.create(**ask).usage.prompt_tokens_details.cached_tokens >= 40


def test_a_client_that_goes_away_frees_its_row(server):
    service = server.app.state.jaxlm.service
    body = json.dumps({"prompt": "a", "max_tokens": 120, "ignore_eos": True, "stream": True}).encode()
    host, _, port = server.url.removeprefix("http://").partition(":")
    before = service.engine.stats().aborted
    with socket.create_connection((host, int(port)), timeout=20) as gone:
        gone.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
                     f"Content-Length: {len(body)}\r\n\r\n".encode() + body)  # fmt: skip
        assert b"200 OK" in gone.recv(100)
    end = time.monotonic() + 20
    while (s := service.engine.stats()).running or s.waiting:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert s.aborted + s.finished > before and s.pages_free + s.pages_cached + s.pages_used == s.pages


def test_vectors_and_labels_are_those_of_this_process(tmp_path, one_device):
    folder = published(tmp_path / "bert", "bert")
    service = serving.open_service(folder)
    texts = ["a b", "another text"]
    found, count = service.embed([*texts, [256 + 5, 5, 256 + 6]])
    np.testing.assert_allclose(found[:2], generate_text.embed(folder, texts), atol=1e-6)
    assert found.shape == (3, 16) and count == 5 + 14 + 3 and service.engine is None
    with pytest.raises(ValueError, match="one has 70 tokens; the model reads 64"):
        service.embed([[5] * 70])
    c = bert.Config(vocab=tiny_published.VOCAB, layers=1, width=16, heads=2, ffn=32, positions=64, head=False)
    labelled = tiny_published.directory(tmp_path / "labels", c, classify.Config(labels=("bad", "good")))
    label = serving.open_service(labelled, name="films").classify
    wanted = predict.predict(labelled, ["a good film", "so bad"])[1]
    assert label(["a good film", "so bad"]) == wanted and label(["so bad"])[0]["label"] == wanted[1]["label"]


@pytest.mark.slow
def test_an_encoder_decoder_reads_the_prompt(tmp_path, one_device):
    folder = published(tmp_path / "t5", "t5", decoder_start=256)
    service = serving.open_service(folder, Settings(length=32, rows=(2,), lengths=(32,), chunks=(8,), source=16))
    assert service.encodes_apart
    [[wanted]] = generate_text.generate(folder, ["ab"], Sampling(tokens=8))
    with served.running(service) as made:
        body = {"prompt": "ab", "max_tokens": 8, "temperature": 0}
        found = Http(made.url).post("/v1/completions", json=body).json()
        assert found["choices"][0]["text"] == wanted.text and found["usage"]["prompt_tokens"] == 3
        assert Http(made.url).post("/v1/completions", json=body | {"echo": True}).status_code == 400


def test_settings_come_from_the_models_files(home, tmp_path, one_device):
    model = open_model(home / "model")
    assert serving.sampling(model)[0].temperature == 1.0, "as other servers do, where files say nothing"
    (home / "model" / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.3, "top_k": 9, "max_new_tokens": 21, "eos_token_id": 257})
    )
    how, own_length = serving.sampling(open_model(home / "model"))
    assert (how.temperature, how.top_k, how.tokens, own_length) == (0.3, 9, 21, True)


MISTAKES = {
    "an adapter without a name": (["--adapter", "poems"], "--adapter: 'poems' is not NAME=DIR"),
    "two of one name": (["--adapter", "a=x", "--adapter", "a=y"], "--adapter: two are called a"),
    "an empty key": (["--api-key", ""], "--api-key: is empty"),
    "no file of keys": (["--api-key-file", "none.txt"], "none.txt"),
    "no such address": (["--host", "no such host"], "--host: 'no such host' is no address"),
    "a wrong number": (["--port", "0", "--answers", "0"], "--answers: 0 is out of range"),
    "no such model": (["--port", "0"], "nowhere: no such model"),
    "no such option": (["--engine.lenght", "9"], "unknown option --engine.lenght; did you mean '--engine.length'?"),
    "an option that is wrong": (["--engine.length", "0"], "--engine.length: 0 is out of range"),
    "another option": (["--prot", "9"], "unknown option --prot; did you mean 'port'?"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_in_a_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, message = MISTAKES[name]
    assert cli.main(["serve", "nowhere", *arguments]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in told and not list(tmp_path.iterdir())


def test_a_missing_extra_is_told_with_the_command(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else real(name))
    assert cli.main(["serve", "nowhere"]) == 2
    assert "serve needs uvicorn, not installed here: pip install 'jaxlm[serve]'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_serves_and_drains_on_sigterm(home, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("k1\nk2\n")
    command = [sys.executable, "-m", "jaxlm", "serve", str(home / "model"), "--port", "0", "--api-key-file", str(keys),
               "--engine.length", "128", "--engine.rows", "4", "--engine.lengths", "128", "--engine.chunks", "32",
               "--name", "mine"]  # fmt: skip
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("serving mine at http://127.0.0.1:"), process.communicate()[1]
        http = Http(line.split()[3])
        assert http.get("/v1/models").status_code == 401
        http.headers["Authorization"] = "Bearer k2"
        assert http.get("/v1/models").json()["data"][0]["id"] == "mine"
        body, found = {"prompt": "a", "max_tokens": 100, "ignore_eos": True}, []
        client = threading.Thread(target=lambda: found.append(http.post("/v1/completions", json=body)))
        client.start()
        while 'num_requests_running{model_name="mine"} 1.0' not in http.get("/metrics").text:
            assert client.is_alive()
        process.send_signal(signal.SIGTERM)
        client.join(60)
        assert found[0].json()["usage"]["completion_tokens"] == 100, "what ran has ended"
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the harness's own and its packages'
def test_the_evaluation_harness_finds_the_same_over_http(server, alone, tmp_path, monkeypatch, one_device):
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    rows = [dict(q=f"Question {i}?", choices=["yes", "no", "per haps"], gold=i % 3) for i in range(8)]
    (tmp_path / "choice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "whole.jsonl").write_text("\n".join(json.dumps(dict(text="some text " * n)) for n in (2, 9)))
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(text.replace("FOLDER", str(tmp_path)))
    tasks = list(TASKS)
    with mesh.on_mesh(alone.mesh):
        run = alone.generator()
        lm = harness.Harness(alone.model, run, run.prepare(alone.params), alone.tokens, alone.boundary_ids, rows=4)
        wanted = harness.evaluate(lm, tasks, folder=tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    over = dict(model="model", base_url=f"{server.url}/v1/completions", tokenizer_backend="remote", max_length=321,
                num_concurrent=2, batch_size=2)  # fmt: skip
    found = simple_evaluate(model="local-completions", model_args=over, tasks=tasks, task_manager=manager)
    differences = {}
    for task in tasks:
        for name, value in wanted["results"][task].items():
            if isinstance(value, float):
                differences[f"{task} {name}"] = (value, found["results"][task][name])
        a, b = ([s["filtered_resps"] for s in r["samples"][task]] for r in (wanted, found))
        if task == "answer":
            assert a == b
    for name, (ours, theirs) in differences.items():
        assert theirs == (ours if "whole" not in name else pytest.approx(ours, rel=1e-6)), name


def test_bytes_are_served_with_a_beginning(tmp_path, one_device):
    folder = published(tmp_path / "llama", "llama")
    p = open_model(folder)
    prompt = serving.to_prompt(p)
    bos, eos = Bytes().bos_id, Bytes().eos_id
    assert prompt("a</s>", True, False) == ([bos, *b"a</s>"], None)
    assert prompt("a</s>", True, True) == ([bos, 97, eos], None)
    assert prompt("<s>a", False, True) == ([bos, 97], None) and prompt("a", False, False) == ([97], None)
