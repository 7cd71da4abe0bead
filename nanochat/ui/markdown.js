/* Renders Markdown as page elements while it is being written.

markdown-it parses, `build` makes elements of its tokens, and dom.js updates the page. Elements are
created one by one and text stays text, so no sanitizer is needed. Off: raw HTML, images, entities,
reference links, indented code, underlined headings. */

import { el, sync } from "./dom.js";
import "./vendor/markdown-it.umd.min.js";

const OFF = ["code", "entity", "html_block", "html_inline", "image", "lheading", "reference"];
const CALL = /([\ue000-\uf8ff])/g; // a private use character stands for a call of the calculator
const FIRST_CALL = 0xe000;

const parser = globalThis.markdownit("commonmark", { html: false, maxNesting: 100 });
parser.enable("table").disable(OFF);
parser.validateLink = (address) => /^(?:https?|mailto):/i.test(address);

/* A text, with a card for each call of the calculator. */
function withCalls(text, calls) {
  const pieces = text.split(CALL).map((piece, i) => {
    if (i % 2 === 0) return piece;
    const [expression, result] = calls[piece.charCodeAt(0) - FIRST_CALL];
    const output = result === undefined ? [] : [" = ", el("output", {}, result)];
    const card = { className: "tool", role: "group", ariaLabel: "Calculator" };
    return el("span", card, el("code", {}, expression), ...output);
  });
  return pieces.filter((piece) => piece !== "");
}

const cell = ({ tag, attrs }) => el(tag, { className: attrs?.[0][1].split(":")[1] ?? "left" });

/* The elements of tokens that are more than their tag. */
const ELEMENTS = {
  heading_open: ({ tag }) => el(`h${Math.min(6, Number(tag[1]) + 1)}`), // the page has the h1
  ordered_list_open: ({ attrs }) => el("ol", { start: attrs?.[0][1] ?? 1 }),
  link_open: ({ attrs }) =>
    el("a", { href: attrs[0][1], rel: "noopener noreferrer", target: "_blank" }),
  table_open: () => el("div", { tabIndex: 0 }, el("table")).firstChild,
  th_open: cell,
  td_open: cell,
  code_inline: ({ content }, calls) => el("code", {}, ...withCalls(content, calls)),
  fence: ({ info, content }, calls) => {
    const language = el("span", {}, info.trim().split(/\s/)[0] || "code");
    const copy = el("button", { type: "button", className: "copy-code" }, "Copy");
    const code = el("code", {}, ...withCalls(content.replace(/\n$/, ""), calls));
    return el("figure", {}, el("figcaption", {}, language, copy), el("pre", { tabIndex: 0 }, code));
  },
};

/* Appends to `parent` the elements that the tokens stand for, and returns it. */
function build(parent, tokens, calls) {
  const outer = [];
  for (const token of tokens) {
    if (token.hidden) continue; // the paragraphs of a tight list
    if (token.type === "inline") build(parent, token.children, calls);
    else if (token.type === "text") parent.append(...withCalls(token.content, calls));
    else if (token.nesting < 0) parent = outer.pop();
    else {
      const element = ELEMENTS[token.type]?.(token, calls) ?? el(token.tag);
      parent.append(element.parentNode ?? element); // a table brings the box that it scrolls in
      if (token.nesting > 0) outer.push(parent);
      if (token.nesting > 0) parent = element;
    }
  }
  return parent;
}

/* Shows the parts of a reply in `root`. While it is `live`, signs at the end of its text wait for
   what they belong to. */
export function showMarkdown(root, parts, live) {
  const calls = [];
  const pieces = parts.map(({ type, text }) => {
    if (type === "text") return text.replace(/\r\n?/g, "\n").replace(CALL, "\ufffd");
    if (type === "python") return String.fromCharCode(FIRST_CALL + calls.push([text]) - 1);
    calls.at(-1)?.push(text);
    return "";
  });
  const text = pieces.join("");
  const tokens = parser.parse(live ? text.replace(/[*_`~]+$/, "") : text, {});
  sync(root, build(document.createDocumentFragment(), tokens, calls));
}
