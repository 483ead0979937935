"use strict";
// Everything that is shown comes from the block of data and is written as text nodes; no text of it becomes markup, a selector or code.
const data = JSON.parse(document.getElementById("data").textContent);
const state = { tab: "layers", search: "", item: "", theme: "", changed: false };
const MOST_HITS = 200;
const get = (id) => document.getElementById(id);

function el(tag, options, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options || {})) {
    if (name === "onclick") node.addEventListener("click", value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(3)) {
    if (child !== null && child !== undefined && child !== "") node.append(child);
  }
  return node;
}
const button = (options, ...children) => el("button", { type: "button", ...options }, ...children);
const count = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const ids = (place) => data.ids[place] || "";
const leftOut = (s) => ["consumers", "producers", "consumers_now", "producers_now"].some((side) => data.ids[s[side]] === null);

// "5, 14, 18…20" → [[5, 5], [14, 14], [18, 20]]
function ranges(text) {
  return text ? text.split(", ").map((part) => part.split("…").map(Number)).map(([a, b]) => [a, b === undefined ? a : b]) : [];
}
const sizeOf = (text) => ranges(text).reduce((sum, [a, b]) => sum + b - a + 1, 0);

// --- strips: the units of a structure in a row, those that train in colour -----------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";
function shape(tag, options) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(options)) node.setAttribute(name, value);
  return node;
}

