// The page of one run: its head, the ledger and the near misses. Text is only ever set as text: a node may be called
// <b> or worse.
const data = JSON.parse(document.getElementById("data").textContent);
const sites = data.sites.map((s, i) => ({ ...s, index: i }));
const STATUSES = ["rewritten", "kept", "excluded", "declined", "near_miss"];
const CHUNK = 200; // rows put into the page at a time: more come as one scrolls

const $ = (id) => document.getElementById(id);

function el(tag, props = {}, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(props)) {
    if (v === null || v === undefined || v === false) continue;
    if (k.startsWith("on")) e.addEventListener(k.slice(2), v);
    else e.setAttribute(k, v === true ? "" : v);
  }
  e.append(...children.filter((c) => c !== null && c !== undefined && c !== ""));
  return e;
}

function svg(tag, props = {}, ...children) {
  const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [k, v] of Object.entries(props)) e.setAttribute(k, v);
  e.append(...children);
  return e;
}

const words = (status) => status.replace("_", " ");
const percent = (share) => `${Math.floor(share * 1000) / 10}%`.replace(".0%", "%");
const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

function bytes(n) {
  if (n < 1000) return `${n} B`;
  let unit = -1;
  do { n /= 1000; unit += 1; } while (n >= 999.95 && unit < 4);
  return `${n.toFixed(n < 99.95 ? 1 : 0)} ${["kB", "MB", "GB", "TB", "PB"][unit]}`;
}

const shape = (w) => w.shape.join("×");
const dot = (status) => el("span", { class: `dot ${status}` });
const tally = (list) => STATUSES.map((s) => [s, list.filter((x) => x.status === s).length]).filter(([, n]) => n);
const weightsOf = (list) => { // a weight that several share counts once
  const seen = new Set();
  return list.map((s) => s.weight).filter((w) => w && !seen.has(w.name) && seen.add(w.name));
};
const sum = (list, of) => list.reduce((total, x) => total + of(x), 0);

function nameOf(s) { // the end of a path is what tells; a name without a path gets its module beside it
  const at = s.name.lastIndexOf("/", s.name.lastIndexOf("/") - 1);
  const path = at > 0 ? s.name.slice(0, at) : "";
  const module = s.name.includes("/") ? "" : s.path.slice(-3).join(".");
  const title = [s.name, s.path.join(".")].join("\n");
  const cut = (c, ...parts) => el("span", { class: c }, el("bdi", { dir: "ltr" }, ...parts)); // cut off on the left
  if (!module || s.name.includes(module)) {
    return el("span", { class: "label", title }, cut("path", path, el("span", { class: "tail" }, s.name.slice(path.length))));
  }
  return el("span", { class: "label", title }, el("span", { class: "tail" }, s.name), cut("path of", module));
}

// -- head

function head() {
  const t = data.totals, f = data.facts;
  const opsets = Object.entries(f.opsets).map(([d, v]) => `${d} ${v}`).join(", ");
  const linears = sites.filter((s) => s.kind === "linear");
  const asked = linears.length - linears.filter((s) => s.status === "excluded").length;
  const fact = (what, value, more) => el("div", {}, el("dt", {}, what), el("dd", {}, value, el("small", {}, more)));
  const list = el("dl", { class: "facts" },
    fact("Linears rewritten", `${t.linear.rewritten} of ${asked}`, `  ${percent(data.coverage)}`),
    fact("Norms rewritten", `${t.norm.rewritten} of ${t.norm.sites}`, ""),
    fact("Weights", `${bytes(t.bytes_before)} → ${bytes(t.bytes_after)}`,
      t.bytes_after ? `  ${(t.bytes_before / t.bytes_after).toFixed(2)} × smaller` : ""),
    ...tally(sites).filter(([s]) => s !== "rewritten" && s !== "kept")
      .map(([s, n]) => fact(words(s)[0].toUpperCase() + words(s).slice(1), String(n), n === 1 ? "  site" : "  sites")));
  $("head").append(...[
    el("h1", {}, data.model),
    el("p", { class: "spec" }, data.spec),
    el("p", { class: "about" }, [plural(f.nodes, "node"), opsets, `ir ${f.ir_version}`, f.producer && `by ${f.producer}`]
      .filter(Boolean).join(" · ")),
    list,
    data.remarks.length ? el("ul", { class: "remarks" }, ...data.remarks.map((r) => el("li", {}, r))) : ""]);
  $("foot").append(data.written ? `qpass ${data.qpass} wrote ${data.written}` : `qpass ${data.qpass}, nothing written`);
}

