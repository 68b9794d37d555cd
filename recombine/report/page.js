"use strict";
// What a reader without scripts does not need: the theme, sorting, filtering, comparing, copying.

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

// A box that calls `show` with a test of texts: whether they hold every word in it.
function box(placeholder, label, show) {
  const input = make("input", { type: "search", placeholder, ariaLabel: label });
  const count = make("output", { ariaLive: "polite" });
  const tools = make("div", { className: "tools" });
  input.oninput = () => {
    const words = input.value.toLocaleLowerCase().split(/\s+/).filter(Boolean);
    const [some, all] = show((text) => words.every((word) => text.toLocaleLowerCase().includes(word)));
    count.textContent = words.length ? `${some} of ${all}` : "";
  };
  tools.append(input, count);
  return tools;
}

// Of a long table, the rows that hold every word.
function filterable(table) {
  const rows = [...table.tBodies[0].rows];
  if (rows.length < 8) return;
  table.closest(".sheet").before(box("Filter rows", `Filter the rows of ${table.caption.textContent}`, (fits) => {
    for (const row of rows) row.hidden = !fits([...row.cells].map((cell) => cell.textContent).join(" "));
    return [rows.filter((row) => !row.hidden).length, rows.length];
  }));
}

// The experiments whose card holds every word; of the others nothing is shown.
function searchable(cards) {
  const all = [...cards.children];
  cards.before(box("Filter experiments", "Filter the experiments", (fits) => {
    const kept = new Map(all.map((card) => [card.dataset.of, fits(`${card.dataset.of} ${card.textContent}`)]));
    document.querySelectorAll("[data-of]").forEach((part) => {
      part.hidden = !(kept.get(part.dataset.of) ?? fits(`${part.dataset.of} ${part.textContent}`));
    });
    return [[...kept.values()].filter(Boolean).length, all.length];
  }));
}

// Two methods over every place that has both. A difference beyond both margins counts, as in the tables.
function comparable(section) {
  const places = JSON.parse(document.getElementById("places").textContent);
  const names = [...new Set(places.flatMap((place) => Object.keys(place.rows)))];
  const [one, other] = ["first", "second"].map((which) => make("select", { ariaLabel: `The ${which} method` }));
  const both = (a, b) => places.filter((place) => a !== b && a in place.rows && b in place.rows);
  const fill = (select, options) => select.replaceChildren(...options.map(([value, words]) => new Option(words, value)));
  const verdict = make("p", { className: "verdict", ariaLive: "polite" });
  const holder = make("div", { className: "sheet", tabIndex: 0 });
  const cell = (name, text) => make(name, { textContent: text });
  const show = () => {
    const [a, b] = [one.value, other.value];
    const counts = { better: 0, level: 0, worse: 0, unknown: 0 };
    const rows = both(a, b).map((place) => {
      const [[x, mx, sx, nx, kx], [y, my, sy, ny, ky]] = [place.rows[a], place.rows[b]];
      const gain = (place.best === "max" ? 1 : -1) * (x - y);
      const same = gain === 0 || Math.abs(gain) <= mx + my;
      const word = same ? "level" : !(kx && ky) ? "unknown" : gain > 0 ? "better" : "worse";
      counts[word] += 1;
      const row = make("tr", {});
      const link = make("a", { href: `#${place.of}`, textContent: place.where.replace(" in small", "") });
      const head = make("th", { scope: "row" });
      head.append(link, `: ${place.what}`);
      const better = word === "better" ? a : b;
      const said = { unknown: "not known", level: "level" }[word] ?? `${better} better, ${Math.min(nx, ny)} seeds`;
      row.append(head, cell("td", sx), cell("td", sy), cell("td", said));
      return row;
    });
    const head = make("tr", {});
    head.append(...["Task", a, b, "Told apart?"].map((text) => Object.assign(cell("th", text), { scope: "col" })));
    const table = make("table", {});
    const caption = Object.assign(cell("caption", `${a} against ${b}`), { className: "unseen" });
    table.append(caption, make("thead", {}), make("tbody", {}));
    table.tHead.append(head);
    table.tBodies[0].append(...rows);
    holder.replaceChildren(table);
    verdict.textContent = `${a} is better than ${b} in ${counts.better}, level in ${counts.level}, `
      + `worse in ${counts.worse} of ${rows.length} places${counts.unknown ? `, and in ${counts.unknown} it is not known` : ""}.`;
  };
  const second = () => {
    const kept = other.value;
    const met = names.map((name) => [name, both(one.value, name).length]).filter(([, n]) => n).sort((a, b) => b[1] - a[1]);
    fill(other, met.map(([name, n]) => [name, `${name} (${n} in common)`]));
    if (met.some(([name]) => name === kept)) other.value = kept;
    show();
  };
  const met = (name) => places.filter((place) => name in place.rows).length;
  fill(one, names.toSorted((a, b) => met(b) - met(a)).map((name) => [name, `${name} (${met(name)} places)`]));
  one.onchange = second;
  other.onchange = show;
  const pick = make("div", { className: "pick" });
  pick.append(one, "against", other);
  section.append(pick, verdict, holder);
  section.hidden = false;
  second();
}

// Marks in the index where the reader is.
function located(nav) {
  const links = new Map([...nav.querySelectorAll("a")].map((link) => [decodeURIComponent(link.hash.slice(1)), link]));
  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      nav.querySelector("[aria-current]")?.removeAttribute("aria-current");
      const link = links.get(target.id);
      link.setAttribute("aria-current", "true");
      nav.scrollTo({ left: link.offsetLeft - 20, top: link.offsetTop - nav.clientHeight / 2 });
    }
  }, { rootMargin: "-10% 0px -85% 0px" });
  for (const name of links.keys()) seen.observe(document.getElementById(name));
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
document.querySelectorAll(".cards").forEach(searchable);
document.querySelectorAll("#compare").forEach(comparable);
document.querySelectorAll(".contents").forEach(located);
