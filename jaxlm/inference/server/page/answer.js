// Asks the server for an answer, and gives its text as it comes.

/** Yields the objects of a stream of server-sent events until it says [DONE]. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    waiting += value;
    for (let end; (end = waiting.search(/\r?\n\r?\n/)) >= 0; ) {
      const event = waiting.slice(0, end);
      waiting = waiting.slice(end).replace(/^\r?\n\r?\n/, "");
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

/** Returns what an error response says, in a line. */
async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

/** Returns the names of the models that are served. */
export async function models() {
  const response = await fetch("/v1/models");
  if (!response.ok) throw new Error(await reason(response));
  return (await response.json()).data.map((card) => card.id);
}

/** Asks for an answer. Calls `add(text)` for each piece; returns why it ended and the number of new tokens. */
export async function ask(body, signal, add) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw new Error(await reason(response));
  let ended = null;
  let tokens = null;
  for await (const chunk of events(response)) {
    if (chunk.error) throw new Error(chunk.error.message);
    const choice = chunk.choices[0];
    if (choice?.delta?.content) add(choice.delta.content);
    ended = choice?.finish_reason ?? ended;
    tokens = chunk.usage?.completion_tokens ?? tokens;
  }
  if (ended === null) throw new Error("the connection ended before the answer did");
  return { ended, tokens };
}
