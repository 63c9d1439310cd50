"use strict";
// Everything from the data goes in through textContent and setAttribute, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const PAIRS_PER_PAGE = Math.max(1, Math.floor(20 / (2 * data.stores.length)));
const SIDES = ["chosen", "rejected"];
const NOT_SHOWN = data.shown.length;
const state = { text: "", id: "", k: 1, page: 1 };
const at = (id) => document.getElementById(id);
const form = at("controls");
const turns = document.querySelectorAll("[data-by]");
let found = data.pairs.map((_, index) => index);

function bytes(text) {
  const raw = atob(text);
  return Uint8Array.from(raw, (c) => c.charCodeAt(0)).buffer;
}

function numbers(text) { // little-endian, as every machine that runs a browser
  return data.bytes === 2 ? new Uint16Array(bytes(text)) : new Uint32Array(bytes(text));
}

function score(code) { // three significant digits: see encode_score
  if (code === 0) return 0;
  const rest = (code - 1) >> 1;
  const value = Number(`${(rest % 900) + 100}e${Math.floor(rest / 900) - 14}`);
  return (code - 1) & 1 ? -value : value;
}

function scoreText(value) {
  return `${value < 0 ? "−" : "+"}${Number(Math.abs(value).toPrecision(3))} nats`;
}

function visible(text) { // what would steer the page, or not be seen at all
  if (text === "") return "⋯";
  return text.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu, (c) => {
    if (c === "\n") return "⏎\n";
    if (c === "\t") return "→\t";
    if (c === "\u200d" || c === "\u200c") return c; // joins the parts of an emoji or a word
    return `\\u{${c.codePointAt(0).toString(16)}}`;
  });
}

