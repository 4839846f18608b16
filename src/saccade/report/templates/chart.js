"use strict";
// Quality against cost, and the settings that all plotly charts of the page share.
const charts = (() => {
  const { byId, data, state, methodIndex, colour, colourOf, plain, short, lengthText } = saccade;
  const coarse = matchMedia("(pointer: coarse)").matches;
  const config = { displayModeBar: false, responsive: false, doubleClick: "reset" };
  const COSTS = {
    cache: { title: "cache and index, of the dense cache", format: ".0%", say: (v) => `${(100 * v).toFixed(0)}%` },
    decode_ms: { title: "decode, ms a token", format: "", say: (v) => `${v.toFixed(2)} ms` },
    prefill_ms: { title: "prefill, ms a prompt", format: "", say: (v) => `${v.toFixed(1)} ms` },
    prefill_density: { title: "prefill density, pairs computed of pairs visible", format: ".0%", say: (v) => `${(100 * v).toFixed(0)}%` },
    decode_density: { title: "decode density, keys read of keys visible", format: ".0%", say: (v) => `${(100 * v).toFixed(0)}%` },
  };
  const NAMES = { cache: "cache", decode_ms: "decode", prefill_ms: "prefill", prefill_density: "prefill density", decode_density: "decode density" };
  let cost = "cache";

  function layout(node, height, more) {
    const axis = { gridcolor: colour("line"), linecolor: colour("line"), zeroline: false, automargin: true, fixedrange: coarse, color: colour("muted"), ticks: "" };
    return {
      width: node.clientWidth,
      height,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("ink") },
      hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("muted"), font: { family: getComputedStyle(document.body).fontFamily, color: colour("ink"), size: 12 }, align: "left", namelength: -1 },
      dragmode: coarse ? false : "zoom",
      hovermode: "closest",
      showlegend: false,
      margin: { l: 56, r: 16, t: 16, b: 48 },
      ...more,
      xaxis: { ...axis, ...more.xaxis },
      yaxis: { ...axis, ...more.yaxis },
    };
  }

  const scoreText = (score, unit) => (score === null ? "none" : unit === "bits" ? `${score.toFixed(3)} bits` : score.toFixed(2));

  function hover(point, unit) {
    const lines = [`<b>${plain(point.method)}</b>${point.length === null ? "" : ` at ${lengthText(point.length)} tokens`}`, `score ${scoreText(point.score, unit)} over ${point.done} of ${point.cells} cells`];
    for (const [name, value] of Object.entries(point.costs)) if (value !== null) lines.push(`${NAMES[name]} ${COSTS[name].say(value)}`);
    if (point.done < point.cells) lines.push("hollow: it failed in some cells");
    return lines.join("<br>");
  }

  const known = (point) => point.score !== null && point.costs[cost] !== null;
  const lookOf = (point) => data.methods[methodIndex.get(point.method)];
  const symbol = (point) => lookOf(point).marker + (point.done < point.cells ? "-open" : "");

  function marks(points, unit, size, faint) {
    return {
      type: "scatter",
      mode: "markers",
      x: points.map((p) => p.costs[cost]),
      y: points.map((p) => p.score),
      customdata: points.map((p) => p.method),
      hovertext: points.map((p) => hover(p, unit)),
      hoverinfo: "text",
      cliponaxis: false,
      marker: {
        size: points.map((p) => (lookOf(p).slug === "dense" ? size * 1.25 : size)),
        symbol: points.map(symbol),
        color: points.map((p) => colourOf(lookOf(p))),
        opacity: points.map((p) => (state.method === null || state.method === p.method ? 1 : 0.3) * faint),
        line: { width: 1, color: colour("panel") },
      },
    };
  }

  // Names beside the marks that matter, each on the first side where it meets no mark and no other name.
  function labels(points, frontier, ranges, box) {
    const px = (v) => box.l + ((v - ranges.x[0]) / (ranges.x[1] - ranges.x[0])) * box.w;
    const py = (v) => box.t + (1 - (v - ranges.y[0]) / (ranges.y[1] - ranges.y[0])) * box.h;
    const taken = points.map((p) => ({ l: px(p.costs[cost]) - 7, r: px(p.costs[cost]) + 7, t: py(p.score) - 7, b: py(p.score) + 7 }));
    const free = (a) => a.l >= box.l && a.r <= box.l + box.w && a.t >= 2 && a.b <= box.t + box.h && !taken.some((b) => a.l < b.r && b.l < a.r && a.t < b.b && b.t < a.b);
    const rank = (p) => (p.method === state.method ? 0 : ["dense", "random"].includes(lookOf(p).slug) ? 1 : frontier.includes(p.method) ? 2 : 3);
    const found = [];
    for (const p of [...points].sort((a, b) => rank(a) - rank(b))) {
      const text = short(p.method, box.w < 420 ? 20 : 34) + (lookOf(p).slug === "random" ? ", the floor" : "");
      const x = px(p.costs[cost]);
      const y = py(p.score);
      const w = text.length * 6.4 + 4;
      const sides = [
        { l: x + 9, t: y - 8, anchor: "left", dx: 9, dy: 0 },
        { l: x - 9 - w, t: y - 8, anchor: "right", dx: -9, dy: 0 },
        { l: x - w / 2, t: y - 25, anchor: "center", dx: 0, dy: -16 },
        { l: x - w / 2, t: y + 9, anchor: "center", dx: 0, dy: 17 },
      ];
      const side = sides.find((s) => free({ l: s.l, r: s.l + w, t: s.t, b: s.t + 16 }));
      if (!side || (rank(p) === 3 && box.w < 420) || (state.method !== null && rank(p) > 1)) continue;
      taken.push({ l: side.l, r: side.l + w, t: side.t, b: side.t + 16 });
      found.push({ x: p.costs[cost], y: p.score, text: plain(text), showarrow: false, xanchor: side.anchor, yanchor: "middle", xshift: side.dx, yshift: -side.dy, bgcolor: colour("panel"), borderpad: 0, font: { size: 11.5, color: colour(rank(p) <= 2 ? "ink" : "muted") } });
    }
    return found;
  }

  function drawScatter(Plotly) {
    const node = byId("scatter");
    const chart = data.charts[state.mode];
    const bits = chart.unit === "bits";
    const points = chart.points.filter(known).reverse(); // What comes last is drawn on top: dense.
    const small = chart.by_length.filter(known);
    const missing = chart.points.filter((p) => !known(p)).map((p) => p.method);
    byId("scatter-note").textContent = missing.length ? `No value on this axis: ${missing.join(", ")}.` : "";
    if (!points.length) {
      Plotly.purge(node);
      node.replaceChildren(Object.assign(document.createElement("p"), { className: "muted empty", textContent: "No method has both a mean score and this cost." }));
      delete node.dataset.listening; // purging takes the listeners with it
      return;
    }
    node.querySelector(":scope > .empty")?.remove();
    const xs = [...points, ...small].map((p) => p.costs[cost]);
    const ys = [...points, ...small].map((p) => p.score);
    const top = Math.max(...ys);
    const ranges = { x: [0, Math.max(...xs) * 1.08 || 1], y: bits ? [0, top * 1.1] : [Math.max(-0.03, Math.floor(10 * Math.min(...ys) - 0.5) / 10), 1.05] };
    const box = { l: 56, t: 18, w: node.clientWidth - 56 - 18, h: node.clientHeight - 18 - 52 };
    const place = new Map(points.map((p) => [p.method, p]));
    const front = chart.frontier[cost].map((name) => place.get(name)).filter(Boolean);
    const line = (p, dash, tone) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: p.score, y1: p.score, layer: "below", line: { color: colour(tone), width: 1, dash } });
    const shapes = points.filter((p) => lookOf(p).slug === "dense").map((p) => line(p, "dash", "look-dense"));
    const floors = points.filter((p) => lookOf(p).slug === "random").sort((a, b) => a.costs[cost] - b.costs[cost]);
    if (floors.length === 1) shapes.push(line(floors[0], "dot", "look-random"));
    const steps = [...front];
    if (steps.length) steps.push({ costs: { [cost]: ranges.x[1] }, score: front[front.length - 1].score });
    const joined = (list, more) => ({ type: "scatter", mode: "lines", hoverinfo: "skip", x: list.map((p) => p.costs[cost]), y: list.map((p) => p.score), ...more });
    const traces = [
      joined(steps, { line: { shape: "hv", width: 2, color: colour("accent") }, opacity: 0.55 }),
      joined(floors.length > 1 ? floors : [], { line: { width: 1, dash: "dot", color: colour("look-random") } }),
      marks(small, chart.unit, 6, 0.5),
      marks(points, chart.unit, 13, 1),
    ];
    const more = {
      shapes,
      annotations: labels(points, chart.frontier[cost], ranges, box),
      margin: { l: 56, r: 18, t: 18, b: 52 },
      xaxis: { title: { text: COSTS[cost].title, standoff: 10 }, tickformat: COSTS[cost].format, range: ranges.x, automargin: false },
      yaxis: { title: { text: bits ? "mean bits per byte (lower is better)" : "mean score" }, range: bits ? [ranges.y[1], 0] : ranges.y, automargin: false },
    };
    Plotly.react(node, traces, layout(node, node.clientHeight, more), config);
    if (!node.dataset.listening) {
      node.dataset.listening = "yes";
      node.on("plotly_click", (event) => {
        const method = event.points.map((p) => p.customdata).find((name) => name !== undefined);
        if (method !== undefined) saccade.show(method);
      });
    }
  }

  saccade.plotly.then((Plotly) => {
    const draw = () => drawScatter(Plotly);
    saccade.choice("Cost", (value) => {
      cost = value;
      draw();
    });
    saccade.onDrawNear(byId("scatter"), draw);
  }, (reason) => {
    byId("scatter").textContent = `The charts can't be drawn: this browser does not inflate data (${reason}). The tables hold every number.`;
  });

  return { layout, config, scoreText };
})();
