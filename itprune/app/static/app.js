// The page: sends picture and question, shows the answer as it comes, what it cost, what was kept.

import { draw } from "./drawing.js";

const $ = (id) => document.getElementById(id);
const COLUMNS = ["pruned", "dense"];
const MANY = 5; // stages beyond which they are a list to choose from
const FINISH = {
  stop: "",
  length: "Cut at the longest answer.",
  time: "Cut: it took too long.",
};
const FIGURES = [
  ["First token", (a) => a.first_token_s, seconds],
  ["Whole answer", (a) => a.total_s, seconds],
  ["Prompt tokens in", (a) => a.tokens_in, String],
  ["Tokens into the LLM", (a) => a.tokens_stage1, String],
  ["Tokens at the last layer", (a) => a.tokens_stage2, String],
  ["Visual tokens kept, mean of layers", (a) => a.visual_layer_average, percent],
  ["KV cache of the prompt", (a) => a.kv_bytes, bytes],
];

let facts = null;
let file = null;
let shown = ""; // address of the preview
let kept = null; // the last `kept` event
let answers = {};
let asking = null; // the AbortController of the question under way

start().catch(() => fail("The server does not answer; is it still running?"));

async function start() {
  const response = await fetch("/api/model");
  facts = await response.json();
  if (!response.ok) return fail(facts.error);
  document.title = `itprune: ${facts.model}`;
  $("model").textContent = facts.model;
  for (const { name } of facts.methods) $("method").add(new Option(name, name));
  $("method").value = facts.method;
  $("keep").value = facts.keep;
  $("longest").max = facts.limits.answer;
  $("longest").value = Math.min(128, facts.limits.answer);
  $("prompt").maxLength = facts.limits.prompt;
  showChoice();
  listen();
  take($("picture").files[0]); // chosen before we listened, or kept by the browser over a reload
}

function listen() {
  $("picture").addEventListener("change", (event) => take(event.target.files[0]));
  $("image").addEventListener("load", ({ target }) =>
    $("view").style.setProperty("--aspect", target.naturalWidth / target.naturalHeight));
  $("image").addEventListener("error", () => fail("The file is not a picture your browser can show."));
  $("keep").addEventListener("input", showChoice);
  $("method").addEventListener("change", showChoice);
  $("stop").addEventListener("click", () => asking && asking.abort());
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!asking) $("form").requestSubmit();
  });
  // Everywhere, since a browser leaves the page for a file that nobody takes.
  const brings = (event) => event.dataTransfer.types.includes("Files");
  const over = (is) => $("drop").classList.toggle("over", is);
  document.addEventListener("dragover", (event) => {
    if (!brings(event)) return;
    event.preventDefault();
    over(true);
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget || over(false));
  document.addEventListener("drop", (event) => {
    over(false);
    if (!brings(event)) return;
    event.preventDefault();
    take(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) take(event.clipboardData.files[0]);
  });
}

function showChoice() {
  const method = facts.methods.find(({ name }) => name === $("method").value);
  $("title").textContent = method ? method.title : "";
  $("note").textContent = method && $("keep").value < 1 ? method.note : "";
  $("kept").value = `${Math.round(100 * $("keep").value)} %`;
}

// -------------------------------------------------------------------------------- the picture
function take(chosen) {
  if (!chosen) return;
  if (asking) asking.abort();
  file = chosen;
  if (shown) URL.revokeObjectURL(shown);
  shown = URL.createObjectURL(file);
  $("image").src = shown;
  $("view").hidden = false;
  $("drop").classList.add("full");
  $("choose").replaceChildren(strong("Another picture"));
  forget();
}

function strong(text) {
  const element = document.createElement("strong");
  element.textContent = text;
  return element;
}

function forget() {
  kept = null;
  $("stages").hidden = true;
  draw($("overlay"), null, 0);
  $("wrong").hidden = true;
}

function showStages() {
  const names = kept.stages.map(({ layer, kept: count, of }) =>
    `${layer === 0 ? "Stage 1, into the LLM" : `Stage 2, from layer ${layer}`}: ${count} of ${of}`);
  names.push("Whole picture");
  const controls = names.length > MANY ? [choiceOf(names)] : names.map(radioOf);
  $("stages").replaceChildren($("stages").querySelector("legend"), ...controls);
  $("stages").hidden = false;
  draw($("overlay"), kept, 0);
}

function radioOf(name, index, names) {
  const label = document.createElement("label");
  const radio = document.createElement("input");
  radio.type = "radio";
  radio.name = "stage";
  radio.checked = index === 0;
  radio.addEventListener("change", () => draw($("overlay"), kept, index));
  label.append(radio);
  if (index < names.length - 1) {
    const key = document.createElement("i");
    if (index > 0) key.className = "late";
    label.append(key);
  }
  label.append(name);
  return label;
}

