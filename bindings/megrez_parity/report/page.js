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
    const buttons = ["lasso2d", "select2d", "autoScale2d", "zoomIn2d", "zoomOut2d", "pan2d"];
    await Plotly.react(plot, data, layout, {
      responsive: true,
      displaylogo: false,
      displayModeBar: touch ? false : "hover",
      modeBarButtonsToRemove: buttons,
    });
    await place(plot);
  }

  // Labels of single points: each where it covers no point and no other label, or nowhere. Those
  // of the front come first; hovering names the others.
  async function place(plot) {
    const { xaxis, yaxis } = plot._fullLayout;
    const points = plot.data
      .map((trace, index) => ({ trace, index }))
      .filter(({ trace }) => trace.mode === "markers+text" && trace.visible !== false)
      .map(({ trace, index }) => ({
        index,
        label: trace.customdata[0][0],
        front: trace.customdata[0][1],
        x: xaxis.d2p(trace.x[0]),
        y: yaxis.d2p(trace.y[0]),
      }));
    if (!points.length) return;
    const taken = points.map(({ x, y }) => [x - 6, y - 6, x + 6, y + 6]);
    const free = ([left, top, right, bottom]) =>
      left >= 0 && top >= 0 && right <= xaxis._length && bottom <= yaxis._length &&
      taken.every(([l, t, r, b]) => right < l || left > r || bottom < t || top > b);
    const pen = document.createElement("canvas").getContext("2d");
    pen.font = "12px system-ui, sans-serif";
    const text = new DOMParser();
    const positions = new Map();
    for (const point of [...points].sort((a, b) => b.front - a.front)) {
      const { x, y } = point;
      const width = pen.measureText(
        text.parseFromString(point.label, "text/html").documentElement.textContent
      ).width;
      const across = { left: x - width - 9, center: x - width / 2, right: x + 9 };
      const down = { top: y - 23, middle: y - 8, bottom: y + 8 };
      const order = ["top right", "middle right", "top center", "bottom left", "middle left"];
      for (const where of [...order, "bottom center", "bottom right", "top left"]) {
        const [v, h] = where.split(" ");
        const box = [across[h], down[v], across[h] + width, down[v] + 15];
        if (!free(box)) continue;
        taken.push(box);
        positions.set(point.index, where);
        break;
      }
    }
    await Plotly.restyle(
      plot,
      {
        text: points.map(({ index, label }) => [positions.has(index) ? label : ""]),
        textposition: points.map(({ index }) => positions.get(index) ?? "top right"),
      },
      points.map(({ index }) => index)
    );
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
      plot.on("plotly_autosize", () => place(plot));
    }
    document.documentElement.dataset.drawn = "true";
  });
})();
