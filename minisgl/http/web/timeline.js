// Draws a request's way round the processes: each hop up to the first byte, then each step of the model.

const HOPS = [
  ["http_parse", "parse", "http"],
  ["pipe_to_tokenizer", "pipe", "pipe"],
  ["tokenize", "tokenize", "tokenizer"],
  ["pipe_to_scheduler", "pipe", "pipe"],
  ["queue", "queue", "scheduler"],
  ["prefill", "prefill", "scheduler"],
  ["pipe_to_detokenizer", "pipe", "pipe"],
  ["detokenize", "detokenize", "detokenizer"],
  ["pipe_to_http", "pipe", "pipe"],
  ["write", "write", "http"],
];
const SVG = "http://www.w3.org/2000/svg";

/**
 * @param hops microseconds by the names of HOPS; those still to come may be missing.
 * @param timing the whole `timing` of the done event, once there is one.
 */
export function drawTimeline(element, hops, timing = null) {
  const total = HOPS.reduce((sum, [name]) => sum + (hops[name] ?? 0), 0);
  const table = made("ol", { className: "hops" });
  let start = 0;
  for (const [name, label, process] of HOPS) {
    if (hops[name] === undefined) continue;
    table.append(hopRow(label, process, start / total, hops[name] / total, hops[name]));
    start += hops[name];
  }
  const parts = [caption("To the first byte", duration(total)), table];
  if (timing?.steps_ns?.length) parts.push(...steps(timing));
  element.replaceChildren(...parts);
}

/** Microseconds as a short text. */
export function duration(us) {
  if (us < 1000) return `${us.toFixed(0)} µs`;
  return us < 1e6 ? `${(us / 1000).toFixed(us < 1e5 ? 1 : 0)} ms` : `${(us / 1e6).toFixed(2)} s`;
}

function hopRow(label, process, start, share, us) {
  const row = made("li", { className: process });
  const track = made("span", { className: "track" });
  const bar = made("i");
  // A hop too short to see still shows where it was.
  bar.style.left = `min(${start * 100}%, 100% - 2px)`;
  bar.style.width = `max(2px, ${share * 100}%)`;
  track.append(bar);
  const name = made("span", { textContent: label });
  if (!["pipe", `${label}r`].includes(process)) name.append(made("small", { textContent: process }));
  row.append(name, track, made("span", { className: "value", textContent: duration(us) }));
  return row;
}

/** Time to the right, a step's duration upwards. `steps_ns` holds when each was launched and retired, in turn. */
function steps(timing) {
  const origin = timing.stamps_ns[0];
  const found = [];
  let free = 0;
  for (let at = 0; at + 1 < timing.steps_ns.length; at += 2) {
    const end = timing.steps_ns[at + 1] - origin;
    // A step is launched while the one before still computes, so its own time begins when that one has ended.
    found.push({ start: Math.max(timing.steps_ns[at] - origin, free), end });
    free = end;
  }
  const lengths = found.map((step) => step.end - step.start);
  const highest = Math.max(...lengths);
  const chart = svg("svg", { class: "steps", viewBox: "0 0 1000 100", preserveAspectRatio: "none", role: "img" });
  chart.setAttribute("aria-label", `${found.length} steps of the model over ${duration(free / 1000)}`);
  const firstByte = timing.ttfb_us * 1000;
  const toFirstByte = { x: 0, y: 0, width: (1000 * firstByte) / Math.max(free, firstByte), height: 100, class: "before" };
  chart.append(titled(svg("rect", toFirstByte), `to the first byte: ${duration(timing.ttfb_us)}`));
  found.forEach((step, index) => {
    const height = Math.max(4, (100 * lengths[index]) / highest);
    const place = { x: (1000 * step.start) / free, y: 100 - height, height };
    const rect = svg("rect", { ...place, width: Math.max(0.5, (1000 * (step.end - step.start)) / free - 1) });
    rect.setAttribute("class", index ? "decode" : "prefill");
    chart.append(titled(rect, `${index ? `step ${index + 1}` : "prefill"}: ${duration(lengths[index] / 1000)}`));
  });
  const decode = lengths.slice(1).sort((one, other) => one - other);
  const median = decode.length ? `median ${duration(decode[decode.length >> 1] / 1000)}, ` : "";
  const axis = made("p", { className: "axis" });
  axis.append(made("span", { textContent: "0" }), made("span", { textContent: duration(free / 1000) }));
  const count = `${found.length} ${found.length === 1 ? "step" : "steps"}`;
  return [caption(count, `${median}max ${duration(highest / 1000)}`), chart, axis];
}

function caption(text, value) {
  const line = made("p", { className: "row" });
  line.append(made("span", { textContent: text }), made("span", { textContent: value }));
  return line;
}

function made(tag, properties = {}) {
  return Object.assign(document.createElement(tag), properties);
}

function titled(element, text) {
  const title = svg("title", {});
  title.textContent = text;
  element.append(title);
  return element;
}

function svg(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
