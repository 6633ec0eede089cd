// Charts that can be hovered and zoomed, and tables that can be sorted. Charts of a page share their horizontal axis.
"use strict";
(() => {
  const holder = document.getElementById("charts");
  const charts = holder ? JSON.parse(holder.textContent) : [];
  const figures = [...document.querySelectorAll(".chart")];
  const LEFT = 58, RIGHT = 14, TOP = 10, BOTTOM = 26, HEIGHT = 250, DRAGGED = 8;
  const xs = charts.flatMap((chart) => chart.lines.flatMap((line) => line.points.map((point) => point[0])));
  const whole = [Math.min(0, ...xs.slice(0, 1)), xs.reduce((a, b) => Math.max(a, b), 0) || 1];
  let view = whole;

  function node(parent, tag, attributes = {}, text = null) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== null) made.textContent = text;
    parent.append(made);
    return made;
  }

  function element(parent, tag, text = "", name = "") {
    const made = document.createElement(tag);
    made.textContent = text;
    if (name) made.className = name;
    parent.append(made);
    return made;
  }

  // Round numbers in [low, high], about `most` of them.
  function ticks(low, high, most) {
    const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
    return found;
  }

  const short = (value) => Math.abs(value) >= 10000
    ? value.toLocaleString("en", { maximumFractionDigits: 0 })
    : String(Number(value.toPrecision(Math.abs(value) >= 1000 ? 5 : 4)));

  function seen(line) {  // the points in view, and one beyond each end
    const inside = line.points.map(([x]) => x >= view[0] && x <= view[1]);
    return line.points.filter((_, i) => inside[i] || inside[i - 1] || inside[i + 1]);
  }

  function draw(index) {
    const chart = charts[index], figure = figures[index];
    const width = Math.max(240, figure.clientWidth), right = width - RIGHT, bottom = HEIGHT - BOTTOM;
    figure.querySelector("svg")?.remove();
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    figure.querySelector("h3").after(svg);
    for (const [name, value] of Object.entries({ viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": chart.title }))
      svg.setAttribute(name, value);
    const drawn = chart.lines.filter((line) => !line.hidden && line.points.length);
    const values = drawn.flatMap((line) => seen(line).map((point) => point[1]));
    let low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    if (!values.length) [low, high] = [0, 1];
    if (chart.zero) low = Math.min(low, 0);
    const room = (high - low || Math.abs(high) || 1) * 0.05;
    [low, high] = [chart.zero && low === 0 ? 0 : low - room, high + room];
    const atX = (x) => LEFT + (x - view[0]) / (view[1] - view[0]) * (right - LEFT);
    const atY = (y) => bottom - (y - low) / (high - low) * (bottom - TOP);
    for (const y of ticks(low, high, 6)) {
      node(svg, "line", { class: "grid", x1: LEFT, x2: right, y1: atY(y), y2: atY(y) });
      node(svg, "text", { x: LEFT - 6, y: atY(y) + 4, "text-anchor": "end" }, short(y));
    }
    for (const x of ticks(view[0], view[1], Math.max(2, Math.min(8, width / 70)))) {
      node(svg, "text", { x: atX(x), y: HEIGHT - 8, "text-anchor": "middle" }, short(x));
    }
    const clip = node(node(svg, "clipPath", { id: `clip${index}` }), "rect",
      { x: LEFT - 2, y: TOP - 4, width: right - LEFT + 4, height: bottom - TOP + 8 });
    const inner = node(svg, "g", { "clip-path": `url(#${clip.parentNode.id})` });
    for (const line of drawn) {
      const style = `stroke:var(--${line.colour});fill:none` + (line.dash ? `;stroke-dasharray:${line.dash}` : "");
      const points = seen(line).map(([x, y]) => `${atX(x).toFixed(1)},${atY(y).toFixed(1)}`).join(" ");
      node(inner, "polyline", { class: line.faint ? "line faint" : "line", style, points });
      if (line.points.length === 1)
        node(inner, "circle", { cx: atX(line.points[0][0]), cy: atY(line.points[0][1]), r: 3, style: `fill:var(--${line.colour})` });
    }
    const cursor = node(inner, "line", { class: "cursor", y1: TOP, y2: bottom, visibility: "hidden" });
    const chosen = node(inner, "rect", { class: "chosen", y: TOP, height: bottom - TOP, width: 0 });
    const tip = figure.querySelector(".tip");
    const place = (event) => {
      const box = svg.getBoundingClientRect();
      return Math.min(right, Math.max(LEFT, (event.clientX - box.left) * width / box.width));
    };
    const valueAt = (x) => view[0] + (x - LEFT) / (right - LEFT) * (view[1] - view[0]);
    let from = null;
    svg.addEventListener("pointermove", (event) => {
      const x = place(event), value = valueAt(x);
      cursor.setAttribute("visibility", "visible");
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      tip.replaceChildren();
      for (const line of drawn) {
        const point = line.points.reduce((a, b) => Math.abs(b[0] - value) < Math.abs(a[0] - value) ? b : a);
        const row = element(tip, "div");
        element(row, "i", "", "swatch").style.borderColor = `var(--${line.colour})`;
        row.append(`${line.name}: ${short(point[1])}${chart.unit} at ${short(point[0])}`);
      }
      tip.hidden = !drawn.length;
      const outer = figure.getBoundingClientRect(), box = svg.getBoundingClientRect();
      tip.style.top = `${box.top - outer.top + TOP}px`;
      const left = box.left - outer.left + x * box.width / width;
      tip.style.left = `${Math.max(0, left + tip.offsetWidth + 16 > figure.clientWidth ? left - tip.offsetWidth - 12 : left + 12)}px`;
      if (from !== null) {
        chosen.setAttribute("x", Math.min(from, x));
        chosen.setAttribute("width", Math.abs(x - from));
      }
    });
    const leave = () => {
      cursor.setAttribute("visibility", "hidden");
      chosen.setAttribute("width", 0);
      tip.hidden = true;
      from = null;
    };
    svg.addEventListener("pointerdown", (event) => {
      from = place(event);
      if (event.pointerType === "mouse") svg.setPointerCapture(event.pointerId);
    });
    svg.addEventListener("pointerup", (event) => {
      const x = place(event), start = from;
      leave();
      if (start !== null && Math.abs(x - start) > DRAGGED) show([valueAt(Math.min(start, x)), valueAt(Math.max(start, x))]);
    });
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointercancel", leave);
    svg.addEventListener("dblclick", () => show(whole));
  }

  function show(range) {
    const width = Math.min(whole[1] - whole[0], Math.max(range[1] - range[0], (whole[1] - whole[0]) / 10000));
    const start = Math.min(Math.max(range[0], whole[0]), whole[1] - width);
    view = [start, start + width];
    charts.forEach((_, index) => draw(index));
  }

  function zoom(factor) {
    const middle = (view[0] + view[1]) / 2, half = (view[1] - view[0]) * factor / 2;
    show([middle - half, middle + half]);
  }

  figures.forEach((figure, index) => {
    const legend = element(figure, "figcaption", "", "legend");
    for (const line of charts[index].lines) {
      const button = element(legend, "button");
      const swatch = element(button, "i", "", "swatch");
      swatch.style.borderColor = `var(--${line.colour})`;
      if (line.dash) swatch.style.borderTopStyle = line.dash.startsWith("2") ? "dotted" : "dashed";
      button.type = "button";
      button.append(line.name);
      button.setAttribute("aria-pressed", "true");
      button.addEventListener("click", () => {
        line.hidden = !line.hidden;
        button.setAttribute("aria-pressed", String(!line.hidden));
        draw(index);
      });
    }
    element(figure, "div", "", "tip").hidden = true;
  });
  for (const button of document.querySelectorAll(".tools button"))
    button.addEventListener("click", () => (button.value ? zoom(Number(button.value)) : show(whole)));
  show(whole);
  let known = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== known) {
      known = innerWidth;
      show(view);
    }
  });

  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => { each.open = true; }));

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const falling = head.getAttribute("aria-sort") === "ascending"
        || (!head.hasAttribute("aria-sort") && head.classList.contains("n"));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const numbers = head.classList.contains("n");
      const compare = (a, b) => (numbers ? Number(key(a)) - Number(key(b)) : key(a).localeCompare(key(b))) * (falling ? -1 : 1);
      const body = table.tBodies[0], rows = [...body.rows];
      const empty = (row) => numbers && row.cells[column].dataset.value === "";
      body.append(...rows.filter((row) => !empty(row)).sort(compare), ...rows.filter(empty));
    }));
  }
})();
