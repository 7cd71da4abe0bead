/* What the page needs of the OpenAI-compatible API: the model and streamed replies.

URLs are relative, so that the page works behind a proxy with a path prefix. A stream that ends
without [DONE] is an error: a dying server also closes its connections cleanly. */

const NUMBERS = ["temperature", "top_k", "top_p", "max_tokens", "seed"]; // settings, may be empty

export class ApiError extends Error {}

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

/* The first model: {id, context_length, ...}. */
export async function loadModel(settings) {
  const { data } = await (await request("v1/models", settings, {})).json();
  return data[0];
}

export async function hasReport() {
  return fetch("report", { method: "HEAD" }).then((response) => response.ok, () => false);
}

/* The reply to `messages` in pieces: some of {queued, text, tool, finish, usage, timings} each. */
export async function* streamReply(model, messages, settings, signal) {
  const system = settings.system?.trim() ? [{ role: "system", content: settings.system }] : [];
  const body = { model, messages: [...system, ...messages], stream: true };
  body.stream_options = { include_usage: true };
  for (const name of NUMBERS) if (settings[name]) body[name] = Number(settings[name]);
  const options = { method: "POST", body: JSON.stringify(body), signal };
  const response = await request("v1/chat/completions", settings, options);
  try {
    for await (const line of readLines(response.body)) {
      const [, field, value] = /^(\w*): *(.*)/s.exec(line) ?? [];
      if (field === "" && value.startsWith("queued")) yield { queued: value.slice(7) };
      if (field !== "data") continue;
      if (value === "[DONE]") return;
      const { error, choices, usage, timings } = JSON.parse(value);
      if (error) throw new ApiError(error.message);
      const { delta, finish_reason: finish } = choices[0] ?? {};
      yield { text: delta?.content, tool: delta?.tool, finish, usage, timings };
    }
  } catch (error) {
    if (signal.aborted || error instanceof ApiError) throw error;
  }
  throw new ApiError("the connection broke off before the answer was complete");
}
