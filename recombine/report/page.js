"use strict";
// What a reader without scripts does not need: the theme, sorting, filtering, copying.

function make(name, properties) {
  return Object.assign(document.createElement(name), properties);
}

function theme() {
  const root = document.documentElement;
  const button = make("button", { className: "theme", type: "button" });
  const show = (dark) => {
    button.textContent = dark ? "Light" : "Dark";
    button.setAttribute("aria-label", dark ? "Switch to light colours" : "Switch to dark colours");
  };
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  try { // a browser may keep nothing for a local file
    const kept = localStorage.getItem("theme");
    if (kept) root.dataset.theme = kept;
  } catch {}
  button.onclick = () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    show(isDark());
    try { localStorage.setItem("theme", root.dataset.theme); } catch {}
  };
  system.onchange = () => show(isDark());
  show(isDark());
  document.querySelector("header h1").after(button);
}

// A cell's value: a number, text, or null where there is none, which sorts last whatever the direction.
function valueOf(row, i) {
  const cell = row.cells[i];
  if (cell.classList.contains("missing")) return null;
  const text = cell.dataset.value ?? cell.textContent.trim();
  return text !== "" && Number.isFinite(Number(text)) ? Number(text) : text || null;
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), undefined, { numeric: true });
}

// First click: the best first, or upwards where nothing is best; second: the other way; third: as it was.
function sortable(table) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, i) => {
    const button = make("button", { type: "button", textContent: head.textContent });
    head.replaceChildren(button);
    const first = head.dataset.best === "max" ? "descending" : "ascending";
    const second = first === "ascending" ? "descending" : "ascending";
    button.onclick = () => {
      const before = head.getAttribute("aria-sort");
      const now = before === null ? first : before === first ? second : null;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      let rows = original;
      if (now) {
        head.setAttribute("aria-sort", now);
        const sign = now === "ascending" ? 1 : -1;
        const keyed = original.map((row) => [valueOf(row, i), row]);
        keyed.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b)));
        rows = keyed.map(([, row]) => row);
      }
      body.append(...rows);
    };
  });
}

// Shows the rows that hold every word; in the index also only their experiments.
function filterable(table) {
  const rows = [...table.tBodies[0].rows];
  if (rows.length < 3) return;
  const name = table.caption.textContent;
  const input = make("input", { type: "search", placeholder: "Filter rows", ariaLabel: `Filter the rows of ${name}` });
  const count = make("output", { ariaLive: "polite" });
  const tools = make("div", { className: "tools" });
  input.oninput = () => {
    const words = input.value.toLocaleLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLocaleLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      const target = row.querySelector('a[href^="#"]');
      if (target) document.getElementById(decodeURIComponent(target.hash.slice(1))).hidden = row.hidden;
    }
    count.textContent = words.length ? `${rows.filter((row) => !row.hidden).length} of ${rows.length}` : "";
  };
  tools.append(input, count);
  table.closest(".sheet").before(tools);
}

function copyable(code) {
  const button = make("button", { className: "copy", type: "button", textContent: "Copy" });
  button.setAttribute("aria-label", `Copy ${code.textContent}`);
  button.onclick = async () => {
    getSelection().selectAllChildren(code);
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch { // not allowed here: it is selected
      button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  };
  if (code.closest(".each")) code.before(button);
  else code.after(button);
}

theme();
document.querySelectorAll("table").forEach((table) => {
  sortable(table);
  filterable(table);
});
document.querySelectorAll("code.command").forEach(copyable);
