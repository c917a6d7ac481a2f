
"use strict";
// Texts come from anybody, so they are only ever set as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const { names, shares, tokens, layers, shown } = data;
const find = (id) => document.getElementById(id);
const percent = (x) => (x == null ? "" : x > 0 && x < 0.0005 ? "<0.1%" : (100 * x).toFixed(x < 0.0995 ? 1 : 0) + "%");
const bits = (x) => x.toFixed(1) + " bits";
const state = { token: null, expert: null };

function make(tag, attributes, ...inside) {
  const svg = ["svg", "g", "circle", "text", "title"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {}))
    if (value != null && value !== false) made.setAttribute(key, value);
  made.append(...inside.filter((part) => part != null).map((part) => (typeof part === "number" ? String(part) : part)));
  return made;
}
const colour = (e) => (e >= 0 && e < data.colours.length ? data.colours[e] : null);
const tint = (element, e) => {
  if (colour(e)) element.style.background = colour(e);
  return element;
};
const visible = (text) => (text.trim() ? text : text.replace(/ /g, "␣")).replace(/[\n\u2028\u2029]/g, "⏎").replace(/\t/g, "⇥") || "·";
const cut = (text, most) => (text.length > most ? `${text.slice(0, most / 2 - 1)}…${text.slice(-most / 2)}` : text);
const name = (e) => (e < 0 ? "the base alone" : names[e]);

// One stop for the Tab key in a group of many; arrow keys move within it.
function roving(group, items, columns) {
  let at = 0;
  items.forEach((item, i) => item.setAttribute("tabindex", i ? -1 : 0));
  const to = (i) => {
    if (i < 0 || i >= items.length) return;
    items[at].setAttribute("tabindex", -1);
    items[(at = i)].setAttribute("tabindex", 0);
    items[at].focus();
  };
  group.addEventListener("focusin", (event) => {
    const i = items.indexOf(event.target.closest("[tabindex]"));
    if (i >= 0 && i !== at) {
      items[at].setAttribute("tabindex", -1);
      items[(at = i)].setAttribute("tabindex", 0);
    }
  });
  group.addEventListener("keydown", (event) => {
    if (!items.includes(event.target)) return;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -at, End: items.length - 1 - at }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    to(at + step);
  });
}

// -- tokens ---------------------------------------------------------------------------------------

const most = Math.max(1e-9, ...tokens.map((token) => token.entropy));
const strip = find("tokens");
const buttons = tokens.map((token, i) => {
  const e = token.expert;
  const button = make("button", {
    type: "button", class: e < 0 ? "tok alone" : "tok", "data-token": i, "aria-pressed": "false",
    title: `${name(e)} ${percent(token.weight)}, ${bits(token.entropy)}`,
  }, visible(token.token), make("i"));
  button.lastChild.style.width = `${(100 * token.entropy) / most}%`;
  if (colour(e)) Object.assign(button.style, { background: colour(e), color: data.inks[e] });
  strip.append(button);
  if (token.token.includes("\n")) strip.append(make("br"));
  return button;
});
roving(strip, buttons, 1);

function bars(rows) {
  const top = Math.max(1e-9, ...rows.map(([, weight]) => weight));
  const box = make("div", { class: "bars" });
  for (const [e, weight] of rows) {
    const bar = tint(make("div", { class: "bar" }), e);
    bar.style.width = `${(100 * weight) / top}%`;
    box.append(make("bdi", { title: name(e) }, cut(name(e), 28)), make("span", {}, percent(weight)), bar);
  }
  return box;
}

function showToken(i) {
  const box = find("token");
  box.replaceChildren();
  if (i == null) {
    find("h-token").textContent = "All tokens";
    box.append(make("p", { class: "hint" }, "Point at a token, or go to it by Tab and arrow keys; a click holds it."));
    box.append(bars(shares.slice(0, 12).map((share, e) => [e, share])));
    return;
  }
  const token = tokens[i];
  find("h-token").textContent = `Token ${i + 1} of ${tokens.length}`;
  box.append(make("h3", {}, make("bdi", {}, `“${visible(token.token)}”`)));
  box.append(make("p", { class: "hint" }, `${bits(token.entropy)}: as ${(2 ** token.entropy).toFixed(0)} with equal weight`));
  box.append(bars(token.experts));
  if (!data.choices) return;
  const rows = make("div", { class: "stacks" });
  rows.append(make("span", {}, "layer"), make("span"), make("span"));
  rows.children[1].textContent = rows.children[2].textContent = "";
  data.choices.forEach((layer, l) => {
    const stack = make("div", { class: "stack" });
    for (const [e, weight] of layer[i]) {
      const part = tint(make("i", { title: `${name(e)} ${percent(weight)}` }), e);
      part.style.width = `${100 * weight}%`;
      if (state.expert != null && e !== state.expert) part.className = "dim";
      stack.append(part);
    }
    const top = layer[i][0];
    const said = top ? `${name(top[0])} ${percent(top[1])}` : "the base alone";
    rows.append(make("span", {}, data.choice_layers[l]), stack, make("bdi", { title: said }, said));
  });
  box.append(make("div", { class: "rows" }, rows));
}