function strip(units, consumers, producers, label) {
  const width = 600, height = 20;
  const svg = shape("svg", { class: "strip", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": label });
  const few = units <= 80;
  if (few) {
    for (let i = 0; i < units; i++) {
      svg.append(shape("rect", { class: "all", x: (i * width) / units + 1, y: 0, width: Math.max(1, width / units - 2), height }));
    }
  } else svg.append(shape("rect", { class: "all", x: 0, y: 0, width, height }));
  const both = consumers && producers;
  paint(svg, units, consumers, "consumer", width, 0, height);
  paint(svg, units, producers, "producer", width, both ? height / 2 : 0, both ? height / 2 : height);
  return svg;
}

const BINS = 150;
const binText = (units) => (units > BINS ? `; a mark stands for ${Math.ceil(units / BINS)} of them, and is the stronger the more of these train` : "");

// Units by the hundred share a bin of the picture: the more of a bin train, the stronger its colour, and the least is seen.
function paint(svg, units, text, kind, width, y, height) {
  const bins = Math.min(units, BINS), found = new Float64Array(bins);
  for (const [a, b] of ranges(text)) {
    for (let u = a; u <= b && u < units; u++) found[Math.floor((u * bins) / units)] += 1;
  }
  const most = Math.max(...found, 0), step = width / bins;
  for (let bin = 0; bin < bins; bin++) {
    if (!found[bin]) continue;
    let end = bin;
    while (end + 1 < bins && found[end + 1] === found[bin]) end += 1;
    const options = { class: kind, y, height, opacity: (0.2 + (0.8 * found[bin]) / most).toFixed(2) };
    if (units <= 80) for (let one = bin; one <= end; one++) svg.append(shape("rect", { ...options, x: one * step + 1, width: Math.max(1, step - 2) }));
    else svg.append(shape("rect", { ...options, x: bin * step, width: Math.max((end - bin + 1) * step, 8) }));
    bin = end;
  }
}

function strips(s) {
  if (leftOut(s)) return [el("span", { class: "caption" }, "ids left out of this page"), el("span", {})];
  const trains = ids(s.consumers) || ids(s.producers);
  const what = `${count(s.units, s.unit)}; ${trains ? `${s.trained || "some"} train` : "nothing trains"}`;
  return [
    strip(s.units, ids(s.consumers), ids(s.producers), `${s.name} before: ${what}, at their places in the model`),
    strip(s.units, ids(s.consumers_now), ids(s.producers_now), `${s.name} after: ${what}, at their present places`),
  ];
}

// --- folding -------------------------------------------------------------------------------------------------------------------

// A header that unfolds what `make` gives, made when it is first unfolded. `key` names it in links and tests.
function fold(key, open, title, make, kind = "row") {
  const inside = el("div", { class: kind === "row" ? "inside" : "" });
  const header = button({ class: "open", "aria-expanded": "false", "data-key": key }, title);
  const show = (on) => {
    if (on && !inside.firstChild) inside.append(...[make()].flat(3));
    header.setAttribute("aria-expanded", String(on));
    inside.hidden = !on;
  };
  header.addEventListener("click", () => show(header.getAttribute("aria-expanded") !== "true"));
  show(open);
  return el("div", { class: kind }, header, inside);
}

// --- layers --------------------------------------------------------------------------------------------------------------------

function short(name, row) {
  return name.startsWith(`${row}.`) ? name.slice(row.length + 1) : name;
}

function structureCard(place, row) {
  const s = data.structures[place];
  const key = `structure:${s.name}`;
  return button({ class: "card", "data-item": key, onclick: () => select(key) },
    el("span", { class: "title" }, el("strong", {}, short(s.name, row)), el("span", { class: "kind" }, `${s.kind === "ffn" ? "feed-forward" : s.kind}, ${s.size}`),
      el("span", { class: "trains" }, s.trained)),
    el("span", { class: "pair" }, strips(s)));
}

function declinedCard(d) {
  const key = `declined:${d.name}`;
  return button({ class: "card", "data-item": key, onclick: () => select(key) },
    el("span", { class: "title" }, el("strong", {}, d.name), el("span", { class: "kind" }, `${d.kind}, declined`)), el("span", { class: "grey" }, d.reason));
}

function layerRow(row, open) {
  const first = row.layers[0], many = row.layers.length > 1;
  const title = [el("span", {}, row.name), many ? el("span", { class: "times" }, `× ${row.layers.length}`) : "",
    el("span", { class: "grey" }, row.structures[0].map((p) => data.structures[p].trained).filter(Boolean).join(" · ") || row.parts.join(", "))];
  return fold(`row:${row.name}`, open, title, () => {
    const cards = [...row.structures[0].map((p) => structureCard(p, first)), ...row.declined[0].map((p) => declinedCard(data.declined[p]))];
    const sides = row.structures[0].length ? el("div", { class: "pair caption" }, el("span", {}, "before: places in the model"), el("span", {}, "after: present places")) : "";
    const each = () => row.structures[0].map((_, column) => el("div", { class: "layers" },
      el("h3", {}, row.parts[column] || ""),
      row.structures.map((places, at) => {
        const s = data.structures[places[column]], key = `structure:${s.name}`;
        return button({ class: "card", "data-item": key, onclick: () => select(key) }, el("span", {}, row.layers[at].split(".").pop()), strips(s));
      })));
    const all = many && row.structures[0].length ? fold(`layers:${row.name}`, false, `each of the ${row.layers.length} layers`, each, "inner") : "";
    return [many ? el("p", { class: "caption" }, `as in ${first}`) : "", sides, cards, all];
  });
}

function legend() {
  const one = (kind, text) => el("span", {}, el("i", { class: kind }), text);
  return el("div", { class: "legend" }, one("all", "stays as it is"), one("consumer", "trains: columns of O or Down"), one("producer", "trains: rows of V or Up"));
}

function layersTab() {
  if (!data.rows.length) return el("p", { class: "note" }, "No structures: detection has not run, or found nothing.");
  return [legend(), data.rows.map((row, at) => layerRow(row, at < 3))];
}

// --- operations ----------------------------------------------------------------------------------------------------------------

const isChanged = (op) => Boolean(op.was || op.new);
function walk(items, see, above = []) {
  for (const item of items) {
    if (item.items) walk(item.items, see, [...above, item]);
    else see(item, above);
  }
}
// How many operations, and how many of them changed; each: folded layers count as many times as they stand for.
function counted(items, each) {
  let all = 0, changed = 0;
  walk(items, (op, above) => {
    const times = each ? above.reduce((n, run) => n * run.count, 1) : 1;
    all += times;
    changed += isChanged(op) ? times : 0;
  });
  return [all, changed];
}

// A call as it read before: values by the names that they had.
let former = null;
function formerly(text) {
  if (!former) {
    former = new Map();
    walk(data.operations, (op) => { if (op.was) former.set(`%${op.name}`, op.was[op.was.length - 1].split(" = ")[0]); });
  }
  return text.replace(/%[A-Za-z0-9_]+/g, (name) => former.get(name) || name);
}

function opLine(op) {
  const key = `operation:${op.name}`, now = `%${op.name} = ${op.call}`;
  const changed = isChanged(op);
  if (state.changed && !changed) return "";
  const line = op.name === "return" ? `return ${op.call}` : now;
  const before = changed ? (op.was || []).map((text) => el("code", { class: "was" }, formerly(text))) : el("code", {}, formerly(line));
  const after = el("code", { class: changed ? "now" : "second" }, line);
  return button({ class: `op ${changed ? "changed" : "same"}`, "data-item": key, onclick: () => select(key) }, el("span", {}, before), after);
}

const FEW = 12;
function opLines(items, top) {
  const found = [];
  let place = null, plain = [];
  // a long stretch before, between or behind layers is folded too, so that one sees the layers
  const flush = () => {
    const lines = plain, changed = lines.filter((n) => n.classList.contains("changed")).length, all = lines.filter((n) => n.classList.contains("op")).length;
    plain = [];
    if (!top || all < FEW) found.push(...lines);
    else found.push(fold(`stretch:${found.length}`, changed > 0, [el("span", {}, lines[0].textContent), " ", el("span", { class: "grey" }, `${count(all, "operation")}, ${changed} changed`)], () => lines, "inner"));
  };
  for (const item of items) {
    if (item.items) {
      flush();
      place = null;
      const [all, changed] = counted(item.items);
      if (state.changed && !changed) continue;
      const title = [el("span", {}, item.run), " ", item.count > 1 ? el("span", { class: "times" }, `× ${item.count}`) : "", " ",
        el("span", { class: "grey" }, `${count(all, "operation")}, ${changed} changed`)];
      found.push(fold(`run:${item.run}`, changed > 0 && found.filter((n) => n.className === "inner").length < 2, title, () => [
        item.reads && item.reads.length ? el("p", { class: "caption" }, item.reads.map(([out, own]) => `each reads %${own} of the one before for %${out}`).join(", ")) : "",
        opLines(item.items),
        item.left && item.left.length ? el("p", { class: "caption" }, item.left.map(([later, own, layer]) => `%${later} is %${own} of layer ${layer}`).join(", ")) : "",
      ], "inner"));
      continue;
    }
    const line = opLine(item);
    if (!line) continue;
    if (item.module !== place && item.name !== "return") {
      plain.push(el("div", { class: "module" }, item.module));
      place = item.module;
    }
    plain.push(line);
  }
  flush();
  return found;
}

function operationsTab() {
  const box = el("input", { type: "checkbox", id: "changed" });
  box.checked = state.changed;
  box.addEventListener("change", () => { state.changed = box.checked; show(); get("changed").focus(); });
  const [all, changed] = counted(data.operations, true);
  return [
    el("label", { class: "toggle" }, box, `only what changed (${changed.toLocaleString("en")} of ${count(all, "operation")})`),
    el("div", { class: "sides" }, el("span", {}, "before"), el("span", { class: "second" }, "after")),
    opLines(data.operations, data.operations.some((item) => item.items)),
  ];
}

// --- the other tabs ------------------------------------------------------------------------------------------------------------

function declinedTab() {
  const groups = new Map();
  for (const d of declinedItems()) {
    const key = `${d.kind}\n${d.reason}`;
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(d);
  }
  if (!groups.size) return el("p", { class: "note" }, "Nothing was declined, and everything that trains was brought together.");
  let at = 0;
  return [...groups.values()].map((all) => fold(`why:${at}`, at++ < 8, [el("span", {}, all[0].reason), all.length > 1 ? el("span", { class: "times" }, `× ${all.length}`) : ""],
    () => all.map((d) => button({ class: "card", "data-item": `declined:${d.name}`, onclick: () => select(`declined:${d.name}`) },
      el("strong", {}, d.name), " ", el("span", { class: "kind" }, d.kind)))));
}

// Everything that has a reason: what detection declined, what rules could not serve, what could not be proven, what trains in place.
function declinedItems() {
  return [
    ...data.declined.map((d) => ({ ...d, kind: d.kind === "ffn" ? "feed-forward, declined" : `${d.kind}, declined` })),
    ...data.refusals.map((r) => ({ name: r.where, reason: r.reason, kind: "refused" })),
    ...data.structures.filter((s) => s.unproven).map((s) => ({ name: s.name, reason: s.unproven, kind: "not moved" })),
    ...data.structures.flatMap((s) => (s.choices || []).filter(([, , why]) => why).map(([, , why]) => ({ name: s.name, reason: why, kind: "trains in place" }))),
  ];
}

function nodesOf(kernel) {
  return new Set(kernel.nodes.map((text) => text.split(" ")[0]));
}

function kernelsTab() {
  const timed = [];
  walk(data.operations, (op) => { if (op.kernel) timed.push(op); });
  const found = data.kernels.map((k) => fold(`kernel:${k.name}`, false, [el("code", {}, k.name), el("span", { class: "grey" }, `${k.lines} lines, for ${count(k.nodes.length, "operation")}`)],
    () => kernelBody(k)));
  const table = timed.length ? [el("h3", {}, "What computes the operations"), el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, ["operation", "module", "kernel and its times"].map((t) => el("th", { scope: "col" }, t)))),
    el("tbody", {}, timed.map((op) => el("tr", {}, el("td", {}, button({ class: "link code", "data-item": `operation:${op.name}`, onclick: () => select(`operation:${op.name}`) }, `%${op.name}`)),
      el("td", {}, el("code", {}, op.module)), el("td", {}, op.timings ? op.timings.map(([layers, text]) => el("p", {}, `${layers}: ${text}`)) : op.kernel)))))) ] : "";
  if (!found.length && !timed.length) return el("p", { class: "note" }, "No kernels: the program is not lowered.");
  return [found.length ? found : el("p", { class: "note" }, "No generated kernels: libraries multiply."), table];
}