// -- the ledger

const reasons = sites.some((s) => s.reason);
const narrow = matchMedia("(max-width: 1000px)"); // as in the style: wide columns are left out
const COLUMNS = [
  { id: "index", title: "#", width: "52px", by: (s) => s.index, num: true },
  { id: "kind", title: "kind", width: "62px", by: (s) => s.kind },
  { id: "status", title: "status", width: "104px", by: (s) => STATUSES.indexOf(s.status) },
  { id: "op", title: "op", width: "184px", by: (s) => s.op || "", wide: true },
  { id: "name", title: "name", width: "auto", by: (s) => s.name },
  { id: "shape", title: "weight", width: "158px", by: (s) => (s.weight ? s.weight.shape.reduce((a, b) => a * b, 1) : -1), wide: true },
  { id: "before", title: "before", width: "82px", by: (s) => (s.weight ? s.weight.bytes_before : -1), num: true, wide: true },
  { id: "after", title: "after", width: "82px", by: (s) => (s.weight ? s.weight.bytes_after : -1), num: true },
  { id: "fed", title: "fed by", width: "70px", by: (s) => (s.fed === null ? -1 : s.fed), num: true },
  { id: "reason", title: "reason", width: reasons ? "20%" : "70px", by: (s) => s.reason || "", wide: true },
];
const ledger = { order: "index", down: false, text: "", kinds: new Set(), statuses: new Set(), list: sites, from: 0, to: 0 };
const open = new Set();
const haystack = sites.map((s) => [s.kind, words(s.status), s.status, s.op, s.rule, s.reason, s.weight && s.weight.name,
  s.weight && shape(s.weight), s.weight && s.weight.dtype, s.path.join("."), ...s.nodes, ...s.new].filter(Boolean).join("\n").toLowerCase());

function choose() {
  const column = COLUMNS.find((c) => c.id === ledger.order);
  const wanted = ledger.text.toLowerCase().split(/\s+/).filter(Boolean);
  const list = sites.filter((s) =>
    (!ledger.kinds.size || ledger.kinds.has(s.kind)) && (!ledger.statuses.size || ledger.statuses.has(s.status)) &&
    wanted.every((w) => haystack[s.index].includes(w)));
  const turn = ledger.down ? -1 : 1;
  const keys = new Map(list.map((s) => [s, column.by(s)]));
  list.sort((a, b) => {
    const x = keys.get(a), y = keys.get(b);
    return x < y ? -turn : x > y ? turn : a.index - b.index;
  });
  ledger.list = list;
}

function draw() {
  choose();
  $("scroll").scrollTop = 0;
  drawFrom(0);
  const all = sites.length;
  $("count").textContent = ledger.list.length === all ? plural(all, "site") : `${ledger.list.length} of ${plural(all, "site")}`;
  $("none").hidden = ledger.list.length > 0;
  for (const c of COLUMNS) {
    const th = $(`by-${c.id}`);
    if (c.id === ledger.order) th.setAttribute("aria-sort", ledger.down ? "descending" : "ascending");
    else th.removeAttribute("aria-sort");
  }
  for (const b of document.querySelectorAll(".filters button")) {
    b.setAttribute("aria-pressed", String(ledger[b.dataset.of].has(b.dataset.value)));
  }
}

function made(from, to) {
  const rows = document.createDocumentFragment();
  for (const s of ledger.list.slice(from, to)) {
    rows.append(row(s));
    if (open.has(s.index)) rows.append(detail(s));
  }
  return rows;
}

function drawFrom(at) {
  ledger.from = ledger.to = at;
  $("rows").replaceChildren();
  grow();
}

function grow() {
  const to = Math.min(ledger.to + CHUNK, ledger.list.length);
  $("rows").append(made(ledger.to, to));
  ledger.to = to;
}

function growUp() { // what is seen stays where it is
  const from = Math.max(0, ledger.from - CHUNK), box = $("scroll"), below = box.scrollHeight - box.scrollTop;
  $("rows").prepend(made(from, ledger.from));
  ledger.from = from;
  box.scrollTop = box.scrollHeight - below;
}

