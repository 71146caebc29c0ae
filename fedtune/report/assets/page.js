"use strict";
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const hues = {
    light: ["#0067a8", "#cf4a00", "#007f5f", "#b1418c", "#8a6a00", "#4f56c9", "#1d1d1f", "#3d9ac4"],
    dark: ["#62b5f0", "#ff8f4d", "#3ecf9f", "#ec8fc7", "#dcbc45", "#a6a9ff", "#f2f2f5", "#2f8fbd"],
  };
  const dashes = ["", "7 3", "2 2", "9 3 2 3", "", "7 3", "2 2", "9 3 2 3"];
  const shapes = [
    "M21,7a4,4,0,1,1,-8,0a4,4,0,1,1,8,0", "M13.4,3.4h7.2v7.2h-7.2Z", "M17,2.4l4.6,8.4h-9.2Z", "M17,2l3.6,5l-3.6,5l-3.6,-5Z",
    "M15.6,2.6h2.8v3h3v2.8h-3v3h-2.8v-3h-3v-2.8h3Z", "M17,11.6l4.6,-8.4h-9.2Z", "M21.4,7l-8.2,4.6v-9.2Z", "M12.6,7l8.2,4.6v-9.2Z",
  ];
  let groups = [];
  let chosen = {};   // by group title: labels by slot, so that they outlast a new page
  let axes = {};     // by figure: which horizontal axis
  let views = [];

  const theme = () => root.dataset.theme || (dark.matches ? "dark" : "light");

  const config = (width) => {
    const style = getComputedStyle(root);
    const color = (name) => style.getPropertyValue(name).trim();
    const font = style.getPropertyValue("font-family") || getComputedStyle(document.body).fontFamily;
    return {
      aria: false, background: "transparent", font: getComputedStyle(document.body).fontFamily || font,
      range: { category: hues[theme()] }, view: { stroke: null },
      axis: {
        labelColor: color("--soft"), titleColor: color("--soft"), gridColor: color("--line"), domainColor: color("--strong"),
        tickColor: color("--strong"), labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", titlePadding: 10,
        labelLimit: Math.max(90, Math.min(240, width * 0.34)),
      },
      legend: { labelColor: color("--soft"), labelFontSize: 12, symbolSize: 90, labelLimit: 150, columns: Math.max(1, Math.floor((width - 140) / 125)) },
      text: { color: color("--soft"), fontSize: 12 },
    };
  };

  const slotsOf = (group) => {
    const known = chosen[group.title];
    const slots = known ? known.map((label) => group.names.indexOf(label)).map((at) => (at < 0 ? null : at)) : group.chosen;
    return [...slots, ...Array(8).fill(null)].slice(0, 8);
  };

  const keep = (group, slots) => {
    chosen[group.title] = slots.map((at) => (at === null ? null : group.names[at]));
  };

  const paint = (section, group) => {
    const slots = slotsOf(group);
    for (const box of section.querySelectorAll(".choices input")) {
      const slot = slots.indexOf(Number(box.value));
      box.checked = slot >= 0;
      const mark = box.parentElement.querySelector(".mark");
      mark.replaceChildren();
      if (slot < 0) continue;
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      svg.setAttribute("width", "34");
      svg.setAttribute("height", "14");
      const hue = hues[theme()][slot];
      for (const [name, settings] of [
        ["line", { x1: 0, x2: 34, y1: 7, y2: 7, stroke: hue, "stroke-width": 2, "stroke-dasharray": dashes[slot] }],
        ["path", { d: shapes[slot], fill: hue }],
      ]) {
        const part = document.createElementNS("http://www.w3.org/2000/svg", name);
        for (const [key, value] of Object.entries(settings)) part.setAttribute(key, value);
        svg.append(part);
      }
      mark.append(svg);
    }
  };

  const show = (section, group) => {
    paint(section, group);
    for (const view of views.filter((view) => view.group === group)) {
      if (view.figure.spec.height.step && !group.every) draw(view.figure, group, view.place);
      else view.view.signal("chosen", slotsOf(group)).runAsync();
    }
  };

  const compile = (figure, group, place) => {
    const spec = structuredClone(figure.spec);
    const axis = axes[place.closest("figure").id] || 0;
    if (axis && figure.views[axis]) spec.encoding.x = figure.views[axis];
    for (const param of spec.params) if (param.name === "chosen") param.value = slotsOf(group);
    const room = place.clientWidth;
    spec.autosize = { type: "fit-x", contains: "padding", resize: true };
    spec.width = Math.max(160, room);
    if (figure.spec.height.step) {
      // A figure with a row an entry: all of them, or the chosen
      const slots = slotsOf(group);
      const shown = new Set(spec.data.values.map((row) => row.e).filter((entry) => group.every || slots.includes(entry)));
      spec.height = figure.spec.height.step * Math.max(shown.size, 1);
    } else if (room < 420) spec.height = 220;
    return { spec, config: config(room) };
  };

  const draw = async (figure, group, place) => {
    const { spec, config } = compile(figure, group, place);
    const old = views.find((view) => view.place === place);
    const options = { mode: "vega-lite", actions: false, renderer: "svg", ast: true, logLevel: 1, config, tooltip: { theme: "custom" } };
    const done = await vegaEmbed(place, spec, options);
    if (old) old.finalize();
    views = views.filter((view) => view.place !== place);
    if (place.isConnected) views.push({ place, group, figure, view: done.view, width: place.clientWidth, finalize: done.finalize });
    else done.finalize();
  };

  const save = async (view, kind) => {
    const link = document.createElement("a");
    link.href = await view.view.toImageURL(kind, 2);
    link.download = `${view.figure.name}.${kind}`;
    link.click();
    if (link.href.startsWith("blob:")) setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };

  const wire = (section, group) => {
    for (const box of section.querySelectorAll(".choices input")) {
      box.addEventListener("change", () => {
        const slots = slotsOf(group), entry = Number(box.value);
        if (!box.checked) slots[slots.indexOf(entry)] = null;
        else {
          const free = slots.indexOf(null);
          if (free >= 0) slots[free] = entry;
          else {
            group.next = (group.next ?? -1) + 1;
            slots[group.next % 8] = entry;
          }
        }
        keep(group, slots);
        show(section, group);
      });
    }
    section.querySelector(".reset").addEventListener("click", () => { delete chosen[group.title]; show(section, group); });
    section.querySelector(".clear").addEventListener("click", () => { keep(group, Array(8).fill(null)); show(section, group); });
    for (const element of section.querySelectorAll("figure")) {
      const place = element.querySelector(".chart");
      const figure = group.figures.find((figure) => figure.name === element.dataset.figure);
      for (const radio of element.querySelectorAll(".views input")) {
        radio.checked = Number(radio.value) === (axes[element.id] || 0);
        radio.addEventListener("change", () => { axes[element.id] = Number(radio.value); draw(figure, group, place); });
      }
      for (const button of element.querySelectorAll(".save")) {
        button.addEventListener("click", () => {
          const view = views.find((view) => view.place === place);
          if (view) save(view, button.dataset.as);
        });
      }
    }
  };

  const redraw = async () => {
    for (const section of document.querySelectorAll("section.group")) {
      const group = groups[Number(section.dataset.group)];
      paint(section, group);
      for (const element of section.querySelectorAll("figure")) {
        const figure = group.figures.find((figure) => figure.name === element.dataset.figure);
        await draw(figure, group, element.querySelector(".chart"));
      }
    }
  };

  const load = async () => {
    groups = JSON.parse(document.getElementById("data").textContent).groups;
    for (const section of document.querySelectorAll("section.group")) wire(section, groups[Number(section.dataset.group)]);
    await redraw();
  };

  const button = document.getElementById("theme");
  const label = () => {
    button.textContent = theme() === "dark" ? "Light" : "Dark";
    button.setAttribute("aria-label", `Use the ${theme() === "dark" ? "light" : "dark"} colours`);
  };
  const remembered = (value) => {
    try {
      if (value) localStorage.setItem("fedtune-theme", value);
      return localStorage.getItem("fedtune-theme");
    } catch { return null; }
  };
  if (["light", "dark"].includes(remembered())) root.dataset.theme = remembered();
  button.removeAttribute("aria-pressed");
  button.addEventListener("click", () => {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    remembered(root.dataset.theme);
    label();
    redraw();
  });
  dark.addEventListener("change", () => { label(); redraw(); });
  label();

  let waiting = 0;
  let wide = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === wide) return;
    wide = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(redraw, 120);
  });

  const live = document.getElementById("live");
  const follow = async () => {
    try {
      const main = document.getElementById("content");
      const version = (await (await fetch("/version", { cache: "no-store" })).text()).trim();
      if (version !== main.dataset.version) {
        const text = await (await fetch("/", { cache: "no-store" })).text();
        const fresh = new DOMParser().parseFromString(text, "text/html").getElementById("content");
        const open = [...main.querySelectorAll("details[open]")].map((details) => details.id);
        const scrolls = [...main.querySelectorAll(".scroll")].map((box) => [box.getAttribute("aria-label"), box.scrollLeft]);
        const focused = document.activeElement && main.contains(document.activeElement) ? pathOf(document.activeElement) : null;
        const heights = new Map([...main.querySelectorAll("figure")].map((figure) => [figure.id, figure.querySelector(".chart").offsetHeight]));
        const [x, y] = [scrollX, scrollY];
        for (const view of views) view.finalize();
        views = [];
        for (const figure of fresh.querySelectorAll("figure")) figure.querySelector(".chart").style.minHeight = `${heights.get(figure.id) || 0}px`;
        for (const id of open) fresh.querySelector(`[id="${CSS.escape(id)}"]`)?.setAttribute("open", "");
        document.title = fresh.querySelector("h1").textContent;
        main.replaceWith(document.adoptNode(fresh));
        for (const [name, left] of scrolls) {
          const box = [...fresh.querySelectorAll(".scroll")].find((box) => box.getAttribute("aria-label") === name);
          if (box) box.scrollLeft = left;
        }
        if (focused) fresh.querySelector(focused)?.focus({ preventScroll: true });
        scrollTo({ left: x, top: y, behavior: "instant" });
        await load();
        for (const chart of fresh.querySelectorAll(".chart")) chart.style.minHeight = "";
        scrollTo({ left: x, top: y, behavior: "instant" });
      }
      live.textContent = "live";
      live.classList.remove("off");
    } catch {
      live.textContent = "the server doesn't answer";
      live.classList.add("off");
    }
    setTimeout(follow, 2000);
  };
  const pathOf = (element) => {
    const within = element.closest("[id]");
    const start = `[id="${CSS.escape(within.id)}"]`;
    if (within === element) return start;
    if (element.matches("input")) return `${start} input[value="${element.value}"]`;
    return `${start} ${element.tagName.toLowerCase()}${[...element.classList].map((name) => `.${CSS.escape(name)}`).join("")}`;
  };

  globalThis.drawn = load().then(() => { if (live) setTimeout(follow, 2000); });
})();
