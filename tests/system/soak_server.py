"""Keeps a server busy for a while with what clients do, good and bad, and checks that nothing is left over.

Memory stops growing, every request ends, the pages of the cache add up, answers are right afterwards, and SIGTERM lets
the last ones finish.

    PYTHONPATH=. python tests/system/soak_server.py [--minutes 30] [--model PLACE]

It serves a tiny model of random weights unless another is named. Clients ask for streams and whole answers, some go
away in the middle, some read slowly, some send what is no request, and now and then more come than the server takes.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

KEY = "soak"
MALFORMED = [
    b"", b"{", b"[]", b"null", b'{"prompt": 5}', b'{"prompt": "x", "max_tokens": -1}', b'{"prompt": "x", "n": 100000}',
    b'{"prompt": [1, 2, 99999999]}', b'{"prompt": "x", "temperature": "hot"}', b"\xff\xfe{}", b"[" * 20000,
    b'{"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}}',
    b'{"messages": [{"role": "user", "content": {"a": {}}}]}', b'{"prompt": "' + b"a" * 30_000 + b'"}',
    b'{"prompt": "' + b"a" * 5_000_000 + b'"}',
]  # fmt: skip
SETTINGS: tuple[dict[str, Any], ...] = (
    {}, dict(temperature=1.0, top_p=0.9), dict(n=2, temperature=1.0), dict(logprobs=2), dict(stop=["a"]),
    dict(max_tokens=1), dict(max_tokens=40), dict(echo=True, logprobs=1), dict(presence_penalty=0.5),
)  # fmt: skip


class Client:
    """Asks the server, and counts how it goes."""

    def __init__(self, port: int) -> None:
        self.port, self.seen, self.wrong = port, Counter[str](), list[str]()

    def connection(self, timeout: float = 120) -> HTTPConnection:
        return HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def post(self, body: bytes, path: str = "/v1/completions") -> tuple[int, bytes]:
        c = self.connection()
        try:
            c.request("POST", path, body, {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"})
            answer = c.getresponse()
            return answer.status, answer.read()
        finally:
            c.close()

    def complete(self, prompt: str, **more: Any) -> dict:
        status, text = self.post(json.dumps(dict(prompt=prompt, temperature=0, max_tokens=12) | more).encode())
        if status != 200:
            raise RuntimeError(f"{status}: {text[:300]!r}")
        return json.loads(text)

    def get(self, path: str) -> str:
        c = self.connection()
        try:
            c.request("GET", path, headers={"Authorization": f"Bearer {KEY}"})
            return c.getresponse().read().decode()
        finally:
            c.close()

    def metric(self, name: str) -> float:
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def normal(client: Client, rng: random.Random) -> None:
    text = "".join(rng.choice("abcdef ") for _ in range(rng.randint(1, 40)))
    more = rng.choice(SETTINGS)
    client.complete(text, **more)
    client.seen["whole"] += 1


def streamed(client: Client, rng: random.Random, leave: bool = False, slow: bool = False) -> None:
    body = dict(prompt="stream " * rng.randint(1, 6), max_tokens=60, stream=True, temperature=0, ignore_eos=True)
    raw = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += "Content-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", client.port), 120) as s:
        s.sendall(f"{head}Content-Length: {len(raw)}\r\nConnection: close\r\n\r\n".encode() + raw)
        text = b""
        while part := s.recv(64 if slow else 4096):
            text += part
            if leave and len(text) > 600:
                client.seen["left"] += 1
                return
            if slow:
                time.sleep(0.01)
    if b" 429 " in text[:40] or b" 503 " in text[:40]:
        client.seen["refused"] += 1
    elif b"[DONE]" in text:
        client.seen["slow" if slow else "streamed"] += 1
    else:
        client.wrong.append(f"a stream ended without [DONE]: {text[-300:]!r}")


def bad(client: Client, rng: random.Random) -> None:
    body = rng.choice(MALFORMED)
    path = rng.choice(["/v1/completions", "/v1/chat/completions", "/v1/nothing", "/v1/../etc/passwd"])
    try:
        status, text = client.post(body, path)
    except (HTTPException, OSError):
        client.seen["cut off"] += 1  # a body that is too large may be answered before it was sent
        return
    fine = (200,) if path == "/tokenize" else ()  # some of them are no faults there
    if not 400 <= status < 500 and status not in fine:
        client.wrong.append(f"{status} for {body[:60]!r} at {path}: {text[:200]!r}")
    client.seen["malformed"] += 1


def flood(client: Client, rng: random.Random) -> None:
    def one() -> None:
        status, _ = client.post(json.dumps(dict(prompt="flood", max_tokens=20)).encode())
        client.seen["refused" if status in (429, 503) else "flooded"] += 1
        if status not in (200, 429, 503):
            client.wrong.append(f"{status} in a flood")

    threads = [threading.Thread(target=one) for _ in range(60)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


def work(client: Client, until: float, seed: int) -> None:
    rng = random.Random(seed)
    while time.monotonic() < until:
        kind = rng.random()
        try:
            if kind < 0.40:
                normal(client, rng)
            elif kind < 0.60:
                streamed(client, rng)
            elif kind < 0.78:
                streamed(client, rng, leave=True)
            elif kind < 0.85:
                streamed(client, rng, slow=True)
            elif kind < 0.99:
                bad(client, rng)
            else:
                flood(client, rng)
        except RuntimeError as error:
            if not str(error).startswith(("429", "503")):
                client.wrong.append(str(error))
            client.seen["refused"] += 1
        except OSError as error:
            client.wrong.append(f"{type(error).__name__}: {error}")


def resident(pid: int) -> int:
    """Returns the bytes of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def settled(client: Client) -> None:
    """Waits until nothing runs; raises where something is stuck."""
    for _ in range(300):
        if not client.metric("vllm:num_requests_running") and not client.metric("vllm:num_requests_waiting"):
            return
        time.sleep(0.1)
    raise SystemExit("requests are stuck:\n" + client.get("/metrics"))


