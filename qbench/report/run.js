/* The page of one run, built from its packed data when it is opened. */

const KINDS = [
  ["right->wrong", "lost", "right in full precision, wrong here"],
  ["wrong->right", "won", "wrong in full precision, right here"],
  ["wrong->other wrong", "exchanged", "another wrong answer"],
  ["right->other right", "exchanged", "another right answer"],
];

async function showRun(place, anchor) {
  const run = JSON.parse(await unpack(anchor));
  const back = el("p", { class: "back" }, el("a", { href: "#table" }, "← All results"));
  const subtitle = el("p", { class: "lead" }, "on ", el("b", {}, run.checkpoint));
  if (run.full) subtitle.append(" · compared with ", el("a", { href: `#${run.full}` }, "full precision"));
  if (run.seeds.length) {
    const links = run.seeds.map(([seed, other]) =>
      other === anchor ? el("b", {}, String(seed)) : el("a", { href: `#${other}` }, String(seed)));
    subtitle.append(" · seed ", ...links.flatMap((link, i) => (i ? [", ", link] : [link])));
  }
  const parts = [back, el("h1", {}, run.title), subtitle, ...troubles(run), measurements(run)];
  parts.push(...matrices(run), ...answers(run), settings(run));
  place.replaceChildren(...parts);
  const plot = place.querySelector(".plot");
  if (plot) await draw(plot, layerFigure(run.layers));
  await showAnswers(place, run);
}

function section(id, heading, ...children) {
  return el("section", { id: `run-${id}` }, el("h2", {}, heading), ...children);
}

function tableOf(label, headings, rows, numeric = []) {
  const kind = (index) => (numeric.includes(index) ? { class: "number" } : {});
  const head = headings.map((text, index) => el("th", { scope: "col", ...kind(index) }, text));
  const body = rows.map((row) =>
    el("tr", {}, ...row.map((text, index) =>
      el(index ? "td" : "th", { ...(index ? {} : { scope: "row" }), ...kind(index) }, text ?? "–"))));
  const table = el("table", { class: "sheet" });
  table.append(el("caption", { class: "unseen" }, label));
  table.append(el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body));
  makeSortable(table);
  const tall = rows.length > 30 ? " tall" : "";
  const attributes = { class: `scroll${tall}`, tabindex: 0, role: "region", "aria-label": label };
  return el("div", attributes, table);
}

function troubles(run) {
  const told = [];
  if (run.status === "failed") told.push(`This run failed: ${run.error}`);
  if (run.status === "not_applicable") told.push(`Not applicable: ${run.error}`);
  if (run.fallbacks) {
    told.push(`${run.fallbacks} of ${run.layers.name.length} matrices were rounded to nearest, ` +
      "because the method could not run on them.");
  }
  return told.map((text) => el("p", { class: "trouble" }, text));
}

function measurements(run) {
  if (!run.measurements.length) return section("measured", "Measured", el("p", {}, "Nothing."));
  const compared = run.measurements.some((one) => one.full !== undefined);
  const headings = ["Task", "Metric", "Value"];
  headings.push(...(compared ? ["Full precision", "Difference"] : []), "Items", "Protocol", "Also");
  const rows = run.measurements.map((one) => [
    one.task,
    one.metric,
    one.value,
    ...(compared ? [one.full, one.difference] : []),
    one.n === null ? "–" : String(one.n),
    [one.protocol, one.how].filter(Boolean).join(", "),
    one.also.join("; "),
  ]);
  const notes = run.measurements.flatMap((one) => one.notes);
  const table = tableOf("Measured", headings, rows, compared ? [2, 3, 4, 5] : [2, 3]);
  return section("measured", "Measured", table, ...notes.map((text) => el("p", { class: "small" }, text)));
}

/* ---- matrices ---- */

/** Block number and kind of a matrix: "model.layers.3.mlp.up_proj" is up_proj of block 3. */
function layerPlace(name) {
  const parts = name.split(".");
  const at = parts.findIndex((part) => /^\d+$/.test(part));
  return at < 0 ? [null, name] : [Number(parts[at]), parts.slice(at + 1).join(".")];
}

function layerFigure(layers) {
  const measure = layers["proxy loss"] ? "proxy loss" : "relative error";
  const kinds = new Map();
  for (const [index, name] of layers.name.entries()) {
    const [block, kind] = layerPlace(name);
    const value = layers[measure]?.[index];
    if (block === null || typeof value !== "number" || value <= 0) continue;
    if (!kinds.has(kind)) kinds.set(kind, { x: [], y: [], text: [] });
    const own = kinds.get(kind);
    own.x.push(block);
    own.y.push(value);
    own.text.push(name);
  }
  const colours = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#767676"];
  const symbols = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x"];
  const traces = [...kinds].map(([kind, own], index) => ({
    type: "scatter",
    mode: "lines+markers",
    name: inert(kind),
    ...own,
    text: own.text.map(inert),
    hovertemplate: `%{text}<br>${measure} %{y:.3g}<extra></extra>`,
    line: { width: 1, color: colours[index % colours.length] },
    marker: { size: 7, color: colours[index % colours.length], symbol: symbols[index % symbols.length] },
  }));
  const last = Math.max(0, ...traces.flatMap((trace) => trace.x));
  return {
    data: traces,
    layout: {
      xaxis: { title: { text: "decoder block" }, tick0: 0, dtick: Math.max(1, Math.ceil(last / 12)) },
      yaxis: { title: { text: `${measure} (log)` }, type: "log" },
    },
  };
}

