// Markdown as models write it → DOM nodes. Text of the model only ever becomes text nodes: no markup is made from strings here,
// and attributes are set for links of known schemes alone. Costs are bounded for hostile texts: every search has a window.

const WINDOW = 1000; // characters within which the end of an emphasis, a link or inline code must come
const DEPTH = 8; // levels of lists, quotes and emphasis; what is deeper stays text
const FENCE = /^( {0,3})(`{3,}|~{3,})/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])([ \t]+|$)/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const TABLE_RULE = /^\|?[ \t]*:?-+:?[ \t]*(\|[ \t]*:?-+:?[ \t]*)*\|?$/;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}]/u;

export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in node && typeof value !== "string") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** Show a text in a node that this function alone fills; blocks that did not change keep their nodes. */
export function show(node, text) {
  const blocks = split(text.replace(/\r\n?/g, "\n").replace(/\t/g, "    "));
  const before = node.blocks ?? [];
  let same = 0;
  while (same < blocks.length && same < before.length && blocks[same].key === before[same].key) same++;
  while (node.childNodes.length > same) node.lastChild.remove();
  for (const block of blocks.slice(same)) node.append(make(block, 0));
  node.blocks = blocks;
}

/** Blocks of a text: {kind, key, ...}; two blocks with the same key look the same. */
function split(text) {
  const lines = text.split("\n");
  const blocks = [];
  let at = 0;
  const add = (kind, from, more) => blocks.push({ kind, key: kind + "\0" + lines.slice(from, at).join("\n"), ...more });
  while (at < lines.length) {
    const line = lines[at];
    const from = at;
    let match;
    if (line.trim() === "") {
      at++;
    } else if ((match = fenceOf(line))) {
      const { indent, fence, language } = match;
      const code = [];
      let closed = false;
      for (at++; at < lines.length && !closed; at++) {
        const end = lines[at].trim();
        closed = end.length >= fence.length && end === fence[0].repeat(end.length);
        if (!closed) code.push(lines[at].startsWith(indent) ? lines[at].slice(indent.length) : lines[at].trimStart());
      }
      add("code", from, { language, code: code.join("\n") });
    } else if ((match = HEADING.exec(line))) {
      at++;
      add("heading", from, { level: match[1].length, text: match[2].trim() });
    } else if (RULE.test(line)) {
      at++;
      add("rule", from);
    } else if (QUOTE.test(line)) {
      while (at < lines.length && QUOTE.test(lines[at])) at++;
      add("quote", from, { text: lines.slice(from, at).map((one) => one.replace(QUOTE, "")).join("\n") });
    } else if ((match = ITEM.exec(line))) {
      at = endOfList(lines, at, match);
      add("list", from, { items: items(lines.slice(from, at)), ordered: /\d/.test(match[2]), start: parseInt(match[2]) });
    } else if (line.includes("|") && at + 1 < lines.length && TABLE_RULE.test(lines[at + 1].trim())) {
      at += 2;
      while (at < lines.length && lines[at].includes("|")) at++;
      add("table", from, { rows: [lines[from], ...lines.slice(from + 2, at)].map(cells) });
    } else {
      do at++;
      while (at < lines.length && lines[at].trim() !== "" && !begins(lines[at]));
      add("text", from, { text: lines.slice(from, at).map((one) => one.trim()).join("\n") });
    }
  }
  return blocks;
}

/** The fence that a line opens a code block with; null where it opens none. */
function fenceOf(line) {
  const match = FENCE.exec(line);
  if (!match) return null;
  const info = line.slice(match[0].length).trim();
  if (match[2][0] === "`" && info.includes("`")) return null; // inline code that begins the line
  return { indent: match[1], fence: match[2], language: info.split(/\s/, 1)[0].slice(0, 40) };
}

function begins(line) {
  return fenceOf(line) !== null || HEADING.test(line) || QUOTE.test(line) || ITEM.test(line) || RULE.test(line);
}

function endOfList(lines, at, first) {
  const indent = first[1].length;
  const ordered = /\d/.test(first[2]);
  for (at++; at < lines.length; at++) {
    const line = lines[at];
    if (line.trim() === "") {
      const next = lines[at + 1];
      if (next === undefined || (next.search(/\S/) <= indent && !ITEM.test(next))) return at;
      continue;
    }
    const item = ITEM.exec(line);
    if (item && item[1].length <= indent && /\d/.test(item[2]) !== ordered) return at;
    if (!item && line.search(/\S/) <= indent && (begins(line) || lines[at - 1].trim() === "")) return at;
  }
  return at;
}

/** The texts of a list's items, without their markers and indentation. */
function items(lines) {
  const indent = ITEM.exec(lines[0])[1].length;
  const found = [];
  let inside = 0;
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= indent + 1) {
      inside = item[0].length;
      found.push([line.slice(inside)]);
    } else {
      found.at(-1).push(line.slice(Math.min(inside, Math.max(line.search(/\S/), 0))));
    }
  }
  return found.map((one) => one.join("\n"));
}

function cells(line) {
  return line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "").split(/(?<!\\)\|/).map((one) => one.trim().replaceAll("\\|", "|"));
}

function make(block, depth) {
  switch (block.kind) {
    case "code":
      return code(block.language, block.code);
    case "heading": // the page has headings of its own above these
      return inline(el(`h${Math.min(block.level + 2, 6)}`, { dir: "auto" }), block.text, depth);
    case "rule":
      return el("hr");
    case "quote":
      return nested(el("blockquote"), block.text, depth);
    case "list": {
      const list = el(block.ordered ? "ol" : "ul");
      if (block.ordered && block.start !== 1) list.start = block.start;
      for (const text of block.items) list.append(nested(el("li", { dir: "auto" }), text, depth));
      return list;
    }
    case "table": {
      const [head, ...body] = block.rows;
      const row = (tag, texts) => el("tr", {}, ...head.map((_, i) => inline(el(tag, { dir: "auto" }), texts[i] ?? "", depth)));
      const table = el("table", {}, el("thead", {}, row("th", head)), el("tbody", {}, ...body.map((one) => row("td", one))));
      return el("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, table);
    }
    default:
      return inline(el("p", { dir: "auto" }), block.text, depth);
  }
}

/** Blocks inside a block; a single paragraph goes without a node of its own. */
function nested(node, text, depth) {
  const blocks = depth < DEPTH ? split(text) : [{ kind: "text", text }];
  if (blocks.length && blocks[0].kind === "text") {
    inline(node, blocks[0].text, depth + 1);
    blocks.shift();
  }
  for (const block of blocks) node.append(make(block, depth + 1));
  return node;
}

function code(language, text) {
  const copy = el("button", { type: "button", class: "small" }, "Copy");
  copy.addEventListener("click", () => copyText(text, copy));
  const content = el("pre", { tabindex: "0", dir: "ltr" }, el("code", {}, text));
  return el("figure", { class: "code" }, el("figcaption", {}, el("span", {}, language || "text"), copy), content);
}

/** Put a text into the clipboard, and say so on the button. */
export async function copyText(text, button) {
  const label = button.textContent;
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // browsers keep that interface from pages without TLS, as on a phone in the same network
    const area = el("textarea", { class: "hidden", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = done ? "Copied" : "Not copied";
  setTimeout(() => (button.textContent = label), 1500);
}

/** Emphasis, code, links and line ends of a text, as children of a node. */
function inline(node, text, depth) {
  let plain = "";
  let at = 0;
  const missing = new Set(); // delimiters that have no end in the rest of the text
  const flush = () => {
    if (plain) node.append(plain);
    plain = "";
  };
  const put = (child, next) => {
    flush();
    node.append(child);
    at = next;
  };
  while (at < text.length) {
    const c = text[at];
    if (c === "\n") {
      put(el("br"), at + 1);
    } else if (c === "\\" && at + 1 < text.length && PUNCTUATION.test(text[at + 1])) {
      plain += text[at + 1];
      at += 2;
    } else if (c === "`") {
      const run = runOf(text, at);
      const end = endOfCode(text, at + run, run, missing);
      if (end < 0) {
        plain += text.slice(at, at + run);
        at += run;
      } else {
        const content = text.slice(at + run, end).replaceAll("\n", " ");
        put(el("code", {}, /^ .*[^ ].* $/.test(content) ? content.slice(1, -1) : content), end + run);
      }
    } else if (c === "*" || c === "_" || c === "~") {
      const run = runOf(text, at);
      const size = c === "~" ? 2 : Math.min(run, 3);
      const end = depth < DEPTH && run <= 3 && run >= (c === "~" ? 2 : 1) ? endOfEmphasis(text, at, c, size, missing) : -1;
      if (end < 0) {
        plain += text.slice(at, at + run);
        at += run;
      } else {
        const inner = text.slice(at + size, end);
        const tag = c === "~" ? "s" : size === 1 ? "em" : "strong";
        const child = size === 3 ? el("strong", {}, inline(el("em"), inner, depth + 1)) : inline(el(tag), inner, depth + 1);
        put(child, end + size);
      }
    } else if ((c === "[" || (c === "!" && text[at + 1] === "[")) && depth < DEPTH) {
      const link = missing.has("](") ? null : linkAt(text, c === "!" ? at + 1 : at, missing);
      if (link) {
        const label = c === "!" ? `image: ${link.label || link.address}` : link.label || link.address;
        put(inline(anchor(link.address), label, DEPTH), link.end);
      } else {
        plain += c;
        at++;
      }
    } else if (c === "h" && (at === 0 || !WORD.test(text[at - 1])) && /^https?:\/\/./.test(text.slice(at, at + 9))) {
      const address = /^[^\s<>"'`*|]+/.exec(text.slice(at, at + 2000))[0].replace(/[.,;:!?)\]]+$/, "");
      if (safeAddress(address)) put(el_text(anchor(address), address), at + address.length);
      else {
        plain += c;
        at++;
      }
    } else {
      plain += c;
      at++;
    }
  }
  flush();
  return node;
}

