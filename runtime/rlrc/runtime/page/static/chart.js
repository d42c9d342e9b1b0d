// Canvases: latency against the deadline, and a chart for every joint. Colours come from the style sheet.

export const WINDOW = 30; // seconds

function prepare(canvas) {
  const scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

export function colours() {
  const style = getComputedStyle(document.documentElement);
  const named = {};
  for (const name of ["text", "soft", "blue", "red", "grid", "band"]) named[name] = style.getPropertyValue(`--${name}`).trim();
  return named;
}

// steps: {t, lag, infer, late}; newest: the time at the right edge. The scale is logarithmic, since most latencies are far
// below the deadline.
export function drawLatency(canvas, steps, newest, deadline, colour) {
  const { context, width, height } = prepare(canvas);
  const left = 72, bottom = height - 24, right = width - 8, up = 8;
  if (right <= left) return;
  let most = deadline ? deadline * 1.2 : 1, least = most;
  for (const { lag, infer } of steps) {
    most = Math.max(most, lag, infer ?? 0);
    least = Math.min(least, infer ?? most);
  }
  const low = Math.floor(Math.log10(Math.max(least * 0.7, 0.01))), high = Math.max(low + 1, Math.ceil(Math.log10(most)));
  const x = (t) => right - ((newest - t) / WINDOW) * (right - left);
  const y = (ms) => bottom - ((Math.log10(Math.max(ms, 10 ** low)) - low) / (high - low)) * (bottom - up);
  context.font = `15px ${getComputedStyle(document.body).fontFamily}`;
  context.lineWidth = 1;
  context.textBaseline = "middle";
  for (let power = low; power <= high; power++) {
    const ms = 10 ** power;
    context.strokeStyle = colour.grid;
    line(context, left, y(ms), right, y(ms));
    context.fillStyle = colour.soft;
    context.textAlign = "right";
    context.fillText(`${Number(ms.toPrecision(3))} ms`, left - 6, Math.max(y(ms), 10));
  }
  context.textAlign = "center";
  for (let ago = 0; ago <= WINDOW; ago += 10) {
    const label = ago ? `−${ago} s` : "now";
    const half = context.measureText(label).width / 2;
    context.fillText(label, Math.min(Math.max(x(newest - ago), left + half), right - half), height - 9);
  }
  columns(context, steps, x, y, left, bottom, colour);
  context.fillStyle = colour.blue;
  for (const step of steps) {
    if (step.infer === null || x(step.t) < left) continue;
    context.beginPath();
    context.arc(x(step.t), y(step.infer), 2.6, 0, 7);
    context.fill();
  }
  if (deadline) {
    context.strokeStyle = colour.red;
    context.lineWidth = 2;
    context.setLineDash([7, 5]);
    line(context, left, y(deadline), right, y(deadline));
    context.setLineDash([]);
  }
}

// For every column of pixels the step with the largest delay, so that late steps stay visible.
function columns(context, steps, x, y, left, bottom, colour) {
  const highest = new Map();
  for (const step of steps) {
    const column = Math.round(x(step.t));
    const other = highest.get(column);
    if (column >= left && (!other || step.lag > other.lag)) highest.set(column, step);
  }
  for (const [column, step] of highest) {
    context.strokeStyle = step.late ? colour.red : colour.soft;
    context.lineWidth = step.late ? 2.5 : 1;
    line(context, column, bottom, column, Math.min(y(step.lag), bottom - 1));
  }
}

function line(context, x0, y0, x1, y1) {
  context.beginPath();
  context.moveTo(x0, y0);
  context.lineTo(x1, y1);
  context.stroke();
}

// values: [t, command, measured]; null: none.
export function drawJoint(canvas, values, newest, low, high, colour) {
  const { context, width, height } = prepare(canvas);
  let bottom = Infinity, top = -Infinity;
  for (const [, command, measured] of values) {
    for (const value of [command, measured]) {
      if (value !== null && value < bottom) bottom = value;
      if (value !== null && value > top) top = value;
    }
  }
  if (bottom > top) return;
  const room = Math.max((top - bottom) * 0.15, 1e-3, Math.abs(top) * 1e-3);
  bottom -= room;
  top += room;
  const x = (t) => width - ((newest - t) / WINDOW) * width;
  const y = (value) => height - 3 - ((value - bottom) / (top - bottom)) * (height - 6);
  context.fillStyle = colour.band;
  if (low !== null) {
    const upper = Math.max(0, y(high)), lower = Math.min(height, y(low));
    context.fillRect(0, upper, width, Math.max(0, lower - upper));
  }
  drawLine(context, values, x, y, 2, colour.text, 1.4);
  drawLine(context, values, x, y, 1, colour.blue, 2.2);
}

function drawLine(context, values, x, y, which, colour, thickness) {
  context.strokeStyle = colour;
  context.lineWidth = thickness;
  context.lineJoin = "round";
  context.beginPath();
  let drawing = false;
  const stride = Math.max(1, Math.floor(values.length / 600));
  for (let i = 0; i < values.length; i += stride) {
    const value = values[i][which];
    if (value === null) {
      drawing = false;
      continue;
    }
    if (drawing) context.lineTo(x(values[i][0]), y(value));
    else context.moveTo(x(values[i][0]), y(value));
    drawing = true;
  }
  context.stroke();
}
