"use strict";
// The table of all rows: sorting and filtering what is already there. Whoever shows the same things elsewhere hears of it ("saccade:list").
(() => {
  const { byId, state } = saccade;
  const table = byId("table");
  const body = table.tBodies[0];
  const form = byId("filters");
  const searched = (node) => [node.dataset.method, node.dataset.task, node.dataset.length, node.dataset.mode, node.dataset.status, node.querySelector(".sentence")?.textContent ?? ""].join(" ").toLowerCase();
  const rows = [...body.rows].map((node, order) => ({ node, order, sort: JSON.parse(node.dataset.sort), text: searched(node) }));
  const sorting = { column: null, sign: 1 };

  function compare(a, b) {
    const [x, y] = [a.sort[sorting.column], b.sort[sorting.column]];
    if (x === null || y === null) return (x === null) - (y === null) || a.order - b.order; // What has no value comes last either way.
    const difference = typeof x === "string" ? x.localeCompare(y) : x - y;
    return sorting.sign * difference || a.order - b.order;
  }

  const order = byId("order"); // A box that sorts too, where the page has one.
  const tell = () => document.dispatchEvent(new CustomEvent("saccade:list", { detail: rows.map((row) => row.node).filter((node) => !node.hidden) }));

  function sort(column) {
    const header = table.tHead.querySelector(`th[data-column="${column}"]`);
    // Numbers start with the largest, except lengths; a second click turns the order around.
    const first = header.classList.contains("number") && column !== 2 ? -1 : 1;
    sorting.sign = sorting.column === column ? -sorting.sign : first;
    sorting.column = column;
    table.tHead.querySelectorAll("th").forEach((th) => th.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", sorting.sign > 0 ? "ascending" : "descending");
    body.append(...rows.sort(compare).map((row) => row.node));
    if (order) order.value = String(column);
    tell();
  }

  table.tHead.addEventListener("click", (event) => {
    const header = event.target.closest("th[data-column]");
    if (header) sort(Number(header.dataset.column));
  });
  function sortAsChosen() {
    sorting.column = null;
    sort(Number(order.value));
  }
  order?.addEventListener("change", sortAsChosen);

  // A box named like a row's data wants that value; one with a column wants that number at least, or at most; what has none fails both.
  function passes({ node, sort: values, text }, box) {
    if (!box.value) return true;
    if (box.name === "find") return text.includes(box.value.trim().toLowerCase());
    if (box.dataset.column === undefined) return node.dataset[box.name] === box.value;
    const value = values[Number(box.dataset.column)];
    return value !== null && (box.dataset.side === "most" ? value <= Number(box.value) : value >= Number(box.value));
  }

  function filter() {
    const boxes = [...form.elements].filter((box) => box.name && box !== order);
    let shown = 0;
    for (const row of rows) {
      const { method, mode } = row.node.dataset;
      row.node.hidden = !(mode === state.mode && (state.method === null || method === state.method) && boxes.every((box) => passes(row, box)));
      shown += row.node.hidden ? 0 : 1;
    }
    byId("count").textContent = `${shown} of ${rows.length} ${form.dataset.what ?? "rows"}`;
    tell();
  }

  form.addEventListener("input", filter);
  form.addEventListener("reset", () =>
    setTimeout(() => {
      filter(); // The boxes are empty only once the event is over.
      if (order) sortAsChosen();
    }),
  );
  form.addEventListener("submit", (event) => event.preventDefault());
  saccade.onDraw(filter);
})();