function row(s) {
  const w = s.weight;
  const td = (id, ...children) => {
    const c = COLUMNS.find((x) => x.id === id);
    return el("td", { class: [id, c.num && "num", c.wide && "wide"].filter(Boolean).join(" ") }, ...children);
  };
  return el("tr", { class: "site", tabindex: "-1", "data-index": s.index, "aria-expanded": String(open.has(s.index)) },
    td("index", String(s.index)), td("kind", s.kind), td("status", dot(s.status), words(s.status)), td("op", ...(s.op || "").split(/(?=[A-Z])/).flatMap((part) => [part, el("wbr")])),
    td("name", nameOf(s), s.reason ? el("span", { class: "narrow reason more", style: "white-space:normal" }, s.reason) : null),
    td("shape", w ? el("span", {}, shape(w), " ", el("span", { class: "more" }, w.dtype)) : ""),
    td("before", w ? bytes(w.bytes_before) : ""), td("after", w ? bytes(w.bytes_after) : ""),
    td("fed", s.fed === null ? "" : jump(s.fed, String(s.fed))), td("reason", s.reason || ""));
}

function detail(s) {
  const w = s.weight;
  const jumps = (list) => el("ul", {}, ...list.map((x) => el("li", {}, jump(x.index, x.name))));
  const names = (list) => el("ul", {}, ...list.map((n) => el("li", { class: "mono" }, n)));
  const feeds = sites.filter((x) => x.fed === s.index);
  const terms = [
    ["reason", s.reason],
    ["op", s.op],
    ["rule", s.rule],
    ["weight", w && `${w.name}  [${shape(w)}] ${w.dtype}, ${w.bytes_before.toLocaleString("en")} → ${w.bytes_after.toLocaleString("en")} bytes`],
    ["nearest", s.miss && where(s.miss)],
    ["original nodes", names(s.nodes)],
    ["new nodes", s.new.length ? names(s.new) : null],
    ["fed by", s.fed === null ? null : jump(s.fed, sites[s.fed].name)],
    ["feeds", feeds.length ? jumps(feeds) : null],
    ["its Linears", s.parts.length ? jumps(s.parts.map((i) => sites[i])) : null],
    ["module", s.path.join(".")],
  ];
  return el("tr", { class: "detail", id: `detail-${s.index}` }, el("td", { colspan: COLUMNS.filter((c) => !(c.wide && narrow.matches)).length },
    el("dl", {}, ...terms.filter(([, v]) => v).flatMap(([k, v]) => [el("dt", {}, k), el("dd", {}, v)]))));
}

const rowOf = (index) => $("rows").querySelector(`tr.site[data-index="${index}"]`);
const jump = (index, text) =>
  el("button", { type: "button", class: "link mono", "data-jump": index, title: `Show site ${index}` }, text);

function toggle(tr) {
  const index = Number(tr.dataset.index), was = open.has(index);
  if (was) { open.delete(index); $(`detail-${index}`).remove(); }
  else { open.add(index); tr.after(detail(sites[index])); }
  tr.setAttribute("aria-expanded", String(!was));
}

function show(index) {
  if (!ledger.list.includes(sites[index])) {
    ledger.text = $("search").value = "";
    ledger.kinds.clear();
    ledger.statuses.clear();
    draw();
  }
  const at = ledger.list.indexOf(sites[index]);
  if (at >= ledger.to || at < ledger.from) drawFrom(Math.max(0, at - CHUNK / 2));
  const tr = rowOf(index);
  $("ledger").scrollIntoView({ block: "nearest" });
  $("scroll").scrollTop += tr.getBoundingClientRect().top - $("scroll").getBoundingClientRect().top - 90;
  focusRow(tr);
  for (const old of document.querySelectorAll("tr.found")) old.classList.remove("found");
  tr.classList.add("found");
}

function focusRow(tr) {
  for (const old of $("rows").querySelectorAll('tr.site[tabindex="0"]')) old.tabIndex = -1;
  tr.tabIndex = 0;
  tr.focus({ preventScroll: true });
}

function step(tr, by) {
  const index = ledger.list.indexOf(sites[Number(tr.dataset.index)]) + by;
  if (index < 0 || index >= ledger.list.length) return;
  if (index >= ledger.to) grow();
  if (index < ledger.from) growUp();
  const next = rowOf(ledger.list[index].index);
  focusRow(next);
  next.scrollIntoView({ block: "nearest" });
}

