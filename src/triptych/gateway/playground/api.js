// OpenAI's API as the gateway serves it.

/** What the server refused, or what broke on the way. */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {string} code  the error's name, such as "media_too_large"
   * @param {number} status  HTTP's; 0 where there was no answer
   */
  constructor(message, code, status = 0) {
    super(message);
    this.code = code;
    this.status = status;
  }
}

/** Every model that can be asked: [{id, root}]. */
export async function models(key) {
  const response = await request("../v1/models", { headers: headers(key) });
  return (await response.json()).data;
}

/**
 * The chunks of one streamed answer.
 *
 * @param {object} body  a chat-completions request
 * @param {string} key  API key, or ""
 * @param {AbortSignal} signal  ends it, on the server too
 */
export async function* chat(body, key, signal) {
  const response = await request("../v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, chunk.error.code, response.status);
    yield chunk;
  }
  throw new ApiError("the connection broke in the middle of the answer", "connection_failed");
}

function headers(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("the server does not answer", "connection_failed");
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  const message = error?.message ?? `the server says ${response.status}`;
  throw new ApiError(message, error?.code ?? "error", response.status);
}

/** The data of server-sent events, one line each. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
  }
}
