// What the server does right now, from GET /health once a second while the page can be seen.

import { health } from "./api.js";

const EVERY_MS = 1000;
const KEPT = 60;
const WINDOW = 3;
const byId = (id) => document.getElementById(id);

/** Readings of the tokens sampled so far, `[milliseconds, tokens]`, and the rates between them. */
const readings = [];
const rates = [];

export function watchServer() {
  let timer = 0;
  const round = async () => {
    clearTimeout(timer);
    if (document.hidden) return;
    try {
      show(await health(AbortSignal.timeout(5000)));
    } catch {
      readings.length = 0;
      showState("no answer", "bad", ["The server does not answer."]);
    }
    clearTimeout(timer);
    timer = setTimeout(round, EVERY_MS);
  };
  document.addEventListener("visibilitychange", round);
  round();
}

function show({ status, problems, workers }) {
  const entries = Object.entries(workers);
  const schedulers = entries.filter(([name]) => name.startsWith("scheduler-")).map(([, worker]) => worker);
  const sum = (pick) => schedulers.reduce((total, worker) => total + (pick(worker.stats ?? {}, worker.info ?? {}) ?? 0), 0);
  showState(status === "ok" ? "ready" : status, status === "ok" ? "good" : "bad", problems);
  byId("running").textContent = sum((stats) => stats.running);
  byId("waiting").textContent = sum((stats) => stats.waiting);
  const tokens = (pick) => sum((stats, info) => (stats.kv_pages_total ? pick(stats) * (info.page_size ?? 1) : 0));
  showMemory(
    tokens((stats) => stats.kv_pages_total - stats.kv_pages_free),
    tokens((stats) => stats.kv_pages_evictable ?? 0),
    tokens((stats) => stats.kv_pages_total),
  );
  showThroughput(sum((stats) => stats.tokens_generated));
  byId("workers").replaceChildren(...entries.sort().map(([name, worker]) => workerEntry(name, worker)));
}

function showState(text, kind, problems) {
  const state = byId("state");
  if (state.textContent !== text) state.textContent = text;
  state.className = kind;
  const list = byId("problems");
  list.hidden = problems.length === 0;
  if (list.textContent !== problems.join(" ")) list.textContent = problems.join(" ");
}

function showMemory(used, cached, total) {
  const number = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
  const share = (tokens) => (total ? (100 * tokens) / total : 0);
  byId("kv-text").textContent = total
    ? `${number.format(used)} used, ${number.format(cached)} cached of ${number.format(total)}`
    : "-";
  byId("kv").querySelector(".used").style.width = used ? `max(2px, ${share(used)}%)` : "0";
  byId("kv").querySelector(".cached").style.width = cached ? `max(2px, ${share(cached)}%)` : "0";
}

function showThroughput(tokens) {
  const last = readings.at(-1);
  // The counter starts again with a new life of a scheduler.
  if (last && tokens < last[1]) readings.length = 0;
  readings.push([performance.now(), tokens]);
  if (readings.length > WINDOW + 1) readings.shift();
  const [first, now] = [readings[0], readings.at(-1)];
  const rate = readings.length > 1 ? (1000 * (now[1] - first[1])) / (now[0] - first[0]) : 0;
  rates.push(rate);
  if (rates.length > KEPT) rates.shift();
  byId("throughput").textContent = rate >= 100 ? rate.toFixed(0) : rate.toFixed(1);
  const highest = Math.max(...rates, 1);
  const points = rates.map((value, index) => `${60 - rates.length + index},${(19.5 - (19 * value) / highest).toFixed(2)}`);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  line.setAttribute("points", points.join(" "));
  byId("spark").replaceChildren(line);
}

function workerEntry(name, worker) {
  const entry = document.createElement("li");
  entry.className = worker.state === "ready" ? "good" : "bad";
  const restarts = worker.restarts ? `, restarted ${worker.restarts} times` : "";
  entry.textContent = name;
  entry.title = `${worker.state}${restarts}, pid ${worker.pid}`;
  if (worker.state !== "ready") entry.append(` ${worker.state}`);
  return entry;
}
