"use strict";
// The charts of a benchmark: speed-up against density, time against length, and the roofline.
(() => {
  const { byId, data, state, methodIndex, colour, colourOf, plain, lengthText } = saccade;
  const coarse = matchMedia("(pointer: coarse)").matches;
  const config = { displayModeBar: false, responsive: false, doubleClick: "reset" };
  const lookOf = (row) => data.methods[methodIndex.get(row.contestant)];
  const shown = (row) => state.method === null || row.contestant === state.method;
  const number = (value) => (value >= 100 ? value.toFixed(0) : value >= 1 ? value.toPrecision(3) : value.toPrecision(2));

  function layout(node, xaxis, yaxis, more) {
    const axis = { type: "log", gridcolor: colour("line"), linecolor: colour("line"), zeroline: false, automargin: true, fixedrange: coarse, color: colour("muted"), ticks: "" };
    const font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("ink") };
    const narrow = node.clientWidth < 560;
    return {
      width: node.clientWidth,
      height: node.clientHeight,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font,
      hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("muted"), font, align: "left", namelength: -1 },
      dragmode: coarse ? false : "zoom",
      hovermode: "closest",
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { size: narrow ? 11 : 12 } },
      margin: { l: narrow ? 44 : 56, r: 14, t: 24, b: 48 },
      xaxis: { ...axis, ...xaxis },
      yaxis: { ...axis, ...yaxis },
      ...more,
    };
  }

  const told = (row) => [
    `<b>${plain(row.contestant)}</b> ${plain(row.family)}`,
    plain(row.text),
    `${number(row.ms)} ms${row.selection_ms === null ? "" : ` and ${number(row.selection_ms)} ms of choosing`}, ${number(row.rate)} ${row.rate_unit}`,
    ...(row.ratio === null ? [] : [`${number(row.ratio)} times the best dense`]),
    ...(row.density === null || row.density >= 1 ? [] : [`${(100 * row.density).toPrecision(2)}% of the pairs`]),
  ].join("<br>");

  function lines(rows, x, y, more) {
    const names = data.methods.map((method) => method.name).filter((name) => rows.some((row) => row.contestant === name));
    return names.map((name) => {
      const own = rows.filter((row) => row.contestant === name).sort((a, b) => a[x] - b[x]);
      const look = lookOf(own[0]);
      return {
        type: "scatter",
        mode: "lines+markers",
        name: plain(name),
        x: own.map((row) => row[x]),
        y: own.map((row) => row[y]),
        hovertext: own.map(told),
        hoverinfo: "text",
        opacity: shown(own[0]) ? 1 : 0.15,
        line: { color: colourOf(look), width: look.ours ? 2.6 : 1.6 },
        marker: { symbol: look.marker, size: look.ours ? 10 : 8, color: colourOf(look), line: { width: 1, color: colour("panel") } },
        ...more?.(own),
      };
    });
  }

  function picked(id) {
    const select = byId(id);
    return data.rows.filter((row) => row[select.dataset.key] === select.value);
  }

  function drawDensity(Plotly, node) {
    const rows = picked("density-pick").filter((row) => row.ratio !== null && row.density !== null && !(row.density >= 1 && row.role === "dense"));
    const densities = [...rows.map((row) => row.density), 1];
    const least = Math.min(...densities);
    const ideal = { type: "scatter", mode: "lines", name: "1 / density", x: [least, 1], y: [1 / least, 1], line: { color: colour("muted"), width: 1.2, dash: "dash" }, hoverinfo: "skip" };
    const even = { type: "line", xref: "paper", x0: 0, x1: 1, y0: 1, y1: 1, layer: "below", line: { color: colour("look-dense"), width: 1 } };
    const ticks = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1];
    const xaxis = { title: { text: "pairs read, of pairs visible" }, range: [Math.log10(least) - 0.08, 0.05], tickvals: ticks, ticktext: ticks.map((t) => `${+(100 * t).toPrecision(2)}%`) };
    Plotly.react(node, [ideal, ...lines(rows, "density", "ratio")], layout(node, xaxis, { title: { text: "times the best dense" } }, { shapes: [even] }), config);
  }

  function drawLength(Plotly, node) {
    const rows = picked("length-pick");
    const lengths = [...new Set(rows.map((row) => row.n))].sort((a, b) => a - b);
    const range = (own) => ({ error_y: { type: "data", symmetric: false, array: own.map((row) => row.ms_high - row.ms), arrayminus: own.map((row) => row.ms - row.ms_low), thickness: 1.2, width: 3 } });
    const xaxis = { title: { text: "tokens" }, tickvals: lengths, ticktext: lengths.map(lengthText) };
    Plotly.react(node, lines(rows, "n", "ms", range), layout(node, xaxis, { title: { text: "ms" } }), config);
  }

  function drawRoofline(Plotly, node) {
    const rows = data.rows.filter((row) => row.intensity !== null && row.tflops !== null);
    const { copy, matmul } = data.ceilings;
    const xs = rows.map((row) => row.intensity);
    const [low, high] = [Math.min(...xs) / 2, Math.max(...xs) * 2];
    const roofs = [];
    if (copy && matmul) {
      const knee = matmul / copy;
      const points = [low, ...(knee > low && knee < high ? [knee] : []), high];
      roofs.push({ type: "scatter", mode: "lines", name: "measured ceilings", x: points, y: points.map((x) => Math.min(copy * x, matmul)), line: { color: colour("ink"), width: 1.6 }, hovertemplate: `copy ${number(copy)} TB/s, matmul ${number(matmul)} TFLOP/s<extra></extra>` });
    }
    const marks = lines(rows, "intensity", "tflops", () => ({ mode: "markers" }));
    Plotly.react(node, [...roofs, ...marks], layout(node, { title: { text: "FLOPs for each byte" } }, { title: { text: "TFLOP/s" } }), config);
  }

  saccade.plotly.then((Plotly) => {
    for (const [name, draw] of [["density", drawDensity], ["length", drawLength], ["roofline", drawRoofline]]) {
      const node = byId(`${name}-chart`);
      if (!node) continue;
      const select = byId(`${name}-pick`);
      if (select) select.dataset.key = `${name}_series`;
      saccade.onDrawNear(node, () => draw(Plotly, node));
      select?.addEventListener("change", () => draw(Plotly, node));
    }
  }, (reason) => {
    document.querySelectorAll(".chart").forEach((node) => {
      node.textContent = `The charts can't be drawn: this browser does not inflate data (${reason}). The table holds every number.`;
    });
  });
})();