function kernelBody(k) {
  return [k.source ? "" : el("p", {}, "Its source was left out of this page."), el("p", { class: "caption" }, k.nodes.slice(0, 40).join(", ") + (k.nodes.length > 40 ? `, … ${k.nodes.length - 40} more` : "")), el("pre", { tabindex: "0" }, k.source)];
}

function numbersTable(columns, rows) {
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, columns.map((c) => el("th", { scope: "col" }, c)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell) => el("td", {}, cell)))))));
}

function passesTab() {
  const percent = (x) => (x === null ? "not known" : `${(100 * x).toFixed(1)} %`);
  return [
    el("h3", {}, "What every pass did"), el("ol", {}, data.history.map((note) => el("li", {}, note))),
    data.pruned.length ? [el("h3", {}, "Pruned weights"), numbersTable(["weight", "zeros", "pattern", "method", "error"],
      data.pruned.map((p) => [p.name, percent(p.sparsity), p.pattern, p.method, p.error === null ? "not known" : p.error.toExponential(2)]))] : "",
    data.packed.length ? [el("h3", {}, "Packed weights"), numbersTable(["weight", "format", "bytes before", "after", "error"],
      data.packed.map((p) => [p.param, p.format, p.before.toLocaleString("en"), p.after.toLocaleString("en"), percent(p.error)]))] : "",
    data.left_out.length ? [el("h3", {}, "Left out of this page"), el("ul", {}, data.left_out.map((text) => el("li", {}, text)))] : "",
  ];
}

