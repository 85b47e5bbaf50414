"use strict";
const report = JSON.parse(document.getElementById("report-data").textContent);
// Indices of models switched off in the curves: at first the invalid ones, whose losses mean nothing.
const hidden = new Set(report.models.some((model) => model.valid) ? report.models.flatMap((model, i) => (model.valid ? [] : [i])) : []);
const HUES = 6;
const DASHES = ["solid", "dash", "dot"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon"];

// Look of a model: the baseline in ink, the others in six hues; beyond six, dashes tell them apart.
const looks = (() => {
  let next = 0;
  return report.models.map((model) => {
    if (model.baseline) return { color: "--ink", dash: "solid", symbol: SYMBOLS[0] };
    const i = next++;
    return { color: `--model-${i % HUES}`, dash: DASHES[Math.floor(i / HUES) % 3], symbol: SYMBOLS[(i + 1) % SYMBOLS.length] };
  });
})();
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const faded = (hex, alpha) => hex + Math.round(alpha * 255).toString(16).padStart(2, "0");

function styled(trace) {
  const look = looks[trace.meta.model];
  const color = css(look.color);
  const error = { color, thickness: 1.4, width: 3 };
  const result = { ...trace, marker: { color, symbol: look.symbol, size: 7 }, line: { color, dash: look.dash, width: 2 } };
  if (trace.error_x) result.error_x = { ...error, ...trace.error_x, width: 5 };
  if (trace.error_y) result.error_y = { ...error, ...trace.error_y };
  switch (trace.meta.role) {
    case "seed": Object.assign(result, { mode: "markers", marker: { color: faded(color, 0.45), size: 6 } }); break;
    case "mean": Object.assign(result, { mode: "markers", marker: { ...result.marker, size: 11 } }); break;
    case "point": Object.assign(result, { mode: "markers", marker: { ...result.marker, size: 11 } }); break;
    case "zeroed": Object.assign(result, { line: { color: faded(color, 0.8), dash: "dash", width: 1.4 } }); result.marker.size = 5; break;
    case "swapped": Object.assign(result, { line: { color: faded(color, 0.8), dash: "dot", width: 1.4 } }); result.marker.size = 5; break;
    case "train": result.line = { color: faded(color, 0.35), width: 1 }; break;
    case "band": Object.assign(result, { fillcolor: faded(color, 0.14), line: { width: 0 } }); break;
    case "validation": result.line.width = 2.6; result.marker.size = 5; break;
  }
  return result;
}

function axis(given) {
  return {
    gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false, ticks: "", ticklabelstandoff: 6, automargin: true, fixedrange: coarse,
    ...given,
    zerolinecolor: css("--soft"),
    title: { standoff: 10, font: { size: 13, color: css("--soft") }, ...given.title },
  };
}

const LABELLED = ["plot-cache", "plot-recall-state"]; // a name beside each point
const coarse = matchMedia("(pointer: coarse)").matches; // a finger on a plot scrolls the page
function draw(id) {
  const element = document.getElementById(id);
  const { data, layout } = report.figures[id];
  const labelled = LABELLED.includes(id);
  const curves = id !== "plot-perplexity" && !labelled;
  const traces = data.filter((trace) => !curves || !hidden.has(trace.meta.model)).map(styled);
  if (id === "plot-perplexity" || id === "plot-cache") {
    const names = report.figures["plot-perplexity"].layout.yaxis.ticktext;
    const row = 17 + 15 * Math.max(...names.map((name) => labelLines(name).length)); // of options, a name has a line each
    element.style.height = `${Math.max(360, 120 + row * names.length)}px`;
  }
  const range = labelled ? { range: cacheRange(element, traces) } : {};
  const options = {
    ...layout,
    xaxis: axis({ tickfont: { size: element.clientWidth < 420 ? 11 : 13 }, ...layout.xaxis, ...range }), yaxis: axis(layout.yaxis),
    shapes: (layout.shapes || []).map((shape) => ({ ...shape, layer: "below", line: { color: css("--soft"), width: 1, dash: "dot" } })),
    font: { family: css("--text"), size: 13, color: css("--ink") },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 8, r: 12, t: 12, b: 8 }, // and as much more as the labels need
    hoverlabel: { bgcolor: css("--raised"), bordercolor: css("--line"), font: { color: css("--ink") } },
    dragmode: coarse ? false : "zoom",
    showlegend: false,
  };
  return Plotly.react(element, traces, options, { displayModeBar: false, responsive: true }).then(() => {
    if (labelled) labelPoints(element);
  });
}

