"use strict";
// The attention viewer: one canvas per head, the map in ink and the method's selection over it. It shows the heads of a layer, or, on a
// page whose table lists heads, the rows of that table in their order.
(() => {
  const { byId, data, state, methodIndex, colour, colourOf } = saccade;
  if (!data.attention) return;
  const { layers, methods, pool, texts } = data.attention;
  const now = { layer: 0, method: methods[0] ?? null, overlay: "kept", at: 0, turn: 0 };
  const AT_ONCE = 24; // More heads than this are painted when they come near the window.
  const streams = new Map();
  let listed = data.attention.list ? layers.flatMap((layer, i) => layer.heads.map((head) => ({ layer: i, head }))) : null;
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const percent = (value) => (value === undefined || value === null ? "\u2013" : `${(100 * value).toFixed(0)}%`);
  const two = (value) => (value === undefined || value === null ? "\u2013" : value.toFixed(2));

  const methodBox = byId("attention-method");
  const layerBox = byId("attention-layer");
  methodBox?.append(...methods.map((name) => new Option(name, name)));
  layerBox?.append(...layers.map((layer, i) => new Option(`${layer.layer}`, String(i))));

  function stream(index) {
    if (!streams.has(index)) streams.set(index, saccade.inflate(`attention-${index}`));
    return streams.get(index);
  }

  const entries = () => listed ?? layers[now.layer].heads.map((head) => ({ layer: now.layer, head }));
  const part = (bytes, at, size) => (at === undefined ? null : bytes.subarray(at, at + size * size));

  function paint(canvas, bytes, head) {
    const { size } = head;
    const map = part(bytes, head.map, size);
    const kept = now.method === null || now.overlay === "none" ? null : part(bytes, head.selections[now.method], size);
    const paper = rgb(colour("panel"));
    const ink = rgb(colour("ink"));
    const missed = rgb(colour("bad"));
    const known = data.methods[methodIndex.get(now.method)];
    const tint = rgb(known ? colourOf(known) : colour("accent"));
    canvas.width = size;
    canvas.height = size;
    const context = canvas.getContext("2d");
    const image = context.createImageData(size, size);
    for (let i = 0; i < size * size; i++) {
      const weight = (map[i] / 255) ** 1.4; // A log scale is pale: the power brings the strong keys forward.
      const share = kept ? kept[i] / 255 : 0;
      const future = i % size > Math.floor(i / size);
      for (let c = 0; c < 3; c++) {
        let value = paper[c] + weight * (ink[c] - paper[c]);
        if (kept && now.overlay === "kept") value += 0.4 * share * (tint[c] - value);
        if (kept && now.overlay === "missed") value = paper[c] + weight * (share * 0.35 * (ink[c] - paper[c]) + (1 - share) * (missed[c] - paper[c]));
        image.data[4 * i + c] = value;
      }
      image.data[4 * i + 3] = future && weight === 0 && share === 0 ? 0 : 255;
    }
    context.putImageData(image, 0, 0);
  }

  const nameOf = (head) => `Head ${head.head}` + (head.kv_head === null ? "" : `, group ${head.kv_head}`);
  const placeOf = ({ layer, head }) => `Layer ${layers[layer].layer}, ${nameOf(head).toLowerCase()}`;
  const titleOf = ({ layer, head }) => (listed ? `Layer ${layers[layer].layer}, head ${head.head}` : nameOf(head));
  const massOf = (byte) => (byte ? `a mean mass of ${(10 ** ((4 * byte) / 255 - 4)).toPrecision(2)}` : "a mean mass below 0.0001");
  function figures(head) {
    const scores = head.sink === undefined ? [] : [`sink ${two(head.sink)}`, `retrieval ${two(head.retrieval)}`];
    return [...scores, ...(now.method === null ? [] : [`mass ${percent(head.mass[now.method])}`, `density ${percent(head.density[now.method])}`])].join(", ");
  }

  async function paintTile(tile) {
    if (!tile.stale || !tile.near) return;
    tile.stale = false;
    const { entry } = tile;
    try {
      const bytes = await stream(entry.layer);
      if (tile.entry === entry) paint(tile.children[0], bytes, entry.head); // Else another head has come to this place.
    } catch (reason) {
      byId("attention-note").textContent = `The maps can't be drawn: this browser does not inflate data (${reason}).`;
    }
  }
  const sight = new IntersectionObserver(
    (seen) => {
      for (const { target, isIntersecting } of seen) {
        target.near = isIntersecting;
        paintTile(target);
      }
    },
    { rootMargin: "500px 0px" },
  );

  function newTile() {
    const tile = Object.assign(document.createElement("button"), { type: "button", className: "head" });
    tile.append(document.createElement("canvas"), document.createElement("strong"), document.createElement("span"));
    tile.addEventListener("click", () => enlarge([...tile.parentNode.children].indexOf(tile)));
    return tile;
  }

  function drawGrid() {
    const shown = entries();
    const grid = byId("heads");
    const wanted = state.method !== null && !methods.includes(state.method);
    byId("attention-note").textContent = wanted ? `${state.method} has no selections here; ${now.method ?? "no method"} is shown.` : "";
    if (!shown.length) byId("attention-note").textContent = "No head passes the filter.";
    while (grid.children.length > shown.length) {
      sight.unobserve(grid.lastChild);
      grid.lastChild.remove();
    }
    shown.forEach((entry, i) => {
      let tile = grid.children[i];
      if (!tile) {
        tile = newTile();
        tile.near = i < AT_ONCE;
        grid.append(tile);
        sight.observe(tile);
      }
      Object.assign(tile, { entry, stale: true });
      tile.children[1].textContent = titleOf(entry);
      tile.children[2].textContent = figures(entry.head);
      tile.setAttribute("aria-label", `${nameOf(entry.head)}, layer ${layers[entry.layer].layer}: ${figures(entry.head)}. Enlarge`);
      paintTile(tile);
    });
    if (methodBox) methodBox.value = now.method ?? "";
    if (layerBox) layerBox.value = String(now.layer);
    if (byId("enlarged").open) drawEnlarged();
  }

  async function drawEnlarged() {
    const shown = entries();
    now.at = Math.max(0, Math.min(now.at, shown.length - 1));
    const entry = shown[now.at];
    if (!entry) return;
    byId("enlarged-title").textContent = placeOf(entry);
    byId("enlarged-read").textContent = `${now.method ?? ""} ${figures(entry.head)}. Point at the map to read it.`;
    byId("enlarged-overlay").textContent = `Overlay: ${now.overlay}`;
    const turn = ++now.turn;
    const bytes = await stream(entry.layer);
    if (turn === now.turn) paint(byId("enlarged-map"), bytes, entry.head); // Else another head was chosen while this one was opened.
  }

  function enlarge(index) {
    now.at = index;
    byId("enlarged").showModal();
    drawEnlarged();
  }

  function step(key, by, count) {
    now[key] = (now[key] + by + count) % count;
    drawGrid();
  }
  const stepHead = (by) => step("at", by, entries().length);
  const stepLayer = (by) => step("layer", by, layers.length);

  const overlays = ["kept", "missed", "none"];
  function turnOverlay() {
    if (now.method === null) return;
    now.overlay = overlays[(overlays.indexOf(now.overlay) + 1) % overlays.length];
    document.querySelector(`input[name="Overlay"][value="${now.overlay}"]`).checked = true;
    drawGrid();
  }

  function common(event) {
    if (event.key === "PageUp" && !listed) stepLayer(-1);
    else if (event.key === "PageDown" && !listed) stepLayer(1);
    else if (event.key.toLowerCase() === "o" && !event.ctrlKey && !event.metaKey) turnOverlay();
    else return false;
    event.preventDefault();
    return true;
  }

  byId("heads").addEventListener("keydown", (event) => {
    const tiles = [...byId("heads").children];
    const at = tiles.indexOf(document.activeElement);
    if (at < 0 || common(event)) return;
    const columns = getComputedStyle(byId("heads")).gridTemplateColumns.split(" ").length;
    const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    tiles[at + move]?.focus();
  });
  byId("enlarged").addEventListener("keydown", (event) => {
    if (common(event)) return;
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move !== undefined) stepHead(move);
  });
  byId("enlarged").addEventListener("close", () => byId("heads").children[now.at]?.focus());

  async function read(event) {
    const { layer, head } = entries()[now.at];
    const box = byId("enlarged-map").getBoundingClientRect();
    const at = (value, from, span) => Math.min(head.size - 1, Math.max(0, Math.floor(((value - from) / span) * head.size)));
    const column = at(event.clientX, box.left, box.width);
    const row = at(event.clientY, box.top, box.height);
    const bytes = await stream(layer);
    const i = row * head.size + column;
    const kept = now.method === null ? null : part(bytes, head.selections[now.method], head.size);
    const width = pool ?? 1;
    const span = (tile) => `${tile * width} to ${(tile + 1) * width - 1}` + (texts ? ` \u201c${saccade.short(texts[tile].replace(/\s+/g, " ").trim(), 40)}\u201d` : "");
    byId("enlarged-read").textContent = `Queries ${span(row)}, keys ${span(column)}: ${massOf(part(bytes, head.map, head.size)[i])}` + (kept ? `, ${percent(kept[i] / 255)} of the keys kept` : "");
  }
  byId("enlarged-map").addEventListener("pointermove", read);
  byId("enlarged-map").addEventListener("pointerdown", read);
  byId("enlarged-close").addEventListener("click", () => byId("enlarged").close());
  byId("enlarged-overlay").addEventListener("click", turnOverlay);
  byId("head-previous").addEventListener("click", () => stepHead(-1));
  byId("head-next").addEventListener("click", () => stepHead(1));
  byId("layer-previous")?.addEventListener("click", () => stepLayer(-1));
  byId("layer-next")?.addEventListener("click", () => stepLayer(1));
  layerBox?.addEventListener("change", () => stepLayer(Number(layerBox.value) - now.layer));
  methodBox?.addEventListener("change", () => {
    now.method = methodBox.value;
    drawGrid();
  });
  saccade.choice("Overlay", (value) => {
    now.overlay = value;
    drawGrid();
  });
  if (listed) {
    const entryOf = (node) => ({ layer: Number(node.dataset.at), head: layers[node.dataset.at].heads[node.dataset.head] });
    document.addEventListener("saccade:list", (event) => {
      listed = event.detail.map(entryOf);
      drawGrid();
    });
    byId("table").addEventListener("click", (event) => {
      const row = event.target.closest("button[data-enlarge]")?.closest("tr");
      if (row) enlarge(entries().findIndex(({ layer, head }) => layer === Number(row.dataset.at) && head === layers[layer].heads[row.dataset.head]));
    });
  }
  saccade.onDrawNear(byId("attention"), () => {
    if (state.method !== null && methods.includes(state.method)) now.method = state.method;
    drawGrid();
  });

  // What the PNG export draws: the same heads, painted in the same way.
  saccade.viewer = { entries, current: () => entries()[now.at], placeOf, figures, paint: async (canvas, { layer, head }) => paint(canvas, await stream(layer), head) };
})();
