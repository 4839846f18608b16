"use strict";
// Score by task with intervals, and fidelity by layer.
(() => {
  const { byId, data, state, methodIndex, colour, colourOf, plain, short, lengthText } = saccade;
  const chosen = { scale: "linear", bars: data.lengths[data.lengths.length - 1], lines: data.lengths[data.lengths.length - 1] };
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  const visible = (row) => row.mode === state.mode && (state.method === null || row.method === state.method);

  function panel(task) {
    const box = document.createElement("figure");
    box.className = "panel";
    box.dataset.task = task;
    const caption = document.createElement("figcaption");
    const title = Object.assign(document.createElement("h3"), { textContent: task });
    const note = Object.assign(document.createElement("p"), { className: "muted" });
    caption.append(title, note);
    const chart = document.createElement("div");
    chart.className = "chart";
    chart.setAttribute("role", "img");
    chart.setAttribute("aria-label", `Scores on ${task} by method; the table of all rows holds the numbers`);
    box.append(caption, chart);
    return { task, box, note, chart };
  }

  const panels = data.tasks.map(panel);
  byId("bars").append(...panels.map((p) => p.box));

  function drawBars(Plotly, { task, box, note, chart }) {
    const cell = data.rows.filter((row) => row.mode === state.mode && row.task === task && row.length === chosen.bars);
    const rows = cell.filter(visible).sort((a, b) => methodIndex.get(b.method) - methodIndex.get(a.method));
    const bits = cell.some((row) => row.unit === "bits");
    const dense = cell.find((row) => data.methods[methodIndex.get(row.method)].slug === "dense" && row.score !== null);
    const blunt = cell.length > 0 && cell.every((row) => !row.discriminating);
    box.classList.toggle("faint", blunt);
    note.textContent = blunt
      ? `does not discriminate: dense itself scores ${dense ? charts.scoreText(dense.score, dense.unit) : "too low"} here`
      : bits ? "bits per byte, lower is better" : "share right";
    if (!rows.length) {
      Plotly.purge(chart);
      chart.textContent = "";
      chart.append(Object.assign(document.createElement("p"), { className: "muted empty", textContent: `Not run at ${lengthText(chosen.bars)} tokens.` }));
      return;
    }
    chart.querySelector(".empty")?.remove();
    const methods = rows.map((row) => data.methods[methodIndex.get(row.method)]);
    const top = bits ? Math.max(...cell.map((row) => row.high ?? row.score ?? 0)) * 1.02 : 1;
    const label = (row) => plain(short(row.method, 21));
    const position = rows.map((_, i) => i);
    const gap = (row, side) => (row.score === null || row[side] === null ? 0 : Math.abs(row[side] - row.score));
    const bars = {
      type: "bar",
      orientation: "h",
      y: position,
      x: rows.map((row) => row.score),
      marker: { color: methods.map(colourOf), opacity: 0.85 },
      error_x: { type: "data", symmetric: false, array: rows.map((row) => gap(row, "high")), arrayminus: rows.map((row) => gap(row, "low")), color: colour("ink"), thickness: 1.2, width: 3 },
      hovertext: rows.map((row) => `<b>${plain(row.method)}</b><br>${row.status === "failed" ? "failed" : `${charts.scoreText(row.score, row.unit)}, 95% from ${charts.scoreText(row.low, row.unit)} to ${charts.scoreText(row.high, row.unit)}<br>${row.samples ?? "?"} samples`}`),
      hoverinfo: "text",
    };
    const figure = (row, i) => ({
      xref: "paper",
      x: 1,
      xanchor: "left",
      xshift: 4,
      y: i,
      text: row.status === "failed" ? "failed" : row.score === null ? "none" : row.score.toFixed(2),
      showarrow: false,
      font: { size: 11.5, color: colour(row.status === "failed" ? "bad" : "ink") },
    });
    const more = {
      bargap: 0.35,
      margin: { l: 8, r: 42, t: 6, b: 26 },
      annotations: rows.map(figure),
      shapes: dense ? [{ type: "line", yref: "paper", y0: 0, y1: 1, x0: dense.score, x1: dense.score, line: { color: colour("look-dense"), width: 1, dash: "dash" } }] : [],
      xaxis: { range: [0, top * 1.04], nticks: 6 },
      yaxis: { tickfont: { size: 11 }, tickvals: position, ticktext: rows.map(label), range: [-0.6, rows.length - 0.4], showgrid: false },
    };
    Plotly.react(chart, [bars], charts.layout(chart, 38 + 22 * rows.length, more), charts.config);
  }

  function drawLines(Plotly, node, key) {
    const rows = data.rows.filter((row) => visible(row) && row.length === chosen.lines && Array.isArray(row[key]));
    const traces = [];
    for (const method of data.methods) {
      const own = rows.filter((row) => row.method === method.name).map((row) => row[key]);
      if (!own.length) continue;
      const layers = own[0].map((_, layer) => {
        const there = own.map((values) => values[layer]).filter((value) => value !== null && value !== undefined);
        return there.length ? mean(there) : null;
      });
      traces.push({
        type: "scatter",
        mode: "lines+markers",
        name: plain(method.name),
        x: layers.map((_, layer) => layer),
        y: layers,
        line: { color: colourOf(method), width: 1.8 },
        marker: { symbol: method.marker, size: 7, color: colourOf(method) },
        hovertemplate: `<b>${plain(method.name)}</b><br>layer %{x}: %{y:.3f}<extra></extra>`,
      });
    }
    const more = {
      xaxis: { title: { text: "layer", standoff: 6 }, dtick: traces[0]?.x.length > 16 ? undefined : 1, showgrid: false },
      yaxis: key === "mass" ? { range: [0, 1.04] } : { rangemode: "tozero", type: chosen.scale, dtick: chosen.scale === "log" ? 1 : undefined },
      margin: { l: 44, r: 12, t: 10, b: 44 },
    };
    if (traces.length) Plotly.react(node, traces, charts.layout(node, 300, more), charts.config);
    else Plotly.purge(node);
    return traces.length;
  }

  saccade.plotly.then((Plotly) => {
    const redrawBars = [];
    for (const part of panels) {
      const draw = () => drawBars(Plotly, part);
      saccade.onDrawNear(part.box, draw);
      redrawBars.push(draw);
    }
    const drawFidelity = () => {
      const shown = drawLines(Plotly, byId("error"), "output_error") + drawLines(Plotly, byId("mass"), "mass");
      byId("fidelity-note").textContent = shown ? "" : "No row that is shown has fidelity figures at this length.";
    };
    saccade.onDrawNear(byId("fidelity"), drawFidelity);
    saccade.choice("Length", (value) => {
      chosen.bars = Number(value);
      redrawBars.forEach((draw) => draw());
    });
    saccade.choice("Error scale", (value) => {
      chosen.scale = value;
      drawFidelity();
    });
    saccade.choice("Prompt length", (value) => {
      chosen.lines = Number(value);
      drawFidelity();
    });
  }, () => panels.forEach((p) => p.box.remove()));
})();
