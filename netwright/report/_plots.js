const dark = matchMedia("(prefers-color-scheme: dark)");
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const faint = (hex, alpha) => hex + Math.round(alpha * 255).toString(16).padStart(2, "0");

function axis(title, more) {
  return Object.assign({title: {text: title, standoff: 8}, gridcolor: css("--line"), zeroline: false,
    linecolor: css("--line"), automargin: true, hoverformat: ""}, more);
}
function layout(x, y) {
  return {paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
    font: {family: "system-ui, sans-serif", size: 12.5, color: css("--ink")}, hovermode: "closest",
    hoverlabel: {bgcolor: css("--card"), bordercolor: css("--line"), font: {color: css("--ink")}, align: "left"},
    margin: {l: 56, r: 18, t: 14, b: 46}, xaxis: x, yaxis: y};
}
