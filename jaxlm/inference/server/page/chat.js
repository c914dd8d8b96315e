// The page: a conversation whose messages can be stopped, edited and asked again.
import { ask, models } from "./answer.js";
import { render } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];
const KEPT = ["system", ...NUMBERS, "stop"];
const STORE = "jaxlm-chat-settings";

let talk = []; // {role, content, note}
let running = null; // the AbortController of the answer that comes

function element(name, properties = {}, ...inside) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...inside);
  return made;
}

function button(text, action) {
  const made = element("button", { type: "button", textContent: text });
  made.addEventListener("click", action);
  return made;
}

/** Returns the settings of the form that are set. Throws an error that names a field that is wrong. */
function settings() {
  const out = { model: $("model").value || undefined };
  for (const name of NUMBERS) {
    const field = $(name);
    if (!field.checkValidity()) {
      $("settings").open = true;
      field.focus();
      throw new Error(`${field.labels[0].firstChild.textContent.trim()}: ${field.validationMessage}`);
    }
    if (field.value !== "") out[name] = Number(field.value);
  }
  if ($("stop").value) out.stop = $("stop").value;
  return out;
}

function messages() {
  const system = $("system").value.trim();
  const said = talk.map(({ role, content }) => ({ role, content }));
  return system ? [{ role: "system", content: system }, ...said] : said;
}

/** Draws one message; `i` is its place in the conversation. */
function draw(i) {
  const { role, content, note } = talk[i];
  const text = element("div", { className: role === "user" ? "plain" : "text" });
  if (role === "user") text.textContent = content;
  else text.replaceChildren(...render(content));
  const actions = element("div", { className: "actions" });
  const item = element("li", { className: role },
    element("h3", { textContent: role === "user" ? "You" : "Model" }), text, actions);
  if (role === "user") actions.append(button("Edit", () => edit(i)));
  else if (!(running && i === talk.length - 1)) {
    actions.append(button("Copy", () => copy(i)), button("Answer again", () => again(i)));
    if (note) actions.append(element("span", { textContent: note }));
  } else item.setAttribute("aria-busy", "true");
  return item;
}

function show() {
  $("talk").replaceChildren(...talk.map((_, i) => draw(i)));
  $("empty").hidden = talk.length > 0;
}

function toEnd() {
  const main = document.querySelector("main");
  main.scrollTop = main.scrollHeight;
}

function fail(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
  if (text) toEnd();
}

function say(text) {
  $("status").textContent = text;
}

/** Asks for an answer to the conversation as it stands. */
async function answer() {
  let how;
  fail("");
  try {
    how = settings();
  } catch (error) {
    fail(error.message);
    return;
  }
  const asked = messages();
  const mine = (running = new AbortController());
  talk.push({ role: "assistant", content: "", note: "" });
  const at = talk.length - 1;
  show();
  toEnd();
  $("send").disabled = true;
  $("stop_answer").hidden = false;
  say("The model answers.");
  const target = $("talk").lastElementChild.querySelector(".text");
  target.classList.add("waiting");
  let drawn = 0;
  const redraw = () => {
    drawn = 0;
    if (mine !== running) return;
    const main = document.querySelector("main");
    const follows = main.scrollHeight - main.scrollTop - main.clientHeight < 80;
    target.replaceChildren(...render(talk[at].content));
    if (follows) toEnd();
  };
  let problem = "";
  try {
    const { ended, tokens } = await ask({ ...how, messages: asked }, mine.signal, (text) => {
      talk[at].content += text;
      drawn ||= requestAnimationFrame(redraw);
    });
    talk[at].note = ended === "length" ? `cut off after ${tokens} tokens` : `${tokens} tokens`;
  } catch (error) {
    if (mine.signal.aborted) talk[at].note = "stopped";
    else problem = error.message;
  }
  if (mine !== running) return; // a new chat has begun
  running = null;
  cancelAnimationFrame(drawn);
  if (problem && !talk[at].content) talk.pop();
  $("send").disabled = false;
  $("stop_answer").hidden = true;
  show();
  fail(problem && `No answer: ${problem}`);
  say(problem ? "" : mine.signal.aborted ? "Stopped." : `The answer is complete: ${talk[at].content.slice(0, 2000)}`);
  if (document.activeElement === document.body || document.activeElement === $("stop_answer")) $("say").focus();
  toEnd();
}

function stop() {
  running?.abort();
}

/** Ends an answer that comes, and lets the next one begin. */
function leave() {
  stop();
  running = null;
  $("send").disabled = false;
  $("stop_answer").hidden = true;
}

/** Lets a message of the user be changed; what follows it is asked anew. */
function edit(i) {
  if (running) {
    talk.at(-1).note = "stopped";
    leave();
    show();
  }
  const item = $("talk").children[i];
  const field = element("textarea", { value: talk[i].content, rows: 3, ariaLabel: "Edit message" });
  const close = () => {
    show();
    $("talk").children[i]?.querySelector("button")?.focus();
  };
  const send = () => {
    if (!field.value.trim()) return;
    talk = [...talk.slice(0, i), { role: "user", content: field.value }];
    $("say").focus();
    answer();
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  item.replaceChildren(field, element("div", { className: "actions" }, button("Send again", send), button("Cancel", close)));
  field.focus();
}

function again(i) {
  talk = talk.slice(0, i);
  $("say").focus();
  answer();
}

async function copy(i) {
  try {
    await navigator.clipboard.writeText(talk[i].content);
    say("Copied.");
  } catch {
    fail("The browser does not allow copying here.");
  }
}

function keep() {
  try {
    localStorage.setItem(STORE, JSON.stringify(Object.fromEntries(KEPT.map((name) => [name, $(name).value]))));
  } catch { /* a browser without storage forgets settings */ }
}

function recall() {
  try {
    const kept = JSON.parse(localStorage.getItem(STORE) ?? "{}");
    for (const name of KEPT) if (typeof kept[name] === "string") $(name).value = kept[name];
  } catch { /* damaged settings are as none */ }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("say").value;
  if (!text.trim() || running) return;
  talk.push({ role: "user", content: text });
  $("say").value = "";
  answer();
});
$("say").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("form").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
$("stop_answer").addEventListener("click", stop);
$("new").addEventListener("click", () => {
  leave();
  talk = [];
  fail("");
  show();
  $("say").focus();
});
$("sampling").addEventListener("change", keep);
$("sampling").addEventListener("submit", (event) => event.preventDefault());
$("sampling").addEventListener("reset", () => setTimeout(keep));

recall();
try {
  $("model").replaceChildren(...(await models()).map((name) => element("option", { value: name, textContent: name })));
} catch (error) {
  fail(`The models can't be listed: ${error.message}`);
}
$("say").focus();
