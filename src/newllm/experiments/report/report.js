"use strict";
const report = JSON.parse(document.getElementById("report-data").textContent);
const hidden = new Set(); // indices of models switched off in the curves
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
    case "train": result.line = { color: faded(color, 0.35), dash: look.dash, width: 1 }; break;
    case "band": Object.assign(result, { fillcolor: faded(color, 0.14), line: { width: 0 } }); break;
    case "validation": result.line.width = 2.6; result.marker.size = 5; break;
  }
  return result;
}

function axis(given) {
  return {
    gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false, ticks: "", automargin: true, fixedrange: coarse,
    ...given,
    zerolinecolor: css("--soft"),
    title: { standoff: 10, ...given.title },
  };
}

const coarse = matchMedia("(pointer: coarse)").matches; // a finger on a plot scrolls the page
function draw(id) {
  const element = document.getElementById(id);
  const { data, layout } = report.figures[id];
  const curves = id !== "plot-perplexity" && id !== "plot-cache";
  const traces = data.filter((trace) => !curves || !hidden.has(trace.meta.model)).map(styled);
  const rows = id === "plot-perplexity" ? layout.yaxis.tickvals.length : 0;
  if (rows > 8) element.style.height = `${120 + 32 * rows}px`;
  const options = {
    ...layout,
    xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis),
    shapes: (layout.shapes || []).map((shape) => ({ ...shape, layer: "below", line: { color: css("--soft"), width: 1, dash: "dot" } })),
    font: { family: css("--text"), size: 13, color: css("--ink") },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 8, r: 12, t: 12, b: 8 },
    hoverlabel: { bgcolor: css("--raised"), bordercolor: css("--line"), font: { color: css("--ink") } },
    dragmode: coarse ? false : "zoom",
    showlegend: false,
  };
  return Plotly.react(element, traces, options, { displayModeBar: false, responsive: true }).then(() => {
    if (id === "plot-cache") labelPoints(element);
  });
}

// Names beside the points: to the right, or to the left near the right edge; pushed apart where they would overlap.
function labelPoints(element) {
  const { xaxis, yaxis } = element._fullLayout;
  const points = element.data.map((trace) => ({
    x: xaxis.d2p(trace.x[0]), y: yaxis.d2p(trace.y[0]), name: trace.text[0], color: trace.marker.color,
  }));
  const height = 17, width = (text) => 7 * text.replace(/&\w+;/g, "x").length + 16;
  for (const point of points) {
    point.side = point.x + width(point.name) > xaxis._length ? -1 : 1;
    point.left = point.side > 0 ? point.x + 10 : point.x - 10 - width(point.name);
    point.right = point.left + width(point.name);
  }
  points.sort((a, b) => a.y - b.y);
  const placed = [];
  for (const point of points) {
    point.at = point.y;
    for (const other of placed) { // ascending: each label is pushed below those already placed
      const sideways = point.left < other.right && other.left < point.right;
      if (sideways && point.at < other.at + height) point.at = other.at + height;
    }
    placed.push(point);
    placed.sort((a, b) => a.at - b.at);
  }
  const overflow = Math.max(0, ...placed.map((point) => point.at + height / 2 - yaxis._length));
  const annotations = placed.map((point) => ({
    x: point.x + point.side * 11, y: point.at - overflow, text: point.name, showarrow: false,
    xanchor: point.side > 0 ? "left" : "right", color: point.color,
  }));
  return Plotly.relayout(element, {
    annotations: annotations.map(({ x, y, color, ...rest }) => ({
      ...rest, xref: "paper", yref: "paper", x: x / xaxis._length, y: 1 - y / yaxis._length, yanchor: "middle",
      font: { size: 13, color: css("--ink") },
    })),
  });
}

function drawAll() {
  return Promise.all(Object.keys(report.figures).map(draw)).then(() => { document.body.dataset.drawn = "yes"; });
}

function buildLegend() {
  const legend = document.getElementById("legend");
  if (!legend) return;
  report.models.forEach((model, index) => {
    const look = looks[index];
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    const pattern = { solid: "", dash: "6 4", dot: "2 3" }[look.dash];
    button.innerHTML = `<svg width="26" height="10" aria-hidden="true"><line x1="0" x2="26" y1="5" y2="5" stroke="var(${look.color})" stroke-width="3" stroke-dasharray="${pattern}"/></svg>`;
    button.append(model.name);
    button.addEventListener("click", () => {
      const show = hidden.delete(index);
      if (!show) hidden.add(index);
      button.setAttribute("aria-pressed", String(show));
      drawAll();
    });
    legend.append(button);
  });
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
  resizing = setTimeout(() => { if (report.figures["plot-cache"]) draw("plot-cache"); }, 200);
});
