// Markdown, as models write it, into page elements.
//
// `parse` makes a tree of plain objects, `{tag, attributes, children}` with text as strings; `show` makes elements of
// it. Text only ever becomes text nodes and tags are only the ones named here, so nothing needs escaping and no answer
// can bring markup, scripts or styles of its own.

const DEEPEST = 8;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( +)(?=\S)/;

const INLINE = new RegExp(
  [
    "(?<tick>`+)(?<code>[^`](?:[^]{0,2000}?[^`])?)\\k<tick>(?!`)",
    "\\*\\*(?=\\S)(?<strong>[^]{0,2000}?[^\\s])\\*\\*",
    "(?<!\\w)__(?=\\S)(?<strong2>[^]{0,2000}?[^\\s])__(?!\\w)",
    "\\*(?=[^\\s*])(?<em>[^]{0,2000}?[^\\s*])\\*(?!\\*)",
    "(?<!\\w)_(?=[^\\s_])(?<em2>[^]{0,2000}?[^\\s_])_(?!\\w)",
    "\\[(?<label>[^\\[\\]\\n]{1,500})\\]\\((?<target>[^\\s()]{1,2000}(?:\\([^\\s()]{0,500}\\)[^\\s()]{0,500})?)\\)",
    "(?<!\\w)(?<url>https?://[^\\s<>\"'`]{0,2000}[^\\s<>\"'`.,;:!?)*_\\]])",
    "\\\\(?<plain>[\\\\`*_{}\\[\\]()#+.!>~-])",
    "(?<newline> *\\n)",
  ].join("|"),
  "g",
);

/** The blocks of a text. */
export function parse(text) {
  return blocks(text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n"), 0);
}

/** Show these blocks in an element; those that are there already, unchanged, are left alone. */
export function show(element, tree) {
  const before = element.shownBlocks ?? [];
  const after = tree.map((node) => JSON.stringify(node));
  let same = 0;
  while (same < after.length && after[same] === before[same]) same += 1;
  while (element.childNodes.length > same) element.lastChild.remove();
  element.append(...tree.slice(same).map(toElement));
  element.shownBlocks = after;
}

function toElement(node) {
  if (typeof node === "string") return document.createTextNode(node);
  const element = document.createElement(node.tag);
  for (const [name, value] of Object.entries(node.attributes)) element.setAttribute(name, value);
  element.append(...node.children.map(toElement));
  return element;
}

function made(tag, children = [], attributes = {}) {
  return { tag, attributes, children };
}

// ---- blocks ---------------------------------------------------------------------------------------------------------

function blocks(lines, depth) {
  const found = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const heading = HEADING.exec(line);
    if (!line.trim()) {
      at += 1;
    } else if (FENCE.test(line)) {
      at = fence(lines, at, found);
    } else if (heading) {
      found.push(made(`h${heading[1].length}`, inline(heading[2])));
      at += 1;
    } else if (RULE.test(line)) {
      found.push(made("hr"));
      at += 1;
    } else if (QUOTE.test(line) && depth < DEEPEST) {
      const end = endOf(lines, at, (next) => QUOTE.test(next));
      found.push(made("blockquote", blocks(lines.slice(at, end).map((next) => next.replace(QUOTE, "")), depth + 1)));
      at = end;
    } else if (ITEM.test(line) && depth < DEEPEST) {
      at = list(lines, at, found, depth);
    } else {
      const end = endOf(lines, at + 1, (next) => next.trim() && !startsBlock(next));
      found.push(made("p", inline(lines.slice(at, end).map((next) => next.trimStart()).join("\n"))));
      at = end;
    }
  }
  return found;
}

function endOf(lines, start, belongs) {
  let end = start;
  while (end < lines.length && belongs(lines[end])) end += 1;
  return end;
}

function startsBlock(line) {
  return [FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(line));
}

/** A fence that is not closed, as in the middle of an answer, runs to the end of the text. */
function fence(lines, start, found) {
  const [, mark, language] = FENCE.exec(lines[start]);
  const closes = (line) => {
    const rest = line.trim();
    return rest.length >= mark.length && rest === mark[0].repeat(rest.length);
  };
  const end = endOf(lines, start + 1, (line) => !closes(line));
  const code = made("code", [lines.slice(start + 1, end).join("\n")]);
  found.push(made("pre", [code], { tabindex: "0", ...(language && { "data-language": language }) }));
  return end + 1;
}

/** The items of one list: lines that are indented under an item's text belong to it, and so may be lists themselves. */
function list(lines, start, found, depth) {
  const numbered = (marker) => /\d/.test(marker);
  const first = ITEM.exec(lines[start])[2];
  const items = [];
  let at = start;
  for (;;) {
    const match = at < lines.length && !RULE.test(lines[at]) && ITEM.exec(lines[at]);
    if (!match || numbered(match[2]) !== numbered(first)) break;
    const indent = match[1].length + match[2].length + 1;
    // Models indent by two spaces under "1." too, where the text begins at the third.
    const inside = (line) => line.search(/\S/) >= Math.min(indent, 2);
    let end = at + 1;
    while (end < lines.length) {
      const next = lines[end].trim() ? end : endOf(lines, end, (line) => !line.trim());
      const lazy = next === end && lines[end].trim() && !startsBlock(lines[end]);
      if (next >= lines.length || !(inside(lines[next]) || lazy)) break;
      end = next + 1;
    }
    const body = lines.slice(at + 1, end);
    const margin = Math.min(indent, ...body.filter((line) => line.trim()).map((line) => line.search(/\S/)));
    const content = blocks([lines[at].slice(match[0].length), ...body.map((line) => line.slice(margin))], depth + 1);
    items.push(made("li", content[0]?.tag === "p" ? [...content[0].children, ...content.slice(1)] : content));
    at = endOf(lines, end, (line) => !line.trim());
  }
  const number = Number.parseInt(first, 10);
  found.push(numbered(first) ? made("ol", items, { start: String(number) }) : made("ul", items));
  return at;
}

// ---- inside a block -------------------------------------------------------------------------------------------------

function inline(text, depth = 0) {
  if (depth >= DEEPEST) return [text];
  const nodes = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > at) nodes.push(text.slice(at, match.index));
    nodes.push(styled(match, depth + 1));
    at = match.index + match[0].length;
  }
  if (at < text.length) nodes.push(text.slice(at));
  return nodes;
}

function styled(match, depth) {
  const { code, strong, strong2, em, em2, label, target, url, plain } = match.groups;
  if (code !== undefined) return made("code", [code.length > 2 ? code.replace(/^ (.*) $/s, "$1") : code]);
  if (strong ?? strong2) return made("strong", inline(strong ?? strong2, depth));
  if (em ?? em2) return made("em", inline(em ?? em2, depth));
  if (label) return link(target, inline(label, depth)) ?? match[0];
  if (url) return link(url, [url]) ?? url;
  return plain ?? made("br");
}

/** A link to a web page; anything else (javascript:, data:, a path of this server) is no link. */
function link(target, children) {
  if (!/^https?:\/\//i.test(target) || !URL.canParse(target)) return null;
  return made("a", children, { href: new URL(target).href, rel: "noopener noreferrer nofollow", target: "_blank" });
}