// --- details -------------------------------------------------------------------------------------------------------------------

// Whether the module of an operation, perhaps of several layers (`layers.{0…29}.mlp.up`), is `name` or lies in it.
function inModule(module, name) {
  const one = module.match(/\{[^}]*\}|[^.]+/g) || [], other = name.split(".");
  return other.every((part, at) => {
    const own = one[at];
    if (own === undefined) return false;
    if (!own.startsWith("{")) return own === part;
    return ranges(own.slice(1, -1)).some(([a, b]) => /^\d+$/.test(part) && a <= Number(part) && Number(part) <= b);
  });
}

function idsBlock(text) {
  if (text.length < 600) return el("div", { class: "ids code" }, text || "none");
  const box = el("div", { class: "ids code" }, `${text.slice(0, 500)} … `);
  box.append(button({ class: "link", onclick: () => box.replaceChildren(text) }, "all of them"));
  return box;
}

function structureDetails(s) {
  const sides = [["consumers", s.kind === "ffn" ? "Down" : "O", "columns"], ["producers", s.kind === "ffn" ? "Up" : "V", "rows"]];
  const [before, after] = strips(s);
  const ops = [];
  walk(data.operations, (op) => { if ((isChanged(op) || op.kernel) && inModule(op.module, s.name)) ops.push(op); });
  const table = el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ["role", "tensor", "axis, block"].map((t) => el("th", { scope: "col" }, t)))),
    el("tbody", {}, s.sites.map((site) => el("tr", {}, el("td", { class: "role" }, site.role), el("td", {}, el("code", {}, short(site.param, s.name)),
      el("div", { class: "caption" }, `${site.tensor}${site.moved ? ", reordered" : ""}`), site.more ? el("div", { class: "trains" }, site.more) : ""), el("td", {}, el("code", {}, site.where)))))));
  const order = (o) => data.ids[o.front] === null ? "left out of this page" : o.count ? `${ids(o.front)}, then the others of ${o.units} as they stood` : "as it was";
  return [
    el("h2", {}, s.name), el("p", { class: "grey" }, `${s.kind === "ffn" ? "feed-forward" : s.kind}, ${s.size}`),
    s.trained ? el("p", { class: "trains" }, `trains ${s.trained}`) : el("p", {}, "No whole channels train here."),
    el("div", { class: "big" }, el("p", { class: "caption" }, `before: at their places in the model${binText(s.units)}`), before, el("p", { class: "caption" }, "after: where they stand now"), after),
    (s.choices || []).map(([rule, method, why]) => el("p", {}, `chosen by rule ${rule} (${method})${why ? `; in place: ${why}` : ""}`)),
    s.unproven ? el("p", {}, `not moved: ${s.unproven}`) : "",
    el("h3", {}, "Sites"), table,
    sides.filter(([side]) => ids(s[side])).map(([side, owner, what]) => [
      el("h3", {}, `${count(sizeOf(ids(s[side])), s.unit)} of ${owner} (${what})`), idsBlock(ids(s[side])),
      el("p", { class: "caption" }, `now at ${ids(s[`${side}_now`]).slice(0, 120)}`)]),
    s.order ? [el("h3", {}, "Permutation"), el("p", { class: "caption" }, "which unit stands at place 0, 1, 2, …"), idsBlock(order(s.order)),
      s.inner_order ? [el("p", { class: "caption" }, "inside the groups"), s.inner_order.map((o) => idsBlock(order(o)))] : ""] : "",
    s.slices.length ? [el("h3", {}, "Trained slices"), s.slices.map((piece) => [el("p", {}, el("code", {}, piece.text)),
      el("p", { class: "caption" }, `${piece.side} block of ${piece.count}: channels`), data.ids[piece.channels] === null ? "left out of this page" : idsBlock(ids(piece.channels))])] : "",
    ops.length ? [el("h3", {}, "Its operations, before and after"), ops.map((op) => opDetails(op, false))] : "",
    el("p", {}, button({ class: "link", onclick: () => { setSearch(s.name); } }, "everything with this name")),
  ];
}

