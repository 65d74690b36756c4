// Markdown as DOM nodes.
//
// The text comes from a model and is not trusted. HTML in it stays text, an image becomes a link,
// and a link leads to http or https only. All work is linear in the text's length, but for bounded
// look-aheads, and nesting is bounded.

import { copy, element } from "./dom.js";
import { say } from "./strings.js";

const DEEPEST = 10;
const FENCE = /^ *(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)/;
const MATH = /^ *(\\\[|\$\$)/;
// A last line of which a list, a rule, a heading, a fence or a table may still become.
const BUDDING = /^\s*(?:[-*_+#>`~|=: ]{1,12}|\d{1,9}[.)]?)$/;

const shown = new WeakMap();

/**
 * Show `text` in `parent`. What is shown already and has not changed stays as it is, so a growing
 * answer neither flickers nor loses a selection. `open` says that the text will go on: marks that
 * are not closed yet count as closed.
 */
export function render(parent, text, open = false) {
  const before = shown.get(parent) ?? [];
  const now = parse(text, open);
  now.forEach((block, index) => {
    const old = before[index];
    if (old?.key === block.key) {
      block.node = old.node;
    } else if (old?.type === "code" && block.type === "code" && old.language === block.language) {
      block.node = old.node;
      old.node.querySelector("code").textContent = block.text;
    } else {
      block.node = build(block, 0);
      if (old) old.node.replaceWith(block.node);
      else parent.append(block.node);
    }
  });
  before.slice(now.length).forEach((block) => block.node.remove());
  shown.set(parent, now);
}

function parse(text, open) {
  const blocks = split(linesOf(text), open);
  for (const block of blocks) block.key = `${block.open}${block.type}\n${block.source}`;
  return blocks;
}

/** The lines of a text, tabs in front of them as spaces, but not in code. */
function linesOf(text) {
  const state = { mark: null };
  return text.replaceAll("\r\n", "\n").split("\n").map((line) => (
    passFence(line, state) ? line : line.replace(/^[ \t]+/, (tabs) => tabs.replaceAll("\t", "    "))
  ));
}

// --- blocks ---

/** Blocks of lines: {type, source, open, ...}; only the last one can be open. */
function split(lines, open) {
  if (open && lines.length > 0 && BUDDING.test(lines.at(-1)) && !insideFence(lines)) {
    lines = lines.slice(0, -1);
  }
  const blocks = [];
  for (let at = 0; at < lines.length;) {
    if (lines[at].trim() === "") {
      at += 1;
      continue;
    }
    const block = fence(lines, at) ?? heading(lines, at) ?? rule(lines, at) ?? quote(lines, at)
      ?? math(lines, at, open) ?? list(lines, at) ?? table(lines, at, open) ?? paragraph(lines, at);
    block.source = lines.slice(at, block.end).join("\n");
    block.open = open && block.end >= lines.length;
    blocks.push(block);
    at = block.end;
  }
  return blocks;
}

function insideFence(lines) {
  const state = { mark: null };
  for (const line of lines) passFence(line, state);
  return state.mark !== null;
}

/** Take a line into account; whether it is code in a fence. `state.mark` is the fence's, or null. */
function passFence(line, state) {
  const found = FENCE.exec(line);
  const inside = state.mark !== null;
  if (!inside) state.mark = found?.[1] ?? null;
  else if (found && closes(found, state.mark)) state.mark = null;
  return inside;
}

function closes(found, mark) {
  return found[1].startsWith(mark) && found[2].trim() === "";
}

function fence(lines, at) {
  const found = FENCE.exec(lines[at]);
  if (!found) return null;
  const indent = indentation(lines[at]);
  const text = [];
  let end = at + 1;
  for (; end < lines.length; end += 1) {
    const mark = FENCE.exec(lines[end]);
    if (mark && closes(mark, found[1])) break;
    text.push(lines[end].slice(Math.min(indent, indentation(lines[end]))));
  }
  return { type: "code", end: end + 1, text: text.join("\n"), language: found[2].trim() };
}

function heading(lines, at) {
  const found = HEADING.exec(lines[at]);
  if (!found) return null;
  const text = found[2].trim().replace(/ #+$/, "");
  return { type: "heading", end: at + 1, level: found[1].length, text };
}

function rule(lines, at) {
  return RULE.test(lines[at]) ? { type: "rule", end: at + 1 } : null;
}

function quote(lines, at) {
  if (!QUOTE.test(lines[at])) return null;
  const inner = [];
  let end = at;
  for (; end < lines.length && lines[end].trim() !== ""; end += 1) {
    if (!QUOTE.test(lines[end]) && begins(lines, end)) break;
    inner.push(lines[end].replace(QUOTE, ""));
  }
  return { type: "quote", end, lines: inner };
}

function math(lines, at, open) {
  const found = MATH.exec(lines[at]);
  if (!found) return null;
  const mark = found[1] === "$$" ? "$$" : "\\]";
  let end = at;
  let from = found[0].length;
  while (end < lines.length && !lines[end].includes(mark, from)) {
    end += 1;
    from = 0;
  }
  if (end === lines.length && !open) return null;
  return { type: "math", end: end + 1, text: lines.slice(at, end + 1).join("\n") };
}

function list(lines, at) {
  const first = item(lines[at]);
  if (!first) return null;
  const items = [];
  let end = at;
  for (;;) {
    const mark = item(lines[end]);
    const body = [lines[end].slice(mark.width)];
    end = itemEnd(lines, end + 1, mark, body);
    items.push(body);
    const next = skipBlank(lines, end);
    const follows = next < lines.length && item(lines[next]);
    if (!follows || follows.ordered !== first.ordered || follows.indent < first.indent) break;
    end = next;
  }
  return { type: "list", end, items, ordered: first.ordered, start: first.start };
}

function item(line) {
  const found = ITEM.exec(line);
  if (!found || RULE.test(line)) return null;
  const start = Number.parseInt(found[2], 10);
  return {
    indent: found[1].length, width: found[0].length, ordered: !Number.isNaN(start), start,
  };
}

/** Collect the lines of an item in `body`; return the line after them. */
function itemEnd(lines, at, mark, body) {
  while (at < lines.length) {
    const next = skipBlank(lines, at);
    if (next === lines.length) return at;
    const line = lines[next];
    // Two spaces suffice below "1." too: models write so.
    const inside = indentation(line) >= mark.indent + 2;
    if (!inside && (next > at || begins(lines, next))) return at;
    for (; at < next; at += 1) body.push("");
    body.push(line.slice(Math.min(indentation(line), mark.width)));
    at += 1;
  }
  return at;
}

function table(lines, at, open) {
  if (!lines[at].includes("|")) return null;
  const next = lines[at + 1];
  const whole = next !== undefined && isDelimiter(next);
  const budding = open && lines[at].trimStart().startsWith("|") && next === undefined;
  if (!whole && !budding) return null;
  const head = cells(lines[at]);
  const sides = whole ? cells(next).map(side) : [];
  if (whole && sides.length !== head.length) return null;
  const rows = [];
  let end = Math.min(at + 2, lines.length);
  for (; end < lines.length && lines[end].includes("|"); end += 1) rows.push(cells(lines[end]));
  return { type: "table", end, head, sides, rows };
}

function isDelimiter(line) {
  return line.includes("|") && /^[|:\- ]+$/.test(line)
    && cells(line).every((cell) => /^:?-+:?$/.test(cell));
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function side(cell) {
  if (!cell.endsWith(":")) return "";
  return cell.startsWith(":") ? "center" : "right";
}

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() !== "" && !begins(lines, end)) end += 1;
  return { type: "paragraph", end, text: lines.slice(at, end).join("\n") };
}

/** Whether line `at` begins a block that can follow a paragraph without a blank line. */
function begins(lines, at) {
  const line = lines[at];
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)
    || MATH.test(line) || item(line) !== null
    || (line.includes("|") && at + 1 < lines.length && isDelimiter(lines[at + 1]));
}

function indentation(line) {
  return line.length - line.trimStart().length;
}

function skipBlank(lines, at) {
  while (at < lines.length && lines[at].trim() === "") at += 1;
  return at;
}

// --- nodes ---

function build(block, depth) {
  switch (block.type) {
    case "code":
      return codeBlock(block);
    case "heading":
      // The page's own title is the only h1.
      return inline(element(`h${Math.min(block.level + 1, 6)}`), block.text, block.open);
    case "rule":
      return element("hr");
    case "quote":
      return nested(element("blockquote"), block.lines, block.open, depth);
    case "math":
      return element("p", { className: "math" }, block.text);
    case "list":
      return listNode(block, depth);
    case "table":
      return tableNode(block);
    default:
      return inline(element("p"), block.text, block.open);
  }
}

function nested(parent, lines, open, depth) {
  if (depth >= DEEPEST) {
    parent.append(lines.join("\n"));
  } else {
    for (const block of split(lines, open)) parent.append(build(block, depth + 1));
  }
  return parent;
}

function listNode(block, depth) {
  const node = element(block.ordered ? "ol" : "ul");
  if (block.ordered && block.start !== 1) node.start = block.start;
  block.items.forEach((lines, index) => {
    const last = index === block.items.length - 1;
    const task = /^\[([ xX])\] /.exec(lines[0]);
    if (task) lines = [lines[0].slice(4), ...lines.slice(1)];
    const made = nested(element("li"), lines, block.open && last, depth);
    // An item's text stands on the line of its mark; further paragraphs stay paragraphs.
    if (made.firstChild?.localName === "p") made.firstChild.replaceWith(...made.firstChild.childNodes);
    if (task) made.prepend(task[1] === " " ? "☐ " : "☑ ");
    node.append(made);
  });
  return node;
}

function tableNode(block) {
  const row = (name, texts) => {
    const made = element("tr");
    block.head.forEach((_, column) => {
      const cell = element(name, { className: block.sides[column] ?? "" });
      made.append(inline(cell, texts[column] ?? "", block.open));
    });
    return made;
  };
  const body = element("tbody", {}, ...block.rows.map((texts) => row("td", texts)));
  const head = element("thead", {}, row("th", block.head));
  return element("div", { className: "table", tabIndex: 0 }, element("table", {}, head, body));
}

function codeBlock(block) {
  const code = element("code", {}, block.text);
  const button = element("button", { type: "button", textContent: say("copy") });
  button.onclick = () => copy(code.textContent, button);
  const head = element("div", { className: "code-head" }, element("span", {}, block.language), button);
  return element("div", { className: "code" }, head, element("pre", { tabIndex: 0 }, code));
}

// --- text ---

const SPECIAL = /[\\`*_~[!<$\n]|https?:\/\//g;
const ADDRESS = /https?:\/\/[^\s<>"`|\\\u3000-\u303f\uff00-\uffef]+/y;
const LOOK_AHEAD = 500;

/** Append `text` to `parent`, its marks as elements, and return `parent`. */
function inline(parent, text, open, depth = 0) {
  if (open && depth === 0) text = text.replace(/[*_`~[!\\]{1,3}$/, "");
  if (depth >= DEEPEST) {
    parent.append(text);
    return parent;
  }
  const scan = { parent, text, open, depth, missing: new Set() };
  let from = 0;
  SPECIAL.lastIndex = 0;
  for (let found; (found = SPECIAL.exec(text));) {
    const at = found.index;
    const read = reader(found[0]);
    const made = read(scan, at);
    if (made) {
      parent.append(text.slice(from, at), ...made.nodes);
      from = made.end;
    }
    // Set in every case: read() may have called this function, and so moved it.
    SPECIAL.lastIndex = made?.end ?? at + ("*_~`$".includes(found[0]) ? runLength(text, at) : 1);
  }
  parent.append(text.slice(from));
  parent.normalize();
  return parent;
}

function reader(mark) {
  switch (mark) {
    case "\n": return lineBreak;
    case "\\": return escape;
    case "`": return codeSpan;
    case "[": return link;
    case "!": return image;
    case "<": return angle;
    case "$": return dollars;
    case "*": case "_": case "~": return emphasis;
    default: return address;
  }
}

function runLength(text, at) {
  let end = at + 1;
  while (end < text.length && text[end] === text[at]) end += 1;
  return end - at;
}

function lineBreak(_, at) {
  return { nodes: [element("br")], end: at + 1 };
}

function escape({ text }, at) {
  const next = text[at + 1];
  if (next === "(" || next === "[") return formula(text, at, next === "(" ? "\\)" : "\\]", 2);
  if (next === undefined || !/[!-/:-@[-`{-~]/.test(next)) return null;
  return { nodes: [next], end: at + 2 };
}

function dollars({ text }, at) {
  if (text.startsWith("$$", at)) return formula(text, at, "$$", 2);
  const found = /\$[^\s$](?:[^$\n]{0,200}[^\s$])?\$(?!\d)/y;
  found.lastIndex = at;
  return found.test(text) ? mathSpan(text, at, found.lastIndex) : null;
}

function formula(text, at, mark, width) {
  const end = text.indexOf(mark, at + width);
  return end < 0 ? null : mathSpan(text, at, end + mark.length);
}

function mathSpan(text, at, end) {
  return { nodes: [element("span", { className: "math" }, text.slice(at, end))], end };
}

function codeSpan(scan, at) {
  const { text, open, missing } = scan;
  const width = runLength(text, at);
  const mark = "`".repeat(width);
  let end = missing.has(mark) ? -1 : text.indexOf(mark, at + width);
  while (end >= 0 && runLength(text, end) !== width) {
    end = text.indexOf(mark, end + runLength(text, end));
  }
  if (end < 0) {
    missing.add(mark);
    if (!open || width > 2) return null;
    end = text.length;
  }
  let inner = text.slice(at + width, end);
  if (/^ .*[^ ].* $/s.test(inner)) inner = inner.slice(1, -1);
  return { nodes: [element("code", {}, inner)], end: Math.min(end + width, text.length) };
}

function emphasis(scan, at) {
  const { text, depth } = scan;
  const mark = text[at];
  const width = runLength(text, at);
  const after = text[at + width];
  if (after === undefined || /\s/.test(after) || (mark === "_" && isWord(text[at - 1]))) return null;
  for (const size of mark === "~" ? [2] : [3, 2, 1]) {
    if (size > width) continue;
    const end = emphasisEnd(scan, at, width, size);
    if (end < 0) continue;
    const inner = text.slice(at + size, end);
    const rest = end === text.length;
    const names = mark === "~" ? ["del"] : [[], ["em"], ["strong"], ["strong", "em"]][size];
    const nodes = names.map((name) => element(name));
    nodes.reduce((outer, node) => (outer.append(node), node));
    inline(nodes.at(-1), inner, scan.open && rest, depth + 1);
    return { nodes: [nodes[0]], end: Math.min(end + size, text.length) };
  }
  return null;
}

/** Where the mark that closes the `size` marks at `at` begins; the text's end if it is to come. */
function emphasisEnd({ text, open, missing }, at, width, size) {
  const mark = text[at];
  const name = mark.repeat(size);
  for (let end = at + width; !missing.has(name) && (end = text.indexOf(mark, end)) >= 0;) {
    const run = runLength(text, end);
    const fits = size === 1 ? run === 1 || run === 3 : run >= size;
    const closing = !/\s/.test(text[end - 1]) && !(mark === "_" && isWord(text[end + run]));
    if (fits && closing) return end + run - size;
    end += run;
  }
  missing.add(name);
  const begins = !isWord(text[at - 1]) && size === width;
  return open && (size === 2 || begins) ? text.length : -1;
}

function isWord(character) {
  return character !== undefined && /[\p{L}\p{N}]/u.test(character);
}

function link(scan, at) {
  const { text, open, depth } = scan;
  const close = matching(text, at, "[", "]");
  const end = text[close + 1] === "(" ? matching(text, close + 1, "(", ")") : -1;
  if (end < 0) return open && !isWord(text[at - 1]) ? buddingLink(text, at, close) : null;
  const label = text.slice(at + 1, close);
  const target = text.slice(close + 2, end).trim().split(/\s/)[0].replace(/^<|>$/g, "");
  const node = anchor(target);
  if (!node) return { nodes: [label], end: end + 1 };
  return { nodes: [inline(node, label, false, depth + 1)], end: end + 1 };
}

/** The label of a link whose rest is still to come. */
function buddingLink(text, at, close) {
  const label = text.slice(at + 1, close < 0 ? text.length : close);
  const canGoOn = close < 0 || close === text.length - 1 || text[close + 1] === "(";
  const fits = text.length - at < LOOK_AHEAD && !text.includes("\n", at);
  return canGoOn && fits ? { nodes: [label], end: text.length } : null;
}

// Showing it would ask another host for it, and so tell that host.
function image(scan, at) {
  return scan.text[at + 1] === "[" ? link(scan, at + 1) : null;
}

function angle({ text }, at) {
  const found = /<(?:br ?\/?|(https?:\/\/[^\s<>]+))>/iy;
  found.lastIndex = at;
  const match = found.exec(text);
  if (!match) return null;
  const node = match[1] ? anchor(match[1]) : element("br");
  if (!node) return null;
  if (match[1]) node.append(match[1]);
  return { nodes: [node], end: found.lastIndex };
}

function address({ text }, at) {
  ADDRESS.lastIndex = at;
  let target = ADDRESS.exec(text)?.[0] ?? "";
  target = target.replace(/[.,;:!?'*_~\]]{1,9}$/, "");
  if (target.endsWith(")") && !target.includes("(")) target = target.slice(0, -1);
  const node = anchor(target);
  if (!node) return null;
  node.append(target);
  return { nodes: [node], end: at + target.length };
}

/** A link to another site, or null if it would lead anywhere else than to http or https. */
function anchor(target) {
  let url;
  try {
    url = new URL(target);
  } catch {
    return null;
  }
  if (url.protocol !== "http:" && url.protocol !== "https:") return null;
  return element("a", { href: url.href, rel: "noopener noreferrer", target: "_blank" });
}

/** Where the bracket at `at` closes, on the same line and not too far, or -1. */
function matching(text, at, opening, closing) {
  let depth = 0;
  const limit = Math.min(text.length, at + LOOK_AHEAD);
  for (let end = at; end < limit && text[end] !== "\n"; end += 1) {
    if (text[end] === "\\") end += 1;
    else if (text[end] === opening) depth += 1;
    else if (text[end] === closing && (depth -= 1) === 0) return end;
  }
  return -1;
}
