// Everything here is optional: without it the pages show all rows and every link works.
"use strict";

const THEMES = ["auto", "light", "dark"];

// a page opened from disk may have no access to storage
const kept = {
  get(name) { try { return localStorage.getItem(name); } catch { return null; } },
  set(name, value) { try { localStorage.setItem(name, value); } catch { /* the choice lasts for this page */ } },
};

// before the page is drawn, so that the default theme does not flash
const setTheme = (theme) => { document.documentElement.dataset.theme = theme; };
setTheme(THEMES.includes(kept.get("theme")) ? kept.get("theme") : "auto");

document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll("[hidden]")) element.hidden = false;
  startTheme();
  startCopy();
  for (const form of document.querySelectorAll(".filters")) startFilters(form);
  for (const table of document.querySelectorAll(".matrix")) startGrid(table);
});

function startTheme() {
  const button = document.getElementById("theme");
  const show = () => { button.firstElementChild.textContent = document.documentElement.dataset.theme; };
  button.addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
    setTheme(next);
    kept.set("theme", next);
    show();
  });
  show();
}

function startCopy() {
  for (const place of document.querySelectorAll("[data-copy]")) {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", className: "copy", textContent: "Copy", title: place.dataset.copy });
    button.setAttribute("aria-label", `Copy the command ${place.dataset.copy}`);
    button.addEventListener("click", async () => {
      button.textContent = (await copy(place.dataset.copy)) ? "Copied" : "Failed";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
    place.append(button);
  }
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = Object.assign(document.createElement("textarea"), { value: text });
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

// The filters are kept in the hash (#q=oracle&verdict=red): a page on disk can change no other part of its address.
function startFilters(form) {
  const more = (row) => (row.nextElementSibling?.matches(".more") ? row.nextElementSibling : null);
  const rows = [...document.querySelectorAll(".rows tr, .rows article")]
    .filter((row) => !row.matches(".phase, .more") && !row.closest("thead"))
    .map((row) => ({ row, text: [row, more(row)].map((one) => `${one?.textContent} ${one?.dataset.text}`).join().toLowerCase() }));
  const fields = [...form.elements].filter((field) => field.name);

  const read = () => {
    const hash = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
    for (const field of fields) field.value = hash.get(field.name) ?? "";
  };
  const apply = () => {
    const want = Object.fromEntries(fields.map((field) => [field.name, field.value.trim()]));
    const words = (want.q ?? "").toLowerCase().split(/\s+/);
    let shown = 0;
    for (const { row, text } of rows) {
      const cells = row.dataset.v === undefined ? [...row.querySelectorAll("[data-v]")] : [row];
      const ended = (cell) => (want.verdict === "red" ? cell.dataset.red !== undefined : cell.dataset.v === want.verdict);
      const fits = (cell) => (!want.verdict || ended(cell))
        && (!want.evidence || cell.dataset.e === want.evidence);
      for (const cell of cells) cell.classList.toggle("off", !fits(cell));
      row.hidden = !(words.every((word) => text.includes(word))
        && (!want.phase || row.dataset.phase === want.phase)
        && (!want.gate || row.dataset.gate === want.gate)
        && ((!want.verdict && !want.evidence) || cells.some(fits)));
      if (more(row)) more(row).hidden = row.hidden;
      shown += !row.hidden;
    }
    for (const group of document.querySelectorAll(".rows:is(tbody), .rows tbody, .rows .group")) {
      const members = rows.filter(({ row }) => group.contains(row));
      group.hidden = members.length > 0 && members.every(({ row }) => row.hidden);
    }
    form.querySelector("output").textContent = `${shown} of ${rows.length}`;
  };
  const write = () => {
    const chosen = fields.filter((field) => field.value.trim()).map((field) => [field.name, field.value.trim()]);
    history.replaceState(null, "", `#${new URLSearchParams(chosen)}`);
    apply();
  };

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", write);
  form.addEventListener("reset", () => setTimeout(write));
  window.addEventListener("hashchange", () => { read(); apply(); });
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input, select, textarea");
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      form.elements.q.focus();
    } else if (event.key === "Escape" && fields.some((field) => field.value)) {
      event.preventDefault();
      form.reset();
    }
  });
  read();
  apply();
}

// A table of links is a single Tab stop; the arrow keys move within it.
function startGrid(table) {
  const inspector = document.querySelector(".inspector");
  const links = [...table.querySelectorAll("tbody a, thead a")];
  const tell = (link) => { inspector.textContent = link?.getAttribute("aria-label") ?? ""; };
  const enter = (link) => {
    for (const other of links) other.tabIndex = other === link ? 0 : -1;
  };
  const seen = (row) => row && !row.hidden && !row.closest("[hidden]");
  const step = (from, down, right) => {
    const all = [...table.rows].filter(seen);
    let row = all.indexOf(from.closest("tr"));
    let column = from.closest("th, td").cellIndex;
    for (;;) {
      row += down;
      column += right;
      const cell = all[row]?.cells[column];
      if (down ? !all[row] : !cell) return null;
      const link = cell?.querySelector("a");
      if (link) return link;
    }
  };
  const moves = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] };

  enter(table.querySelector("tbody a"));
  table.addEventListener("keydown", (event) => {
    const link = event.target.closest("a");
    if (!link || event.ctrlKey || event.altKey || event.metaKey) return;
    const ends = [...link.closest("tr").querySelectorAll("a")];
    const next = event.key in moves ? step(link, ...moves[event.key])
      : event.key === "Home" ? ends[0] : event.key === "End" ? ends.at(-1) : null;
    if (event.key in moves || next) event.preventDefault();
    next?.focus();
  });
  table.addEventListener("focusin", (event) => {
    const link = event.target.closest("a");
    if (link) { enter(link); tell(link); }
  });
  table.addEventListener("pointerover", (event) => tell(event.target.closest("a")));
  table.addEventListener("pointerleave", () => tell(table.contains(document.activeElement) ? document.activeElement : null));
  // a filter may hide the row with the only Tab stop
  document.addEventListener("input", () => {
    const stop = links.find((link) => link.tabIndex === 0);
    if (!seen(stop?.closest("tr"))) enter(links.find((link) => link.closest("tbody") && seen(link.closest("tr"))));
  });
}
