// Draws the figures with the colours of the theme, one per tick so that the page never freezes.
"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const phone = window.matchMedia("(max-width: 760px)");
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// A copy in which every colour named like a CSS variable is that colour.
const painted = value =>
  Array.isArray(value) ? value.map(painted)
  : value && typeof value === "object" ? Object.fromEntries(Object.entries(value).map(([k, v]) => [k, painted(v)]))
  : typeof value === "string" && /^--[a-z]+\d?$/.test(value) ? colour(value) || value
  : value;

// What all figures share; a figure's own layout wins, axis by axis.
function layout(own) {
  const axis = { gridcolor: colour("--line"), linecolor: colour("--line"), zerolinecolor: colour("--line"),
                 automargin: true, fixedrange: phone.matches, ticks: "" };
  const legend = { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
    font: { color: colour("--text"), family: getComputedStyle(document.body).fontFamily, size: 12 },
    margin: { l: 8, r: 12, t: 36, b: 40 }, showlegend: true,
    hoverlabel: { bgcolor: colour("--panel"), bordercolor: colour("--muted"), font: { color: colour("--text") }, align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--muted"), activecolor: colour("--text") },
    dragmode: phone.matches ? false : "zoom",  // a finger scrolls the page
    ...own,
    legend: { ...legend, ...own.legend }, xaxis: { ...axis, ...own.xaxis }, yaxis: { ...axis, ...own.yaxis },
  };
}

const slider = id => document.querySelector(`input[data-figure="${id}"]`);

function draw(id) {
  const figure = painted(figures[id]);
  const input = slider(id);
  if (input) figure.data[0].z = figures[id].steps[input.value].z;
  const config = { responsive: true, displaylogo: false, displayModeBar: phone.matches ? false : "hover",
                   modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"] };
  return Plotly.react(`figure-${id}`, figure.data, layout(figure.layout), config);
}

async function drawAll() {
  delete document.documentElement.dataset.drawn;
  for (let id = 0; id < figures.length; id++) {
    await draw(id);
    await new Promise(done => setTimeout(done));
  }
  document.documentElement.dataset.drawn = "yes";
}

for (const input of document.querySelectorAll("input[data-figure]")) {
  const id = input.dataset.figure;
  input.addEventListener("input", () => {
    const step = figures[id].steps[input.value];
    input.nextElementSibling.textContent = step.label;
    input.setAttribute("aria-valuetext", step.label);
    Plotly.restyle(`figure-${id}`, { z: [step.z] }, [0]);
  });
}

for (const button of document.querySelectorAll(".copy button")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const block = button.parentElement.querySelector("pre");
    getSelection().selectAllChildren(block);
    try {
      await navigator.clipboard.writeText(block.textContent);
    } catch {
      document.execCommand("copy");  // a page opened from a file may not have the clipboard
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

for (const query of [window.matchMedia("(prefers-color-scheme: dark)"), phone]) query.addEventListener("change", drawAll);
drawAll();
