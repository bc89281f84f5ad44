// The page: one conversation on the screen, at most one answer on its way.

import { ApiError, get, stream } from "./api.js";
import { copyText, el, show } from "./markdown.js";
import * as store from "./store.js";

const $ = (id) => document.getElementById(id);
const SAMPLING = [
  // name, label, range, step, and the name under which the server tells its own value
  ["temperature", "Temperature", 0, 5, 0.05, "temperature"],
  ["top_p", "Top-p", 0, 1, 0.01, "top_p"],
  ["top_k", "Top-k", 0, 1000000, 1, "top_k"],
  ["min_p", "Min-p", 0, 1, 0.01, "min_p"],
  ["repeat_penalty", "Repeat penalty", 0.1, 5, 0.05, "repeat_penalty"],
  ["presence_penalty", "Presence penalty", -2, 2, 0.1, "presence_penalty"],
  ["frequency_penalty", "Frequency penalty", -2, 2, 0.1, "frequency_penalty"],
  ["max_tokens", "Most tokens", 1, 10000000, 1, "max_tokens"],
  ["seed", "Seed", 0, 4294967295, 1, "seed"],
];
const TEXT_TOKENS = 256; // of one continuation, unless the settings say otherwise: a text has no end of its own
const KEEP_EVERY = 1000; // milliseconds between two savings of an answer that is being written

const settings = store.settings();
let current = store.begin("chat");
let props = null; // of the chosen model; null until the server told
let running = null; // {conversation, message, abort, ...} while an answer comes

// ---- what the server offers

async function loadModels() {
  try {
    const list = (await get("v1/models", settings.key)).data.map((one) => one.id);
    $("model").replaceChildren(...list.map((id) => el("option", { value: id }, id)));
    $("model").value = list.includes(settings.model) ? settings.model : list[0];
    await loadProps();
  } catch (error) {
    tellProblem(error, loadModels);
  }
}

async function loadProps() {
  const model = $("model").value;
  props = null;
  refresh();
  const watching = setInterval(watchLoading, 500);
  try {
    const value = await get(`props?model=${encodeURIComponent(model)}`, settings.key);
    if ($("model").value !== model) return;
    props = value;
    tellNothing();
    fillPlaceholders();
    if (!current.messages.length && !current.text) current.kind = canChat() ? "chat" : "text";
    showConversation();
  } finally {
    clearInterval(watching);
    $("device").textContent = props?.device ?? "";
  }
}

async function watchLoading() {
  try {
    const response = await fetch("health");
    const value = await response.json();
    if (props === null && value.status === "loading") {
      $("device").textContent = `${value.error.message} (${Math.round(100 * value.progress)} %)`;
    }
  } catch {} // the request that waits for the model tells what is wrong
}

const canChat = () => Boolean(props?.chat_template);

function fillPlaceholders() {
  const values = props.default_generation_settings?.params ?? {};
  for (const [name, , , , , theirs] of SAMPLING) {
    const value = values[theirs];
    const text = name === "seed" ? "random" : name === "max_tokens" && !(value > 0) ? "no limit" : String(value ?? "");
    $("settings").querySelector(`[name=${name}]`).placeholder = text;
  }
}

// ---- notices

function tellProblem(error, retry) {
  const notice = $("notice");
  notice.replaceChildren(error.message + " ");
  if (retry) {
    const button = el("button", { type: "button", class: "small" }, "Try again");
    button.addEventListener("click", () => {
      tellNothing();
      retry();
    });
    notice.append(button);
  }
  notice.hidden = false;
  if (error.status === 401) openSettings("key");
}

function tellNothing() {
  $("notice").hidden = true;
  $("notice").replaceChildren();
}

const say = (text) => ($("status").textContent = text);

function keep(conversation) {
  conversation.changed = Date.now();
  if (!store.keep(conversation)) {
    tellProblem(new Error("The browser's storage is full: delete old conversations, or this one will be lost."));
  }
  showList();
}

// ---- the list of conversations

