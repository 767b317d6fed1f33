// The page: what is attached, what was said, and the answer that runs.

import { chat, models } from "./api.js";
import { byId, make, preview, release } from "./dom.js";
import { render } from "./markdown.js";
import { kindOf, part } from "./media.js";
import { Meter, show } from "./stats.js";

const log = byId("log");
const question = byId("question");
const welcome = byId("welcome");

let attached = []; // files, in the order in which the model is to see them
let messages = []; // what was said, as the API has it
let running = null; // the AbortController of the answer under way

// What is said to those who do not see the page.
function tell(text) {
  byId("status").textContent = text;
}

// Models and settings.

async function listModels() {
  const select = byId("model");
  try {
    const found = await models(byId("key").value);
    const chosen = select.value;
    const engines = Map.groupBy(found, (model) => model.root.replace(/^chat_/, ""));
    const groups = [...engines].map(([engine, own]) =>
      make("optgroup", { label: engine }, ...own.map(({ id }) => make("option", { value: id }, id))),
    );
    select.replaceChildren(...groups);
    if (found.some(({ id }) => id === chosen)) select.value = chosen;
    select.disabled = found.length === 0;
    if (!found.length) complain("no model that chats is loaded");
  } catch (error) {
    select.disabled = true;
    select.replaceChildren(make("option", {}, "none"));
    complain(error.message);
    if (error.status === 401) askForKey();
  }
}

function askForKey() {
  byId("settings").showPopover();
  byId("key").focus();
}

function request(turns) {
  const wanted = { model: byId("model").value };
  if (byId("temperature").value) wanted.temperature = Number(byId("temperature").value);
  if (byId("max-tokens").value) wanted.max_tokens = Number(byId("max-tokens").value);
  const system = byId("system").value.trim();
  const before = system ? [{ role: "system", content: system }] : [];
  return { ...wanted, messages: [...before, ...turns] };
}

// What is attached.

function attach(files) {
  for (const file of files) {
    if (kindOf(file)) attached.push(file);
    else complain(`${file.name} is no picture, clip or sound`);
  }
  showAttached();
  question.focus();
}

function showAttached() {
  const list = byId("media");
  release(list);
  list.replaceChildren(
    ...attached.map((file, index) => {
      const remove = () => {
        attached.splice(index, 1);
        showAttached();
        question.focus();
      };
      const button = make("button", { type: "button", "aria-label": `Remove ${file.name}`, onclick: remove }, "×");
      return make("li", {}, preview(file, kindOf(file), { still: true }), make("span", {}, file.name), button);
    }),
  );
}

// What is said.

function add(element) {
  welcome.hidden = true;
  log.append(element);
  log.scrollTop = log.scrollHeight;
  return element;
}

function complain(text) {
  add(make("p", { class: "error", role: "alert" }, text));
}

async function ask() {
  const text = question.value.trim();
  if (running || (!text && !attached.length)) return;
  if (byId("model").disabled) return listModels();
  const [files, turns] = [attached, messages]; // a new chat may begin before this ends
  begin();
  const turn = add(make("article", { class: "asked", "aria-label": "Your question" }));
  turn.append(...files.map((file) => preview(file, kindOf(file))), ...(text ? [make("p", {}, text)] : []));
  question.value = "";
  attached = [];
  showAttached();
  try {
    const media = await Promise.all(files.map(part));
    const content = media.length ? [...media, ...(text ? [{ type: "text", text }] : [])] : text;
    turns.push({ role: "user", content });
    if (await answer(turns)) return;
    turns.pop();
  } catch (error) {
    complain(`a file cannot be read: ${error.message}`);
  } finally {
    end();
  }
  // Nothing came of it, so it is put back, to be changed and sent again.
  turn.classList.add("failed");
  question.value ||= text;
  attached = [...files, ...attached];
  showAttached();
}

/** Stream the answer to `turns` and add it there; false: there was none. */
async function answer(turns) {
  const text = make("div", { class: "text" });
  const article = add(make("article", { class: "answer", "aria-label": "Answer", "aria-busy": "true" }, text));
  let said = "";
  let end = "";
  const meter = new Meter();
  try {
    for await (const chunk of chat(request(turns), byId("key").value, running.signal)) {
      meter.note(chunk);
      said += chunk.choices[0]?.delta.content ?? "";
      if (chunk.choices[0]?.finish_reason === "length") end = "Cut off at the limit of tokens.";
      draw(text, said);
    }
    tell(`${said} ${end}`);
  } catch (error) {
    if (error.name === "AbortError") tell((end = "Stopped."));
    else article.append(make("p", { class: "error", role: "alert" }, `${error.message} (${error.code})`));
    if (error.status === 401) askForKey();
  }
  text.replaceChildren(...render(said));
  if (end) article.append(make("p", { class: "note" }, end));
  if (said) article.append(show(meter));
  article.removeAttribute("aria-busy");
  follow();
  if (said) turns.push({ role: "assistant", content: said });
  return Boolean(said);
}

// At most once a frame, however fast the tokens come.
let frame = 0;
function draw(element, text) {
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(() => {
    const before = isAtEnd();
    element.replaceChildren(...render(text));
    if (before) follow();
  });
}

const isAtEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 80;

function follow() {
  cancelAnimationFrame(frame);
  log.scrollTop = log.scrollHeight;
}

function begin() {
  running = new AbortController();
  byId("send").hidden = true;
  byId("stop").hidden = false;
  tell("Answering");
}

function end() {
  running = null;
  byId("send").hidden = false;
  byId("stop").hidden = true;
}

function stop() {
  running?.abort();
  question.focus();
}

function startAnew() {
  stop();
  messages = [];
  release(log);
  log.replaceChildren(welcome);
  welcome.hidden = false;
  tell("New chat");
}

// What the person does.

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) stop();
});
byId("stop").addEventListener("click", stop);
byId("new").addEventListener("click", startAnew);
byId("files").addEventListener("change", (event) => {
  attach(event.target.files);
  event.target.value = "";
});
question.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) {
    event.preventDefault();
    attach(event.clipboardData.files);
  }
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  attach(event.dataTransfer.files);
});
byId("settings").addEventListener("submit", (event) => {
  event.preventDefault();
  byId("settings").hidePopover();
});
byId("key").addEventListener("change", () => {
  sessionStorage.setItem("key", byId("key").value);
  listModels();
});

byId("key").value = sessionStorage.getItem("key") ?? "";
listModels();
