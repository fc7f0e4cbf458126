// The views beside the ledger: layers, plots, rules. A part of the page's one script, after page.js.

// -- layers

function tree() {
  const root = { name: "", children: new Map(), sites: [] };
  for (const s of sites) {
    let at = root;
    for (const part of s.path) {
      if (!at.children.has(part)) at.children.set(part, { name: part, children: new Map(), sites: [] });
      at = at.children.get(part);
    }
    at.sites.push(s);
  }
  const finish = (n) => { // a module with nothing but one module in it is one line with that
    n.children = [...n.children.values()].map(finish);
    n.all = [...n.sites, ...n.children.flatMap((c) => c.all)].sort((a, b) => a.index - b.index);
    n.layered = n.children.some((c) => /\.\d+$/.test(c.name) || c.layered);
    while (n !== root && n.children.length === 1 && !n.sites.length && !n.children[0].layered === !n.layered) {
      const only = n.children[0];
      n = { ...only, name: `${n.name}.${only.name}` };
    }
    n.children.sort((a, b) => a.all[0].index - b.all[0].index);
    return n;
  };
  finish(root);
  const lines = [];
  const put = (n, depth, inLayer) => lines.push(branch(n, depth, inLayer));
  if (root.sites.length) put({ name: "(no module)", children: [], sites: root.sites, all: root.sites }, 0, false);
  for (const c of root.children) put(c, 0, false);
  $("tree").append(...lines);
  $("layers").hidden = !sites.length;
}

function branch(n, depth, inLayer) {
  const isLayer = /\.\d+$/.test(n.name) || inLayer;
  const box = el("div", { class: "module" });
  if (!n.children.length && n.sites.length === 1 && depth > 0) { // a leaf: the module is the site
    const s = n.sites[0];
    box.append(leaf(s, n.name, depth));
    return box;
  }
  const inner = el("div", { hidden: true });
  const fill = () => {
    if (inner.childElementCount) return;
    const parts = [...n.children.map((c) => [c.all[0].index, () => branch(c, depth + 1, isLayer)]),
      ...n.sites.map((s) => [s.index, () => leaf(s, s.name, depth + 1)])];
    inner.append(...parts.sort((a, b) => a[0] - b[0]).map(([, make]) => make()));
  };
  const button = el("button", { type: "button", "aria-expanded": "false", onclick: () => set(inner.hidden) }, n.name);
  const set = (on) => {
    if (on) fill();
    inner.hidden = !on;
    button.setAttribute("aria-expanded", String(on));
  };
  const small = n.all.length <= 40 && (isLayer || !nested(n));
  box.append(el("div", { class: "branch", style: `--depth:${depth}` }, button, small ? flow(n.all) : null, counts(n)), inner);
  if (!isLayer && nested(n) && n.all.length <= 4000) set(true);
  return box;
}

const nested = (n) => n.children.some((c) => /\.\d+$/.test(c.name) || nested(c));

function counts(n) {
  const w = weightsOf(n.all);
  const size = w.length ? el("i", {}, `${bytes(sum(w, (x) => x.bytes_before))} → ${bytes(sum(w, (x) => x.bytes_after))}`) : null;
  return el("span", { class: "tally" }, ...tally(n.all).map(([s, k]) => el("i", { title: words(s) }, dot(s), String(k))), size);
}

function leaf(s, name, depth) {
  return el("div", { class: "branch", style: `--depth:${depth}` },
    el("span", { class: "site-name" }, dot(s.status), jump(s.index, name)),
    el("span", { class: "more" }, s.op || [words(s.status), s.reason].filter(Boolean).join(": ")),
    el("span", { class: "tally" }, s.weight ? el("i", {}, `${bytes(s.weight.bytes_before)} → ${bytes(s.weight.bytes_after)}`) : null));
}

function flow(list) { // Linears on one activation stand side by side
  const steps = [];
  for (const s of list) {
    const same = s.reads && steps.find((g) => g[0].reads === s.reads);
    if (same) same.push(s); else steps.push([s]);
  }
  const chip = (s) => el("button", { type: "button", class: `chip ${s.status} ${s.kind}`, "data-jump": s.index,
    title: [`${s.kind} ${s.name}`, s.op || words(s.status), s.reason].filter(Boolean).join("\n") },
  short(s));
  return el("div", { class: "flow" }, ...steps.map((g) => el("span", { class: "step" }, ...g.map(chip))));
}

const short = (s) => (s.path.length ? s.path[s.path.length - 1] : s.name.split("/").pop());

// -- plots

function coverage() {
  const kinds = [...new Set(sites.map((s) => s.kind))].sort();
  $("numbers").hidden = !sites.length;
  const W = 460, H = 34, left = 52, right = 70;
  const most = Math.max(1, ...kinds.map((k) => sites.filter((s) => s.kind === k).length));
  const plot = svg("svg", { viewBox: `0 0 ${W} ${Math.max(H, kinds.length * H)}`, role: "img", "aria-label": "Sites by kind and status" });
  kinds.forEach((kind, i) => {
    const all = sites.filter((s) => s.kind === kind);
    let x = left;
    plot.append(svg("text", { x: left - 10, y: i * H + 20, "text-anchor": "end" }, kind));
    for (const [status, n] of tally(all)) {
      const width = (n / most) * (W - left - right);
      const bar = svg("rect", { class: `bar ${status}`, x, y: i * H + 5, width: Math.max(1, width - 1), height: 22, rx: 2 },
        svg("title", {}, `${n} ${kind} ${words(status)}`));
      plot.append(bar);
      x += width;
    }
    plot.append(svg("text", { class: "soft", x: x + 6, y: i * H + 20 }, `${all.filter((s) => s.status === "rewritten").length} of ${all.length}`));
  });
  $("coverage").append(plot, el("div", { class: "key" },
    ...tally(sites).map(([s, n]) => el("span", { class: s }, el("b"), `${words(s)} ${n}`))));
}

