"use strict";
const report = JSON.parse(document.getElementById("report-data").textContent);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const faded = (hex, alpha) => hex + Math.round(alpha * 255).toString(16).padStart(2, "0");
const coarse = matchMedia("(pointer: coarse)").matches; // a finger on a plot scrolls the page
const hidden = Object.fromEntries(Object.keys(report.figures).map((id) => [id, new Set()]));

// A curve and its band, in the colour that its look names.
function traces(curve) {
  const color = css(curve.color);
  const line = {
    type: "scatter", x: curve.x, y: curve.y, mode: curve.markers ? "lines+markers" : "lines", name: curve.name,
    line: { color, dash: curve.dash, width: curve.width }, marker: { color, size: 6 },
    hovertemplate: `<b>${curve.name}</b><br>${report.xName[curve.kind]} %{x}: %{y:.2f}<extra></extra>`,
  };
  if (!curve.low) return [line];
  const band = {
    type: "scatter", x: [...curve.x, ...[...curve.x].reverse()], y: [...curve.high, ...[...curve.low].reverse()],
    mode: "lines", fill: "toself", fillcolor: faded(color, 0.14), line: { width: 0 }, hoverinfo: "skip",
  };
  return [band, line];
}

function draw(id) {
  const figure = report.figures[id];
  const axis = { gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false, ticks: "", automargin: true, fixedrange: coarse };
  const title = (text) => ({ text, standoff: 10, font: { size: 13, color: css("--soft") } });
  const layout = {
    xaxis: { ...axis, title: title(figure.xTitle), rangemode: figure.fromZero ? "tozero" : "normal" }, yaxis: { ...axis, title: title(figure.yTitle) },
    font: { family: css("--text"), size: 13, color: css("--ink") },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 8, r: 12, t: 12, b: 8 },
    hoverlabel: { bgcolor: css("--raised"), bordercolor: css("--line"), font: { color: css("--ink") } },
    dragmode: coarse ? false : "zoom", showlegend: false,
  };
  const data = figure.curves.filter((curve) => !hidden[id].has(curve.name)).flatMap(traces);
  return Plotly.react(document.getElementById(id), data, layout, { displayModeBar: false, responsive: true });
}

function buildLegend(legend) {
  const id = legend.dataset.plot;
  for (const curve of report.figures[id].curves) {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    const pattern = { solid: "", dash: "6 4", dot: "2 3" }[curve.dash];
    button.innerHTML = `<svg width="26" height="10" aria-hidden="true"><line x1="0" x2="26" y1="5" y2="5" stroke="var(${curve.color})" stroke-width="3" stroke-dasharray="${pattern}"/></svg>`;
    button.append(curve.name);
    button.addEventListener("click", () => {
      const show = hidden[id].delete(curve.name);
      if (!show) hidden[id].add(curve.name);
      button.setAttribute("aria-pressed", String(show));
      draw(id);
    });
    legend.append(button);
  }
}

const drawAll = () => Promise.all(Object.keys(report.figures).map(draw)).then(() => { document.body.dataset.drawn = "yes"; });
document.querySelectorAll(".legend").forEach(buildLegend);
drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
