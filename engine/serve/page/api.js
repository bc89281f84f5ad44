// The server's HTTP interface: requests, and the events of a stream.

/** What the server refused or could not do; the text is for people. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const headersOf = (key) => ({ "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) });

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  let message = `The server answered ${response.status}.`;
  try {
    message = (await response.json()).error.message ?? message;
  } catch {} // not the server's own answer
  const after = response.headers.get("Retry-After");
  throw new ApiError(response.status, response.status === 429 && after ? `${message} Try again in ${after} s.` : message);
}

/** A JSON object by GET. Addresses are relative, so that the page also works below a path of a proxy. */
export async function get(path, key, signal) {
  return (await request(path, { headers: headersOf(key), signal })).json();
}

/** The objects of a streamed answer, until its end. */
export async function* stream(path, body, key, signal) {
  const options = { method: "POST", headers: headersOf(key), body: JSON.stringify({ ...body, stream: true }), signal };
  const reader = (await request(path, options)).body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let ended = false;
  try {
    for (;;) {
      const { done, value } = await read(reader);
      rest += decoder.decode(value, { stream: !done });
      const lines = rest.split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue; // comments keep the connection open
        const data = line.slice(5).trim();
        if (data === "[DONE]") {
          ended = true;
          continue;
        }
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(event.error.code ?? 500, event.error.message ?? "The server failed.");
        yield event;
      }
      if (done) break;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
  if (!ended) throw new ApiError(0, "The connection broke before the answer was complete.");
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The connection broke before the answer was complete.");
  }
}
