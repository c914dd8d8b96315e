"use strict";
// Sections of text and tables. Whatever a run says is put in as text: nothing of it becomes markup.

/** Makes an element with attributes and children; null children are left out. */
function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== "" && value !== null) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

const BLOCKS = {
  facts: (block) => element("dl", {class: "summary"}, ...block.rows.map(([name, value, note]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value, note ? element("small", {}, " ", note) : null)))),
  lines: (block) => element("div", {class: block.warns ? "warning" : "about"}, ...block.lines.map((line) => element("p", {}, line))),
  table: (block, title) => {
    const heads = element("tr", {}, ...block.heads.map((head) => element("th", {scope: "col"}, ...lines(head))));
    const rows = block.rows.map(([name, ...cells]) => element("tr", {}, filled(element("th", {scope: "row"}), name), ...cells.map((cell) => filled(element("td"), cell))));
    return scrolled(title, element("table", {class: block.wide ? "wide" : "figures"}, element("thead", {}, heads), element("tbody", {}, ...rows)));
  },
  bars: (block) => element("table", {class: "bars"}, element("tbody", {}, ...block.rows.map(([name, text, share, own]) => {
    const bar = element("i", {class: own ? "own" : ""});
    bar.style.width = `${100 * share}%`;
    return element("tr", {}, element("th", {scope: "row"}, name), element("td", {}, bar), element("td", {}, text));
  }))),
  samples: (block) => element("div", {}, ...block.rows.map(samples)),
  command: (block) => {
    const button = element("button", {type: "button"}, "Copy");
    const code = element("code", {}, block.text);
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(block.text);
        button.textContent = "Copied";
      } catch { // not allowed here: then the text is marked, ready to be copied
        getSelection().selectAllChildren(code);
        button.textContent = "Marked";
      }
      setTimeout(() => (button.textContent = "Copy"), 2000);
    });
    return element("div", {class: "command"}, element("pre", {tabindex: "0", "aria-label": "Command"}, code), button);
  },
  parts: (block) => element("div", {class: "parts"}, ...block.parts.map((part) => element("table", {},
    part.caption ? element("caption", {}, part.caption) : null,
    element("tbody", {}, ...part.rows.map(([name, value]) => element("tr", {}, element("th", {scope: "row"}, name), element("td", {}, value))))))),
};

const lines = (text) => String(text).split("\n").flatMap((line, i) => (i ? [element("br"), element("small", {}, line)] : [line]));

/** Puts a cell's text into a node: with something smaller beside it, shaded by a share, outlined. */
function filled(node, cell) {
  if (typeof cell !== "object" || cell === null) return node.append(...lines(cell ?? "")), node;
  node.append(cell.text);
  if (cell.small) node.append(" ", element("small", {}, cell.small));
  if (cell.shade !== undefined && !Number.isNaN(cell.shade)) {
    node.classList.add(cell.wrong ? "wrong" : "shaded");
    node.style.setProperty("--share", String(Math.round(60 * Math.min(1, Math.max(0, cell.shade)))) + "%");
  }
  if (cell.edge) node.classList.add("edge");
  return node;
}

/** A table that is wider than the page is scrolled by itself, with keys too. */
const scrolled = (title, node) => element("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": title || "Table"}, node);

/** Shows the first text of a prompt beside one that is chosen, at first the last. */
function samples({prompt, texts}) {
  const text = (i) => element("pre", {tabindex: "0", "aria-label": `Sample of step ${texts[i][0]}`}, element("b", {}, prompt), texts[i][1]);
  const pair = element("div", {class: "pair"}, element("div", {}, element("h4", {}, `step ${texts[0][0].toLocaleString("en")}`), text(0)));
  if (texts.length > 1) {
    const place = element("div", {}, text(texts.length - 1));
    const choice = element("select", {"aria-label": "Step of the sample"}, ...texts.slice(1).map(([step], i) => element("option", {value: String(i + 1)}, `step ${step.toLocaleString("en")}`)));
    choice.value = String(texts.length - 1);
    choice.addEventListener("change", () => place.replaceChildren(text(Number(choice.value))));
    pair.append(element("div", {}, element("h4", {}, choice), place));
  }
  return pair;
}

/** Makes the node of a section; one that is folded stays as open or closed as the one before it. */
function sectionNode(section, before) {
  const blocks = section.blocks.map((block) => BLOCKS[block.kind](block, section.title));
  const note = section.note ? element("small", {}, " ", section.note) : null;
  if (section.folded) {
    const open = before ? before.querySelector("details")?.open : true;
    return element("section", {id: `section-${section.id}`}, element("details", open ? {open: "open"} : {}, element("summary", {}, element("h2", {}, section.title, note)), ...blocks));
  }
  const head = section.title ? element("h2", {}, section.title, note) : null;
  return element("section", {id: `section-${section.id}`, "aria-label": section.title || null}, head, ...blocks);
}
