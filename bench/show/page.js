// What the page can do besides being read: sort by a column, filter by outcome, copy a command.
// Without this script everything is still there.
"use strict";

(() => {
  const table = document.getElementById("comparison-table");
  const heads = [...table.tHead.rows[0].cells];

  const order = (a, b, column, direction) => {
    const [left, right] = [a.cells[column], b.cells[column]];
    const numeric = heads[column].classList.contains("number");
    if (!numeric) return direction * left.textContent.trim().localeCompare(right.textContent.trim());
    // What was not measured comes last, whichever way the column is sorted.
    const [x, y] = [left.dataset.value, right.dataset.value];
    if (x === "" || y === "") return (x === "") - (y === "");
    return direction * (Number(x) - Number(y));
  };

  const sortBy = (column) => {
    const head = heads[column];
    const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
    // Within a section only: runs that did not do the same work are not mixed.
    for (const body of table.tBodies) {
      const rows = [...body.rows].filter((row) => !row.classList.contains("section"));
      rows.sort((a, b) => order(a, b, column, direction));
      body.append(...rows);
    }
  };

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "head";
    button.textContent = head.querySelector(".head").textContent;
    button.addEventListener("click", () => sortBy(column));
    head.querySelector(".head").replaceWith(button);
  });

  const filtered = [...document.querySelectorAll("tr[data-status]")];
  const found = [...new Set(filtered.map((row) => row.dataset.status))];
  const filter = (status, pressed) => {
    for (const button of pressed.parentElement.children) button.setAttribute("aria-pressed", button === pressed);
    for (const row of filtered) row.hidden = status !== "" && row.dataset.status !== status;
    for (const body of table.tBodies) {
      body.hidden = [...body.rows].every((row) => row.hidden || row.classList.contains("section"));
    }
  };
  if (found.length > 1) {
    const tools = document.getElementById("tools");
    tools.setAttribute("role", "group");
    tools.setAttribute("aria-label", "Show runs by outcome");
    for (const status of ["", ...found]) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = status === "" ? "All" : status.replaceAll("_", " ");
      button.setAttribute("aria-pressed", status === "");
      button.addEventListener("click", () => filter(status, button));
      tools.append(button);
    }
  }

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
  for (const command of document.querySelectorAll(".command")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Copy";
    button.setAttribute("aria-label", `Copy the command of ${command.querySelector("h3").textContent}`);
    button.addEventListener("click", () => copy(command.querySelector("code"), button));
    command.append(button);
  }
})();