function make(name, className, text) {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

const haystacks = [];
function haystack(index) { // the text of a pair, put together once it is looked for
  if (haystacks[index] === undefined) {
    const parts = [data.pairs[index].prompt];
    for (const store of data.pairs[index].responses)
      for (const side of SIDES)
        if (store[side]) parts.push(Array.from(numbers(store[side].tokens), (i) => data.strings[i]).join(""));
    haystacks[index] = parts.join("\n").toLowerCase();
  }
  return haystacks[index];
}

function search() {
  const text = state.text.toLowerCase(), id = state.id.toLowerCase();
  found = [];
  data.pairs.forEach((pair, index) => {
    if (id && !pair.id.toLowerCase().includes(id)) return;
    if (text && !haystack(index).includes(text)) return;
    found.push(index);
  });
}

function shade(value, scale) {
  const step = Math.min(5, Math.round((5 * Math.abs(value)) / (scale || 1)));
  return step === 0 ? "" : ` ${value > 0 ? "p" : "n"}${step}`;
}

function selectedText(level) {
  return level < NOT_SHOWN ? `selected at ${Math.round(100 * data.shown[level])} %` : "";
}

function response(one, side, store) {
  const box = make("div", "response");
  const ids = numbers(one.tokens);
  const codes = one.score === null ? null : new Uint16Array(bytes(one.score));
  const levels = one.level === null ? null : Array.from(one.level, Number);
  const isRanked = levels !== null && levels.some((level) => level !== 0 && level !== NOT_SHOWN);
  const last = data.shown.map((_, k) => (levels ? levels.findLastIndex((level) => level <= k) : ids.length - 1));
  box.setAttribute("role", "listbox");
  box.setAttribute("aria-orientation", "horizontal");
  box.setAttribute("aria-label", `${side} response, token by token, ${store.name}`);
  ids.forEach((id, t) => {
    const level = levels ? levels[t] : NOT_SHOWN;
    const keptAt = last.findIndex((end) => t <= end);
    const value = codes ? score(codes[t]) : null;
    const color = value === null ? "" : shade(value, store.scale);
    const text = visible(data.strings[id]);
    const span = make("span", `t l${level} c${keptAt < 0 ? NOT_SHOWN : keptAt}${color}`, text);
    const selected = isRanked ? selectedText(level) : level === 0 ? "selected" : "";
    const said = [value === null ? "" : scoreText(value), `token ${t + 1} of ${ids.length}`, selected];
    span.title = said.filter(Boolean).join(", ");
    span.setAttribute("role", "option");
    span.setAttribute("aria-label", `${text.trim() || "blank"}: ${span.title}`);
    span.tabIndex = t === 0 ? 0 : -1; // one stop a response; arrows move inside
    box.append(span);
    last.forEach((end, k) => {
      if (t !== end || t + 1 === ids.length) return;
      const cut = make("span", `cut cut${k}`);
      cut.title = "cut here";
      box.append(cut);
    });
  });
  return box;
}

function pairBox(index) {
  const pair = data.pairs[index];
  const box = make("article", "pair");
  box.append(make("h3", "", `Row ${visible(pair.id)}`));
  const prompt = make("p", "prompt", visible(pair.prompt).replaceAll("⏎\n", "\n"));
  prompt.tabIndex = 0; // it may scroll
  prompt.setAttribute("role", "region");
  prompt.setAttribute("aria-label", `Prompt of row ${pair.id}`);
  box.append(prompt);
  const sides = make("div", "sides");
  pair.responses.forEach((store, s) => {
    for (const side of SIDES) {
      const part = make("div");
      const head = make("h4", "", side === "chosen" ? "Chosen" : "Rejected");
      if (data.stores.length > 1) head.append(make("span", "", `, ${data.stores[s].name}`));
      part.append(head);
      part.append(store[side] ? response(store[side], side, data.stores[s]) : make("p", "", "not in this store"));
      sides.append(part);
    }
  });
  box.append(sides);
  return box;
}

function markSelected() {
  at("pairs").dataset.k = state.k;
  for (const token of at("pairs").querySelectorAll(".t"))
    token.setAttribute("aria-selected", String(Number(/ l(\d)/.exec(token.className)[1]) <= state.k));
}

function show() {
  const pages = Math.max(1, Math.ceil(found.length / PAIRS_PER_PAGE));
  state.page = Math.min(Math.max(1, state.page), pages);
  const first = (state.page - 1) * PAIRS_PER_PAGE;
  const shown = found.slice(first, first + PAIRS_PER_PAGE);
  at("pairs").replaceChildren(...shown.map(pairBox));
  markSelected();
  const where = shown.length ? `${first + 1}–${first + shown.length} of ${found.length} pairs` : "No pair has it";
  at("count").textContent = found.length === data.pairs.length ? where : `${where}, filtered`;
  for (const button of turns) button.disabled = Number(button.dataset.by) < 0 ? state.page === 1 : state.page === pages;
  at("token").hidden = true;
}

function remember() { // so that a view can be sent to somebody
  const hash = new URLSearchParams({ k: Math.round(100 * data.shown[state.k]), page: state.page });
  if (state.text) hash.set("text", state.text);
  if (state.id) hash.set("id", state.id);
  history.replaceState(null, "", `#${hash}`);
}

function recall() {
  const hash = new URLSearchParams(location.hash.slice(1));
  const share = data.shown.findIndex((each) => Math.round(100 * each) === Number(hash.get("k")));
  state.text = hash.get("text") ?? "";
  state.id = hash.get("id") ?? "";
  state.k = share < 0 ? 1 : share;
  state.page = Number.parseInt(hash.get("page") ?? "1", 10) || 1;
  form.elements.text.value = state.text;
  form.elements.row.value = state.id;
  form.elements.k.value = String(state.k);
  search();
  show();
}

let waiting = 0;
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", (event) => {
  if (event.target.name === "k") {
    state.k = Number(form.elements.k.value);
    markSelected();
    remember();
    return;
  }
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    Object.assign(state, { text: form.elements.text.value, id: form.elements.row.value, page: 1 });
    search();
    show();
    remember();
  }, 120);
});

function turn(by) {
  state.page += by;
  show();
  remember();
  at("controls").scrollIntoView();
}
for (const button of turns) button.addEventListener("click", () => turn(Number(button.dataset.by)));

const pairs = at("pairs");
const tokenOf = (event) => event.target.closest(".response > .t");
function tell(event) {
  const token = tokenOf(event);
  at("token").hidden = token === null;
  if (token) at("token").textContent = token.title;
}
pairs.addEventListener("focusin", tell);
pairs.addEventListener("focusout", () => { at("token").hidden = true; });
pairs.addEventListener("keydown", (event) => {
  const token = tokenOf(event);
  if (!token) return;
  const tokens = [...token.parentElement.querySelectorAll(".t")];
  const here = tokens.indexOf(token);
  const to = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: tokens.length - 1 }[event.key];
  if (to === undefined || !tokens[to]) return;
  event.preventDefault();
  token.tabIndex = -1;
  tokens[to].tabIndex = 0;
  tokens[to].focus();
});
pairs.addEventListener("click", (event) => tokenOf(event)?.focus());
window.addEventListener("hashchange", () => { if (location.hash.includes("=")) recall(); });
recall();
