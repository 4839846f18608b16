"use strict";
// What every part of the page shares: the data, the one filter, the theme, copying, and how the deflated parts are opened.
const saccade = (() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const state = { method: null, mode: data.modes[0] };
  const listeners = [];
  const methodIndex = new Map(data.methods.map((method, i) => [method.name, i]));

  function bytesOf(base64) {
    const text = atob(base64);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return bytes;
  }

  async function inflate(id) {
    const stream = new Blob([bytesOf(byId(id).textContent)]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const colourOf = (method) => colour(method.css);

  // Plotly reads a little HTML in its texts: names must stay text.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  // Both ends of a long name stay: methods of one family differ at the end, in their numbers.
  const short = (text, n) => (text.length > n ? `${text.slice(0, Math.ceil(n / 2) - 1)}\u2026${text.slice(-Math.floor(n / 2))}` : text);
  const lengthText = (n) => (n >= 1024 && n % 1024 === 0 ? `${n / 1024}K` : n.toLocaleString("en"));
  const isDark = () => getComputedStyle(document.documentElement).colorScheme === "dark";

  // Draw again after the filter, the mode, the theme or the width of the page has changed. What has a node waits until the node is near
  // the window, so that the page opens, and follows a click, without drawing charts that nobody sees.
  const draw = () => listeners.forEach((listener) => listener());
  function onDraw(listener) {
    listeners.push(listener);
    listener();
  }
  const waitingNodes = new Map();
  const sight = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        const place = waitingNodes.get(target);
        place.near = isIntersecting;
        if (isIntersecting) place.drawNow();
      }
    },
    { rootMargin: "500px 0px" },
  );
  function onDrawNear(node, listener) {
    const place = { near: false, stale: true };
    place.drawNow = () => {
      if (place.stale) listener();
      place.stale = false;
    };
    waitingNodes.set(node, place);
    onDraw(() => {
      place.stale = true;
      if (place.near) place.drawNow();
    });
    sight.observe(node);
  }
  addEventListener("beforeprint", () => waitingNodes.forEach((place) => place.drawNow()));

  function show(method) {
    state.method = method === state.method ? null : method;
    document.body.classList.toggle("filtered", state.method !== null);
    document.querySelectorAll(".chip").forEach((chip) => chip.setAttribute("aria-pressed", String(chip.dataset.chip === state.method)));
    byId("clear").hidden = state.method === null;
    byId("announce").textContent = state.method === null ? "All methods shown." : `Only ${state.method} shown.`;
    draw();
  }

  function choice(name, listener) {
    const box = document.querySelector(`[data-choice="${name}"]`);
    if (box) box.addEventListener("change", (event) => listener(event.target.value));
  }

  async function copy(button) {
    const text = button.dataset.copy;
    let done = true;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // No clipboard here (an old browser, a page inside a frame): select and copy the old way.
      const area = Object.assign(document.createElement("textarea"), { value: text });
      document.body.append(area);
      area.select();
      done = document.execCommand("copy");
      area.remove();
      button.focus();
    }
    button.textContent = done ? "Copied" : "Not copied";
    button.classList.toggle("done", done);
    setTimeout(() => {
      button.textContent = "Copy";
      button.classList.remove("done");
    }, 1500);
  }

  const remembered = {
    get() {
      try {
        return localStorage.getItem("saccade-theme");
      } catch {
        return null; // A browser may refuse storage to a local file; the system's choice stands.
      }
    },
    set(value) {
      try {
        localStorage.setItem("saccade-theme", value);
      } catch {
        return; // As above: the choice then lasts as long as the page.
      }
    },
  };

  function setTheme(theme) {
    if (theme) document.documentElement.dataset.theme = theme;
    byId("theme").textContent = isDark() ? "Light" : "Dark";
    byId("theme").setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
  }

  setTheme(remembered.get());
  byId("theme").addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    setTheme(theme);
    remembered.set(theme);
    draw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    setTheme(null);
    draw();
  });

  // Headings and rows that are jumped to stop below the bar of methods, whose height depends on how many there are.
  const bar = document.querySelector(".bar");
  const spare = new ResizeObserver(() => {
    document.documentElement.style.scrollPaddingTop = `${bar.offsetHeight + 12}px`;
  });
  if (bar) spare.observe(bar);

  let width = innerWidth;
  let waiting = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // A phone's address bar changes the height on every scroll.
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(draw, 120);
  });

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.copy !== undefined) copy(button);
    else if (button.dataset.chip !== undefined) show(button.dataset.chip);
    else if (button.id === "clear") show(null);
  });
  choice("Mode", (mode) => {
    state.mode = mode;
    draw();
  });

  // Parts written in HTML: heat maps and anything that belongs to one mode.
  onDraw(() => {
    document.querySelectorAll("main [data-mode]:not(tr)").forEach((part) => {
      part.hidden = part.dataset.mode !== state.mode;
    });
    document.querySelectorAll(".heat-group").forEach((group) => {
      let shown = 0;
      group.querySelectorAll(".heat").forEach((heat) => {
        heat.hidden = state.method !== null && heat.dataset.method !== state.method;
        shown += heat.hidden ? 0 : 1;
      });
      group.querySelector(".nothing").hidden = shown > 0;
    });
  });

  // A page without charts carries no plotly.
  const plotly = byId("plotly") && (async () => {
    const script = document.createElement("script");
    script.textContent = new TextDecoder().decode(await inflate("plotly"));
    document.head.append(script);
    return window.Plotly;
  })();

  return { byId, data, state, methodIndex, inflate, colour, colourOf, plain, short, lengthText, isDark, onDraw, onDrawNear, show, choice, plotly };
})();