function pin(i) {
  state.token = state.token === i ? null : i;
  buttons.forEach((button, j) => button.setAttribute("aria-pressed", String(j === state.token)));
  showToken(state.token);
}
const tokenOf = (event) => {
  const button = event.target.closest("[data-token]");
  return button ? Number(button.dataset.token) : null;
};
strip.addEventListener("click", (event) => tokenOf(event) != null && pin(tokenOf(event)));
strip.addEventListener("mouseover", (event) => tokenOf(event) != null && showToken(tokenOf(event)));
strip.addEventListener("focusin", (event) => tokenOf(event) != null && showToken(tokenOf(event)));
for (const left of ["mouseleave", "focusout"]) strip.addEventListener(left, () => showToken(state.token));

// -- experts --------------------------------------------------------------------------------------

const legend = find("legend");
names.slice(0, data.colours.length).forEach((text, e) => {
  if (!shares[e]) return;
  const chip = make("button", { type: "button", class: "chip", "data-expert": e, "aria-pressed": "false" }, make("i"), make("bdi", {}, text), percent(shares[e]));
  tint(chip.firstChild, e);
  legend.append(chip);
});
const others = shares.slice(data.colours.length).filter((share) => share > 0);
if (others.length) legend.append(make("span", { class: "chip" }, make("i"), `${others.length} others ${percent(others.reduce((a, b) => a + b, 0))}`));

function about(e) {
  if (e == null) return "A click on an expert, anywhere on this page, shows it everywhere; Escape lets go.";
  const first = tokens.filter((token) => token.expert === e).length;
  const of = (e) => layers.map((layer) => layer.weights[e]);
  const best = of(e).indexOf(Math.max(...of(e)));
  let said = `${names[e]}: ${percent(shares[e]) || "0%"} of the weight, first at ${first} of ${tokens.length} tokens`;
  if (shares[e] > 0) said += `, most in layer ${layers[best].layer} (${percent(layers[best].weights[e])})`;
  const home = data.map && data.map.clusters.find(([, members]) => members.includes(e));
  if (home) said += `; in cluster ${home[0]}${home[1].length > 1 ? ` with ${home[1].filter((m) => m !== e).map((m) => names[m]).slice(0, 6).join(", ")}${home[1].length > 7 ? ", ..." : ""}` : " alone"}`;
  return said;
}

function choose(e) {
  state.expert = state.expert === e ? null : e;
  drawHeat();
  buttons.forEach((button, i) => {
    const rank = state.expert == null ? 0 : tokens[i].experts.findIndex(([other]) => other === state.expert);
    button.classList.toggle("dim", rank < 0);
    button.classList.toggle("some", rank > 0);
    button.classList.toggle("has", state.expert != null && rank === 0);
  });
  markMap();
  showToken(state.token);
  find("expert").textContent = about(state.expert);
  for (const chip of document.querySelectorAll("[data-expert]"))
    if (chip.hasAttribute("aria-pressed")) chip.setAttribute("aria-pressed", String(Number(chip.dataset.expert) === state.expert));
}
document.addEventListener("click", (event) => {
  const chip = event.target.closest("[data-expert]");
  if (chip) choose(Number(chip.dataset.expert));
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    if (state.token != null) pin(state.token);
    if (state.expert != null) choose(state.expert);
  }
  const chip = event.target.closest("[data-expert]");
  if (chip && chip.tagName !== "BUTTON" && (event.key === "Enter" || event.key === " ")) {
    event.preventDefault();
    choose(Number(chip.dataset.expert));
  }
});

// -- layers by experts ----------------------------------------------------------------------------