function groups() { // by layer where there are layers, else by module
  const out = new Map();
  for (const s of sites.filter((x) => x.weight)) {
    const at = s.path.findIndex((p) => /\.\d+$/.test(p));
    const key = at >= 0 ? s.path.slice(0, at + 1).join(".") : s.path.slice(0, 3).join(".") || s.name;
    if (!out.has(key)) out.set(key, []);
    out.get(key).push(s);
  }
  const seen = new Set();
  const bars = [...out].map(([name, list]) => {
    const w = weightsOf(list).filter((x) => !seen.has(x.name) && seen.add(x.name));
    return { name, before: sum(w, (x) => x.bytes_before), after: sum(w, (x) => x.bytes_after) };
  }).filter((b) => b.before);
  const rest = { name: "everything else: embeddings, biases, norms", short: "else",
    before: data.totals.bytes_before - sum(bars, (b) => b.before), after: data.totals.bytes_after - sum(bars, (b) => b.after) };
  return rest.before > 0 && rest.after >= 0 ? [...bars, rest] : bars;
}

function sizes() {
  const bars = groups();
  if (!bars.length) { $("sizes").append("No weights."); return; }
  const W = 720, H = 200, left = 58, floor = H - 44, top = 8;
  const most = Math.max(...bars.map((b) => Math.max(b.before, b.after)));
  const room = (W - left) / bars.length, width = Math.min(34, room * 0.72);
  const y = (n) => floor - (n / most) * (floor - top);
  const plot = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "Weight bytes before and after, by layer" });
  for (const share of [0, 0.5, 1]) {
    plot.append(svg("line", { class: "axis", x1: left, x2: W, y1: y(most * share), y2: y(most * share) }),
      svg("text", { class: "soft", x: left - 8, y: y(most * share) + 4, "text-anchor": "end" }, bytes(Math.round(most * share))));
  }
  const labels = Math.ceil((bars.length * 46) / (W - left));
  const lists = bars.map((b) => (b.name.match(/^(.*)\.\d+$/) || [])[1]); // what a layer's number counts in
  const several = new Set(lists.filter(Boolean)).size > 1;
  bars.forEach((b, i) => {
    const x = left + room * i + (room - width) / 2;
    const title = `${b.name}\n${bytes(b.before)} → ${bytes(b.after)}`;
    plot.append(svg("g", {}, svg("title", {}, title),
      svg("rect", { class: "before", x, y: y(b.before), width, height: Math.max(0, floor - y(b.before)), rx: 2 }),
      svg("rect", { class: "after", x: x + width * 0.2, y: y(b.after), width: width * 0.6, height: Math.max(0, floor - y(b.after)), rx: 1 })));
    if (several && lists[i] && lists[i] !== lists[i - 1]) {
      plot.append(svg("text", { class: "soft", x, y: floor + 34 }, lists[i]));
    }
    if (i % labels === 0 || b.short) {
      const text = b.short || (b.name.match(/\.(\d+)$/) || [, b.name.split(".").pop()])[1];
      plot.append(svg("text", { class: "soft", x: x + width / 2, y: floor + 16, "text-anchor": "middle" }, text.length > 9 ? `${text.slice(0, 8)}…` : text));
    }
  });
  $("sizes").append(plot, el("div", { class: "key" }, el("span", { class: "before" }, el("b"), "before"), el("span", { class: "after" }, el("b"), "after")));
}

function rules() {
  $("rules").hidden = !data.rules.length;
  const key = data.timed ? "seconds" : "tries";
  const list = [...data.rules].sort((a, b) => b[key] - a[key]);
  const whole = sum(list, (r) => r[key]) || 1, most = Math.max(1e-12, ...list.map((r) => r[key]));
  $("rules-title").append(el("small", {}, data.timed
    ? `${(whole * 1000).toFixed(1)} ms of matching and rewriting in all`
    : "by how often each was tried; qpass rewrite --profile-rules tells the time too"));
  const heads = ["rule", "at", "tries", "hits", "declines", data.timed ? "ms" : null, data.timed ? "share of the time" : "share of the tries"];
  const number = (n) => el("td", { class: "num" }, n.toLocaleString("en"));
  $("rule-bars").append(el("table", {}, el("thead", {}, el("tr", {}, ...heads.filter(Boolean).map((h) => el("th", { scope: "col", class: /^(rule|at|share.*)$/.test(h) ? null : "num" }, h)))),
    el("tbody", {}, ...list.map((r) => el("tr", { title: r.does },
      el("td", { class: "mono" }, r.rule), el("td", { class: "mono more" }, r.at), number(r.tries), number(r.hits), number(r.declines),
      data.timed ? el("td", { class: "num" }, (r.seconds * 1000).toFixed(1)) : null,
      el("td", { class: "share" }, el("span", {}, `${((r[key] / whole) * 100).toFixed(0)}%`),
        svg("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
          svg("rect", { x: 0, y: 0, width: Math.max(0.3, (r[key] / most) * 100), height: 10 }))))))));
}

head();
if (sites.length) table();
else $("ledger").replaceChildren(el("p", {}, "The model has no norm and no Linear."));
missed();
tree();
coverage();
sizes();
rules();
