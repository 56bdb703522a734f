"use strict";
// Run inside a report's page, behind its own script: looks at every state of the page, and tells the page around it what it found.
{
  const found = { width: window.innerWidth, dark: matchMedia("(prefers-color-scheme: dark)").matches, faults: [], texts: 0, states: 0 };

  const fault = (state, words) => {
    if (found.faults.length < 40) found.faults.push(state + ": " + words);
  };

  const textBoxes = () => {
    const boxes = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const node = walker.currentNode;
      const parent = node.parentElement;
      if (!node.data.trim() || parent.closest("script, style, title") || !parent.checkVisibility()) continue;
      if (parent.closest("thead")?.getBoundingClientRect().width <= 1) continue; // for screen readers alone
      const range = document.createRange();
      range.selectNodeContents(node);
      for (const box of range.getClientRects()) {
        if (box.width > 0 && box.right > 0) boxes.push({ box, text: node.data.trim().slice(0, 40), parent });
      }
    }
    return boxes;
  };

  const checkOverlaps = (state) => {
    const boxes = textBoxes().sort((one, other) => one.box.top - other.box.top);
    found.texts = Math.max(found.texts, boxes.length);
    for (let i = 0; i < boxes.length; i++) {
      const one = boxes[i].box;
      for (let j = i + 1; j < boxes.length && boxes[j].box.top < one.bottom; j++) {
        const other = boxes[j].box;
        const wide = Math.min(one.right, other.right) - Math.max(one.left, other.left);
        const high = Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top);
        // The box of a line is higher than its letters: a quarter may lie over the next.
        if (wide > 1 && high > 0.25 * Math.min(one.height, other.height)) {
          fault(state, `"${boxes[i].text}" and "${boxes[j].text}" overlap`);
        }
      }
    }
  };

  const checkWidths = (state) => {
    const root = document.documentElement;
    if (root.scrollWidth > root.clientWidth) fault(state, `the page is ${root.scrollWidth} wide, of ${root.clientWidth}`);
    for (const cell of document.querySelectorAll("th, td, li, p, dd, figure, summary")) {
      if (cell.checkVisibility() && cell.clientWidth > 1 && cell.scrollWidth > cell.clientWidth + 1) {
        fault(state, `"${cell.textContent.trim().slice(0, 40)}" is cut`);
      }
    }
  };

  const checkAxes = (state) => {
    for (const tick of document.querySelectorAll(".x-axis span, .y-axis span")) {
      const size = parseFloat(getComputedStyle(tick).fontSize);
      if (tick.getBoundingClientRect().height > 1.5 * size) fault(state, `tick ${tick.textContent} is broken`);
    }
  };

  const luminance = (colour) => {
    const [red, green, blue] = colour.match(/[\d.]+/g).slice(0, 3).map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };

  const background = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if (!/, 0\)$/.test(colour)) return colour;
    }
    return "rgb(255, 255, 255)";
  };

  const contrast = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };

  // WCAG 2.2: 4.5 for text (1.4.3), 3 for what is drawn (1.4.11).
  const checkContrast = (state) => {
    for (const { parent, text } of textBoxes()) {
      const ratio = contrast(getComputedStyle(parent).color, background(parent));
      if (ratio < 4.5) fault(state, `"${text}" has a contrast of ${ratio.toFixed(2)}`);
    }
    for (const line of document.querySelectorAll(".plot .line")) {
      if (!line.closest(".panel").checkVisibility()) continue;
      const behind = [background(line.closest(".plot")), ...Array.from(line.closest("svg").querySelectorAll(".shade:not(.phase-optimizer)"), (shade) => getComputedStyle(shade).fill)];
      for (const colour of behind) {
        const ratio = contrast(getComputedStyle(line).stroke, colour);
        if (ratio < 3) fault(state, `line ${line.classList} has a contrast of ${ratio.toFixed(2)} on ${colour}`);
      }
    }
  };

  const checkMeaning = () => {
    const state = "meaning";
    for (const wanted of ["header", "nav[aria-label]", "main", "footer", "h1", "html[lang]", "a.skip"]) {
      if (document.querySelectorAll(wanted).length !== 1) fault(state, `expected one ${wanted}`);
    }
    let level = 0;
    for (const heading of document.querySelectorAll("h1, h2, h3, h4")) {
      const own = Number(heading.tagName[1]);
      if (own > level + 1) fault(state, `heading "${heading.textContent}" skips a level`);
      level = own;
    }
    for (const section of document.querySelectorAll("section")) {
      if (!document.getElementById(section.getAttribute("aria-labelledby"))) fault(state, "a section has no name");
    }
    for (const table of document.querySelectorAll("table")) {
      if (!table.caption?.textContent) fault(state, "a table has no caption");
      if (table.querySelector("thead th:not([scope=col])")) fault(state, "a column header has no scope");
      for (const row of table.tBodies[0].rows) {
        if (!row.querySelector("th[scope=row]")) fault(state, "a row has no header");
      }
    }
    for (const field of document.querySelectorAll("input")) {
      if (!field.labels.length && !field.getAttribute("aria-label")) fault(state, `${field.type} has no label`);
    }
    for (const drawing of document.querySelectorAll("svg")) {
      if (drawing.getAttribute("role") !== "img" || !drawing.getAttribute("aria-label")) fault(state, "a drawing has no words");
    }
    for (const link of document.querySelectorAll("a[href^='#']")) {
      if (!document.querySelector(link.getAttribute("href"))) fault(state, `${link.getAttribute("href")} leads nowhere`);
    }
    const ids = Array.from(document.querySelectorAll("[id]"), (each) => each.id);
    if (new Set(ids).size < ids.length) fault(state, "an id occurs twice");
  };

  const checkKeyboard = () => {
    const state = "keyboard";
    if (document.querySelector("[tabindex]:not([tabindex='0']):not([tabindex='-1'])")) fault(state, "the order of focus is changed");
    let before = null;
    for (const each of document.querySelectorAll("a[href], summary, input")) {
      if (!each.checkVisibility()) continue;
      each.focus();
      if (document.activeElement !== each) fault(state, `${each.outerHTML.slice(0, 80)} takes no focus`);
      if (before && !(before.compareDocumentPosition(each) & Node.DOCUMENT_POSITION_FOLLOWING)) fault(state, "the order of focus jumps");
      before = each;
    }
    document.activeElement.blur();
    for (const panel of document.querySelectorAll("div.panel")) {
      if (!panel.checkVisibility()) continue;
      const slider = panel.querySelector("input[type=range]");
      const output = panel.querySelector("output");
      const shown = [];
      for (const value of ["0", slider.max]) {
        slider.value = value;
        slider.dispatchEvent(new Event("input", { bubbles: true }));
        shown.push(output.textContent);
        if (!slider.getAttribute("aria-valuetext").includes(" s")) fault(state, "a slider does not say its instant");
      }
      if (shown[0] === shown[1]) fault(state, "a slider changes nothing");
      const plot = panel.querySelector(".plot");
      const box = plot.getBoundingClientRect();
      plot.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, bubbles: true }));
      if (Math.abs(slider.value - slider.max / 2) > 1) fault(state, "a pointer in the middle of a chart is elsewhere");
    }
  };

  const checkSearch = () => {
    for (const list of document.querySelectorAll("details.tensors")) {
      const search = list.querySelector("input[type=search]");
      const rows = Array.from(list.querySelectorAll("tbody tr"));
      const wanted = rows[0].querySelector("th").textContent.toUpperCase();
      search.value = wanted;
      search.dispatchEvent(new Event("input", { bubbles: true }));
      const left = rows.filter((row) => row.checkVisibility());
      if (!left.includes(rows[0]) || left.length === rows.length) fault("search", `${left.length} of ${rows.length} rows are left`);
      if (!list.querySelector(".count").textContent.startsWith(`${left.length} of ${rows.length}`)) fault("search", "the count is wrong");
      search.value = "";
      search.dispatchEvent(new Event("input", { bubbles: true }));
      if (rows.some((row) => !row.checkVisibility())) fault("search", "rows stay hidden");
    }
  };

  const look = (state) => {
    found.states += 1;
    checkOverlaps(state);
    checkWidths(state);
    checkAxes(state);
    checkContrast(state);
  };

  try {
    look("at first");
    checkMeaning();
    for (const part of document.querySelectorAll("details")) part.open = true;
    look("opened");
    checkKeyboard();
    checkSearch();
    for (const choice of document.querySelectorAll("input[name=figure]")) {
      choice.click();
      const shown = new Set(Array.from(document.querySelectorAll("figure > .panel"), (panel) => panel.checkVisibility() && panel.dataset.figure));
      shown.delete(false);
      if (shown.size !== 1 || !shown.has(choice.value)) fault(choice.value, `charts of ${[...shown]} are shown`);
      look(choice.value);
    }
    document.querySelector("input[name=figure]")?.click();
    for (const part of document.querySelectorAll("details")) part.open = false;
    scrollTo(0, 0);
  } catch (error) {
    fault("the checks", String(error));
  }
  found.title = document.title;
  parent.postMessage(JSON.stringify(found).replaceAll("<", "\\u003c"), "*");
}