const heat = find("heat");
const columnsNow = () => {
  const columns = names.slice(0, shown).map((_, e) => e).filter((e) => shares[e] > 0);
  if (state.expert != null && !columns.includes(state.expert)) columns.push(state.expert);
  return columns;
};

function drawHeat() {
  const columns = columnsNow();
  const rest = names.map((_, e) => e).filter((e) => shares[e] > 0 && !columns.includes(e));
  const had = heat.contains(document.activeElement) ? document.activeElement.dataset : null;
  const peak = Math.max(1e-9, ...layers.flatMap((layer) => columns.map((e) => layer.weights[e])));
  const head = make("tr", {}, make("th", { class: "side", scope: "col" }, "layer"));
  for (const e of columns) {
    const button = make("button", { type: "button", "data-expert": e, "aria-pressed": String(e === state.expert), title: names[e] }, tint(make("span", { class: "dot" }), e), make("bdi", {}, cut(names[e], 22)));
    head.append(make("th", { scope: "col" }, button));
  }
  if (rest.length) head.append(make("th", { scope: "col", title: "all others together" }, `${rest.length} others`));
  head.append(make("th", { scope: "col", class: "n", title: "how often another layer has the same top expert for a token" }, "same"));
  head.append(make("th", { scope: "col", class: "n", title: "entropy of the layer's weights" }, "bits"));
  const body = make("tbody");
  const cells = [];
  layers.forEach((layer, l) => {
    const row = make("tr", {}, make("th", { class: "side", scope: "row", title: layer.layer }, layer.layer));
    for (const e of columns) {
      const weight = layer.weights[e];
      const cell = make("td", { class: "c", "data-expert": e, "data-layer": l, "aria-label": `layer ${layer.layer}, ${names[e]}: ${percent(weight) || "0%"}` }, make("i"), weight >= 0.0005 ? percent(weight).replace("%", "") : "");
      cell.firstChild.style.opacity = weight / peak;
      cell.classList.toggle("strong", weight / peak > 0.55);
      cell.classList.toggle("on", e === state.expert);
      cells.push(cell);
      row.append(cell);
    }
    if (rest.length) row.append(make("td", { class: "f" }, percent(rest.reduce((sum, e) => sum + layer.weights[e], 0)).replace("%", "")));
    row.append(make("td", { class: "f" }, percent(layer.agreement)), make("td", { class: "f" }, layer.entropy.toFixed(1)));
    body.append(row);
  });
  heat.replaceChildren(make("thead", {}, head), body);
  cells.forEach((cell, i) => cell.setAttribute("tabindex", i ? -1 : 0));
  heat.cells = cells;
  heat.across = columns.length;
  if (had && had.expert != null) {
    const same = had.layer == null ? `th button[data-expert="${Number(had.expert)}"]` : `td[data-expert="${Number(had.expert)}"][data-layer="${Number(had.layer)}"]`;
    const again = heat.querySelector(same);
    if (again) again.focus();
  }
}
const tell = (event) => {
  const cell = event.target.closest("td.c");
  if (cell) find("cell").textContent = cell.getAttribute("aria-label");
};
heat.addEventListener("mouseover", tell);
heat.addEventListener("focusin", (event) => {
  tell(event);
  const cell = event.target.closest("td.c");
  if (cell) for (const other of heat.cells) other.setAttribute("tabindex", other === cell ? 0 : -1);
});
heat.addEventListener("keydown", (event) => {
  const at = heat.cells.indexOf(event.target);
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -heat.across, ArrowDown: heat.across }[event.key];
  if (at < 0 || step === undefined) return;
  event.preventDefault();
  if (heat.cells[at + step]) heat.cells[at + step].focus();
});

// -- clusters -------------------------------------------------------------------------------------