function showList() {
  const items = store.conversations().map((one) => {
    const name = store.title(one);
    const open = el("button", { type: "button", class: "open", title: name }, name);
    const remove = el("button", { type: "button", class: "delete icon", "aria-label": `Delete: ${name}` }, "✕");
    open.addEventListener("click", () => openConversation(store.conversation(one.id) ?? one));
    remove.addEventListener("click", () => removeConversation(one, name));
    const item = el("li", {}, open, remove);
    if (one.id === current.id) {
      item.classList.add("current");
      open.setAttribute("aria-current", "true");
    }
    return item;
  });
  const focused = [...$("list").children].findIndex((item) => item.contains(document.activeElement));
  $("list").replaceChildren(...items);
  if (focused >= 0) (items[Math.min(focused, items.length - 1)]?.querySelector(".open") ?? $("new-chat")).focus();
}

function openConversation(one) {
  current = running?.conversation.id === one.id ? running.conversation : one;
  hideSidebar();
  showConversation();
  focusInput();
}

function removeConversation(one, name) {
  if (!confirm(`Delete “${name}”?`)) return;
  if (running?.conversation.id === one.id) stop();
  store.remove(one.id);
  if (current.id === one.id) openConversation(store.begin(canChat() ? "chat" : "text"));
  showList();
}

// ---- one conversation

function showConversation() {
  const isText = current.kind === "text";
  $("messages").replaceChildren(...current.messages.map((message, index) => messageNode(message, index)));
  $("text-pane").hidden = !isText;
  $("messages").hidden = isText;
  $("chat-row").hidden = isText;
  if (isText) $("text").value = current.text;
  refresh();
  showList();
  const scroller = isText ? $("text") : $("scroller");
  scroller.scrollTop = scroller.scrollHeight;
}

/** Buttons and labels for the present state. */
function refresh() {
  const isText = current.kind === "text";
  const mine = running?.conversation === current;
  const possible = props !== null && (isText || canChat());
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  $("send").disabled = !possible;
  $("send").textContent = isText ? "Continue" : "Send";
  $("again").hidden = !isText || running !== null || !current.last;
  $("undo").hidden = !isText || running !== null || !current.last;
  $("text").readOnly = mine;
  $("input").disabled = props !== null && !possible;
  $("input").placeholder = props !== null && !possible ? "This model has no chat template: it continues texts" : "Message";
  $("new-chat").hidden = props !== null && !canChat();
  $("keys").textContent = isText
    ? "Ctrl+Enter continues the text, Escape stops."
    : "Enter sends, Shift+Enter begins a new line, Escape stops.";
  if (!mine) $("figures").textContent = isText ? current.last?.figures ?? "" : "";
}

function focusInput() {
  if (matchMedia("(pointer: coarse)").matches) return; // the keyboard would cover half of a phone
  (current.kind === "text" ? $("text") : $("input")).focus();
}

function messageNode(message, index) {
  const node = el("article", { class: `message ${message.role}` });
  node.append(el("h2", {}, message.role === "user" ? "You" : "Model"));
  if (message.reasoning) node.append(reasoningNode(message));
  const body = el("div", { class: "body", dir: "auto" });
  if (message.role === "user") body.textContent = message.content;
  else show(body, message.content);
  node.append(body);
  if (message.error) node.append(el("p", { class: "error" }, message.error));
  node.append(toolsNode(message, index));
  return node;
}

function reasoningNode(message) {
  const text = el("div", { dir: "auto" });
  show(text, message.reasoning);
  return el("details", { class: "reasoning" }, el("summary", {}, message.content ? "Thought" : "Thinking …"), text);
}