/** One control for methods that drop tokens after many layers. */
function choiceOf(names) {
  const choice = document.createElement("select");
  choice.setAttribute("aria-label", "Stage");
  names.forEach((name, index) => choice.add(new Option(name, index)));
  choice.addEventListener("change", () => draw($("overlay"), kept, Number(choice.value)));
  return choice;
}

// -------------------------------------------------------------------------------- asking
async function ask() {
  forget();
  if (!file) return fail("Choose a picture first.");
  if (file.size > facts.limits.body_mb * 1e6) {
    return fail(`The picture is larger than ${facts.limits.body_mb} MB; use a smaller one.`);
  }
  const form = new FormData();
  form.set("picture", file);
  form.set("prompt", $("prompt").value);
  form.set("method", $("method").value);
  form.set("keep", $("keep").value);
  form.set("max_new_tokens", $("longest").value);
  form.set("beside", $("beside").checked ? "1" : "");
  asking = new AbortController();
  prepare();
  try {
    const body = await fetch("/api/ask", { method: "POST", body: form, signal: asking.signal });
    if (!body.ok) throw new Error(await refusal(body));
    await read(body.body);
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else fail(error instanceof TypeError ? "The server does not answer; is it still running?" : error.message);
  } finally {
    finish();
  }
}

async function refusal(response) {
  try {
    return (await response.json()).error;
  } catch {
    return "The server is busy; try again in a minute.";
  }
}

function prepare() {
  answers = {};
  $("ask").disabled = true;
  $("stop").hidden = false;
  $("results").hidden = false;
  $("results").classList.toggle("plain-model", !$("beside").checked);
  $("dense").hidden = !$("beside").checked;
  $("figures").hidden = true;
  for (const column of COLUMNS) {
    part(column, "answer").textContent = "";
    part(column, "answer").classList.remove("writing");
    part(column, "end").textContent = "";
  }
  say("Sending …");
}

function finish() {
  asking = null;
  $("ask").disabled = false;
  $("stop").hidden = true;
  for (const column of COLUMNS) part(column, "answer").classList.remove("writing");
}

/** Reads server-sent events: one JSON object a `data:` line, a blank line behind each. */
async function read(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection was lost; ask again.");
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      if (!block.startsWith("data: ")) continue;
      const event = JSON.parse(block.slice("data: ".length));
      if (event.kind === "end") return;
      takeIn(event);
    }
  }
}

function takeIn(event) {
  if (event.kind === "queue") {
    say(event.ahead ? `${event.ahead} before you …` : "Your turn …");
  } else if (event.kind === "start") {
    part(event.column, "answer").classList.add("writing");
    say(event.column === "dense" ? "The dense model reads …" : "Reading the picture …");
  } else if (event.kind === "kept") {
    kept = event;
    showStages();
    say("Writing …");
  } else if (event.kind === "text") {
    part(event.column, "answer").append(event.text);
  } else if (event.kind === "done") {
    show(event);
  } else if (event.kind === "error") {
    fail(event.error);
  }
}

function show(answer) {
  answers[answer.column] = answer;
  const place = part(answer.column, "answer");
  if (place.textContent !== answer.answer) place.textContent = answer.answer;
  if (!answer.answer) part(answer.column, "end").textContent = "The model said nothing.";
  else part(answer.column, "end").textContent = FINISH[answer.finish] || "";
  place.classList.remove("writing");
  fillFigures();
  say("");
}

// -------------------------------------------------------------------------------- figures
function fillFigures() {
  const { pruned, dense } = answers;
  const rows = FIGURES.map(([name, value, format]) => {
    const row = document.createElement("tr");
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = name;
    const [a, b] = [pruned, dense].map((answer) => answer && value(answer));
    row.append(head, cell(told(a, format), ""), cell(told(b, format), "dense"), cell(ratio(a, b), "dense"));
    return row;
  });
  $("figures").querySelector("tbody").replaceChildren(...rows);
  $("figures").hidden = false;
}

function cell(text, name) {
  const element = document.createElement("td");
  element.className = `number ${name}`.trim();
  element.textContent = text;
  return element;
}

function told(value, format) {
  return value === undefined || value === null ? "–" : format(value);
}

function ratio(a, b) {
  return a && b ? `${(b / a).toFixed(2)}×` : "–";
}

function seconds(value) {
  return value < 1 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(2)} s`;
}

function percent(value) {
  return `${(100 * value).toFixed(1)} %`;
}

function bytes(value) {
  return value < 2 ** 20 ? `${(value / 1024).toFixed(0)} KiB` : `${(value / 2 ** 20).toFixed(1)} MiB`;
}

// -------------------------------------------------------------------------------- saying
function part(column, name) {
  return $(column).querySelector(`.${name}`);
}

function say(text) {
  $("status").textContent = text;
}

function fail(sentence) {
  say("");
  $("wrong").textContent = sentence.charAt(0).toUpperCase() + sentence.slice(1);
  $("wrong").hidden = false;
}