let points = [];
function drawMap() {
  if (!data.map) return;
  const box = find("map");
  const width = Math.max(280, box.clientWidth);
  const height = Math.min(480, Math.max(280, width * 0.62));
  const placed = data.map.positions.map((at, e) => ({ e, at })).filter(({ at }) => at);
  const many = placed.length > 80;
  const [xs, ys] = [0, 1].map((axis) => placed.map(({ at }) => at[axis]));
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const pad = 30;
  const scale = Math.min((width - 2 * pad) / Math.max(x1 - x0, 1e-6), (height - 2 * pad) / Math.max(y1 - y0, 1e-6));
  const top = Math.max(1e-9, ...shares);
  const cluster = new Map(data.map.clusters.flatMap(([label, members]) => members.map((e) => [e, label])));
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "group", "aria-label": "Map of the experts. Arrow keys move, Enter chooses." });
  points = placed.map(({ e, at }) => {
    const x = width / 2 + (at[0] - (x0 + x1) / 2) * scale;
    const y = height / 2 - (at[1] - (y0 + y1) / 2) * scale;
    const radius = (many ? 3.5 : 7.5) + (many ? 6 : 11) * Math.sqrt(shares[e] / top);
    const circle = make("circle", { cx: x, cy: y, r: radius });
    if (colour(e)) circle.style.fill = colour(e);
    const said = `${names[e]}, cluster ${cluster.get(e)}, ${percent(shares[e]) || "0%"}`;
    const group = make("g", { role: "button", "data-expert": e, "aria-pressed": "false", "aria-label": said }, make("title", {}, said), circle);
    if (!many) {
      const inside = make("text", { class: "in", x, y: y + 3 }, cluster.get(e));
      if (colour(e)) inside.style.fill = data.inks[e];
      group.append(inside);
    }
    return { e, x, y, radius, group };
  });
  // Those in colour last, on top of the others; of these the large ones first. Names where there is room.
  const order = (point) => (colour(point.e) ? 0 : 1000) + point.radius;
  for (const point of [...points].sort((a, b) => order(b) - order(a))) svg.append(point.group);
  const taken = points.map(({ x, y, radius }) => [x - radius, y - radius, x + radius, y + radius]);
  for (const point of points.slice(0, data.colours.length)) {
    point.label = label(point, taken, width, height);
    if (point.label) svg.append(point.label);
  }
  box.replaceChildren(svg);
  roving(svg, points.map(({ group }) => group), 1);
  markMap();
}
function label({ e, x, y, radius }, taken, width, height, anyhow) {
  const text = cut(names[e], 34);
  const long = 6.4 * text.length;
  const spots = [[x + radius + 4, y + 4], [x - radius - 4 - long, y + 4], [x - long / 2, y - radius - 5], [x - long / 2, y + radius + 13]];
  const free = ([a, b]) => a > 2 && a + long < width - 2 && b > 12 && b < height - 3 && !taken.some(([l, t, r, d]) => a < r && a + long > l && b - 10 < d && b + 2 > t);
  let spot = spots.find(free);
  if (!spot && anyhow) spot = [Math.max(2, Math.min(x - long / 2, width - long - 2)), y - radius - 5 > 12 ? y - radius - 5 : y + radius + 13];
  if (!spot) return null;
  taken.push([spot[0], spot[1] - 10, spot[0] + long, spot[1] + 2]);
  return make("text", { class: "name", x: spot[0], y: spot[1] }, text);
}
function markMap() {
  if (!data.map || !points.length) return;
  const home = data.map.clusters.find(([, members]) => members.includes(state.expert));
  const svg = find("map").firstChild;
  for (const extra of svg.querySelectorAll(".extra")) extra.remove();
  for (const point of points) {
    const on = point.e === state.expert;
    const mate = home && home[1].includes(point.e);
    point.group.classList.toggle("on", on);
    point.group.classList.toggle("dim", state.expert != null && !mate);
    point.group.setAttribute("aria-pressed", String(on));
    if (point.label) point.label.classList.toggle("dim", state.expert != null && !on && !mate);
    if (!on) continue;
    // Once more on top of all, since moving the point itself would take the focus from it.
    const again = make("g", { class: "extra", "aria-hidden": "true" });
    for (const part of point.group.querySelectorAll("circle, text")) again.append(part.cloneNode(true));
    svg.append(again);
    if (!point.label) {
      const extra = label(point, [], svg.viewBox.baseVal.width, svg.viewBox.baseVal.height, true);
      extra.classList.add("extra");
      svg.append(extra);
    }
  }
}

// -- begin ----------------------------------------------------------------------------------------

find("page").hidden = false;
showToken(null);
drawHeat();
find("expert").textContent = about(null);
find("cell").textContent = "Point at a cell to read it; numbers in it are per cent.";
if (data.map) {
  find("map-part").hidden = false;
  find("basis").textContent = `compared: ${data.map.basis}`;
  let width = 0;
  new ResizeObserver(() => {
    if (find("map").clientWidth !== width) {
      width = find("map").clientWidth;
      drawMap();
    }
  }).observe(find("map"));
  drawMap();
}
