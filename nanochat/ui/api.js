/* What the page needs of the OpenAI-compatible API: the model and streamed replies.

URLs are relative, so that the page works behind a proxy with a path prefix. A stream that ends
without [DONE] is an error: a dying server also closes its connections cleanly. */

const NUMBERS = ["temperature", "top_k", "top_p", "max_tokens", "seed"]; // settings, may be empty

export class ApiError extends Error {}

/* The events of a server-sent stream: {data} or {comment}. Chunks may cut characters and lines. */
async function* readEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let [carry, data] = ["", []];
  try {
    for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read()) {
      const lines = (carry + chunk.value).split(/\r?\n/);
      carry = lines.pop();
      for (const line of lines) {
        if (line.startsWith(":")) yield { comment: line.slice(1).trim() };
        else if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
        else if (line === "" && data.length) yield { data: data.splice(0).join("\n") };
      }
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

/* The reply to `messages` in pieces: {queued}, {text}, {tool}, {finish}, last {usage, timings}. */
export async function* streamReply(model, messages, settings, signal) {
  const system = settings.system?.trim() ? [{ role: "system", content: settings.system }] : [];
  const body = { model, messages: [...system, ...messages], stream: true };
  body.stream_options = { include_usage: true };
  for (const name of NUMBERS) if (settings[name]) body[name] = Number(settings[name]);
  const options = { method: "POST", body: JSON.stringify(body), signal };
  const response = await request("v1/chat/completions", settings, options);
  try {
    for await (const { data, comment } of readEvents(response.body)) {
      if (comment?.startsWith("queued")) yield { queued: comment.slice(6).trim() };
      if (data === "[DONE]") return;
      if (data) yield* pieces(JSON.parse(data));
    }
  } catch (error) {
    if (signal.aborted || error instanceof ApiError) throw error;
  }
  throw new ApiError("the connection broke off before the answer was complete");
}

function* pieces({ error, choices, usage, timings }) {
  if (error) throw new ApiError(error.message);
  const { delta, finish_reason: finish } = choices[0] ?? {};
  if (delta?.tool) yield { tool: delta.tool };
  if (delta?.content) yield { text: delta.content };
  if (finish) yield { finish };
  if (usage) yield { usage, timings };
}
