// What the page can do besides being read: sort by a column, narrow down the runs, hide columns, highlight a
// backend in every figure and table at once, copy a command or settings. Without this script everything is
// still there: what only works with it is hidden until it runs.
"use strict";

(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const byId = (id) => document.getElementById(id);
  const make = (tag, properties) => Object.assign(document.createElement(tag), properties);
  // Rules that change go into a sheet of their own: one rule is faster than a class on a thousand rows, and the
  // page's policy allows it.
  const rules = new CSSStyleSheet();
  document.adoptedStyleSheets = [rules];
  const written = { lit: "", columns: "" };
  const write = (name, text) => {
    if (written[name] === text) return;
    written[name] = text;
    rules.replaceSync(Object.values(written).join("\n"));
  };

  // ---- the first lines of very many

  const LINES = 100;
  let whole = false;
  const more = byId("more");
  const turn = () => {
    let count = 0;
    for (const body of table.tBodies) {
      for (const row of body.rows) {
        const fits = !row.hidden && !row.classList.contains("section");
        count += fits;
        row.classList.toggle("later", fits && !whole && count > LINES);
      }
      body.hidden = ![...body.rows].some((row) => !row.hidden && !row.classList.contains("section"));
      const head = body.querySelector(".section");
      head?.classList.toggle("later", ![...body.rows].some((row) => row !== head && !row.hidden && !row.classList.contains("later")));
    }
    more.hidden = whole || count <= LINES;
    more.textContent = `Show the other ${count - LINES} lines`;
  };

  // ---- sort

  const table = byId("comparison-table");
  const heads = [...table.tHead.rows[0].cells];
  const inWords = new Intl.Collator("en", { numeric: true }).compare;
  const keyOf = (row, column, numeric) => {
    const cell = row.cells[column];
    if (!numeric) return cell.textContent.trim();
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  };

  const sortBy = (column) => {
    const head = heads[column];
    const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
    const numeric = head.classList.contains("number");
    const order = ([a], [b]) => {
      // What was not measured comes last, whichever way the column is sorted.
      if (a === null || b === null) return (a === null) - (b === null);
      return direction * (numeric ? a - b : inWords(a, b));
    };
    // Within a section only: runs that did not do the same work are not mixed.
    for (const body of table.tBodies) {
      const rows = [...body.rows].filter((row) => !row.classList.contains("section"));
      const keyed = rows.map((row) => [keyOf(row, column, numeric), row]).sort(order);
      body.append(...keyed.map(([, row]) => row));
    }
    turn();
  };

  heads.forEach((head, column) => {
    const button = make("button", { type: "button", className: "head", textContent: head.querySelector(".head").textContent });
    button.addEventListener("click", () => sortBy(column));
    head.querySelector(".head").replaceWith(button);
  });

  // ---- narrow down

  const tools = byId("tools");
  const choices = all("select[data-facet]");
  const lines = all("[data-facets]").map((row) => [row, row.dataset.facets.split(" ")]);
  const kinds = lines.filter(([row]) => row.closest("#comparison-table"));
  const bodies = all("tbody").filter((body) => body.querySelector("[data-facets]"));

  const narrow = () => {
    const wanted = choices.map((choice) => choice.value);
    const fits = (places) => wanted.every((value, facet) => value === "" || places[facet] === value);
    for (const [row, places] of lines) row.hidden = !fits(places);
    for (const body of bodies) {
      body.hidden = [...body.rows].every((row) => row.hidden || row.classList.contains("section"));
    }
    turn();
    const left = kinds.filter(([row]) => !row.hidden).length;
    const narrowed = wanted.some((value) => value !== "");
    byId("found").textContent = narrowed ? `${left} of ${kinds.length} lines` : "";
    byId("clear").hidden = !narrowed;
  };
  choices.forEach((choice) => choice.addEventListener("change", narrow));
  byId("clear").addEventListener("click", () => {
    choices.forEach((choice) => { choice.value = ""; });
    narrow();
    (choices[0] ?? byId("clear")).focus();
  });

  // ---- columns

  const boxes = all("input[data-columns]");
  const hideColumns = () => {
    const hidden = boxes.filter((box) => !box.checked).flatMap((box) => box.dataset.columns.split(" "));
    const cells = hidden.map((place) => `#comparison-table tr:not(.section) > :nth-child(${place})`);
    write("columns", cells.length ? `${cells.join(", ")} { display: none; }` : "");
  };
  boxes.forEach((box) => box.addEventListener("change", hideColumns));
  more.addEventListener("click", () => { whole = true; turn(); });
  tools.hidden = false;
  turn();

  // ---- highlight

  const chips = all("button[data-lights]");
  let pinned = null;
  const light = (owner) => {
    write("lit", owner === null ? "" : [
      `[data-backend]:not([data-backend="${owner}"]) { opacity: .14; }`,
      `tr[data-backend]:not([data-backend="${owner}"]) { opacity: .38; }`,
    ].join("\n"));
    chips.forEach((chip) => chip.classList.toggle("lit", chip.dataset.lights === owner));
  };
  const pin = (owner) => {
    pinned = pinned === owner ? null : owner;
    chips.forEach((chip) => chip.setAttribute("aria-pressed", chip.dataset.lights === pinned));
    light(pinned);
  };
  // Whose a mark is: anything in a figure, or the name at the head of a row.
  const ownerAt = (target) => {
    const mark = target.closest("svg [data-backend]") ?? target.closest("tr[data-backend] > th")?.parentElement;
    return mark?.dataset.backend ?? null;
  };
  chips.forEach((chip) => {
    chip.addEventListener("click", () => pin(chip.dataset.lights));
    for (const type of ["pointerenter", "focus"]) chip.addEventListener(type, () => light(chip.dataset.lights));
    for (const type of ["pointerleave", "blur"]) chip.addEventListener(type, () => light(pinned));
  });
  document.addEventListener("pointerover", (event) => {
    if (event.pointerType === "mouse" && !event.target.closest("[data-lights]")) light(ownerAt(event.target) ?? pinned);
  });
  document.addEventListener("click", (event) => {
    const owner = event.target.closest("a, button, summary, select, label") ? null : ownerAt(event.target);
    if (owner !== null) pin(owner);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && pinned !== null) pin(pinned);
  });
  byId("highlight").hidden = chips.length < 2;

  // ---- copy

  const copy = async (code, button) => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      // Without the right to the clipboard, selecting it is the next best.
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  };
  for (const part of all("[data-copy]")) {
    const button = make("button", { type: "button", textContent: "Copy" });
    button.setAttribute("aria-label", `Copy the ${part.dataset.copy}`);
    button.addEventListener("click", () => copy(part.querySelector("code"), button));
    part.append(button);
  }

  // ---- print

  // On paper nothing can be opened; the raw records stay closed, for they are not printed.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = all("details:not([open])").filter((part) => !part.closest("#records"));
    opened.forEach((part) => { part.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach((part) => { part.open = false; }));
})();