function toolsNode(message, index) {
  const tools = el("div", { class: "tools" });
  if (running?.message === message) return tools;
  const who = message.role === "user" ? "your message" : "the answer";
  const tool = (name, label, act) => {
    const button = el("button", { type: "button", class: "small", "aria-label": label }, name);
    button.addEventListener("click", () => act(button));
    tools.append(button);
  };
  tool("Copy", `Copy ${who}`, (button) => copyText(message.content, button));
  tool("Edit", `Edit ${who}`, () => edit(message, index));
  if (message.role === "assistant") {
    tool("Regenerate", "Answer again", () => answerAgain(index));
    const last = index === current.messages.length - 1;
    if (last && message.content && ["length", "stopped"].includes(message.finish)) {
      tool("Continue", "Continue the answer", () => answer(message));
    }
    const ends = { length: "longest answer reached", stopped: "stopped", broken: "broken off" };
    const figures = [ends[message.finish], message.figures].filter(Boolean).join(" · ");
    if (figures) tools.append(el("span", {}, figures));
  }
  return tools;
}

function edit(message, index) {
  if (running) return;
  const node = $("messages").children[index];
  const field = el("textarea", { "aria-label": "Edit the message", dir: "auto", rows: "4" });
  field.value = message.content;
  const save = el("button", { type: "button", class: "main" }, message.role === "user" ? "Send" : "Save");
  const cancel = el("button", { type: "button" }, "Cancel");
  const leave = () => {
    showConversation();
    $("messages").children[index]?.querySelector('[aria-label^="Edit"]')?.focus();
  };
  save.addEventListener("click", () => {
    if (running || (message.role === "user" && !field.value.trim())) return;
    message.content = field.value;
    if (message.role === "user") {
      current.messages.length = index + 1;
      answer();
    } else {
      keep(current);
      leave();
    }
  });
  cancel.addEventListener("click", leave);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      leave();
    }
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save.click();
  });
  node.querySelector(".body").replaceChildren(field);
  node.querySelector(".body").blocks = null;
  node.querySelector(".tools").replaceChildren();
  node.querySelector(".tools").append(el("div", { class: "edit-tools" }, save, cancel));
  field.focus();
}

// ---- asking the model

function sampling() {
  const values = { model: $("model").value };
  for (const [name] of SAMPLING) if (settings[name] !== undefined && settings[name] !== "") values[name] = settings[name];
  const stop = settings.stop.split("\n").filter(Boolean);
  if (stop.length) values.stop = stop;
  return values;
}

function send() {
  const text = $("input").value;
  if (running || !text.trim() || !canChat()) return;
  $("input").value = "";
  grow();
  current.messages.push({ role: "user", content: text });
  answer();
}

function answerAgain(index) {
  if (running) return;
  current.messages.length = index;
  answer();
}

/** Have the conversation answered, or one answer continued. */
async function answer(continued = null) {
  if (running || !canChat()) return;
  const message = continued ?? { role: "assistant", content: "", reasoning: "" };
  if (!continued) current.messages.push(message);
  delete message.error;
  delete message.finish;
  delete message.figures;
  const messages = [];
  for (const { role, content } of current.messages.filter((one) => one !== message && one.content)) {
    // A question without an answer and the next one become one message: many templates want roles to alternate.
    if (role === messages.at(-1)?.role) messages.at(-1).content += "\n\n" + content;
    else messages.push({ role, content });
  }
  if (settings.system) messages.unshift({ role: "system", content: settings.system });
  if (continued) messages.push({ role: "assistant", content: message.content });
  const body = { ...sampling(), messages, timings_per_token: true };
  await run("v1/chat/completions", body, message, (choice) => {
    message.reasoning += choice.delta?.reasoning_content ?? "";
    message.content += choice.delta?.content ?? "";
  });
}

async function continueText() {
  if (running || props === null) return;
  current.text = $("text").value;
  current.last = { from: current.text.length, figures: "" };
  const prompt = current.text;
  const body = { max_tokens: TEXT_TOKENS, ...sampling(), prompt };
  const conversation = current;
  await run("v1/completions", body, current.last, (choice) => (conversation.text += choice.text ?? ""));
}

function undo() {
  if (running || !current.last) return;
  current.text = current.text.slice(0, current.last.from);
  current.last = null;
  keep(current);
  showConversation();
  focusInput();
}

