"use strict";
// The table of all rows: sorting and filtering what is already there.
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

  table.tHead.addEventListener("click", (event) => {
    const header = event.target.closest("th[data-column]");
    if (!header) return;
    const column = Number(header.dataset.column);
    // Numbers start with the largest, except lengths; a second click turns the order around.
    const first = header.classList.contains("number") && column !== 2 ? -1 : 1;
    sorting.sign = sorting.column === column ? -sorting.sign : first;
    sorting.column = column;
    table.tHead.querySelectorAll("th").forEach((th) => th.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", sorting.sign > 0 ? "ascending" : "descending");
    body.append(...rows.sort(compare).map((row) => row.node));
  });

  function filter() {
    const find = form.elements.find.value.trim().toLowerCase();
    let shown = 0;
    for (const { node, text } of rows) {
      const { method, mode, task, length, status } = node.dataset;
      const wanted = (name, value) => !form.elements[name].value || form.elements[name].value === value;
      node.hidden = !(mode === state.mode && (state.method === null || method === state.method) && wanted("task", task) && wanted("length", length) && wanted("status", status) && text.includes(find));
      shown += node.hidden ? 0 : 1;
    }
    byId("count").textContent = `${shown} of ${rows.length} rows`;
  }

  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  saccade.onDraw(filter);
})();
