"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const cards = data.cards, byNumber = new Map(cards.map(c => [c.i, c])), gathered = new Set(data.gathered);
const step = 30;
let found = [], drawn = 0;

function make(name, text, css, parent) {
  const e = document.createElement(name);
  if (text !== undefined && text !== null) e.textContent = text;
  if (css) e.className = css;
  if (parent) parent.append(e);
  return e;
}
const percent = x => x === null ? "–" : x === 0 ? "0%" : x < 0.0001 ? "<0.01%" : (100 * x).toFixed(x < 0.01 ? 2 : 1) + "%";
const places = x => x === null ? "–" : x.toFixed(2);

function requestName(text) {
  const [run, rid] = data.texts[text];
  return data.runs.length > 1 ? `${data.runs[run]}: ${rid}` : rid;
}

function example(card, e, parent) {
  const [, text, position, start, length, at, reused, pairs] = e;
  const line = make("div", null, "ex", parent), values = new Map();
  for (let i = 0; i < pairs.length; i += 2) values.set(pairs[i], pairs[i + 1]);
  for (let i = 0; i < length; i++) {
    const value = values.get(i), token = make("span", data.words[data.flat[start + i]], null, line);
    const from = gathered.has(start + i);
    if (value) token.style.background = `rgb(213 94 0 / ${(0.12 + 0.5 * value / card.m).toFixed(2)})`;
    if (i === at) token.classList.add("at");
    if (from) token.classList.add("gathered");
    if (value || from) token.title = (value ? `${value} ` : "") + (from ? "row gathered from the request that computed it" : "row computed");
  }
  const more = reused ? `, reused at ${reused} further position${reused > 1 ? "s" : ""}` : "";
  const said = make("small", null, null, line);
  make("a", requestName(text), null, said).href = `#t${text}`;
  said.append(`, position ${position}: ${values.get(at)}; row computed${more}`);
}

function rates(card, parent) {
  for (const [axis, classes] of Object.entries(card.rt)) {
    const box = make("div", null, null, parent);
    make("h3", `fires, by ${axis}`, null, box);
    const top = Math.max(...classes.map(c => c[1]), 1e-9);
    for (const [name, rate] of classes) {
      const row = make("div", null, "rate", box);
      make("span", name, null, row);
      make("i", null, null, make("span", null, null, row)).style.cssText = `display:block;width:${(100 * rate / top).toFixed(1)}%`;
      make("b", percent(rate), null, row);
    }
  }
}

function tokens(title, list, parent) {
  if (!list || !list.length) return;
  const box = make("div", null, null, parent);
  make("h3", title, null, box);
  for (const [word, value] of list) make("span", data.words[word], "tok", box).title = value;
}

function neighbours(title, list, parent) {
  if (!list.length) return;
  const box = make("div", null, null, parent);
  make("h3", title, null, box);
  for (const [number, value] of list) {
    const link = make("a", `${number} (${value.toFixed(2)})`, null, box), other = byNumber.get(number);
    link.href = `#f${number}`;
    if (other) link.title = other.l;
    box.append(" ");
  }
}