function opDetails(op, whole = true) {
  const kernels = data.kernels.filter((k) => nodesOf(k).has(op.name));
  const line = `%${op.name}${op.makes ? `: ${op.makes}` : ""} = ${op.call}`;
  return [
    whole ? [el("h2", {}, op.name), el("p", { class: "grey" }, `in ${op.module}`)] : el("p", {}, button({ class: "link code", onclick: () => select(`operation:${op.name}`) }, `%${op.name}`)),
    isChanged(op) && whole ? [el("h3", {}, "Before"), (op.was || ["nothing: it was added"]).map((text) => el("p", {}, el("code", {}, formerly(text)))), el("h3", {}, "After")] : "",
    whole ? el("p", {}, el("code", {}, line)) : "",
    op.note ? el("p", { class: "trains" }, op.note) : "",
    op.own && whole ? [el("h3", {}, "By layer"), numbersTable(["layers", "⟨…⟩"], op.own)] : "",
    op.kernel ? [whole ? el("h3", {}, "Computed by") : "", op.timings ? (whole ? numbersTable(["layers", "kernel and its times"], op.timings) : el("p", { class: "caption" }, op.timings[0][1])) : el("p", { class: "caption" }, op.kernel)] : "",
    whole ? kernels.map((k) => [el("h3", {}, `Kernel ${k.name}`), kernelBody(k)]) : "",
  ];
}

