"use strict";
// Without this script the page shows everything but other figures than the first, and other instants than the peak.
document.documentElement.classList.add("has-script");

const TENTHS = 10; // of a MiB, in which values are given

function bytesInWords(tenths) {
  if (tenths === null) return "-";
  const mib = tenths / TENTHS;
  if (Math.abs(mib) >= 4096) {
    return (mib / 1024).toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 }) + " GiB";
  }
  if (mib !== 0 && Math.abs(mib) < 10) return mib.toFixed(1) + " MiB";
  return Math.round(mib).toLocaleString("en") + " MiB";
}

function secondsInWords(seconds) {
  return seconds >= 100 ? seconds.toFixed(0) : seconds.toFixed(seconds >= 10 ? 1 : 2);
}

function part(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function follow(panel) {
  const data = JSON.parse(panel.querySelector("script").textContent);
  const slider = panel.querySelector("input[type=range]");
  const plot = panel.querySelector(".plot");
  const cursor = panel.querySelector(".cursor");
  const output = panel.querySelector("output");
  const last = Number(slider.max);

  function show() {
    const at = Number(slider.value);
    const seconds = (data.end * at) / last;
    const inside = data.phases.filter(([, start, stop]) => start <= seconds && seconds <= stop).map(([name]) => name);
    const heading = secondsInWords(seconds) + " s" + (inside.length ? ", " + inside.join(" \u203a ") : "");
    const list = part("ul");
    for (const line of data.lines) {
      const entry = part("li");
      const key = part("span", "key line " + line.style);
      key.setAttribute("aria-hidden", "true");
      entry.append(key, line.name + " ", part("b", "", bytesInWords(line.values[at])));
      list.append(entry);
    }
    output.replaceChildren(part("span", "when", heading), list);
    slider.setAttribute(
      "aria-valuetext",
      heading + ": " + data.lines.map((line) => line.name + " " + bytesInWords(line.values[at])).join(", ")
    );
    cursor.hidden = false;
    cursor.style.left = (100 * at) / last + "%";
  }

  function point(event) {
    const box = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    slider.value = String(Math.round(share * last));
    show();
  }

  slider.addEventListener("input", show);
  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  show();
}

for (const panel of document.querySelectorAll("div.panel")) follow(panel);

for (const choice of document.querySelectorAll("input[name=figure]")) {
  choice.addEventListener("change", () => {
    document.querySelector(".charts").dataset.shown = choice.value;
  });
  // A browser that comes back to the page may have kept another choice than the first.
  if (choice.checked) document.querySelector(".charts").dataset.shown = choice.value;
}

for (const list of document.querySelectorAll("details.tensors")) {
  const search = list.querySelector("input[type=search]");
  const count = list.querySelector(".count");
  const whole = count.textContent;
  const rows = Array.from(list.querySelectorAll("tbody tr"), (row) => [row, row.textContent.toLowerCase()]);
  search.addEventListener("input", () => {
    const wanted = search.value.trim().toLowerCase();
    let found = 0;
    for (const [row, text] of rows) {
      row.hidden = !text.includes(wanted);
      if (!row.hidden) found += 1;
    }
    count.textContent = wanted ? found + " of " + rows.length + " tensors have it." : whole;
  });
}
