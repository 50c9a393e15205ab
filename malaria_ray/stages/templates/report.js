"use strict";
// Sorting, filtering and paging of tables whose rows stand as JSON, and the dialog of the galleries. Text goes into the
// page by textContent and clones of what is there already, never as HTML.

const PAGE_ROWS = 25;

for (const box of document.querySelectorAll(".data")) {
  const all = JSON.parse(document.getElementById(box.dataset.rows).textContent);
  const body = box.querySelector("tbody");
  const headings = [...box.querySelectorAll("th button")];
  const filters = [...box.querySelectorAll("[data-filter]")];
  const [previous, next] = box.querySelectorAll("[data-page]");
  const status = box.querySelector("[role=status]");
  let rows = all;
  let page = 0;

  const compare = (a, b) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
  };

  const show = () => {
    const n_pages = Math.max(1, Math.ceil(rows.length / PAGE_ROWS));
    page = Math.min(Math.max(page, 0), n_pages - 1);
    const from = page * PAGE_ROWS;
    body.replaceChildren(...rows.slice(from, from + PAGE_ROWS).map((row) => {
      const line = document.createElement("tr");
      row.forEach((value, column) => {
        const cell = document.createElement(column ? "td" : "th");
        if (column) {
          cell.textContent = value === null ? "" : typeof value === "number" && column >= 4 ? value.toFixed(4) : value.toLocaleString("en");
        } else {
          cell.scope = "row";
          cell.append(Object.assign(document.createElement("bdi"), { textContent: value }));
        }
        line.append(cell);
      });
      return line;
    }));
    const to = Math.min(from + PAGE_ROWS, rows.length);
    const left_out = rows.length < all.length ? ` (of ${all.length.toLocaleString("en")})` : "";
    status.textContent = rows.length ? `${from + 1}–${to} of ${rows.length.toLocaleString("en")}${left_out}` : `none${left_out}`;
    previous.disabled = page === 0;
    next.disabled = page === n_pages - 1;
  };

  const update = () => {
    const sorted = headings.find((button) => button.closest("th").ariaSort);
    const column = Number(sorted.dataset.column);
    const sign = sorted.closest("th").ariaSort === "descending" ? -1 : 1;
    const wanted = filters.map((filter) => [Number(filter.dataset.filter), filter.value.toLowerCase(), filter.tagName]);
    rows = all.filter((row) => wanted.every(([of, text, tag]) => {
      const value = String(row[of]).toLowerCase();
      return text === "" || (tag === "SELECT" ? value === text : value.includes(text));
    }));
    rows.sort((a, b) => sign * compare(a[column], b[column]) || compare(a[0], b[0]));
    page = 0;
    show();
  };

  for (const button of headings) {
    button.addEventListener("click", () => {
      const heading = button.closest("th");
      const order = heading.ariaSort === "ascending" ? "descending" : "ascending";
      for (const other of headings) other.closest("th").removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", order);
      update();
    });
  }
  for (const filter of filters) filter.addEventListener("input", update);
  for (const button of [previous, next]) {
    button.addEventListener("click", () => { page += Number(button.dataset.page); show(); });
  }
  update();
}

const dialog = document.querySelector("dialog");
if (dialog) {
  const cells = [...document.querySelectorAll(".cell")];
  let shown = 0;

  const show = (number) => {
    shown = (number + cells.length) % cells.length;
    const picture = cells[shown].querySelector(".pair").cloneNode(true);
    const facts = cells[shown].parentElement.querySelector("dl").cloneNode(true);
    facts.hidden = false;
    dialog.querySelector(".picture").replaceChildren(picture, facts);
    if (!dialog.open) dialog.showModal();
  };

  cells.forEach((cell, number) => cell.addEventListener("click", () => show(number)));
  for (const button of dialog.querySelectorAll("[data-step]")) {
    button.addEventListener("click", () => show(shown + Number(button.dataset.step)));
  }
  dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") show(shown - 1);
    if (event.key === "ArrowRight") show(shown + 1);
  });
  dialog.addEventListener("close", () => cells[shown].focus());
}

let opened = [];
window.addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("#quarantine details:not([open])")];
  for (const details of opened) details.open = true;
});
window.addEventListener("afterprint", () => { for (const details of opened) details.open = false; });
