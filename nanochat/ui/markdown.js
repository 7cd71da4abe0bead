/* Markdown becomes page elements, while it is still being written.

Two passes make a tree of {tag, children, attributes}: lines become blocks (by the container stack of the CommonMark
specification, appendix "A parsing strategy"), and the text of a block becomes inline nodes (by its delimiter stack).
`sync` then lays the tree over the page. It alone makes elements, with createElement and text nodes, so no text can
turn into markup. Every step takes linear time; what is nested deeper than MAX_DEPTH is shown flat.

The choices that would surprise: setext headings, indented code, images, raw HTML, entities and reference links are
off; `#` is an h2, since the page has the h1; and a private use character stands for an object, such as a tool call. */

const MAX_DEPTH = 16;
export const FIRST_OBJECT = 0xe000; // the character FIRST_OBJECT + i stands for objects[i] of a MarkdownView
const MAX_LINK = 2000; // characters; this bound and those in LINK_TARGET keep hostile input linear
const LINK_TARGET =
  /^\(\s{0,3}(?:<([^<>\n]*)>|((?:[^\s()\\]|\\.|\((?:[^\s()\\]|\\.)*\))*))(?:\s{1,3}(?:"[^"]*"|'[^']*'))?\s{0,3}\)/;
const SAFE_LINK = /^(?:https?:|mailto:)/i;
const ESCAPE = /\\([!-/:-@[-`{-~])/g;
const INLINE = new RegExp(
  [
    /\\(?<escaped>[!-/:-@[-`{-~])/,
    /(?<hard>\\\n| {2,}\n)| ?(?<soft>\n)/,
    /(?<ticks>`+)|(?<run>\*+|_+)|(?<bracket>[[\]])/,
    /<(?<address>(?:https?:|mailto:)[^\s<>]*)>/,
    /(?<object>[\ue000-\uf8ff])/,
    / +|[^\\ \n`*_[\]<\ue000-\uf8ff]+|[^]/,
  ].map((part) => part.source).join("|"),
  "iy",
);

export const node = (tag, children = [], attributes = {}) => ({ tag, children, attributes });

/* ---- lines become blocks ---- */

const indentOf = (line) => line.length - line.trimStart().length;
const skip = (line, length) => line.slice(Math.min(length, indentOf(line))); // white space only
const drop = (line, length) => line.trimStart().slice(length);
const afterQuoteMark = (line) => skip(drop(line, 1), 1);

function tableCells(text) {
  const cells = text.trim().replace(/^\|/, "").split(/(?<!\\)\|/);
  if (cells.at(-1).trim() === "") cells.pop();
  return cells.map((cell) => cell.trim().replaceAll("\\|", "|"));
}

/* The alignments that `body` gives the columns of a table with this header; null when it is no such row. */
function tableColumns(header, body) {
  if (!header.includes("|") || !/^(?:[|:]|-[-:|])/.test(body)) return null;
  const cells = tableCells(body);
  if (cells.length !== tableCells(header).length || !cells.every((cell) => /^:?-+:?$/.test(cell))) return null;
  return cells.map((cell) => (cell.endsWith(":") ? (cell[0] === ":" ? "center" : "right") : "left"));
}

class BlockParser {
  root = node("div");
  open = [this.root]; // the containers that the next line may continue, outermost first
  leaf = null; // the paragraph, table or fenced code at the end of the innermost one
  blankLine = -1; // number of the last blank line

  close(depth) {
    this.open.length = depth;
    this.leaf = null;
  }

  append(block, number, depth = this.open.length) {
    this.close(depth);
    const { list, children } = this.open.at(-1);
    if (list && children.length && this.blankLine === number - 1) list.loose = true;
    children.push(Object.assign(block, { line: number }));
    return block;
  }

  add(text, number) {
    const spaced = text.replace(/^\t+/, (tabs) => "    ".repeat(tabs.length));
    let [depth, line] = this.descend(this.leaf?.code ? text : spaced);
    if (this.leaf?.code && depth === this.open.length) return this.addCode(line);
    if (!line.trim() && this.open[depth - 1].tag !== "blockquote") this.blankLine = number;
    while (line.trim()) {
      if (this.leaf?.lines && indentOf(line) >= 4) break; // goes on with the paragraph, whatever it is
      const paragraph = depth === this.open.length && this.leaf?.lines;
      if (this.startLeaf(line, depth, number, paragraph)) return;
      const inside = depth < MAX_DEPTH ? this.startContainer(line, depth, number, paragraph) : null;
      if (inside === null) break;
      [line, depth] = [inside, this.open.length];
    }
    if (!line.trim()) this.close(depth);
    else if (this.leaf?.lines) this.leaf.lines.push(line.trimStart()); // lazily too: "> a" goes on with "b"
    else if (this.leaf?.rows && depth === this.open.length) this.leaf.rows.push(tableCells(line));
    else this.leaf = this.append({ ...node("p"), lines: [line.trimStart()] }, number, depth);
  }

  /* How many of the open containers a line continues, and what it holds for the innermost of these. */
  descend(line) {
    let depth = 1;
    for (; depth < this.open.length; depth++) {
      const { tag, width, children } = this.open[depth];
      const isQuote = tag === "blockquote";
      if (isQuote ? line.trimStart()[0] !== ">" : line.trim() ? indentOf(line) < width : !children.length) break;
      line = isQuote ? afterQuoteMark(line) : skip(line, width);
    }
    return [depth, line];
  }

  /* Starts the block that takes up the whole line, if it is one. */
  startLeaf(line, depth, number, paragraph) {
    const body = line.trimStart();
    const columns = paragraph && tableColumns(paragraph.at(-1), body);
    const heading = /^(#{1,6})(?:\s|$)/.exec(body);
    const fence = /^(`{3,}(?=[^`]*$)|~{3,})\s*(\S*)/.exec(body);
    if (columns) {
      const rows = [tableCells(paragraph.pop())];
      if (!paragraph.length) this.open.at(-1).children.pop();
      this.leaf = this.append({ ...node("table"), columns, rows }, number - 1);
    } else if (heading) {
      const text = body.slice(heading[1].length).trim().replace(/(?:^|\s)#+$/, "");
      this.append({ ...node(`h${Math.min(6, heading[1].length + 1)}`), lines: [text] }, number, depth);
    } else if (fence) {
      const closing = new RegExp(`^ {0,3}${fence[1]}${fence[1][0]}*\\s*$`);
      const block = { ...node("figure"), closing, language: fence[2], indent: indentOf(line), code: [] };
      this.leaf = this.append(block, number, depth);
    } else if (/^([-*_])(?:[ \t]*\1){2,}\s*$/.test(body)) this.append(node("hr"), number, depth);
    else return false;
    return true;
  }

  /* Opens the quote or list item that a line begins with; what is left of the line, null when there is none. */
  startContainer(line, depth, number, paragraph) {
    if (line.trimStart()[0] === ">") {
      this.open.push(this.append(node("blockquote"), number, depth));
      return afterQuoteMark(line);
    }
    const [marker, digits = "1"] = /^(?:[-+*]|(\d{1,9})[.)])(?=\s|$)/.exec(line.trimStart()) ?? [];
    const inside = marker && drop(line, marker.length);
    if (!marker || (paragraph && (!inside.trim() || Number(digits) !== 1))) return null;
    this.close(depth);
    const [tag, kind] = [marker.length > 1 ? "ol" : "ul", marker.at(-1)];
    let list = this.open.at(-1).children.at(-1);
    if (list?.tag === tag && list.kind === kind) list.loose ||= this.blankLine === number - 1;
    else {
      const attributes = Number(digits) === 1 ? {} : { start: String(Number(digits)) };
      list = this.append({ ...node(tag, [], attributes), kind }, number);
    }
    const gap = inside.trim() && indentOf(inside) <= 4 ? indentOf(inside) : 1;
    const item = { ...node("li"), list, width: indentOf(line) + marker.length + gap };
    list.children.push(item);
    this.open.push(item);
    return skip(inside, gap);
  }

  addCode(line) {
    if (this.leaf.closing.test(line)) this.leaf = null;
    else this.leaf.code.push(skip(line, this.leaf.indent));
  }
}

/* The tree below a block: its texts become inline nodes, and the items of a tight list lose their paragraphs. */
function finish(block, objects) {
  const { tag, lines, code, rows, columns, children, attributes, list } = block;
  const cell = (name) => (text, i) => node(name, inline(text, objects), { class: columns[i] });
  if (lines) return node(tag, inline(lines.join("\n").trimEnd(), objects), attributes);
  if (code) {
    const copy = node("button", ["Copy"], { type: "button", class: "copy-code" });
    const caption = node("figcaption", [node("span", [block.language || "code"]), copy]);
    return node(tag, [caption, node("pre", [node("code", [code.join("\n")])], { tabindex: "0" })]);
  }
  if (rows) {
    const fitting = rows.map((cells) => cells.slice(0, columns.length));
    const [head, ...body] = fitting.map((cells, i) => node("tr", cells.map(cell(i ? "td" : "th"))));
    const parts = [node("thead", [head]), ...(body.length ? [node("tbody", body)] : [])];
    return node("div", [node("table", parts)], { tabindex: "0" });
  }
  const inner = children.flatMap((child) => {
    const done = finish(child, objects);
    return list && !list.loose && child.tag === "p" ? done.children : [done];
  });
  return node(tag, inner, attributes);
}

/* ---- text becomes inline nodes ---- */

const linkAttributes = (href) => ({ href, rel: "noopener noreferrer", target: "_blank" });

/* `pieces` are strings, nodes and marks; a mark closes elements, shows its text, and opens elements. */
function inline(text, objects) {
  const [pieces, runs, brackets] = [[], [], []];
  const closers = Map.groupBy([...text.matchAll(/`+/g)].reverse(), ([ticks]) => ticks.length); // last one first
  const token = new RegExp(INLINE);
  for (let match; (match = token.exec(text)); ) {
    const { escaped, hard, soft, ticks, run, bracket, address, object } = match.groups;
    const end = token.lastIndex;
    if (escaped || soft) pieces.push(escaped ?? soft);
    else if (hard) pieces.push(node("br"));
    else if (object) pieces.push(objects[object.charCodeAt(0) - FIRST_OBJECT] ?? "");
    else if (address) pieces.push(node("a", [address], linkAttributes(address)));
    else if (ticks) {
      const later = closers.get(ticks.length) ?? [];
      while (later.at(-1)?.index < end) later.pop();
      const close = later.at(-1)?.index;
      pieces.push(close ? codeSpan(text.slice(end, close)) : ticks);
      if (close) token.lastIndex = close + ticks.length;
    } else if (run) {
      const mark = emphasisMark(text, match.index, end);
      runs.push(mark);
      pieces.push(mark);
    } else if (bracket === "[") {
      const mark = { text: "[", opens: [], closes: 0 };
      brackets.push({ mark, numRuns: runs.length });
      pieces.push(mark);
    } else if (bracket) {
      const opener = brackets.pop();
      const target = opener && LINK_TARGET.exec(text.slice(end, end + MAX_LINK));
      const href = target && (target[1] ?? target[2]).replace(ESCAPE, "$1");
      if (target && SAFE_LINK.test(href)) {
        pairEmphasis(runs.splice(opener.numRuns));
        Object.assign(opener.mark, { text: "", opens: [node("a", [], linkAttributes(href))] });
        pieces.push({ text: "", opens: [], closes: 1 });
        brackets.length = 0; // a link holds no link
        token.lastIndex = end + target[0].length;
      } else pieces.push(bracket);
    } else pieces.push(match[0]);
  }
  pairEmphasis(runs);
  return nest(pieces);
}

function codeSpan(text) {
  const code = text.replaceAll("\n", " ");
  return node("code", [/^ .*[^ ].* $/.test(code) ? code.slice(1, -1) : code]);
}

/* A run of * or _, with its power to open and to close by what stands before and after it. */
function emphasisMark(text, start, end) {
  // 0: white space, 1: a sign or an object, 2: a letter
  const rank = (char = " ") => (/\s/.test(char) ? 0 : /[\p{P}\p{S}\p{Co}]/u.test(char) ? 1 : 2);
  const before = rank([...text.slice(Math.max(0, start - 2), start)].at(-1));
  const after = rank([...text.slice(end, end + 2)][0]);
  const left = after === 2 || (after === 1 && before < 2);
  const right = before === 2 || (before === 1 && after < 2);
  const star = text[start] === "*";
  const canOpen = left && (star || !right || before === 1);
  const canClose = right && (star || !left || after === 1);
  return { text: text.slice(start, end), length: end - start, canOpen, canClose, opens: [], closes: 0 };
}

/* Pairs each run that can close with the nearest that can open it. `floors` says for each kind of closer below which
   height of the stack no partner is: without it, many unlike runs take quadratic time. */
function pairEmphasis(runs) {
  const openers = [];
  const floors = new Map();
  for (const closer of runs) {
    const kind = closer.text[0] + closer.canOpen + (closer.length % 3);
    while (closer.canClose && closer.text) {
      let i = openers.length - 1;
      while (i >= (floors.get(kind) ?? 0) && !isPair(openers[i], closer)) i--;
      if (i < (floors.get(kind) ?? 0)) {
        floors.set(kind, openers.length);
        break;
      }
      const opener = openers[i];
      const width = Math.min(2, opener.text.length, closer.text.length);
      opener.opens.unshift(node(width === 2 ? "strong" : "em"));
      closer.closes++;
      for (const run of [opener, closer]) run.text = run.text.slice(width);
      openers.length = opener.text ? i + 1 : i;
      for (const [key, height] of floors) floors.set(key, Math.min(height, openers.length));
    }
    if (closer.canOpen && closer.text) openers.push(closer);
  }
}

function isPair(opener, closer) {
  const ambiguous = (opener.canClose || closer.canOpen) && closer.length % 3 !== 0;
  return opener.text[0] === closer.text[0] && !(ambiguous && (opener.length + closer.length) % 3 === 0);
}

function nest(pieces) {
  const stack = [node("div")];
  const add = (piece) => {
    const { children } = stack.at(-1);
    const joins = typeof piece === "string" && typeof children.at(-1) === "string";
    if (joins) children[children.length - 1] += piece;
    else if (piece !== "") children.push(piece);
  };
  for (const piece of pieces) {
    if (piece.closes) stack.length -= piece.closes;
    add(piece.opens ? piece.text : piece);
    for (const element of piece.opens ?? []) {
      const fits = stack.length <= MAX_DEPTH;
      if (fits) add(element);
      stack.push(fits ? element : stack.at(-1));
    }
  }
  return stack[0].children;
}

/* ---- the tree becomes the page ---- */

/* Makes the children of `parent`, from `at` on, those of the tree. What is right already stays, with its selection. */
function sync(parent, children, at = parent.firstChild) {
  for (const child of children) {
    const isText = typeof child === "string";
    let here = at;
    if (!matches(at, child)) {
      here = isText ? document.createTextNode(child) : document.createElement(child.tag);
      for (const [name, value] of Object.entries(child.attributes ?? {})) here.setAttribute(name, value);
      parent.insertBefore(here, at);
      at?.remove();
    } else if (isText && here.data !== child) {
      if (child.startsWith(here.data)) here.appendData(child.slice(here.data.length));
      else here.data = child;
    }
    if (!isText) sync(here, child.children);
    at = here.nextSibling;
  }
  while (at) [at] = [at.nextSibling, at.remove()];
}

function matches(there, child) {
  if (typeof child === "string") return there?.nodeType === Node.TEXT_NODE;
  const wanted = Object.entries(child.attributes);
  if (there?.localName !== child.tag || there.attributes.length !== wanted.length) return false;
  return wanted.every(([name, value]) => there.getAttribute(name) === value);
}

/* Shows a growing text in `root`. A block is final once the next one has begun with a whole line, and is then
   neither parsed nor touched again. `objects` are nodes of the tree and may grow with the text. */
export class MarkdownView {
  constructor(root, objects = []) {
    Object.assign(this, { root, objects, numFinal: 0, finalLength: 0 }); // in blocks, and in characters
  }

  update(text) {
    const lines = text.slice(this.finalLength).split("\n");
    const numWhole = lines.length - 1;
    if (lines.at(-1) === "") lines.pop();
    const parser = new BlockParser();
    lines.forEach((line, number) => parser.add(line, number));
    const blocks = parser.root.children;
    sync(this.root, blocks.map((block) => finish(block, this.objects)), this.root.children[this.numFinal] ?? null);
    const numDone = blocks.findLastIndex((block) => block.line < numWhole);
    if (numDone < 1) return;
    this.numFinal += numDone;
    for (const line of lines.slice(0, blocks[numDone].line)) this.finalLength += line.length + 1;
  }
}
