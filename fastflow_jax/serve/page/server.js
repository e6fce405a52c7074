"use strict";
// Requests to the server: token, repetition while it is busy, and a few at a time.

const LANES = 3; // requests with images at the same time
const ATTEMPTS = 60; // while the server is busy

let token = sessionStorage.getItem("token");
let entered = null; // a promise while the dialog for the token is open

/** Calls the API; returns the JSON of its answer. Errors have a sentence for the user. */
async function ask(path, { method = "GET", body, onWait } = {}) {
  for (let attempt = 1; ; attempt++) {
    const sent = token;
    let response;
    try {
      response = await fetch(path, { method, body, headers: authorization(), redirect: "error" });
    } catch {
      throw new Error("The connection to the server was lost. Check that it runs, then try again.");
    }
    if (response.status === 401) {
      if (sent === token) await newToken();
    } else if (response.status === 503 && attempt < ATTEMPTS) {
      const seconds = Number(response.headers.get("Retry-After")) || 1;
      onWait?.(seconds);
      await new Promise((done) => setTimeout(done, 1000 * seconds));
    } else {
      const content = await response.json().catch(() => ({}));
      if (response.ok) return content;
      throw new Error(
        content.error ?? `The server answered with status ${response.status}. See its log.`,
      );
    }
  }
}

/** The header with the token; the server expects UTF-8. */
function authorization() {
  if (token === null) return {};
  return { Authorization: `Bearer ${String.fromCharCode(...new TextEncoder().encode(token))}` };
}

/** Asks the user for the token, once for all requests that wait for it. */
function newToken() {
  entered ??= new Promise((done) => {
    const dialog = find("token-dialog");
    find("token-message").textContent =
      token === null
        ? "This server needs its token, the value of FASTFLOW_TOKEN."
        : "This token is wrong. Enter another one.";
    find("token-form").onsubmit = (event) => {
      event.preventDefault();
      token = find("token").value.trim();
      sessionStorage.setItem("token", token);
      find("token").value = "";
      entered = null;
      dialog.close();
      done();
    };
    dialog.onclose = () => entered && dialog.showModal(); // by Escape: nothing works without it
    dialog.showModal();
  });
  return entered;
}

const waiting = [];
let running = 0;

/** Runs an asynchronous function when fewer than `LANES` others run. */
function schedule(task) {
  waiting.push(task);
  advance();
}

async function advance() {
  if (running >= LANES || !waiting.length) return;
  running++;
  try {
    await waiting.shift()();
  } finally {
    running--;
    advance();
  }
}
