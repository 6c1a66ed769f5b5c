// The server's API, as this page uses it. The API key lives in this tab alone.

const KEY = "minisgl.api-key";

/** The server said no; the message says why. */
export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
};

export async function fetchJson(path) {
  return (await fetchOk(path)).json();
}

/**
 * One answer: calls `onDelta` with each piece of text and returns the done event.
 * `onStart` is told the hops to the first byte, from the Server-Timing header.
 */
export async function generate(body, signal, onStart, onDelta) {
  const headers = { "Content-Type": "application/json" };
  const response = await fetchOk("/generate", { method: "POST", headers, body: JSON.stringify(body), signal });
  onStart(serverTiming(response.headers.get("Server-Timing") ?? ""));
  for await (const event of jsonLines(response.body)) {
    if (event.event === "done") return event;
    if (event.event === "error") throw new Refusal(response.status, event.message);
    onDelta(event.text_delta);
  }
  throw new Refusal(0, "The connection closed before the answer was complete.");
}

/** GET /health: its answer is of use whether or not the server is well. */
export async function health(signal) {
  return (await fetch("/health", { signal, cache: "no-store" })).json();
}

async function fetchOk(path, options = {}) {
  const key = apiKey.get();
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Refusal(response.status, body?.error?.message ?? `The server answered with status ${response.status}.`);
}

async function* jsonLines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

/** `name;dur=milliseconds, ...` as microseconds by name. */
function serverTiming(header) {
  return Object.fromEntries(
    header.split(", ").filter(Boolean).map((part) => {
      const [name, milliseconds] = part.split(";dur=");
      return [name, Number(milliseconds) * 1000];
    }),
  );
}
