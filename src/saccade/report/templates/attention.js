"use strict";
// The attention viewer: one canvas per head, the map in ink and the method's selection over it.
(() => {
  const { byId, data, state, methodIndex, colour, colourOf } = saccade;
  if (!data.attention) return;
  const { layers, methods, pool } = data.attention;
  const now = { layer: 0, method: methods[0] ?? null, overlay: "kept", head: 0 };
  const streams = new Map();
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const percent = (value) => (value === undefined || value === null ? "\u2013" : `${(100 * value).toFixed(0)}%`);

  const methodBox = byId("attention-method");
  const layerBox = byId("attention-layer");
  methodBox.append(...methods.map((name) => new Option(name, name)));
  layerBox.append(...layers.map((layer, i) => new Option(`${layer.layer}`, String(i))));

  function stream(index) {
    if (!streams.has(index)) streams.set(index, saccade.inflate(`attention-${index}`));
    return streams.get(index);
  }

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
  const figures = (head) => (now.method === null ? "" : `mass ${percent(head.mass[now.method])}, density ${percent(head.density[now.method])}`);

  async function drawGrid() {
    const layer = layers[now.layer];
    let bytes;
    try {
      bytes = await stream(now.layer);
    } catch (reason) {
      byId("attention-note").textContent = `The maps can't be drawn: this browser does not inflate data (${reason}).`;
      return;
    }
    if (layer !== layers[now.layer]) return; // Another layer was chosen while this one was opened.
    const grid = byId("heads");
    while (grid.children.length > layer.heads.length) grid.lastChild.remove();
    layer.heads.forEach((head, i) => {
      let tile = grid.children[i];
      if (!tile) {
        tile = Object.assign(document.createElement("button"), { type: "button", className: "head" });
        tile.append(document.createElement("canvas"), document.createElement("strong"), document.createElement("span"));
        tile.addEventListener("click", () => enlarge(i));
        grid.append(tile);
      }
      tile.children[1].textContent = nameOf(head);
      tile.children[2].textContent = figures(head);
      tile.setAttribute("aria-label", `${nameOf(head)}, layer ${layer.layer}: ${figures(head)}. Enlarge`);
      paint(tile.children[0], bytes, head);
    });
    methodBox.value = now.method ?? "";
    layerBox.value = String(now.layer);
    const wanted = state.method !== null && !methods.includes(state.method);
    byId("attention-note").textContent = wanted ? `${state.method} has no selections here; ${now.method ?? "no method"} is shown.` : "";
    if (byId("enlarged").open) drawEnlarged(bytes);
  }

  function drawEnlarged(bytes) {
    const layer = layers[now.layer];
    now.head = Math.min(now.head, layer.heads.length - 1);
    const head = layer.heads[now.head];
    byId("enlarged-title").textContent = `Layer ${layer.layer}, ${nameOf(head).toLowerCase()}`;
    byId("enlarged-read").textContent = `${now.method ?? ""} ${figures(head)}. Point at the map to read it.`;
    byId("enlarged-overlay").textContent = `Overlay: ${now.overlay}`;
    paint(byId("enlarged-map"), bytes, head);
  }

  async function enlarge(index) {
    now.head = index;
    byId("enlarged").showModal();
    drawEnlarged(await stream(now.layer));
  }

  function step(key, by, count) {
    now[key] = (now[key] + by + count) % count;
    drawGrid();
  }

  const overlays = ["kept", "missed", "none"];
  function turnOverlay() {
    now.overlay = overlays[(overlays.indexOf(now.overlay) + 1) % overlays.length];
    document.querySelector(`input[name="Overlay"][value="${now.overlay}"]`).checked = true;
    drawGrid();
  }

  function common(event) {
    if (event.key === "PageUp") step("layer", -1, layers.length);
    else if (event.key === "PageDown") step("layer", 1, layers.length);
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
    if (move !== undefined) step("head", move, layers[now.layer].heads.length);
  });
  byId("enlarged").addEventListener("close", () => byId("heads").children[now.head]?.focus());
  async function read(event) {
    const head = layers[now.layer].heads[now.head];
    const box = byId("enlarged-map").getBoundingClientRect();
    const at = (value, from, span) => Math.min(head.size - 1, Math.max(0, Math.floor(((value - from) / span) * head.size)));
    const column = at(event.clientX, box.left, box.width);
    const row = at(event.clientY, box.top, box.height);
    const bytes = await stream(now.layer);
    const i = row * head.size + column;
    const kept = now.method === null ? null : part(bytes, head.selections[now.method], head.size);
    const width = pool ?? 1;
    const span = (tile) => `${tile * width} to ${(tile + 1) * width - 1}`;
    byId("enlarged-read").textContent = `Queries ${span(row)}, keys ${span(column)}: attention ${part(bytes, head.map, head.size)[i]} of 255 on a log scale` + (kept ? `, ${percent(kept[i] / 255)} of the keys kept` : "");
  }
  byId("enlarged-map").addEventListener("pointermove", read);
  byId("enlarged-map").addEventListener("pointerdown", read);
  byId("enlarged-close").addEventListener("click", () => byId("enlarged").close());
  byId("enlarged-overlay").addEventListener("click", turnOverlay);
  byId("head-previous").addEventListener("click", () => step("head", -1, layers[now.layer].heads.length));
  byId("head-next").addEventListener("click", () => step("head", 1, layers[now.layer].heads.length));
  byId("layer-previous").addEventListener("click", () => step("layer", -1, layers.length));
  byId("layer-next").addEventListener("click", () => step("layer", 1, layers.length));
  layerBox.addEventListener("change", () => step("layer", Number(layerBox.value) - now.layer, layers.length));
  methodBox.addEventListener("change", () => {
    now.method = methodBox.value;
    drawGrid();
  });
  saccade.choice("Overlay", (value) => {
    now.overlay = value;
    drawGrid();
  });
  saccade.onDrawNear(byId("attention"), () => {
    if (state.method !== null && methods.includes(state.method)) now.method = state.method;
    drawGrid();
  });
})();
