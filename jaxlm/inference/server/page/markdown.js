// Turns Markdown into elements. Every text of the model becomes a text node, so nothing that it writes is ever HTML.

const SAFE = /^(https?:|mailto:)/i;
const INLINE = [
  [/^(`+)([^]*?[^`])\1(?!`)/, (m) => element("code", m[2].replace(/^ ([^]*\S[^]*) $/, "$1"))],
  [/^\\([!-/:-@[-`{-~])/, (m) => document.createTextNode(m[1])],
  [/^!?\[((?:[^\][\\]|\\.|\[[^\]]*\])*)\]\(\s*<?([^\s<>()]*(?:\([^\s()]*\)[^\s<>()]*)*)>?(?:\s+["'][^]*?["'])?\s*\)/,
    (m) => link(m[2], inline(m[1] || m[2]))],
  [/^<((?:https?:\/\/|mailto:)[^\s<>]+)>/i, (m) => link(m[1], [document.createTextNode(m[1])])],
  [/^https?:\/\/[^\s<>()[\]]+[^\s<>()[\]"'.,;:!?]/i, (m) => link(m[0], [document.createTextNode(m[0])])],
  [/^(\*\*|__)(?=\S)([^]*?\S)\1/, (m) => element("strong", inline(m[2]))],
  [/^~~(?=\S)([^]*?\S)~~/, (m) => element("del", inline(m[1]))],
  [/^\*(?=[^\s*])([^]*?[^\s*])\*(?!\*)/, (m) => element("em", inline(m[1]))],
  [/^_(?=[^\s_])([^]*?[^\s_])_(?![\w_])/, (m) => element("em", inline(m[1]))],
];
const DEPTH = 12; // of marks within marks and blocks within blocks; deeper ones stay text

let depth = 0;

function element(name, inside = [], className = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...(typeof inside === "string" ? [inside] : inside));
  return made;
}

/** A link leads only to the web or to a mail address; a picture is a link too, so that nothing is loaded unasked. */
function link(target, inside) {
  if (!SAFE.test(target)) return element("span", [...inside, ` (${target})`]);
  const made = element("a", inside);
  made.href = target;
  made.rel = "noopener noreferrer nofollow";
  made.target = "_blank";
  return made;
}

/** Returns the nodes of a line's text. */
function inline(text) {
  if (depth > DEPTH) return [document.createTextNode(text)];
  depth++;
  const out = [];
  let plain = "";
  const flush = () => {
    if (plain) out.push(document.createTextNode(plain));
    plain = "";
  };
  for (let i = 0; i < text.length; ) {
    const special = "`\\![<*_~hH\n".includes(text[i]) && !(/[_hH]/.test(text[i]) && /\w/.test(text[i - 1] ?? ""));
    const rest = special ? text.slice(i, i + 4000) : "";
    const found = special && INLINE.map(([pattern, make]) => [pattern.exec(rest), make]).find(([m]) => m);
    if (found) {
      flush();
      out.push(found[1](found[0]));
      i += found[0][0].length;
    } else if (text[i] === "\n") {
      flush();
      out.push(document.createElement("br"));
      i++;
    } else {
      plain += text[i++];
    }
  }
  flush();
  depth--;
  return out;
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const BAR = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

/** Returns the elements of lines of text. */
function blocks(lines) {
  if (depth > DEPTH) return [element("p", lines.join("\n"))];
  depth++;
  const out = [];
  for (let i = 0; i < lines.length; ) {
    const line = lines[i];
    let m;
    if (!line.trim()) {
      i++;
    } else if ((m = FENCE.exec(line))) {
      const closed = new RegExp(`^ {0,3}${m[1][0]}{${m[1].length},}\\s*$`);
      const inner = [];
      for (i++; i < lines.length && !closed.test(lines[i]); i++) inner.push(lines[i]);
      i++;
      const code = element("pre", [element("code", inner.join("\n"))]);
      code.tabIndex = 0; // so that the keyboard can scroll it
      if (m[2]) code.dataset.language = m[2];
      out.push(code);
    } else if ((m = HEADING.exec(line))) {
      out.push(element(`h${Math.min(6, m[1].length + 3)}`, inline(m[2])));
      i++;
    } else if (RULE.test(line)) {
      out.push(document.createElement("hr"));
      i++;
    } else if (QUOTE.test(line)) {
      const inner = [];
      for (; i < lines.length && (m = QUOTE.exec(lines[i])); i++) inner.push(m[1]);
      out.push(element("blockquote", blocks(inner)));
    } else if (ITEM.test(line)) {
      const [list, next] = listed(lines, i);
      out.push(list);
      i = next;
    } else if (line.includes("|") && i + 1 < lines.length && lines[i + 1].includes("-") && BAR.test(lines[i + 1])) {
      const rows = [cells(line)];
      for (i += 2; i < lines.length && lines[i].includes("|"); i++) rows.push(cells(lines[i]));
      out.push(table(rows));
    } else {
      const inner = [];
      do inner.push(lines[i++].trim());
      while (i < lines.length && lines[i].trim() && !starts(lines[i]));
      out.push(element("p", inline(inner.join("\n"))));
    }
  }
  depth--;
  return out;
}

const starts = (line) => [FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(line));

/** Returns the list that begins at a line, and the line after it. */
function listed(lines, at) {
  const first = ITEM.exec(lines[at]);
  const ordered = /\d/.test(first[2]);
  const list = document.createElement(ordered ? "ol" : "ul");
  if (ordered) list.start = parseInt(first[2], 10);
  const margin = first[1].length;
  let i = at;
  while (i < lines.length) {
    const m = ITEM.exec(lines[i]);
    if (!m || m[1].length > margin + 1 || m[1].length < margin || /\d/.test(m[2]) !== ordered) break;
    const inner = [m[3]];
    for (i++; i < lines.length; i++) {
      const indent = lines[i].length - lines[i].trimStart().length;
      const blank = !lines[i].trim();
      if (blank && !(i + 1 < lines.length && /^\s{2,}\S/.test(lines[i + 1]))) break;
      if (!blank && (indent <= margin ? starts(lines[i]) || !lines[i - 1].trim() : false)) break;
      inner.push(lines[i].slice(Math.min(indent, margin + m[2].length + 1)));
    }
    const whole = blocks(inner);
    list.append(element("li", whole.length && whole[0].tagName === "P" ? [...whole[0].childNodes, ...whole.slice(1)] : whole));
    while (i + 1 < lines.length && !lines[i].trim() && ITEM.exec(lines[i + 1])?.[1].length === margin) i++;
  }
  return [list, i];
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim());

function table(rows) {
  const made = element("table", rows.map((row, i) =>
    element("tr", row.map((cell) => element(i ? "td" : "th", inline(cell))))));
  const around = element("div", [made], "table");
  around.tabIndex = 0;
  return around;
}

/** Returns the elements of a text in Markdown. */
export function render(text) {
  depth = 0;
  return blocks(text.replace(/\r\n?/g, "\n").split("\n"));
}
