"use strict";
/* The page's own script: sorting and filtering the table, the plot, going to a run and back.
   Text reaches the page as text nodes only; nothing is fetched. */

const data = JSON.parse(document.getElementById("data").textContent);

/** An element with attributes and children; strings become text. */
function el(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** The data of a packed block. */
async function unpack(name) {
  const blocks = document.querySelectorAll("script[data-block]");
  const block = [...blocks].find((found) => found.dataset.block === name);
  const bytes = Uint8Array.from(atob(block.textContent), (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return await new Response(stream).text();
}

/* ---- tables ---- */

/** The number a text begins with: "−14.0", "2.06 ± 0.06", "1,293", "±0.19", "inf (diverged)". */
function numberIn(text) {
  const plain = text.trim().replace(/^±/, "").replace("−", "-").replaceAll(",", "");
  const value = parseFloat(plain.replace(/^([+-]?)inf.*$/i, "$1Infinity"));
  return Number.isNaN(value) ? null : value;
}

function sortKey(cell, numeric) {
  return numeric ? numberIn(cell.dataset.v ?? cell.textContent) : cell.textContent;
}

/** Sort by a column; what has no number stays last whichever way. */
function sortRows(table, index, direction) {
  const body = table.tBodies[0];
  table.classList.toggle("sorted", direction !== "none");
  const heading = table.tHead.rows[0].cells[index];
  const numeric = heading.classList.contains("number");
  const rows = [...body.rows];
  for (const [place, row] of rows.entries()) row.dataset.place ??= place;
  const keys = new Map(rows.map((row) => [row, sortKey(row.cells[index], numeric)]));
  const sign = direction === "descending" ? -1 : 1;
  const collator = new Intl.Collator("en", { numeric: true });
  rows.sort((a, b) => {
    const [x, y] = [keys.get(a), keys.get(b)];
    const original = a.dataset.place - b.dataset.place;
    if (direction === "none") return original;
    if (x === null || y === null) return (x === null) - (y === null) || original;
    const order = numeric ? (x === y ? 0 : x < y ? -1 : 1) : collator.compare(x, y);
    return sign * order || original;
  });
  body.append(...rows);
}

/** Headings become buttons: up, down, and back to the table's own order. */
function makeSortable(table) {
  const headings = [...table.tHead.rows[0].cells];
  for (const [index, heading] of headings.entries()) {
    const notes = [...heading.querySelectorAll("sup")];
    const button = el("button", { type: "button" });
    button.append(...[...heading.childNodes].filter((node) => !notes.includes(node)));
    heading.replaceChildren(button, ...notes);
    heading.dataset.label = button.innerText; // printed instead: headings of later pages lose buttons
    const first = heading.classList.contains("number") ? "descending" : "ascending";
    const second = first === "ascending" ? "descending" : "ascending";
    button.addEventListener("click", () => {
      const before = heading.getAttribute("aria-sort");
      const next = before === first ? second : before === second ? "none" : first;
      for (const other of headings) other.removeAttribute("aria-sort");
      if (next !== "none") heading.setAttribute("aria-sort", next);
      sortRows(table, index, next);
    });
  }
}

function makeFilters() {
  const form = document.getElementById("filters");
  const rows = [...document.getElementById("table-rows").tBodies[0].rows];
  const names = ["checkpoint", "method", "width"];
  for (const name of names) {
    const values = [...new Set(rows.map((row) => row.dataset[name]))].filter((value) => value);
    form.elements[name].append(...values.map((value) => el("option", { value }, value)));
  }
  const texts = new Map();
  const apply = () => {
    const words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      if (!texts.has(row)) texts.set(row, row.textContent.toLowerCase());
      const fits =
        names.every((name) => ["", row.dataset[name]].includes(form.elements[name].value)) &&
        words.every((word) => texts.get(row).includes(word));
      row.hidden = !fits;
      count += fits;
    }
    const all = count === rows.length ? `${count} rows` : `${count} of ${rows.length} rows`;
    document.getElementById("count").textContent = all;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply));
  form.hidden = false;
  apply();
}

/* ---- plots ---- */

let library = null;

/** plotly.js, unpacked when the first plot is wanted. */
function plotly() {
  library ??= unpack("plotly").then((source) => {
    const script = document.createElement("script");
    script.textContent = source;
    document.head.append(script);
    return window.Plotly;
  });
  return library;
}

/** Draw into a place; colours of text and axes come from the style sheet. */
async function draw(place, figure, onPoint) {
  const Plotly = await plotly();
  const narrow = place.clientWidth < 520;
  const axis = { zeroline: false, fixedrange: narrow, tickangle: 0 };
  // the legend's room is worked out here: left to itself, plotly moves axis titles under it
  const named = figure.data.filter((trace) => trace.showlegend !== false);
  const longest = Math.max(...named.map((trace) => trace.name.length));
  const columns = Math.max(1, Math.floor((place.clientWidth - 76) / (7.5 * longest + 56)));
  const legend = 21 * Math.ceil(named.length / columns) + 10;
  const area = narrow ? 300 : 350;
  const across = { ...figure.layout.xaxis.title, standoff: 8 };
  const layout = {
    ...figure.layout,
    height: 12 + area + 60 + legend,
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    font: { family: "system-ui, sans-serif", size: 13 },
    margin: { l: 64, r: 12, t: 12, b: 60 + legend, autoexpand: false },
    legend: { orientation: "h", y: -58 / area, yanchor: "top", x: 0, entrywidth: 7.5 * longest },
    hoverlabel: { bgcolor: "#222", bordercolor: "#222", font: { color: "#fff" } },
    dragmode: narrow ? false : "zoom",
    xaxis: { ...axis, ...figure.layout.xaxis, title: across },
    yaxis: { ...axis, ...figure.layout.yaxis },
  };
  const settings = { responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover" };
  settings.modeBarButtonsToRemove = ["select2d", "lasso2d", "autoScale2d"];
  await Plotly.react(place, structuredClone(figure.data), layout, settings);
  place.removeAllListeners?.("plotly_click");
  if (onPoint) place.on("plotly_click", (event) => onPoint(event.points[0]));
}

function makePlot() {
  const place = document.getElementById("plot");
  if (!place) return;
  const [label, axis] = ["plot-label", "plot-axis"].map((id) => document.getElementById(id));
  const distinct = (name) => [...new Set(data.figures.map((figure) => figure[name]))];
  label.append(...distinct("label").map((text) => el("option", {}, text)));
  axis.append(...distinct("axis").map((text) => el("option", {}, text)));
  const show = async () => {
    const shown = data.figures.find((f) => f.label === label.value && f.axis === axis.value);
    const caption = document.getElementById("plot-caption");
    if (!shown) {
      caption.textContent = "Not drawn: no run has these numbers.";
      return;
    }
    const lines = [...shown.caption, "Hollow: 16-bit activations. A point opens its run."];
    caption.textContent = lines.join(" ");
    place.setAttribute("aria-label", `${label.value} against ${axis.value}`);
    await draw(place, shown.figure, (point) => {
      if (point.customdata) location.hash = point.customdata;
    });
  };
  label.addEventListener("change", show);
  axis.addEventListener("change", show);
  document.getElementById("plot-controls").hidden = false;
  const seen = new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting)) {
      seen.disconnect();
      show();
    }
  });
  seen.observe(place);
}