/** Plotly reads some tags in names; as entities they are read as themselves. */
function inert(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function matrices(run) {
  const layers = run.layers;
  const kept = run.skipped.map(([name, why]) => el("li", {}, `${name}: ${why}`));
  const parts = [];
  if (layers.name) {
    if (layerFigure(layers).data.length) {
      parts.push(el("div", { class: "plot", role: "img", "aria-label": "Error of every matrix" }));
    }
    const names = Object.keys(layers);
    const headings = names.map((name) => (name === "name" ? "Matrix" : name));
    const rows = layers.name.map((_, index) => names.map((name) => text(layers[name][index])));
    const words = ["name", "shape", "scheme", "fallback"];
    const numeric = names.map((name, i) => (words.includes(name) ? -1 : i)).filter((i) => i >= 0);
    const details = el("details", rows.length > 60 ? {} : { open: "" });
    details.append(el("summary", {}, `All ${rows.length} matrices`));
    details.append(tableOf("Every matrix", headings, rows, numeric));
    parts.push(details);
  }
  if (kept.length) parts.push(el("p", {}, "Left in full precision:"), el("ul", {}, ...kept));
  const what = "Relative error is ‖W − Ŵ‖² / ‖W‖²; proxy loss tr(ΔHΔᵀ) / tr(WHWᵀ), where the " +
    "method collected a hessian H; damping the share of its mean diagonal that was added.";
  if (layers.name) parts.push(el("p", { class: "small" }, what));
  return parts.length ? [section("matrices", "Every matrix", ...parts)] : [];
}

function text(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  return Math.abs(value) >= 1e-3 || value === 0 ? String(value) : value.toExponential(2);
}

/* ---- answers ---- */

function answers(run) {
  const found = run.answers;
  if (found.why) return [section("answers", "Answers that changed", el("p", {}, found.why))];
  if (!found.tasks.length) return [];
  return [section("answers", "Answers that changed", el("div", { id: "answers" }))];
}

async function showAnswers(place, run) {
  const box = place.querySelector("#answers");
  if (!box) return;
  for (const task of run.answers.tasks) box.append(await taskAnswers(task));
}

async function taskAnswers(task) {
  if (task.why) return el("p", {}, el("b", {}, task.task), ` – not compared: ${task.why}.`);
  const counts = KINDS.filter(([kind]) => task.kinds[kind])
    .map(([kind, , words]) => `${task.kinds[kind]} ${words}`);
  const box = el("details", { class: "task" });
  const summary = `${task.n} questions: ${counts.join(", ") || "no answer changed"}`;
  box.append(el("summary", {}, el("b", {}, task.task), ` – ${summary}`));
  box.append(...task.notes.map((note) => el("p", { class: "small" }, note)));
  if (!task.items.length) return box;
  const reason = data.missing[task.texts];
  if (reason) box.append(el("p", { class: "small" }, reason));
  const fill = async () => {
    box.removeEventListener("toggle", fill);
    const texts = data.texts.includes(task.texts) ? JSON.parse(await unpack(task.texts)) : {};
    box.append(...task.items.map((item) => card(item, texts[item[0]])));
    if (task.rest) {
      box.append(el("p", { class: "small" }, `and ${task.rest} more; shown are those whose margin ` +
        "between the right and the best wrong option moved most."));
    }
  };
  box.addEventListener("toggle", fill);
  return box;
}

/** One question: its options with the score of both models, what each chose, and the right one. */
function card([doc, kind, gold, before, after, margins, scores], asked) {
  const [question, options] = asked ?? ["", null];
  const label = KINDS.find(([name]) => name === kind)?.[1] ?? kind;
  const rows = scores[0].map((own, index) => {
    const text = options ? options[index] : `option ${index + 1}`;
    const mark = (chosen, value) =>
      el("td", { class: chosen ? "number chosen" : "number" }, (chosen ? "➤ " : "") + score(value));
    return el(
      "tr",
      gold.includes(index) ? { class: "gold" } : {},
      el("th", { scope: "row" }, text, gold.includes(index) ? el("span", { class: "tag" }, "right") : null),
      mark(index === before, own),
      mark(index === after, scores[1][index]),
    );
  });
  const heads = ["Option", "full precision", "quantized"].map((name, index) =>
    el("th", { scope: "col", ...(index ? { class: "number" } : {}) }, name));
  const table = el("table", { class: "options" });
  table.append(el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...rows));
  const margin = `question ${doc} · margin of the right option ${margins.map(score).join(" → ")}`;
  const head = el("p", { class: "small" }, el("span", { class: `kind ${label}` }, label), ` ${margin}`);
  return el("article", { class: "item" }, head, question ? el("p", { class: "question" }, question) : null, table);
}

/** A log-probability, or a difference of two, in nats. */
function score(value) {
  if (typeof value !== "number") return String(value);
  return value.toFixed(Math.abs(value) < 1 ? 3 : 2).replace("-", "−");
}

/* ---- settings ---- */

function settings(run) {
  const groups = run.groups.map(([heading, pairs]) => {
    const list = el("dl", {});
    for (const [name, value] of pairs) list.append(el("dt", {}, name), el("dd", {}, value));
    return el("div", { class: "group" }, el("h3", {}, heading), list);
  });
  const notes = run.notes.map((note) => el("p", { class: "small" }, note));
  return section("settings", "Settings and environment", el("div", { class: "groups" }, ...groups), ...notes);
}
