// The API as /openapi.json describes it: each route with its fields, an example to copy, and its answers.

import { fetchJson } from "./api.js";
import { withKey } from "./key.js";

const routes = document.getElementById("routes");

try {
  show(await withKey(() => fetchJson("/openapi.json")));
} catch (error) {
  routes.replaceChildren(element("p", { className: "bad" }, error.message));
}

function show(api) {
  document.getElementById("description").replaceChildren(...prose(api.info.description));
  routes.replaceChildren(
    ...Object.entries(api.paths).flatMap(([path, item]) =>
      Object.entries(item).map(([method, operation]) => route(method.toUpperCase(), path, operation)),
    ),
  );
}

function route(method, path, operation) {
  const body = operation.requestBody?.content["application/json"];
  const parameters = operation.parameters ?? [];
  return element(
    "details",
    { id: `${method}${path}` },
    element("summary", {}, element("code", {}, `${method} ${path}`), ` ${operation.summary ?? ""}`),
    element(
      "div",
      {},
      element("p", {}, ...prose(operation.description ?? "")),
      ...section("Parameters", fieldTable(parameters.map(({ name, schema, ...rest }) => [name, { ...schema, ...rest }]))),
      ...(body ? alternatives(body.schema).flatMap(bodySection) : []),
      ...section("Example", element("pre", {}, curl(method, path, body?.example))),
      ...section("Answers", answerTable(operation.responses)),
    ),
  );
}

function alternatives(schema) {
  return schema.properties ? [schema] : (schema.anyOf ?? []).flatMap(alternatives);
}

function bodySection(schema) {
  const required = new Set(schema.required);
  const fields = Object.entries(schema.properties).map(([name, field]) => [name, field, required.has(name)]);
  return [
    ...section(`Body${schema.description ? `: ${schema.description}` : ""}`, fieldTable(fields)),
    ...fields.flatMap(([name, field]) =>
      alternatives(field).flatMap((inner) => section(`The fields of ${name}`, fieldTable(Object.entries(inner.properties)))),
    ),
  ];
}

function fieldTable(fields) {
  if (fields.length === 0) return null;
  const rows = fields.map(([name, field, required]) => [
    element("code", {}, name),
    element("span", { className: "quiet" }, typeOf(field), required ? ", required" : "", defaultOf(field)),
    element("span", {}, ...prose(field.description ?? "")),
  ]);
  return table(rows);
}

function typeOf(schema) {
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.anyOf) return [...new Set(schema.anyOf.map(typeOf))].join(" or ");
  const type = [schema.type].flat().join(" or ");
  return type === "array" && schema.items ? `list of ${typeOf(schema.items)}` : type;
}

function defaultOf(schema) {
  return schema.default == null ? "" : `, default ${JSON.stringify(schema.default)}`;
}

function answerTable(responses) {
  return table(
    Object.entries(responses).map(([status, { description, content }]) => [
      element("code", {}, status),
      element("span", {}, ...prose(description)),
      element("span", { className: "quiet" }, Object.keys(content ?? {}).join(", ")),
    ]),
  );
}

function curl(method, path, example) {
  const words = ["curl"];
  if (method !== "GET") words.push("-X", method);
  words.push(`${location.origin}${path.replace(/\{(\w+)(:path)?\}/g, "NAME")}`);
  if (example) words.push("-H 'Content-Type: application/json'", `-d '${JSON.stringify(example).replaceAll("'", "'\\''")}'`);
  return words.join(" ");
}

function section(title, content) {
  return content ? [element("h3", {}, ...prose(title)), content] : [];
}

function table(rows) {
  const body = rows.map((cells) => element("tr", {}, ...cells.map((cell) => element("td", {}, cell))));
  return element("div", { className: "table" }, element("table", {}, element("tbody", {}, ...body)));
}

/** Text with `code` in it. */
function prose(text) {
  return text.split("`").map((part, index) => (index % 2 ? element("code", {}, part) : part));
}

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}
