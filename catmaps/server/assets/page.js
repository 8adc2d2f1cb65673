"use strict";
// The page of `catmaps serve` and `catmaps show`: draws trajectories, and in the server's case asks for them.
// A panel is {steps, calls, seconds, trajectory: {strings, given, steps: [{t, calls, ids, p}]}}.

const setup = JSON.parse(document.getElementById("setup").textContent);
const at = (id) => document.getElementById(id);
const still = matchMedia("(prefers-reduced-motion: reduce)");
const dark = matchMedia("(prefers-color-scheme: dark)");
const LEVELS = 10;
const EXAMPLE = "the king of [[12]] was [[20]] the war";
const EXAMPLE_TOKENS = 64; // at most, in any alphabet
const MARKS = { " ": "space", "\n": "new line", "\t": "tab", "": "nothing" };

let panels = [];
let timer = null;
let pointed = null; // {panel, place}: whose alternatives are shown

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") element.className = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

// Confidence as a colour on which the text's own colour keeps a contrast of 4.5 and more.
function colour(p) {
  const [from, to] = dark.matches ? [[28, 34, 41], [18, 88, 150]] : [[255, 255, 255], [112, 178, 232]];
  const mixed = from.map((a, i) => Math.round(a + (to[i] - a) * p));
  return `rgb(${mixed.join(" ")})`;
}

const named = (token) => (token in MARKS ? MARKS[token] : token);
const shown = (token) => token.replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
const percent = (p) => (p > 0 && p < 0.001 ? "< 0.1%" : p > 0.999 && p < 1 ? "> 99.9%" : `${(100 * p).toFixed(1)}%`);
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

// ---- panels

function addPanel(steps) {
  const panel = { steps, step: 0, place: 0, tokens: [] };
  panel.head = make("h2", { id: `head-${panels.length}` }, plural(steps, "step"));
  panel.facts = make("dl");
  panel.line = make("div", { class: "line" });
  panel.wait = make("p", { class: "waiting" }, "Waiting …");
  panel.card = make("article", { class: "card", "aria-labelledby": panel.head.id }, panel.head, panel.facts, panel.wait, panel.line);
  at("texts").append(panel.card);
  panels.push(panel);
  return panel;
}

function fillPanel(panel, data) {
  Object.assign(panel, data);
  panel.wait.hidden = true;
  panel.line.setAttribute("role", "listbox");
  panel.line.setAttribute("aria-label", `Text in ${plural(panel.steps, "step")}, token by token`);
  panel.line.setAttribute("aria-orientation", "horizontal");
  panel.tokens = panel.trajectory.given.map((given, place) => {
    const token = make("span", { class: given ? "token given" : "token", role: "option", tabindex: "-1" });
    token.addEventListener("mouseenter", () => point(panel, place));
    token.addEventListener("focus", () => point(panel, place));
    panel.line.append(token);
    return token;
  });
  if (panel.tokens.length) panel.tokens[0].tabIndex = 0;
  panel.line.addEventListener("keydown", (event) => walk(event, panel));
  panel.line.addEventListener("mouseleave", () => point(null));
  panel.line.addEventListener("focusout", () => point(null));
  draw(panel);
}

function walk(event, panel) {
  const last = panel.tokens.length - 1;
  const row = rowLength(panel);
  const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: row, ArrowUp: -row, Home: -last, End: last };
  if (event.key === "Escape") return point(null);
  if (!(event.key in moves) || event.ctrlKey || event.altKey || event.metaKey) return undefined;
  event.preventDefault();
  const to = Math.min(last, Math.max(0, panel.place + moves[event.key]));
  panel.tokens[panel.place].tabIndex = -1;
  panel.place = to;
  panel.tokens[to].tabIndex = 0;
  return panel.tokens[to].focus();
}

// How many tokens a line of the panel holds: what the up and down keys move by.
function rowLength(panel) {
  const top = panel.tokens[panel.place].offsetTop;
  const first = panel.tokens.findIndex((token) => token.offsetTop >= top);
  const next = panel.tokens.findIndex((token, i) => i > first && token.offsetTop > top + 4);
  return next > first ? next - first : Math.max(1, panel.tokens.filter((token) => token.offsetTop < top).length || 1);
}