/* ---- where we are ---- */

let here = ""; // the anchor of the run that is shown
let kept = 0; // how far down the reader was before
let asked = false; // whether a link was followed, rather than the way back

/** Show the run that the address names, or everything else. */
async function go() {
  let anchor = location.hash.slice(1);
  try {
    anchor = decodeURIComponent(anchor);
  } catch { /* an address cut off within a letter names nothing here */ }
  const known = Object.hasOwn(data.runs, anchor);
  const [all, run] = ["all", "run"].map((id) => document.getElementById(id));
  const target = asked && anchor ? document.getElementById(anchor) : null;
  const leaving = here !== "" && !known;
  asked = false;
  all.hidden = known;
  run.hidden = !known;
  here = known ? anchor : "";
  if (!known) {
    document.title = data.title;
    run.replaceChildren();
    if (leaving && target) target.scrollIntoView();
    else if (leaving) window.scrollTo(0, kept);
    return;
  }
  await showRun(run, anchor);
  document.title = `${run.querySelector("h1")?.textContent ?? anchor} – ${data.title}`;
  window.scrollTo(0, 0);
  run.focus({ preventScroll: true });
}

window.addEventListener("scroll", () => {
  if (here === "") kept = window.scrollY;
}, { passive: true });
document.addEventListener("click", (event) => {
  asked = Boolean(event.target.closest("a[href^='#']"));
});
window.addEventListener("hashchange", go);
window.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.sheet")) makeSortable(table);
  makeFilters();
  makePlot();
  go();
});