function details(key) {
  const [kind, name] = [key.slice(0, key.indexOf(":")), key.slice(key.indexOf(":") + 1)];
  if (kind === "structure") {
    const s = data.structures.find((one) => one.name === name);
    return s && structureDetails(s);
  }
  if (kind === "declined") {
    const all = declinedItems().filter((d) => d.name === name);
    return all.length ? [el("h2", {}, name), all.map((d) => [el("p", { class: "grey" }, d.kind), el("p", {}, d.reason),
      (d.sites || []).length ? [el("h3", {}, "Weights that would move"), el("ul", {}, d.sites.map((site) => el("li", {}, el("code", {}, site))))] : ""])] : null;
  }
  if (kind === "operation") {
    let found = null;
    walk(data.operations, (op) => { if (op.name === name && !found) found = op; });
    return found && opDetails(found);
  }
  if (kind === "kernel") {
    const k = data.kernels.find((one) => one.name === name);
    return k && [el("h2", {}, k.name), kernelBody(k)];
  }
  return null;
}

function select(key) {
  state.item = key;
  const found = key ? details(key) : null;
  const panel = get("panel");
  panel.className = found ? "" : "empty";
  panel.replaceChildren(...(found ? [button({ class: "close", onclick: () => select("") }, "close"), ...[found].flat(9).filter(Boolean)]
    : [el("p", { class: "note" }, "Select a structure, an operation or a reason to see all of it: sites, permutation, chosen units, trained slices, kernels.")]));
  panel.scrollTop = 0;
  mark();
  remember();
}

function mark() {
  for (const node of document.querySelectorAll("[data-item]")) {
    if (node.getAttribute("data-item") === state.item) node.setAttribute("aria-current", "true");
    else node.removeAttribute("aria-current");
  }
}

// --- search --------------------------------------------------------------------------------------------------------------------

let index = null;
function searchIndex() {
  if (index) return index;
  index = [];
  const add = (key, title, kind, text) => index.push({ key, title, kind, text: `${title} ${text}`.toLowerCase() });
  for (const s of data.structures) {
    add(`structure:${s.name}`, s.name, `${s.kind === "ffn" ? "feed-forward" : s.kind}, ${s.size}`, `${s.kind} ${s.trained} ${s.sites.map((site) => `${site.param} ${site.role} ${site.more}`).join(" ")}`);
  }
  for (const d of declinedItems()) add(`declined:${d.name}`, d.name, `${d.kind}: ${d.reason}`, `${d.kind} ${d.reason}`);
  walk(data.operations, (op, above) => {
    const times = above.map((run) => run.count).filter((n) => n > 1).map((n) => ` × ${n}`).join("");
    add(`operation:${op.name}`, `%${op.name} = ${op.call}`, `operation in ${op.module}${times}`, `${op.module} ${op.makes} ${op.note || ""} ${op.kernel || ""} ${(op.was || []).join(" ")}`);
  });
  for (const k of data.kernels) add(`kernel:${k.name}`, k.name, `kernel, ${k.lines} lines`, "kernel");
  return index;
}

function marked(text, word) {
  const at = text.toLowerCase().indexOf(word);
  return at < 0 ? [text] : [text.slice(0, at), el("mark", {}, text.slice(at, at + word.length)), text.slice(at + word.length)];
}

function results() {
  const words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
  const hits = searchIndex().filter((entry) => words.every((word) => entry.text.includes(word)));
  return [
    el("p", { class: "note", role: "status", id: "hits" }, `${count(hits.length, "hit")}${hits.length > MOST_HITS ? `, the first ${MOST_HITS} of them` : ""}`),
    hits.slice(0, MOST_HITS).map((hit) => button({ class: "card", "data-item": hit.key, onclick: () => select(hit.key) },
      el("code", {}, marked(hit.title, words[0] || "")), el("div", { class: "caption" }, marked(hit.kind, words[0] || "")))),
  ];
}