function draw(panel) {
  const { trajectory, tokens } = panel;
  const share = at("time").value / at("time").max;
  panel.step = Math.ceil(share * trajectory.steps.length - 1e-9);
  const step = trajectory.steps[panel.step - 1];
  tokens.forEach((token, place) => {
    const given = trajectory.given[place];
    const known = step || (given && trajectory.steps[0]);
    const text = known ? trajectory.strings[known.ids[place][0]] : "·";
    const p = known ? known.p[place][0] : 0;
    if (token.textContent !== shown(text)) token.textContent = shown(text);
    token.classList.toggle("noise", !known);
    token.style.backgroundColor = known && !given ? colour(p) : "";
    token.setAttribute("aria-label", known ? `${named(text)}, ${given ? "given" : percent(p)}` : "noise");
  });
  facts(panel, step);
  if (pointed && pointed.panel === panel) detail();
}

function facts(panel, step) {
  const unsure = panel.trajectory.given.map((given, i) => (given ? null : step ? step.p[i][0] : 0)).filter((p) => p !== null);
  const mean = unsure.length ? unsure.reduce((a, b) => a + b, 0) / unsure.length : 1;
  const items = [
    ["Calls", `${step ? step.calls : 0} of ${panel.calls}`],
    ["t", step ? step.t.toFixed(3) : "0"],
    ["Confidence", step ? percent(mean) : "0%"],
    ["Took", panel.seconds < 1 ? `${Math.round(1000 * panel.seconds)} ms` : `${panel.seconds.toFixed(2)} s`],
  ];
  panel.facts.replaceChildren(...items.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

// ---- alternatives

function point(panel, place) {
  for (const marked of document.querySelectorAll(".marked, .twin")) marked.classList.remove("marked", "twin");
  pointed = panel ? { panel, place } : null;
  at("detail").hidden = !panel;
  if (!panel) return;
  panel.tokens[place].classList.add("marked");
  beside(panel.card);
  for (const other of panels) if (other !== panel && other.tokens[place]) other.tokens[place].classList.add("twin");
  detail();
}

// Alternatives stand below the text they belong to where there is room, else at the window's lower edge.
function beside(card) {
  const box = at("detail");
  box.style.left = box.style.top = box.style.bottom = box.style.transform = "";
  const { left, bottom } = card.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = box;
  if (innerWidth < 700 || bottom + Math.max(height, 90) + 12 > innerHeight) return;
  box.style.left = `${Math.max(14, Math.min(left, innerWidth - width - 14))}px`;
  Object.assign(box.style, { top: `${bottom + 8}px`, bottom: "auto", transform: "none" });
}

function detail() {
  const { panel, place } = pointed;
  const step = panel.trajectory.steps[panel.step - 1];
  const given = panel.trajectory.given[place];
  const where = `Token ${place + 1} of ${panel.tokens.length} in ${plural(panel.steps, "step")}`;
  at("detail-head").textContent = given ? `${where}: given` : step ? `${where}, after step ${panel.step}` : `${where}: noise`;
  const rows = step && !given ? step.ids[place].map((id, i) => [panel.trajectory.strings[id], step.p[place][i]]) : [];
  at("detail-list").replaceChildren(...rows.map(([token, p]) => {
    const bar = make("div", { class: "bar", "aria-hidden": "true" });
    bar.style.width = `${100 * p}%`;
    return make("li", {}, make("code", {}, named(token)), make("span", {}, percent(p)), bar);
  }));
}

// ---- time

function setTime(value) {
  at("time").value = value;
  const share = at("time").value / at("time").max;
  at("time").setAttribute("aria-valuetext", `${Math.round(100 * share)}% of the way from noise to text`);
  panels.filter((panel) => panel.trajectory).forEach(draw);
}

function pause() {
  clearInterval(timer);
  timer = null;
  at("play").textContent = "Play";
}

function play() {
  if (timer) return pause();
  if (Number(at("time").value) >= Number(at("time").max)) setTime(0);
  at("play").textContent = "Pause";
  timer = setInterval(() => {
    setTime(Number(at("time").value) + 1);
    if (Number(at("time").value) >= Number(at("time").max)) pause();
  }, Math.max(40, 4000 / at("time").max));
  return undefined;
}

function begin() {
  panels = [];
  point(null);
  pause();
  at("texts").replaceChildren();
}

function ready() {
  at("time").max = Math.max(8, ...panels.map((panel) => panel.steps));
  at("player").hidden = at("help").hidden = false;
  setTime(at("time").max);
}

// ---- asking the server

class Refused extends Error {}

async function complete(body) {
  const headers = { "Content-Type": "application/json" };
  if (at("key").value) headers.Authorization = `Bearer ${at("key").value}`;
  const answer = await fetch("v1/completions", { method: "POST", headers, body: JSON.stringify(body) });
  if (answer.status === 401) at("key-field").hidden = false;
  const said = await answer.json();
  if (!answer.ok) throw new Refused(said.error ? said.error.message : `status ${answer.status}`);
  return said;
}

function asked() {
  const text = at("text").value;
  const body = { trajectory: 5, temperature: Number(at("temperature").value) };
  body.seed = at("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number(at("seed").value);
  if (/\[\[\d+\]\]/.test(text)) body.infill = text;
  else Object.assign(body, { prompt: text, max_tokens: Number(at("tokens").value) });
  if (at("sampler").value) body.sampler = at("sampler").value;
  return body;
}

async function write(event) {
  event.preventDefault();
  begin();
  at("problem").hidden = true;
  at("write").disabled = true;
  at("status").textContent = "Writing";
  const body = asked();
  at("seed-used").textContent = at("seed").value === "" ? `The seed was ${body.seed}.` : "";
  const wanted = at("steps").value.split(/[ ,]+/).filter(Boolean).map(Number).map(addPanel);
  try {
    for (const panel of wanted) { // one after the other, so that each one's time is its own
      const said = await complete({ ...body, num_steps: panel.steps });
      const { network_calls: calls, seconds } = said.catmaps;
      at("time").value = at("time").max;
      fillPanel(panel, { calls, seconds, trajectory: said.choices[0].trajectory });
    }
    ready();
    at("status").textContent = `Done: ${panels.map((panel) => plural(panel.steps, "step")).join(", ")}`;
    if (!still.matches) play();
  } catch (error) {
    wanted.filter((panel) => !panel.trajectory).forEach((panel) => panel.card.remove());
    panels = panels.filter((panel) => panel.trajectory);
    if (panels.length) ready();
    at("problem").textContent = error instanceof Refused ? error.message : "The server does not answer.";
    at("problem").hidden = false;
    at("status").textContent = "";
  } finally {
    at("write").disabled = false;
  }
}

// ---- start

function start() {
  const { model, kind, window: length, vocabulary, tokenizer } = setup.about;
  at("about").textContent = `${model}: a ${kind}, windows of ${length} tokens, ${vocabulary} symbols (${tokenizer}). ` +
    "All positions start as noise and sharpen together.";
  const scale = () => at("scale").replaceChildren(...[...Array(6).keys()].map((i) => {
    const step = make("span", {}, `${20 * i}%`);
    step.style.backgroundColor = colour((2 * i) / LEVELS);
    return step;
  }));
  scale();
  dark.addEventListener("change", () => { scale(); panels.filter((panel) => panel.trajectory).forEach(draw); });
  at("time").addEventListener("input", () => { pause(); setTime(at("time").value); });
  at("play").addEventListener("click", play);
  at("ask").addEventListener("submit", write);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") point(null); });
  if (setup.live) {
    at("ask").hidden = false;
    if (length >= EXAMPLE_TOKENS) at("text").value = EXAMPLE;
    at("tokens").value = Math.floor(length / 2);
    at("tokens").max = length;
  } else {
    for (const panel of setup.panels) fillPanel(addPanel(panel.steps), panel);
    ready();
  }
}

start();
