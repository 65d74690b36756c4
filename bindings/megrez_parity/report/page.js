"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const figures = [...document.querySelectorAll(".figure")];
  const hidden = new Set();

  function read(figure) {
    const css = getComputedStyle(document.documentElement);
    const source = figure.querySelector("script").textContent;
    const themed = source.replace(/"var\((--\w+)\)"/g, (_, name) =>
      JSON.stringify(css.getPropertyValue(name).trim())
    );
    return JSON.parse(themed);
  }

  async function draw(figure) {
    const { data, layout } = read(figure);
    const plot = figure.querySelector(".chart");
    const choice = figure.querySelector("select")?.value;
    for (const trace of data) {
      if (hidden.has(trace.legendgroup)) trace.visible = false;
      if (trace.meta !== undefined) trace.visible = trace.meta === choice;
    }
    // On a touch screen a drag must scroll the page.
    layout.dragmode = touch ? false : "zoom";
    if (layout.meta) {
      const { annotations, "margin.r": r } = labelled(plot, layout);
      Object.assign(layout, { annotations, margin: { ...layout.margin, r } });
    }
    const buttons = ["lasso2d", "select2d", "autoScale2d", "zoomIn2d", "zoomOut2d", "pan2d"];
    await Plotly.react(plot, data, layout, {
      responsive: true,
      displaylogo: false,
      displayModeBar: touch ? false : "hover",
      modeBarButtonsToRemove: buttons,
    });
  }

  // Labels of points, where there is room for them in the widest plot that fits (frontier.py).
  function labelled(plot, { margin, annotations, meta }) {
    const room = plot.clientWidth - margin.l - meta.right;
    const best = meta.layouts.findLast(({ width }) => width <= room);
    const shown = annotations.map((label) => ({ ...label, visible: false }));
    for (const [i, x, y, line] of best?.labels ?? []) {
      const offset = line ? { ax: x, ay: y } : { xshift: x, yshift: -y };
      const visible = !hidden.has(shown[i].name);
      shown[i] = { ...shown[i], ...offset, showarrow: line, visible };
    }
    const r = meta.right + (best ? room - best.width : 0);
    return { annotations: shown, "margin.r": r };
  }

  const drawAll = () => figures.reduce((before, figure) => before.then(() => draw(figure)),
    Promise.resolve());

  for (const figure of figures) {
    figure.querySelector("select")?.addEventListener("change", () => draw(figure));
    for (const button of figure.querySelectorAll("button")) {
      button.addEventListener("click", () => {
        const level = button.dataset.level;
        if (!hidden.delete(level)) hidden.add(level);
        for (const twin of document.querySelectorAll("button[data-level]")) {
          if (twin.dataset.level === level) twin.ariaPressed = String(!hidden.has(level));
        }
        drawAll();
      });
    }
  }
  dark.addEventListener("change", drawAll);
  drawAll().then(() => {
    for (const figure of figures) {
      const plot = figure.querySelector(".chart");
      plot.on("plotly_autosize", () => {
        if (!plot.layout.meta) return;
        const fitting = labelled(plot, plot.layout);
        // To lay it out is to size it, which is told again.
        if (fitting["margin.r"] !== plot.layout.margin.r) Plotly.relayout(plot, fitting);
      });
    }
    document.documentElement.dataset.drawn = "true";
  });
})();