function setSearch(text) {
  get("search").value = text;
  state.search = text;
  show();
}

// --- the page ------------------------------------------------------------------------------------------------------------------

const TABS = [
  ["layers", "Layers", layersTab],
  ["operations", "Operations", operationsTab],
  ["declined", `Reasons (${declinedItems().length})`, declinedTab],
  ["kernels", `Kernels (${data.kernels.length})`, kernelsTab],
  ["passes", "Passes", passesTab],
];

function show() {
  const tab = TABS.find(([name]) => name === state.tab) || TABS[0];
  for (const node of get("tabs").children) {
    const on = node.getAttribute("data-tab") === tab[0] && !state.search.trim();
    node.setAttribute("aria-selected", String(on));
    node.tabIndex = node.getAttribute("data-tab") === tab[0] ? 0 : -1;
  }
  const content = state.search.trim() ? results() : tab[2]();
  get("content").replaceChildren(...[content].flat(9).filter(Boolean));
  mark();
  remember();
}

function setTab(name, focus) {
  state.tab = name;
  get("search").value = state.search = "";
  show();
  if (focus) [...get("tabs").children].find((node) => node.getAttribute("data-tab") === name).focus();
}

function setTheme(theme) {
  state.theme = theme;
  if (theme) document.documentElement.setAttribute("data-theme", theme);
  else document.documentElement.removeAttribute("data-theme");
  get("theme").textContent = `Theme: ${theme || "system"}`;
  remember();
}

// The address says what is open, so that it can be sent on: #tab=operations&search=down_proj&item=structure:model.layers.0.mlp&theme=dark
function remember() {
  const said = new URLSearchParams();
  if (state.tab !== "layers") said.set("tab", state.tab);
  for (const name of ["search", "item", "theme"]) if (state[name]) said.set(name, state[name]);
  const text = said.toString();
  try { history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search); } catch { /* a frame without an address */ }
}

function recall() {
  const said = new URLSearchParams(location.hash.slice(1));
  const tab = said.get("tab");
  state.tab = TABS.some(([name]) => name === tab) ? tab : "layers";
  state.search = said.get("search") || "";
  state.item = said.get("item") || "";
  setThemeQuietly(said.get("theme"));
  get("search").value = state.search;
}
function setThemeQuietly(theme) {
  const known = ["light", "dark"].includes(theme) ? theme : "";
  const { tab, search, item } = state;
  setTheme(known);
  Object.assign(state, { tab, search, item });
}

function begin() {
  get("model").textContent = data.model;
  const share = ((100 * data.trained) / Math.max(1, data.total)).toPrecision(3);
  get("headline").textContent = [
    data.trained ? `${share} % of ${data.total.toLocaleString("en")} parameters train` : `${data.total.toLocaleString("en")} parameters, nothing trains`,
    `${count(data.structures.length, "structure")} in ${count(data.rows.reduce((n, row) => n + row.layers.length, 0), "layer")}`,
    `${count(data.moved, "tensor")} reordered`, `${data.declined.length + data.refusals.length} declined`, `stage ${data.stage.toLowerCase()}`,
  ].join(" · ");
  get("tabs").append(...TABS.map(([name, title]) => button({ role: "tab", "data-tab": name, "aria-controls": "content", onclick: () => setTab(name) }, title)));
  get("tabs").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const at = TABS.findIndex(([name]) => name === state.tab);
    setTab(TABS[(at + step + TABS.length) % TABS.length][0], true);
    event.preventDefault();
  });
  let waiting = 0;
  get("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { state.search = get("search").value; show(); }, 80);
  });
  get("theme").addEventListener("click", () => setTheme({ "": "light", light: "dark", dark: "" }[state.theme]));
  document.addEventListener("keydown", (event) => {
    const typing = ["INPUT", "TEXTAREA", "SELECT"].includes(document.activeElement.tagName);
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
      get("search").focus();
      event.preventDefault();
    }
    if (event.key === "Escape") {
      if (state.search) setSearch("");
      else select("");
    }
  });
  window.addEventListener("hashchange", () => { recall(); show(); select(state.item); });
  recall();
  const item = state.item;
  show();
  select(item);
}
begin();