async function run(path, body, message, take) {
  running = { conversation: current, message, abort: new AbortController(), begun: 0, tokens: 0, kept: Date.now() };
  const mine = running;
  keep(current);
  showConversation();
  say("The model is answering.");
  $("stop").focus({ preventScroll: true });
  draw(true);
  try {
    for await (const event of stream(path, body, settings.key, mine.abort.signal)) {
      const choice = event.choices?.[0];
      if (choice) {
        take(choice);
        if (choice.finish_reason) message.finish = choice.finish_reason;
      }
      count(mine, event, choice);
      if (Date.now() - mine.kept > KEEP_EVERY) {
        mine.kept = Date.now();
        store.keep(mine.conversation);
      }
      draw();
    }
  } catch (error) {
    if (error.name === "AbortError") message.finish = "stopped";
    else {
      message.error = error.message;
      message.finish = "broken";
      if (!(error instanceof ApiError)) console.error(error);
      if (error.status === 401) openSettings("key");
    }
  }
  finish(mine);
}

/** Tokens per second: counted while they come, then what the server measured. */
function count(mine, event, choice) {
  const now = performance.now();
  const timings = event.timings ?? {};
  if (timings.predicted_per_second !== undefined) {
    const cached = timings.cache_n ? `, ${timings.cache_n} of the prompt cached` : "";
    mine.message.figures = `${timings.predicted_n} tokens, ${timings.predicted_per_second.toFixed(1)} tokens/s${cached}`;
  } else if (choice?.text || choice?.delta?.content || choice?.delta?.reasoning_content) {
    mine.tokens += timings.predicted_n ?? 1;
    if (!mine.begun) mine.begun = now;
    else mine.message.figures = `${mine.tokens} tokens, ${((1000 * mine.tokens) / (now - mine.begun)).toFixed(1)} tokens/s`;
  }
}

function finish(mine) {
  running = null;
  const { conversation, message } = mine;
  const isText = conversation.kind === "text";
  keep(conversation);
  if (message.error && isText) tellProblem(new Error(message.error));
  if (conversation === current) {
    const focused = document.activeElement === $("stop") || document.activeElement === document.body;
    drawNow(mine);
    refresh();
    if (!isText) settle(message);
    if (focused) focusInput();
  } else refresh();
  const text = isText ? conversation.text.slice(message.from) : message.content;
  say(message.error ? `The answer failed: ${message.error}` : `Answer: ${text.slice(0, 5000)}`);
}

function stop() {
  running?.abort.abort();
}

// ---- showing an answer while it comes: once a frame, and less often where that takes long

let drawing = null;
let cost = 0;

function draw(now = false) {
  if (drawing !== null && !now) return;
  clearTimeout(drawing);
  drawing = setTimeout(() => requestAnimationFrame(() => drawNow(running)), now ? 0 : Math.max(16, 4 * cost));
}

function drawNow(one) {
  drawing = null;
  if (one === null || one.conversation !== current) return;
  const begun = performance.now();
  const { message } = one;
  const scroller = current.kind === "text" ? $("text") : $("scroller");
  const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
  if (current.kind === "text") $("text").value = current.text;
  else {
    const node = $("messages").children[current.messages.indexOf(message)];
    if (!node) return;
    node.classList.add("running");
    node.setAttribute("aria-busy", "true");
    if (message.reasoning) {
      if (!node.querySelector(".reasoning")) node.querySelector(".body").before(reasoningNode(message));
      else show(node.querySelector(".reasoning div"), message.reasoning);
      node.querySelector("summary").textContent = message.content ? "Thought" : "Thinking …";
    }
    show(node.querySelector(".body"), message.content);
  }
  $("figures").textContent = message.figures ?? "";
  if (atEnd) scroller.scrollTop = scroller.scrollHeight;
  cost = performance.now() - begun;
}

/** What changes in the messages when an answer has ended. What the reader selected or unfolded stays as it is. */
function settle(message) {
  const nodes = [...$("messages").children];
  current.messages.forEach((one, index) => nodes[index].querySelector(".tools").replaceWith(toolsNode(one, index)));
  const node = nodes[current.messages.indexOf(message)];
  if (!node) return;
  node.classList.remove("running");
  node.removeAttribute("aria-busy");
  if (message.error) node.querySelector(".tools").before(el("p", { class: "error" }, message.error));
}

