// Draws what is kept over the picture: dropped patches fade, an edge runs around what stays.

const SVG = "http://www.w3.org/2000/svg";
const SIZE = 1000; // of the overlay's own coordinates

/** Shows one stage of a `kept` event; without one, the whole picture. */
export function draw(overlay, kept, index) {
  overlay.replaceChildren();
  const stage = kept && kept.stages[index];
  overlay.setAttribute("aria-label", stage ? `${stage.kept} of ${stage.of} patches kept` : "All patches kept");
  if (!stage) return;
  kept.grids.forEach((grid, i) => {
    const paths = outline(grid, stage.masks[i]);
    overlay.append(
      path(paths.dropped, kept.grids.length > 1 ? "dropped many" : "dropped"),
      path(paths.edge, index > 0 ? "edge late" : "edge"),
    );
  });
}

function path(d, name) {
  const element = document.createElementNS(SVG, "path");
  element.setAttribute("d", d);
  element.setAttribute("class", name);
  return element;
}

/** Path data of the dropped patches, and of the edge between them and the kept ones. */
function outline({ rows, columns, box }, mask) {
  const [left, top, right, bottom] = box.map((part) => part * SIZE);
  const x = (column) => round(left + ((right - left) * column) / columns);
  const y = (row) => round(top + ((bottom - top) * row) / rows);
  const kept = (row, column) =>
    row >= 0 && row < rows && column >= 0 && column < columns && mask[row * columns + column] === "1";
  // What a processor cut off the picture is seen by no patch: it fades, too.
  let dropped = beside(left, top, right, bottom);
  let edge = "";
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const [x0, x1, y0, y1] = [x(column), x(column + 1), y(row), y(row + 1)];
      if (!kept(row, column)) {
        dropped += `M${x0} ${y0}H${x1}V${y1}H${x0}Z`;
        continue;
      }
      if (!kept(row - 1, column)) edge += `M${x0} ${y0}H${x1}`;
      if (!kept(row + 1, column)) edge += `M${x0} ${y1}H${x1}`;
      if (!kept(row, column - 1)) edge += `M${x0} ${y0}V${y1}`;
      if (!kept(row, column + 1)) edge += `M${x1} ${y0}V${y1}`;
    }
  }
  return { dropped, edge };
}

/** The frame around the part that a grid covers, when that is the only grid's; else nothing. */
function beside(left, top, right, bottom) {
  let d = "";
  if (top > 2) d += `M0 0H${SIZE}V${round(top)}H0Z`;
  if (bottom < SIZE - 2) d += `M0 ${round(bottom)}H${SIZE}V${SIZE}H0Z`;
  if (left > 2) d += `M0 ${round(top)}H${round(left)}V${round(bottom)}H0Z`;
  if (right < SIZE - 2) d += `M${round(right)} ${round(top)}H${SIZE}V${round(bottom)}H${round(right)}Z`;
  return d;
}

function round(value) {
  return Math.round(value * 10) / 10;
}