def check_pages(client: Client) -> str:
    states = ("free", "cached", "used", "all")
    pages = {state: client.metric(f'jaxlm:prefix_cache_pages{{model_name="tiny",state="{state}"}}') for state in states}
    if pages["used"] or pages["free"] + pages["cached"] != pages["all"] or not pages["all"]:
        raise SystemExit(f"pages do not add up: {pages}")
    return str(pages)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=30)
    p.add_argument("--model", help="anything that `jaxlm serve` reads; default: a tiny one of random weights")
    p.add_argument("--threads", type=int, default=8)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = a.model
        if place is None:
            from tests.support import tiny_models

            place = str(tiny_models.published(Path(folder) / "tiny", layers=2, positions=256))
        port = free_port()
        command = [sys.executable, "-m", "jaxlm", "serve", place, "--port", str(port), "--name", "tiny"]
        command += ["--engine.rows", "1", "8", "--engine.lengths", "64", "256", "--engine.queue", "16"]
        with open(Path(folder) / "log", "w+") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"JAXLM_API_KEY": KEY})
            try:
                soak(Client(port), server, a)
            except BaseException:
                log.seek(0)
                print(log.read()[-5000:])
                raise
            finally:
                server.kill()


def soak(client: Client, server: subprocess.Popen, a: argparse.Namespace) -> None:
    for _ in range(600):
        try:
            client.get("/health")
            break
        except OSError:
            time.sleep(0.5)
            if server.poll() is not None:
                raise SystemExit("the server ended before it listened") from None
    before = [client.complete(text)["choices"][0]["text"] for text in ("abc", "fed cab", "a b c d")]
    until = time.monotonic() + 60 * a.minutes
    threads = [threading.Thread(target=work, args=(client, until, i)) for i in range(a.threads)]
    for t in threads:
        t.start()
    sizes = []
    while any(t.is_alive() for t in threads):
        time.sleep(min(30, 60 * a.minutes / 10))
        sizes.append(resident(server.pid))
        print(f"{sizes[-1] / 1e6:.0f} MB  {dict(client.seen)}", flush=True)
    settled(client)
    pages = check_pages(client)
    after = [client.complete(text)["choices"][0]["text"] for text in ("abc", "fed cab", "a b c d")]
    if client.wrong:
        raise SystemExit(
            f"{len(client.wrong)} things went wrong, such as: " + "; ".join(x[:200] for x in client.wrong[:5])
        )
    if after != before:
        raise SystemExit(f"answers changed: {before} became {after}")
    early, late = max(sizes[len(sizes) // 4 : len(sizes) // 2]), max(sizes[len(sizes) // 2 :])
    if late > 1.1 * early + 20e6:
        raise SystemExit(f"memory grew from {early / 1e6:.0f} to {late / 1e6:.0f} MB")

    found: list[Any] = []
    last = threading.Thread(
        target=lambda: found.append(client.complete("the last one", max_tokens=150, ignore_eos=True))
    )
    last.start()
    time.sleep(0.3)
    server.send_signal(signal.SIGTERM)
    last.join(60)
    status = server.wait(60)
    if status != 0 or not found or found[0]["usage"]["completion_tokens"] != 150:
        raise SystemExit(f"SIGTERM: exit status {status}, and of the last answer came {found}")
    print(f"ok: {sum(client.seen.values())} requests in {a.minutes} minutes {dict(client.seen)}; pages {pages}; memory "
          f"{early / 1e6:.0f} → {late / 1e6:.0f} MB; SIGTERM let the last answer finish")  # fmt: skip


if __name__ == "__main__":
    main()
