"""What a report looks like, and what it does: values below the pointer, sorted columns, pictures that are wiped."""

STYLE = """
:root {
  --paper: #fff; --panel: #f6f7f9; --ink: #1c2127; --quiet: #57606a; --rule: #dde1e6; --accent: #1d5b9f;
  --bar: #cfe0f3; --line0: #1d5b9f; --line1: #b4540a; --line2: #2a7d46; --line3: #8a3fa0;
  --line4: #00788a; --line5: #a8325e; --cell: #000;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --panel: #1c2026; --ink: #e4e7eb; --quiet: #9da7b1; --rule: #2f353d; --accent: #79b4f2;
    --bar: #24456b; --line0: #79b4f2; --line1: #f0a15c; --line2: #7ccb93; --line3: #cf9be0;
    --line4: #63c6d6; --line5: #f08bb0; --cell: #fff;
  }
}
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 84rem;
  background: var(--paper); color: var(--ink); font: 0.9375rem/1.5 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: break-word;
}
h1, h2, h3 { line-height: 1.25; font-weight: 600; margin: 0; }
h1 { font-size: 1.75rem; }
h2 { font-size: 1.25rem; padding-top: 1.25rem; border-top: 1px solid var(--rule); margin: 3rem 0 1rem; }
h3 { font-size: 1rem; margin: 2rem 0 0.75rem; }
h3 small { display: inline-block; font-size: 0.875rem; font-weight: 400; color: var(--quiet); }
p { margin: 0 0 1rem; max-width: 46rem; color: var(--quiet); }
header p { margin: 0.25rem 0 1.5rem; }
a { color: var(--accent); text-underline-offset: 0.2em; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
nav { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; }
dl.scores { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 0 0 1.5rem; align-items: flex-end; }
dt { font-size: 0.8125rem; color: var(--quiet); }
dd { margin: 0; font-size: 1.375rem; line-height: 1.2; }
.scores div:first-child dd { font-size: 3rem; line-height: 1; font-weight: 600; letter-spacing: -0.02em; }
figure { margin: 0; min-width: 0; break-inside: avoid; }
.curves { display: grid; gap: 1.75rem 2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.curve figcaption { display: grid; grid-template-columns: 1fr auto; font-size: 0.8125rem; color: var(--quiet); }
.curve strong { font-size: 0.9375rem; font-weight: 600; color: var(--ink); }
.keys { grid-column: 1 / 3; display: flex; flex-wrap: wrap; gap: 0 0.875rem; }
.keys > ::before {
  content: ""; display: inline-block; width: 0.75rem; height: 0.1875rem; margin-right: 0.375rem;
  vertical-align: 0.25em; background: var(--color);
}
output { color: var(--ink); }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--quiet); }
svg polyline { fill: none; stroke: var(--color); stroke-width: 1.6; stroke-linejoin: round; }
svg circle { fill: var(--color); }
.rule { stroke: var(--rule); }
.pointer { stroke: var(--quiet); stroke-dasharray: 2 2; }
.line0 { --color: var(--line0); } .line1 { --color: var(--line1); } .line2 { --color: var(--line2); }
.line3 { --color: var(--line3); } .line4 { --color: var(--line4); } .line5 { --color: var(--line5); }
table { border-collapse: collapse; font-size: 0.875rem; }
th { font-weight: 400; text-align: left; }
.numbers td, .numbers th { padding: 0.25rem 0.75rem; border-bottom: 1px solid var(--rule); }
.numbers td, .numbers th:not(:first-child) { text-align: right; white-space: nowrap; }
.numbers th:first-child { padding-left: 0; }
.scrolled table { width: max-content; }
.scrolled th:first-child { position: sticky; left: 0; background: var(--paper); max-width: 12rem; }
.numbers thead th { color: var(--quiet); vertical-align: bottom; }
.numbers tfoot :is(th, td) { font-weight: 600; border-bottom: 0; }
.numbers .bar {
  min-width: 10rem; padding-left: 0;
  background: linear-gradient(var(--bar) 0 0) no-repeat left / calc((100% - 4.5rem) * var(--share, 0)) 0.75rem;
}
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
[aria-sort="ascending"] button::after { content: " \\2191"; }
[aria-sort="descending"] button::after { content: " \\2193"; }
.beside { display: flex; flex-wrap: wrap; gap: 2rem 4rem; align-items: flex-start; }
.scrolled { overflow-x: auto; max-width: 100%; }
.swatch { display: inline-block; width: 0.75rem; height: 0.75rem; margin-right: 0.5rem; border-radius: 2px; }
.swatch { box-shadow: 0 0 0 1px var(--rule); }
.wrong { background: #de2d26; } .ignored { background: #969696; }
.matrix { font-size: 0.8125rem; }
.matrix td { min-width: 2.25rem; height: 1.875rem; padding: 0; text-align: center; color: var(--cell); }
.matrix tbody td {
  border: 1px solid var(--paper); background: linear-gradient(rgb(27 79 138 / var(--share, 0)) 0 0) var(--panel);
}
.matrix .high { color: #fff; }
.matrix th { padding-right: 0.75rem; }
.matrix thead th { padding: 0 0 0.5rem; vertical-align: bottom; }
.matrix thead span {
  display: block; margin: auto; max-height: 12rem; writing-mode: vertical-rl; transform: rotate(180deg);
}
.legend {
  display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; list-style: none; margin: 0; padding: 0; font-size: 0.875rem;
}
.tiles { display: grid; gap: 1rem 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
.tiles figcaption { font-size: 0.8125rem; color: var(--quiet); margin-bottom: 0.25rem; }
img { display: block; width: 100%; height: auto; border-radius: 3px; background: var(--panel); }
.wipe { position: relative; touch-action: pan-y; --at: 0%; }
.wipe .over { position: absolute; inset: 0; clip-path: inset(0 calc(100% - var(--at)) 0 0); }
.wipe.on { cursor: ew-resize; }
.wipe.on::after {
  content: ""; position: absolute; inset: 0 auto 0 var(--at); width: 2px; margin-left: -1px; background: #fff;
  box-shadow: 0 0 2px #000;
}
label:not([hidden]) {
  display: flex; align-items: center; gap: 0.75rem; margin-top: 0.375rem; font-size: 0.8125rem; color: var(--quiet);
}
input { flex: 1; min-width: 0; margin: 0; accent-color: var(--accent); }
.scale { display: inline-block; width: 8rem; height: 0.75rem; border-radius: 2px; vertical-align: -0.0625rem; }
.options { columns: 19rem; column-gap: 3rem; }
.options table { width: 100%; break-inside: avoid; margin-bottom: 1.5rem; }
caption { text-align: left; font-weight: 600; padding-bottom: 0.25rem; }
.options :is(th, td) { padding: 0.1875rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
.options th { color: var(--quiet); padding-right: 1rem; }
.options td { text-align: right; overflow-wrap: anywhere; }
.files { display: grid; grid-template-columns: minmax(8rem, 14rem) minmax(0, 1fr); gap: 0.5rem 1.5rem; margin: 0; }
.files dt, .files dd { font-size: 0.875rem; line-height: 1.5; }
.files dd { display: flex; flex-wrap: wrap; gap: 0 1.5rem; }
.files small { font-size: inherit; color: var(--quiet); }
@media (max-width: 40rem) {
  .files { display: block; }
  .files dd { margin-bottom: 0.75rem; }
  .numbers .bar { min-width: 7rem; }
}
@media print {
  body { padding: 0; max-width: none; font-size: 10pt; }
  nav, label:not([hidden]), .over, .wipe.on::after { display: none; }
  .curves, .tiles { grid-template-columns: 1fr 1fr; }
  .scrolled { overflow: visible; }
  article { break-inside: avoid; }
  .bar, .matrix td, .swatch, .scale, .keys ::before { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  h2, h3, h2 + p, .legend { break-after: avoid; }
}
"""