// Room for the names at the right of the rightmost point, whatever the width of the page.
function cacheRange(element, traces) {
  const exponents = traces.map((trace) => Math.log10(trace.x[0]));
  const [low, high] = [Math.min(...exponents), Math.max(...exponents)];
  const width = element.clientWidth - 70, right = Math.max(...traces.map((trace) => labelWidth(trace.text[0]))) + 20, left = 28;
  if (low === high) return [low - 0.5, high + 0.5];
  const perPixel = (high - low) / Math.max(60, width - right - left);
  return [low - left * perPixel, high + right * perPixel];
}
const labelLines = (text) => text.split("<br>").map((line) => line.replace(/&#?\w+;/g, "x"));
const labelWidth = (text) => 7.2 * Math.max(...labelLines(text).map((line) => line.length));

// A name beside each point, moved until it covers no other name, point or interval; a thin line leads back if it is far.
function labelPoints(element) {
  const { xaxis, yaxis } = element._fullLayout;
  const points = element.data.map((trace) => {
    const [x, y] = [xaxis.d2p(trace.x[0]), yaxis.d2p(trace.y[0])];
    const reach = Math.abs(yaxis.d2p(trace.y[0] + trace.error_y.array[0]) - y);
    return { trace, x, y, bar: { left: x - 5, right: x + 5, top: y - Math.max(8, reach), bottom: y + Math.max(8, reach) } };
  });
  const overlap = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  const inside = (box) => box.left > 0 && box.right < xaxis._length + 12 && box.top > -12 && box.bottom < yaxis._length;
  const taken = points.map((point) => point.bar);
  const shifts = [...Array(Math.ceil(yaxis._length / 8)).keys()].flatMap((step) => (step ? [8 * step, -8 * step] : [0]));
  const annotations = points.sort((a, b) => a.y - b.y).map(({ trace, x, y }) => {
    const name = trace.text[0];
    const [width, height] = [labelWidth(name), 15 * labelLines(name).length];
    const boxes = shifts.flatMap((dy) => [1, -1].map((side) => {
      const near = x + side * 11;
      const top = y + dy - height / 2;
      return { dy, side, left: side > 0 ? near : near - width, right: side > 0 ? near + width : near, top, bottom: top + height };
    }));
    const box = boxes.find((candidate) => inside(candidate) && !taken.some((other) => overlap(candidate, other))) || boxes[0];
    taken.push(box);
    return {
      x: Math.log10(trace.x[0]), y: trace.y[0], text: name, align: box.side > 0 ? "left" : "right", font: { size: 12.5 },
      xanchor: box.side > 0 ? "left" : "right", yanchor: "middle", ax: box.side * 11, ay: box.dy, standoff: 7, borderpad: 0,
      showarrow: true, arrowhead: 0, arrowwidth: 1, arrowcolor: Math.abs(box.dy) > height / 2 + 4 ? css("--soft") : "rgba(0,0,0,0)",
    };
  });
  return Plotly.relayout(element, { annotations });
}

function drawAll() {
  return Promise.all(Object.keys(report.figures).map(draw)).then(() => { document.body.dataset.drawn = "yes"; });
}

// One before the curves of each section, with the models that have a curve there.
function buildLegend() {
  const buttons = report.models.map(() => []);
  for (const legend of document.querySelectorAll(".legend")) {
    const plots = [...legend.closest("section").querySelectorAll(".plot")];
    const drawn = new Set(plots.flatMap((plot) => report.figures[plot.id].data.map((trace) => trace.meta.model)));
    report.models.forEach((model, index) => {
      if (!drawn.has(index)) return;
      const look = looks[index];
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", String(!hidden.has(index)));
      const pattern = { solid: "", dash: "6 4", dot: "2 3" }[look.dash];
      button.innerHTML = `<svg width="26" height="10" aria-hidden="true"><line x1="0" x2="26" y1="5" y2="5" stroke="var(${look.color})" stroke-width="3" stroke-dasharray="${pattern}"/></svg>`;
      button.append(model.valid ? model.name : `${model.name} (INVALID)`);
      button.addEventListener("click", () => {
        const show = hidden.delete(index);
        if (!show) hidden.add(index);
        for (const each of buttons[index]) each.setAttribute("aria-pressed", String(show));
        drawAll();
      });
      buttons[index].push(button);
      legend.append(button);
    });
  }
}

function makeSortable(table) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    const button = header.querySelector("button");
    button.addEventListener("click", () => {
      const current = header.getAttribute("aria-sort");
      const first = button.dataset.first || "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const direction = current === first ? other : first;
      headers.forEach((cell) => cell.setAttribute("aria-sort", cell === header ? direction : "none"));
      sortRows(table.tBodies[0], column, direction === "ascending" ? 1 : -1);
    });
  });
}

function sortRows(body, column, sign) {
  const value = (row) => row.cells[column].dataset.value;
  const compare = (a, b) => {
    // Invalid models and missing values stay at the end in either direction.
    const invalid = a.classList.contains("invalid") - b.classList.contains("invalid");
    if (invalid) return invalid;
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    return sign * (column === 0 ? x.localeCompare(y) : Number(x) - Number(y));
  };
  body.append(...[...body.rows].sort(compare));
}

function explainHeaders() {
  const tip = document.getElementById("tip");
  const hide = () => { tip.hidden = true; };
  for (const button of document.querySelectorAll("[data-explanation]")) {
    const show = () => {
      tip.textContent = button.dataset.explanation;
      tip.hidden = false;
      const box = button.getBoundingClientRect();
      const left = Math.min(Math.max(8, box.left), document.documentElement.clientWidth - tip.offsetWidth - 8);
      const above = box.top - tip.offsetHeight - 8;
      tip.style.left = `${left}px`;
      tip.style.top = `${above > 0 ? above : box.bottom + 8}px`;
    };
    button.setAttribute("aria-description", button.dataset.explanation);
    button.addEventListener("mouseenter", show);
    button.addEventListener("focus", () => { if (button.matches(":focus-visible")) show(); });
    button.addEventListener("mouseleave", hide);
    button.addEventListener("blur", hide);
  }
  addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  addEventListener("scroll", hide, true);
}

function copyCommand() {
  const button = document.getElementById("copy");
  const code = document.getElementById("command");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch { // the browser refuses: select the text, so that a key press copies it
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}

document.querySelectorAll("table.sortable").forEach(makeSortable);
explainHeaders();
copyCommand();
buildLegend();
drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
let resizing;
addEventListener("resize", () => {
  clearTimeout(resizing);
  resizing = setTimeout(() => { LABELLED.filter((id) => report.figures[id]).forEach(draw); }, 200);
});
