// The little of Markdown that models write: paragraphs, headings, lists, code, bold and italics.
// Links stay text: nobody should be led away by an answer.

import { make } from "./dom.js";

const INLINE = /`([^`]+)`|\*\*(.+?)\*\*|\*(\S(?:.*?\S)?)\*/g;
const ITEM = /^\s*(?:[-*+]|(\d+)[.)])\s+(.*)$/;

/** The text's elements. What is not finished yet, such as half a block of code, is shown so far. */
export function render(text) {
  const blocks = [];
  const lines = text.split("\n");
  while (lines.length) {
    if (lines[0].startsWith("```")) blocks.push(code(lines));
    else if (/^#{1,6} /.test(lines[0])) blocks.push(heading(lines.shift()));
    else if (ITEM.test(lines[0])) blocks.push(list(lines));
    else if (lines[0].trim()) blocks.push(paragraph(lines));
    else lines.shift();
  }
  return blocks;
}

function code(lines) {
  lines.shift();
  const end = lines.findIndex((line) => line.startsWith("```"));
  const inside = lines.splice(0, end < 0 ? lines.length : end);
  lines.shift();
  return make("pre", { tabindex: "0" }, make("code", {}, inside.join("\n")));
}

function heading(line) {
  return make("h3", {}, ...inline(line.replace(/^#+ /, "")));
}

function list(lines) {
  const [, first] = ITEM.exec(lines[0]);
  const items = [];
  while (lines.length && ITEM.test(lines[0])) {
    items.push(make("li", {}, ...inline(ITEM.exec(lines.shift())[2])));
  }
  return first ? make("ol", { start: first }, ...items) : make("ul", {}, ...items);
}

function paragraph(lines) {
  const own = [];
  while (lines.length && lines[0].trim() && !/^(```|#{1,6} )/.test(lines[0]) && !ITEM.test(lines[0])) {
    own.push(lines.shift());
  }
  return make("p", {}, ...inline(own.join("\n")));
}

function inline(text) {
  const found = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    found.push(text.slice(at, match.index));
    const [whole, raw, bold, slanted] = match;
    if (raw) found.push(make("code", {}, raw));
    else if (bold) found.push(make("strong", {}, ...inline(bold)));
    else found.push(make("em", {}, ...inline(slanted)));
    at = match.index + whole.length;
  }
  return [...found, text.slice(at)];
}