SCRIPT = """
"use strict";
for (const curve of document.querySelectorAll(".curve")) {
  const svg = curve.querySelector("svg"), pointer = svg.querySelector(".pointer");
  const lines = [...svg.querySelectorAll("polyline")], outputs = [...curve.querySelectorAll("output")];
  const last = outputs.map((output) => output.value);
  const show = (texts) => outputs.forEach((output, i) => { output.value = texts[i]; });
  svg.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const nearest = lines.map((line) => {
      const places = [...line.points].map((point) => Math.abs(point.x - at));
      return places.indexOf(Math.min(...places));
    });
    const texts = lines.map((line, i) => line.dataset.values.split(" ")[nearest[i]]);
    const x = lines[0].points[nearest[0]].x;
    pointer.setAttribute("x1", x);
    pointer.setAttribute("x2", x);
    pointer.setAttribute("visibility", "visible");
    show([lines[0].dataset.steps.split(" ")[nearest[0]], ...texts]);
  });
  svg.addEventListener("pointerleave", () => { pointer.setAttribute("visibility", "hidden"); show(last); });
}
for (const header of document.querySelectorAll(".sortable thead th")) {
  const button = document.createElement("button");
  button.append(...header.childNodes);
  header.append(button);
  button.addEventListener("click", () => {
    const body = header.closest("table").tBodies[0], column = header.cellIndex;
    const now = header.getAttribute("aria-sort"), up = now ? now === "descending" : column === 0, order = up ? 1 : -1;
    for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[column].textContent;
    body.append(...[...body.rows].sort((a, b) => order * key(a).localeCompare(key(b), undefined, { numeric: true })));
  });
}
for (const wipe of document.querySelectorAll(".wipe")) {
  const figure = wipe.closest("figure"), slider = figure.querySelector("input");
  const over = figure.previousElementSibling.querySelector("img").cloneNode();
  over.className = "over";
  over.alt = "";
  wipe.append(over);
  wipe.classList.add("on");
  slider.closest("label").hidden = false;
  const move = () => {
    wipe.style.setProperty("--at", slider.value + "%");
    slider.setAttribute("aria-valuetext", slider.value + " % ground truth");
  };
  const drag = (event) => {
    const box = wipe.getBoundingClientRect();
    slider.value = 100 * (event.clientX - box.left) / box.width;
    move();
  };
  slider.addEventListener("input", move);
  wipe.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    wipe.setPointerCapture(event.pointerId);
    drag(event);
  });
  wipe.addEventListener("pointermove", (event) => { if (event.buttons) drag(event); });
  move();
}
"""