// ---- settings

function makeSettings() {
  for (const [name, label, min, max, step] of SAMPLING) {
    const field = el("input", { name, type: "number", min: String(min), max: String(max), step: String(step), inputmode: "decimal" });
    $("sampling").append(el("label", {}, label, field));
  }
  for (const field of $("settings").querySelectorAll("[name]")) {
    field.value = settings[field.name] ?? "";
    field.addEventListener("change", () => changeSetting(field));
  }
  document.documentElement.dataset.theme = settings.theme;
}

function changeSetting(field) {
  if (field.type === "number") {
    if (!field.reportValidity()) return;
    settings[field.name] = field.value === "" ? "" : Number(field.value);
  } else settings[field.name] = field.value;
  if (field.name === "theme") document.documentElement.dataset.theme = settings.theme;
  if (field.name === "key") {
    tellNothing();
    loadModels();
  }
  store.keepSettings(settings);
}

function openSettings(name) {
  if (!$("settings").open) $("settings").showModal();
  if (name) $("settings").querySelector(`[name=${name}]`).focus();
}

// ---- the frame

function showSidebar() {
  $("sidebar").classList.add("shown");
  $("shade").hidden = false;
  $("sidebar-open").setAttribute("aria-expanded", "true");
  $("sidebar-close").focus();
}

function hideSidebar() {
  if (!$("sidebar").classList.contains("shown")) return;
  $("sidebar").classList.remove("shown");
  $("shade").hidden = true;
  $("sidebar-open").setAttribute("aria-expanded", "false");
  $("sidebar-open").focus();
}

function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

function listen() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (current.kind === "text") continueText();
    else send();
  });
  $("input").addEventListener("input", grow);
  $("input").addEventListener("keydown", (event) => {
    // Enter also ends the input of a composed character (Chinese, Japanese, ...): that one does not send.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    send();
  });
  $("text").addEventListener("input", () => {
    current.text = $("text").value;
    if (current.last && current.text.length < current.last.from) current.last = null;
    keep(current);
    refresh();
  });
  $("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      continueText();
    }
  });
  $("again").addEventListener("click", () => {
    undo();
    continueText();
  });
  $("undo").addEventListener("click", undo);
  $("stop").addEventListener("click", stop);
  $("new-chat").addEventListener("click", () => openConversation(store.begin("chat")));
  $("new-text").addEventListener("click", () => openConversation(store.begin("text")));
  $("model").addEventListener("change", () => {
    settings.model = $("model").value;
    store.keepSettings(settings);
    loadProps().catch((error) => tellProblem(error, loadModels));
  });
  $("settings-open").addEventListener("click", () => openSettings());
  $("delete-all").addEventListener("click", () => {
    if (!confirm("Delete all conversations?")) return;
    stop();
    for (const one of store.conversations()) store.remove(one.id);
    openConversation(store.begin(canChat() ? "chat" : "text"));
  });
  $("sidebar-open").addEventListener("click", showSidebar);
  $("sidebar-close").addEventListener("click", hideSidebar);
  $("shade").addEventListener("click", hideSidebar);
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || $("settings").open) return;
    hideSidebar();
    stop();
  });
  addEventListener("pagehide", () => running && store.keep(running.conversation));
  store.onChange((id) => {
    if (id === current.id && running?.conversation !== current) current = store.conversation(id) ?? current;
    if (id === null || id === current.id) showConversation();
    else showList();
  });
}

/** The conversation that was changed last; what a reload cut off is shown as such. */
function openLast() {
  const last = store.conversations()[0];
  if (!last || Date.now() - last.changed > 12 * 3600 * 1000) return;
  const message = last.messages.at(-1);
  if (message?.role === "assistant" && !message.finish) message.finish = "broken";
  current = last;
}

makeSettings();
listen();
openLast();
showConversation();
focusInput();
loadModels();
