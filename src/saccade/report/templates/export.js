"use strict";
// Saving what the viewer shows as PNG: the enlarged head, or all heads on one sheet, each with its name and figures below it.
(() => {
  const { byId, colour, viewer } = saccade;
  if (!viewer) return;
  const FONT = "system-ui, sans-serif";
  const MOST_PIXELS = 100e6; // Browsers refuse canvases beyond a few hundred million.

  async function sheet(entries, columns, edge, title) {
    const rows = Math.ceil(entries.length / columns);
    const gap = 14;
    const below = 44;
    const head = title ? 40 : 0;
    const canvas = document.createElement("canvas");
    canvas.width = gap + columns * (edge + gap);
    canvas.height = gap + head + rows * (edge + below + gap);
    const context = canvas.getContext("2d");
    context.fillStyle = colour("panel");
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.imageSmoothingEnabled = false;
    context.textBaseline = "top";
    const write = (text, x, y, size, look, weight) => {
      context.font = `${weight} ${size}px ${FONT}`;
      context.fillStyle = colour(look);
      context.fillText(text, x, y, edge);
    };
    if (title) {
      context.font = `600 20px ${FONT}`;
      context.fillStyle = colour("ink");
      context.fillText(title, gap, gap, canvas.width - 2 * gap);
    }
    const map = document.createElement("canvas");
    for (const [i, entry] of entries.entries()) {
      const x = gap + (i % columns) * (edge + gap);
      const y = gap + head + Math.floor(i / columns) * (edge + below + gap);
      await viewer.paint(map, entry);
      context.drawImage(map, x, y, edge, edge);
      context.strokeStyle = colour("line");
      context.strokeRect(x - 0.5, y - 0.5, edge + 1, edge + 1);
      write(viewer.placeOf(entry), x, y + edge + 6, 15, "ink", 600);
      write(viewer.figures(entry.head), x, y + edge + 25, 13, "muted", 400);
    }
    return canvas;
  }

  const fileName = (text) => `${text.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "")}.png`;

  async function save(button, canvas, name) {
    const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
    if (!blob) {
      button.textContent = "Too large to save";
      return;
    }
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: fileName(name) });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }

  byId("save-head")?.addEventListener("click", async (event) => {
    const entry = viewer.current();
    const edge = entry.head.size * Math.max(1, Math.floor(1024 / entry.head.size));
    await save(event.target, await sheet([entry], 1, edge, ""), `${document.title} ${viewer.placeOf(entry)}`);
  });
  byId("save-page")?.addEventListener("click", async (event) => {
    const entries = viewer.entries();
    if (!entries.length) return;
    const columns = Math.ceil(Math.sqrt(1.3 * entries.length));
    const edge = Math.floor(Math.min(256, Math.sqrt(MOST_PIXELS / entries.length) - 60));
    await save(event.target, await sheet(entries, columns, edge, document.title), `${document.title} heads`);
  });
})();