function draw(card) {
  const box = make("article", null, null, document.getElementById("cards"));
  box.id = `card-${card.i}`;
  box.tabIndex = -1;
  const head = make("h2", null, null, box);
  make("a", String(card.i), null, head).href = `#f${card.i}`;
  head.append(` ${(card.a || card.l).replaceAll("`", "")}`);
  if (card.a) make("p", `token-set rule: ${card.l.replaceAll("`", "")}`, "muted", box);
  const chips = make("div", null, null, box);
  if (card.a) {
    make("span", `label by ${data.judge}`, "chip", chips).title = "what a model says of its examples: a hypothesis";
    make("span", `its detection ${places(card.ad)} (other label ${places(card.ads)})`, "chip", chips);
    make("span", `its fuzzing ${places(card.az)} (other label ${places(card.azs)})`, "chip", chips);
  } else make("span", "label: heuristic", "chip", chips).title = "the token-set rule, no model: a hypothesis";
  make("span", `fires ${percent(card.r)}, in ${card.t} text${card.t === 1 ? "" : "s"}`, "chip", chips);
  make("span", `strongest ${card.m.toFixed(2)}`, "chip", chips);
  make("span", `token rule F1 ${places(card.f)}`, "chip", chips);
  make("span", `detection ${places(card.d)} (other label ${places(card.ds)})`, "chip", chips);
  make("span", `fuzzing ${places(card.z)} (other label ${places(card.zs)})`, "chip", chips);
  if (card.c >= 0) make("a", `cluster ${card.c}`, "chip", chips).href = `#c${card.c}`;
  for (const e of card.e.filter(e => e[0] === "top").slice(0, 5)) example(card, e, box);
  const rest = card.e.filter(e => e[0] === "top").slice(5);
  const more = make("details", null, null, box);
  make("summary", "all examples, rates, tokens, neighbours", null, more);
  more.addEventListener("toggle", () => {
    if (!more.open || more.dataset.done) return;
    more.dataset.done = "1";
    for (const e of rest) example(card, e, more);
    const words = ["weakest quarter", "second quarter", "third quarter", "strongest quarter"];
    for (let b = 4; b >= 1; b--) {
      const part = card.e.filter(e => e[0] === String(b));
      if (part.length) make("h3", `examples of the ${words[b - 1]} of its activations`, null, more);
      for (const e of part) example(card, e, more);
    }
    const grid = make("div", null, "grid", more);
    rates(card, grid);
    tokens("token rule", card.s.map(w => [w, ""]), grid);
    tokens("its direction raises", card.p, grid);
    tokens("its direction lowers", card.n, grid);
    neighbours("nearest by decoder (cosine)", card.nd, grid);
    neighbours("fire together (Jaccard)", card.nf, grid);
  });
  return more;
}

function more() {
  for (const card of found.slice(drawn, drawn + step)) draw(card);
  drawn = Math.min(drawn + step, found.length);
  document.getElementById("more").hidden = drawn >= found.length;
}

function list() {
  const asked = document.getElementById("find").value.trim().toLowerCase(), hash = location.hash.slice(1);
  const sort = document.getElementById("sort").value, key = sort.replace("-", ""), up = sort[0] === "-" || "ic".includes(key);
  found = cards;
  if (/^f\d+$/.test(hash)) found = cards.filter(c => c.i === Number(hash.slice(1)));
  else if (/^c\d+$/.test(hash)) found = cards.filter(c => c.c === Number(hash.slice(1)));
  else if (/^t\d+$/.test(hash)) found = cards.filter(c => c.e.some(e => e[1] === Number(hash.slice(1))));
  const dotted = asked.replaceAll(" ", "·");
  if (asked) found = cards.filter(c => String(c.i) === asked || c.l.toLowerCase().includes(dotted) || (c.a || "").toLowerCase().includes(asked)
    || c.s.some(w => data.words[w].toLowerCase().includes(dotted)) || (c.p || []).some(p => data.words[p[0]].toLowerCase() === dotted));
  const last = c => c[key] === null || c[key] === undefined || (key === "c" && c.c < 0);
  const other = c => String(c.i) !== asked;
  found = [...found].sort((a, b) => other(a) - other(b) || last(a) - last(b) || (up ? a[key] - b[key] : b[key] - a[key]) || a.i - b.i);
  document.getElementById("cards").replaceChildren();
  drawn = 0;
  const text = document.getElementById("count");
  text.textContent = `${found.length.toLocaleString("en")} of ${cards.length.toLocaleString("en")} features `;
  if (hash && !asked) {
    if (/^t\d+$/.test(hash) && data.texts[Number(hash.slice(1))]) text.append(`with an example in ${requestName(Number(hash.slice(1)))} `);
    if (/^c\d+$/.test(hash)) text.append(`that fire together, cluster ${hash.slice(1)} `);
    make("a", "show all", null, text).href = "#";
  }
  more();
  if (found.length === 1) document.querySelector("#cards details").open = true;
}

function step_to(by) {
  const all = [...document.querySelectorAll("#cards article")], at = all.indexOf(document.activeElement.closest("article"));
  if (at + by >= all.length && drawn < found.length) { more(); return step_to(by); }
  const next = all[Math.min(Math.max(at + by, 0), all.length - 1)];
  if (next) { next.focus({preventScroll: true}); next.scrollIntoView({block: "start"}); }
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const find = document.getElementById("find"), writing = /^(INPUT|SELECT)$/.test(document.activeElement.tagName);
  if (event.key === "Escape" && writing) { find.value = ""; list(); document.activeElement.blur(); return; }
  if (writing) return;
  if (event.key === "/") find.focus();
  else if (event.key === "j") step_to(1);
  else if (event.key === "k") step_to(-1);
  else if (event.key === "o") {
    const details = document.activeElement.closest("article")?.querySelector("details");
    if (details) details.open = !details.open;
  } else return;
  event.preventDefault();
}

const head = document.getElementById("head");
document.title = `Features: ${data.sae}`;
document.getElementById("title").textContent = `Features of ${data.sae} on ${data.runs.join(", ")}`;
make("p", `${data.point} of ${data.model}, ${data.rows.toLocaleString("en")} rows; ${data.dead.toLocaleString("en")} latents never fire here`
  + (data.hidden ? `; ${data.hidden.toLocaleString("en")} rare ones are left out of this page` : "") + ". Orange: activation; outlined: the example's"
  + " position; dotted: a row gathered from the request that computed it.", "muted", head);
const table = make("table", null, null, head), names = make("tr", null, null, table);
const columns = {labels: "labels", other_latents: "other latents'", random_directions: "random directions"};
if (data.scores.some(s => s.random_model !== null)) columns.random_model = "random model";
for (const name of ["labels by", "balanced accuracy", ...Object.values(columns)]) make("th", name, null, names);
for (const s of data.scores) {
  const row = make("tr", null, null, table);
  make("td", s.label, null, row);
  make("td", s.score, null, row);
  for (const k of Object.keys(columns)) make("td", places(s[k]), null, row);
}
if (data.judge) {
  const sort = document.getElementById("sort");
  make("option", `labelled by ${data.judge} first`, null, sort).value = "ad";
}
document.addEventListener("keydown", keys);
document.getElementById("find").addEventListener("input", list);
document.getElementById("sort").addEventListener("change", list);
document.getElementById("more").addEventListener("click", more);
window.addEventListener("hashchange", () => { document.getElementById("find").value = ""; list(); window.scrollTo(0, 0); });
list();
