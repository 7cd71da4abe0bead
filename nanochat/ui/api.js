/* The server's OpenAI-compatible API, as far as the page needs it: the model's description and a streamed reply.

Addresses are relative, so that the page also works behind a proxy with a path prefix. The choice that would surprise:
a stream that ends without [DONE] is an error, since a server that dies closes its connections in good order too. */

const NUMBERS = ["temperature", "top_k", "top_p", "max_tokens", "seed"]; // a setting left empty is the server's affair

export class ApiError extends Error {}

/* The events of a server-sent stream: {data} or {comment}. Characters and lines may be cut anywhere between chunks. */
async function* readEvents(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let [carry, data] = ["", []];
  try {
    for (let done = false; !done; ) {
      const chunk = await reader.read();
      done = chunk.done;
      carry += decoder.decode(chunk.value, { stream: !done });
      const lines = carry.split("\n");
      carry = lines.pop();
      for (const line of lines.map((each) => each.replace(/\r$/, ""))) {
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
  const hint = response.status === 401 ? " · enter the key in the settings" : wait ? ` · try again in ${wait} s` : "";
  throw new ApiError((body.error?.message ?? `the server answered with status ${response.status}`) + hint);
}

/* The first model: {id, context_length, ...}. */
export async function loadModel(settings) {
  const { data } = await (await request("v1/models", settings, {})).json();
  return data[0];
}

export async function hasReport() {
  return fetch("report", { method: "HEAD" }).then((response) => response.ok, () => false);
}

/* The reply to `messages`, piece by piece: {queued}, {text}, {tool}, {finish} and last {usage, timings}. */
export async function* streamReply(model, messages, settings, signal) {
  const body = { model, messages, stream: true, stream_options: { include_usage: true } };
  if (settings.system?.trim()) body.messages = [{ role: "system", content: settings.system }, ...messages];
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