function el_text(node, text) {
  node.append(text);
  return node;
}

function runOf(text, at) {
  let end = at;
  while (text[end] === text[at]) end++;
  return end - at;
}

function endOfCode(text, from, run, missing) {
  if (missing.has(run)) return -1;
  const fence = "`".repeat(run);
  let at = from;
  while ((at = text.indexOf(fence, at)) >= 0 && at - from <= WINDOW) {
    const found = runOf(text, at);
    if (found === run) return at;
    at += found;
  }
  if (at < 0) missing.add(run);
  return -1;
}

function endOfEmphasis(text, at, c, size, missing) {
  const mark = c.repeat(size);
  const after = text[at + size];
  if (missing.has(mark) || after === undefined || /\s/.test(after)) return -1;
  if (c === "_" && at > 0 && WORD.test(text[at - 1])) return -1; // snake_case is no emphasis
  let end = at + size;
  while ((end = text.indexOf(mark, end)) >= 0 && end - at <= WINDOW) {
    const run = runOf(text, end);
    const fits = run === size || (size === 1 && run === 3) || (size === 2 && run > 2);
    const inWord = c === "_" && text[end + run] !== undefined && WORD.test(text[end + run]);
    if (fits && end > at + size && !/\s/.test(text[end - 1]) && text[end - 1] !== "\\" && !inWord) return end + run - size;
    end += run;
  }
  if (end < 0) missing.add(mark);
  return -1;
}

/** [label](address "title") at a place, where the address has a scheme that is safe to follow. */
function linkAt(text, at, missing) {
  const close = text.slice(at, at + WINDOW).indexOf("](") + at;
  if (close < at) {
    if (!text.includes("](", at)) missing.add("](");
    return null;
  }
  const match = /^\]\(\s*<?([^\s<>]{1,2000}?)>?(?:\s+["'(][^\n]{0,500}?["')])?\s*\)/.exec(text.slice(close, close + 2600));
  if (!match || !safeAddress(match[1])) return null;
  return { label: text.slice(at + 1, close), address: match[1], end: close + match[0].length };
}

function safeAddress(address) {
  try {
    return ["http:", "https:", "mailto:"].includes(new URL(address).protocol);
  } catch {
    return false;
  }
}

function anchor(address) {
  return el("a", { href: address, rel: "noopener noreferrer nofollow", target: "_blank" });
}
