/* What the pages need of the server: models, streamed replies and texts, the training runs.

URLs are relative, so that the page works behind a proxy with a path prefix. A stream that ends
without [DONE] is an error: a dying server also closes its connections cleanly. */

const NUMBERS = ["temperature", "top_k", "top_p", "max_tokens", "seed"]; // settings, may be empty
const TEXT_TOKENS = 100; // that a text goes on by at a time, unless the settings say more

export class ApiError extends Error {}

const brokenOff = () => new ApiError("the connection broke off before the answer was complete");

/* The lines of a stream, whose chunks may cut characters and lines. */
async function* readLines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let carry = "";
  try {
    for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read()) {
      const lines = (carry + chunk.value).split(/\r?\n/);
      carry = lines.pop();
      yield* lines;
    }
  } catch {
    throw brokenOff();
  } finally {
    reader.cancel().catch(() => undefined); // the connection is gone already, or is to go
  }
}

async function request(path, settings, options) {
  const headers = { "Content-Type": "application/json" };
  if (settings.key) headers.Authorization = `Bearer ${settings.key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError("the server does not answer; is it running?");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const wait = response.headers.get("Retry-After");
  let message = body.error?.message ?? `the server answered with status ${response.status}`;
  if (wait) message += ` · try again in ${wait} s`;
  if (response.status === 401) message += " · enter the key in the settings";
  throw new ApiError(message);
}

/* The models, the default first: {id, kind: "chat" or "base", context_length, ...}. */
export async function loadModels(settings, signal) {
  return (await (await request("v1/models", settings, { signal })).json()).data;
}

/* The training runs, the newest first; nanochat/runs.py says what there is of each. */
export const loadRuns = async (settings) => (await request("runs/data", settings, {})).json();

export async function hasReport() {
  return fetch("report", { method: "HEAD" }).then((response) => response.ok, () => false);
}

/* The reply to `messages` in pieces: some of {queued, text, tool, odds, finish, usage, timings}
   each. `odds` are the API's logprobs of the text's tokens, if the settings ask for them. */
export function streamReply(model, messages, settings, signal) {
  const system = settings.system?.trim() ? [{ role: "system", content: settings.system }] : [];
  const body = { model, messages: [...system, ...messages] };
  if (settings.odds) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  return stream("v1/chat/completions", body, settings, signal);
}

/* How a base model goes on with the text `prompt`, in such pieces. */
export function streamText(model, prompt, settings, signal) {
  return stream("v1/completions", { model, prompt, max_tokens: TEXT_TOKENS }, settings, signal);
}

async function* stream(path, body, settings, signal) {
  Object.assign(body, { stream: true, stream_options: { include_usage: true } });
  for (const name of NUMBERS) if (settings[name]) body[name] = Number(settings[name]);
  const options = { method: "POST", body: JSON.stringify(body), signal };
  const response = await request(path, settings, options);
  for await (const line of readLines(response.body)) {
    const [, field, value] = /^(\w*): *(.*)/s.exec(line) ?? [];
    if (field === "" && value.startsWith("queued")) yield { queued: value.slice(7) };
    if (field !== "data") continue;
    if (value === "[DONE]") return;
    const { error, choices, usage, timings } = JSON.parse(value);
    if (error) throw new ApiError(error.message);
    const { delta, text, logprobs, finish_reason: finish } = choices[0] ?? {};
    const { content = text, tool } = delta ?? {};
    yield { text: content, tool, odds: logprobs?.content, finish, usage, timings };
  }
  throw brokenOff();
}
