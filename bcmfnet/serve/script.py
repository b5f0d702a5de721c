"""What the page does: it sends an image, and draws the answer over it."""

SCRIPT = """
"use strict";
const get = (id) => document.getElementById(id);
const [before, after, view, probe, slider, told, status, drop, file, result] =
  ["before", "after", "view", "probe", "slider", "told", "status", "drop", "file", "result"].map(get);
const boxes = [...document.querySelectorAll("[data-class]")];
const names = boxes.map((box) => box.closest("label").children[2].textContent);
let labels = null, confidence = null, place = null, latest = 0;

const say = (text, failed = false) => { status.textContent = text; status.classList.toggle("failed", failed); };

async function pixels(base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const options = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const bitmap = await createImageBitmap(new Blob([bytes], { type: "image/png" }), options);
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const data = context.getImageData(0, 0, bitmap.width, bitmap.height).data;
  return Uint8Array.from({ length: data.length / 4 }, (_, i) => data[4 * i]);
}

function draw() {
  const { width, height } = after, context = after.getContext("2d");
  const picture = context.createImageData(width, height), words = new Uint32Array(picture.data.buffer);
  const colors = boxes.map((box) => {
    const rgb = parseInt(box.dataset.color.slice(1), 16);
    return box.checked ? (0xa6 << 24 | (rgb & 255) << 16 | (rgb >> 8 & 255) << 8 | rgb >> 16) >>> 0 : 0;
  });
  for (let i = 0; i < words.length; i++) words[i] = colors[labels[i]];
  context.putImageData(picture, 0, 0);
}

function tell() {
  if (!place) return;
  const at = place[1] * after.width + place[0];
  const sure = confidence ? `, ${confidence[at]} % sure` : "";
  told.value = `${names[labels[at]]}${sure} at ${place[0]}, ${place[1]}`;
}

function point(x, y, marked) {
  const within = (value, size) => Math.min(Math.max(Math.floor(value), 0), size - 1);
  place = [within(x, after.width), within(y, after.height)];
  probe.hidden = !marked;
  probe.style.left = 100 * (place[0] + 0.5) / after.width + "%";
  probe.style.top = 100 * (place[1] + 0.5) / after.height + "%";
  tell();
}

async function show(image) {
  if (!image) return;
  const mine = ++latest, start = performance.now();
  say(`Segmenting ${image.name} ...`);
  try {
    const answered = await fetch("predict?maps=true", {
      method: "POST", body: image, headers: { "Content-Type": image.type || "application/octet-stream" },
    });
    const answer = await answered.json();
    if (!answered.ok) throw new Error(answer.detail);
    const maps = await Promise.all([answer.maps.labels, answer.maps.confidence].map((map) => map && pixels(map)));
    const bitmap = await createImageBitmap(image).catch(() => null);
    if (mine !== latest) return;
    [labels, confidence] = maps;
    for (const canvas of [before, after]) { canvas.width = answer.width; canvas.height = answer.height; }
    if (bitmap) before.getContext("2d").drawImage(bitmap, 0, 0, answer.width, answer.height);
    boxes.forEach((box, i) => {
      const { share } = answer.classes[i], label = box.closest("label");
      label.children[3].textContent = share ? (100 * share).toFixed(1) + " %" : "";
      box.closest("li").hidden = !share;
    });
    place = null;
    probe.hidden = true;
    told.value = "Point at the image, or use the arrow keys on it: its class is told here.";
    result.hidden = false;
    draw();
    const seconds = ((performance.now() - start) / 1000).toFixed(2);
    const unseen = bitmap ? "" : " This browser cannot show the image itself.";
    say(`${image.name}: ${answer.width} x ${answer.height} pixels in ${seconds} s.${unseen}`);
  } catch (error) {
    if (mine === latest) say(`${image.name}: ${error.message}`, true);
  }
}

const wipe = () => {
  view.style.setProperty("--at", slider.value + "%");
  slider.setAttribute("aria-valuetext", slider.value + " % bare image");
};
const at = (event) => {
  const box = view.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
};
slider.addEventListener("input", wipe);
view.addEventListener("pointermove", (event) => {
  const [x, y] = at(event);
  point(x * after.width, y * after.height, false);
  if (event.buttons) { slider.value = 100 * x; wipe(); }
});
view.addEventListener("pointerdown", (event) => {
  const [x, y] = at(event);
  view.setPointerCapture(event.pointerId);
  if (event.pointerType === "mouse") { slider.value = 100 * x; wipe(); }
  point(x * after.width, y * after.height, true);
});
view.addEventListener("keydown", (event) => {
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!moves) return;
  event.preventDefault();
  const step = event.shiftKey ? 1 : Math.max(1, Math.round(after.width / 64));
  const [x, y] = place || [after.width >> 1, after.height >> 1];
  point(x + step * moves[0], y + step * moves[1], true);
});
const check = (checked) => { for (const box of boxes) box.checked = checked; draw(); };
get("all").addEventListener("click", () => check(true));
get("none").addEventListener("click", () => check(false));
for (const box of boxes) box.addEventListener("change", draw);
file.addEventListener("change", () => show(file.files[0]));
document.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
document.addEventListener("dragleave", () => drop.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  show(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => show(event.clipboardData.files[0]));
wipe();
"""