function table() {
  $("table").prepend(el("colgroup", {}, ...COLUMNS.map((c) => el("col", { class: c.wide ? "wide" : null, style: `width:${c.width}` }))));
  $("columns").append(...COLUMNS.map((c) => el("th", { id: `by-${c.id}`, scope: "col", class: [c.num && "num", c.wide && "wide"].filter(Boolean).join(" ") || null },
    el("button", { type: "button", onclick: () => {
      ledger.down = ledger.order === c.id ? !ledger.down : (c.id === "before" || c.id === "after" || c.id === "shape");
      ledger.order = c.id;
      draw();
    } }, c.title))));
  const filter = (of, values, count, label) => values.map((v) =>
    el("button", { type: "button", "data-of": of, "data-value": v, "aria-pressed": "false", onclick: () => {
      if (!ledger[of].delete(v)) ledger[of].add(v);
      draw();
    } }, label(v), el("span", {}, String(count(v)))));
  const kinds = [...new Set(sites.map((s) => s.kind))].sort();
  $("kinds").append(...filter("kinds", kinds, (k) => sites.filter((s) => s.kind === k).length, (k) => [k]).flat());
  const there = STATUSES.filter((s) => sites.some((x) => x.status === s));
  $("statuses").append(...filter("statuses", there, (s) => sites.filter((x) => x.status === s).length, (s) => words(s)));
  $("search").addEventListener("input", (e) => { ledger.text = e.target.value; draw(); });
  $("clear").addEventListener("click", () => {
    ledger.text = $("search").value = "";
    ledger.kinds.clear();
    ledger.statuses.clear();
    draw();
    $("search").focus();
  });
  $("scroll").addEventListener("scroll", () => {
    const box = $("scroll");
    if (ledger.to < ledger.list.length && box.scrollTop + box.clientHeight > box.scrollHeight - 800) grow();
    if (ledger.from > 0 && box.scrollTop < 400) growUp();
  });
  $("rows").addEventListener("click", (e) => {
    const tr = e.target.closest("tr.site");
    if (!tr || e.target.closest("button") || String(getSelection())) return;
    focusRow(tr);
    toggle(tr);
  });
  $("rows").addEventListener("keydown", (e) => {
    const tr = e.target.closest("tr.site");
    if (!tr || e.target !== tr) return;
    if (e.key === "Enter" || e.key === " ") toggle(tr);
    else if (e.key === "ArrowDown") step(tr, 1);
    else if (e.key === "ArrowUp") step(tr, -1);
    else return;
    e.preventDefault();
  });
  document.addEventListener("click", (e) => {
    const to = e.target.closest("[data-jump]");
    if (to) show(Number(to.dataset.jump));
  });
  document.addEventListener("keydown", (e) => {
    if (e.key === "/" && !e.ctrlKey && !e.metaKey && !e.target.matches("input")) { $("search").focus(); e.preventDefault(); }
    else if (e.key === "Escape" && e.target === $("search")) { ledger.text = $("search").value = ""; draw(); }
    else if (e.key === "ArrowDown" && e.target === $("search") && ledger.list.length) {
      focusRow(rowOf(ledger.list[0].index));
      e.preventDefault();
    }
  });
  narrow.addEventListener("change", draw);
  draw();
  const first = $("rows").querySelector("tr.site");
  if (first) first.tabIndex = 0;
}

// -- near misses

const where = (m) => `${m.pattern} (${m.rule}) matched ${m.matched} of ${m.total} nodes up to ${m.op} '${m.node}'; stopped at ${m.at}`;

function missed() {
  const rank = ["near_miss", "declined"];
  const held = sites.filter((s) => rank.includes(s.status)).sort((a, b) => rank.indexOf(a.status) - rank.indexOf(b.status));
  if (!held.length && !data.misses.length) return;
  $("misses").hidden = false;
  const item = (status, title, why, m, rest = null) => el("li", {}, el("div", {}, dot(status), title),
    el("div", { class: "why" }, why), m ? el("div", { class: "where" }, where(m)) : null, rest);
  const alike = new Map(); // sites whose reasons differ in nothing but names
  for (const s of held) {
    const key = [s.kind, s.status, (s.reason || "").replace(/'[^']*'/g, "''")].join("\n");
    if (!alike.has(key)) alike.set(key, []);
    alike.get(key).push(s);
  }
  const more = (list) => (list.length ? el("details", { class: "where" }, el("summary", {}, `and ${list.length} more like it`),
    el("ul", {}, ...list.map((s) => el("li", {}, jump(s.index, s.name))))) : null);
  $("miss-list").append(
    ...[...alike.values()].map(([s, ...rest]) =>
      item(s.status, el("span", {}, `${s.kind} `, jump(s.index, s.name), ` ${words(s.status)}`), s.reason || "", s.miss, more(rest))),
    ...data.misses.map((m) => item("near_miss", el("span", {}, `${m.op} `, el("span", { class: "mono" }, m.node)), m.why, m)));
  $("misses-title").append(el("small", {}, "the nearest first"));
}
