// The operator's page. Server-sent events bring what it shows; actions are POST requests with the token.

import { WINDOW, colours, drawJoint, drawLatency } from "/chart.js";

const HOLD_MS = 2000;      // to re-arm
const SILENT_MS = 2500;    // without news for so long, the connection is lost
const LOOP_SILENT_S = 2;   // the page's process answers, but the loop does not
const PICTURE_MS = 100;
const STOP_MS = 1500;      // interval of requests to the stop's port, and limit of its answers
const EVENTS = 60;

const $ = (id) => document.getElementById(id);
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

let token = location.hash.slice(1) || sessionStorage.getItem("token") || "";
let metadata = null, state = {}, heard = 0, greeted = 0, refused = false, connecting = null;
let steps = [], offset = 0, late = 0, plots = [], colour = colours();

if (location.hash) history.replaceState(null, "", location.pathname); // hides the token from view

// Requests

function ask(path, options = {}) {
  return fetch(path, { ...options, headers: { Authorization: `Bearer ${token}`, ...options.headers }, cache: "no-store" });
}

async function post(path, body = {}, options = {}) {
  try {
    const response = await ask(path, { ...options, method: "POST", body: JSON.stringify(body) });
    return await response.json();
  } catch {
    return { error: "no connection" };
  }
}

async function listen() {
  for (;;) {
    connecting = new AbortController();
    try {
      const response = await ask("/events", { signal: connecting.signal });
      if (response.status === 401) {
        enter();
        return;
      }
      if (response.ok) await read(response.body.getReader());
    } catch { /* retried below */ }
    show();
    await sleep(1000);
  }
}

async function read(reader) {
  const decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += decoder.decode(value, { stream: true });
    const messages = text.split("\n\n");
    text = messages.pop();
    for (const message of messages) {
      const [kind, data] = message.split("\ndata: ");
      take(kind.slice("event: ".length), JSON.parse(data));
    }
  }
}

function enter() {
  refused = true;
  $("entry").hidden = false;
  $("main").hidden = $("stop").hidden = true;
  $("entry-error").textContent = token ? "This token is wrong." : "";
  $("token").focus();
  show();
}

$("entry-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value.trim();
  refused = false;
  $("entry").hidden = true;
  listen();
});

// The stop's own port, which no other request can keep busy. Regular requests keep its connection open, so that a stop
// does not wait for a new connection.

let stopHeard = 0;

const stopUrl = () => `${location.protocol}//${location.hostname}:${metadata.stop}/stop`;

async function askStop(method) {
  const response = await ask(stopUrl(), { method, signal: AbortSignal.timeout(STOP_MS) });
  const answer = await response.json();
  if (response.ok) stopHeard = performance.now();
  return answer;
}

async function keepStopOpen() {
  for (;;) {
    if (metadata && !refused) await askStop("GET").catch(() => null);
    await sleep(STOP_MS);
  }
}

// Received messages

function take(kind, message) {
  heard = performance.now();
  if (kind === "hello") greet(message);
  state = message.state;
  for (const [t, lag, infer, held, skipped, command, measured] of message.steps) {
    const isLate = metadata.kind === "run" ? skipped > 0 || (metadata.deadline_ms && lag >= metadata.deadline_ms) : held;
    late += isLate ? 1 : 0;
    steps.push({ t, lag, infer, held, late: isLate });
    for (const plot of plots) plot.values.push([t, at(command, plot.command, 1), at(measured, plot.state, plot.factor)]);
  }
  const newest = steps.length ? steps[steps.length - 1].t : 0;
  const old = steps.findIndex((step) => step.t >= newest - WINDOW);
  if (old > 0) {
    steps.splice(0, old);
    for (const plot of plots) plot.values.splice(0, old);
  }
  if (message.steps.length) offset = newest - performance.now() / 1000;
  message.events.forEach(log);
  showBoard(message.board);
  show();
}

function showBoard(board) { // {}: not a Jetson
  $("board").hidden = !("watts" in board);
  if ($("board").hidden) return;
  const figure = (value, unit, scale = 1) => (value === null ? "–" : `${(value * scale).toFixed(unit === "GB" ? 1 : 0)} ${unit}`);
  set("watts", figure(board.watts, "W"));
  set("celsius", figure(board.celsius, "°C"));
  set("gpu", figure(board.gpu_load, "%", 100));
  set("memory", figure(board.memory[0], "GB", 1e-9));
  set("memory-name", `used of ${figure(board.memory[1], "GB", 1e-9)}`);
  set("celsius-name", board.throttled.length ? `throttled: ${board.throttled.join(", ")}` : "hottest");
  $("celsius").classList.toggle("bad", board.throttled.length > 0);
}

const at = (values, index, factor) => (values === null || index === null ? null : values[index] * factor);

function greet(message) {
  metadata = message;
  greeted = performance.now();
  sessionStorage.setItem("token", token);
  steps = [];
  late = 0;
  $("events").replaceChildren();
  $("main").hidden = $("stop").hidden = false;
  $("name").textContent = metadata.name;
  document.title = `${metadata.name} · rlrc ${metadata.kind}`;
  const serving = metadata.kind === "serve";
  $("lag-name").textContent = serving ? "including the queue, p99" : "step delay, p99";
  $("late-name").textContent = serving ? "refused" : "late or skipped";
  $("key-lag").textContent = serving ? "queue and inference" : "delay of a command";
  $("key-deadline").textContent = metadata.deadline_ms === null ? "no deadline without --hz" : serving ? "duration of a chunk" : "deadline";
  for (const [id, request] of [["speak", "instruction"], ["benching", "bench"]]) $(id).hidden = !metadata.can.includes(request);
  $("own").textContent = serving ? "Use the client's" : "Use the driver's";
  $("facts").replaceChildren(...metadata.facts.flatMap(([name, value]) => [create("dt", name), create("dd", value)]));
  plots = metadata.rows.map(createPlot);
  $("plots").replaceChildren(...plots.map((plot) => plot.element));
  if (!$("cameras").childElementCount) metadata.cameras.forEach(watch);
}

function create(kind, text, name) {
  const element = document.createElement(kind);
  element.textContent = text;
  if (name) element.className = name;
  return element;
}

function createPlot(row) {
  const element = create("div", "", "plot"), heading = document.createElement("div");
  const canvas = document.createElement("canvas"), value = document.createElement("output");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${row.name}, the last ${WINDOW} seconds`);
  heading.append(create("b", row.name), value);
  element.append(heading, canvas);
  return { ...row, element, canvas, value, values: [] };
}

function log([t, act, text]) {
  const when = new Date((metadata.clock[1] + t - metadata.clock[0]) * 1000);
  const entry = create("li", "", act), time = create("time", when.toLocaleTimeString("en-GB"));
  time.dateTime = when.toISOString();
  entry.append(time, create("span", text));
  $("events").prepend(entry);
  while ($("events").childElementCount > EVENTS) $("events").lastChild.remove();
}

// Display

function describeState() {
  if (refused) return ["lost", "Locked", ""];
  if (!metadata || performance.now() - heard > SILENT_MS) return ["lost", "No connection", "this data is old; a stop may not arrive"];
  if (state.silent_s > LOOP_SILENT_S) return ["lost", "No answer", `no message from the loop for ${state.silent_s.toFixed(0)} s`];
  if (state.stopped) return ["stopped", "Stopped", state.stopped];
  if (state.unready) return ["waiting", "Not ready", state.unready];
  if (performance.now() - stopHeard > 4 * STOP_MS && performance.now() - greeted > 4 * STOP_MS) {
    return ["lost", "No stop", `the stop's port ${metadata.stop} does not answer; a stop is sent through the page's port`];
  }
  if (metadata.kind === "run" && !steps.length) return ["waiting", "Starting", ""];
  if (metadata.kind === "run" && isHeld()) return ["held", "Held", "waiting for an action"];
  return ["running", "Running", metadata.kind === "serve" && state.waiting ? `${state.waiting} waiting` : ""];
}

function isHeld() { // for more than a second; between two chunks it may be held for a few steps
  const newest = steps[steps.length - 1].t;
  return steps.every((step) => step.held || step.t < newest - 1);
}

const set = (id, text) => {
  if ($(id).textContent !== text) $(id).textContent = text; // screen readers announce every change
};

function show() {
  const [kind, word, reason] = describeState();
  document.body.dataset.state = kind;
  set("state", word);
  set("reason", reason);
  if (!metadata) return;
  $("rearming").hidden = !(state.stopped && state.resting && metadata.can.includes("rearm"));
  $("bench").disabled = metadata.kind === "run" && !state.resting;
  set("words", state.instruction ?? (metadata.kind === "serve" ? "sent by the client" : "none"));
  if (!document.hidden) requestAnimationFrame(draw);
}

function percentile(values, share) {
  if (!values.length) return "–";
  const sorted = [...values].sort((a, b) => a - b);
  const ms = sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
  return `${ms < 10 ? ms.toFixed(1) : ms.toFixed(0)} ms`;
}

function draw() {
  const newest = offset + performance.now() / 1000;
  const inferred = steps.filter((step) => step.infer !== null).map((step) => step.infer);
  set("p50", percentile(inferred, 0.5));
  set("p99", percentile(inferred, 0.99));
  set("lag", percentile(steps.map((step) => step.lag), 0.99));
  set("late", String(late));
  $("late").classList.toggle("bad", late > 0);
  drawLatency($("latency"), steps, newest, metadata.deadline_ms, colour);
  for (const plot of plots) {
    drawJoint(plot.canvas, plot.values, newest, plot.low, plot.high, colour);
    const last = plot.values[plot.values.length - 1];
    const value = last ? last[2] ?? last[1] : null;
    const text = value === null ? "–" : `${value.toFixed(3).replace(/^-(?=[0.]+$)/, "")} ${plot.unit}`.trim();
    if (plot.value.textContent !== text) plot.value.textContent = text;
  }
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => (colour = colours()));
document.addEventListener("visibilitychange", show);
setInterval(() => {
  if (connecting && performance.now() - heard > 2 * SILENT_MS) connecting.abort();
  if (performance.now() - heard > SILENT_MS) show();
}, 500);

// Cameras

async function watch(name, index) {
  const figure = document.createElement("figure"), image = document.createElement("img"), caption = document.createElement("figcaption");
  const age = create("span", "no picture yet");
  image.alt = `Camera ${name}, live`;
  caption.append(create("span", name), age);
  figure.append(image, caption);
  $("cameras").append(figure);
  let number = 0, shown = 0;
  setInterval(() => {
    const seconds = (performance.now() - shown) / 1000;
    figure.classList.toggle("old", shown > 0 && seconds > 1.5);
    if (shown) age.textContent = seconds > 1.5 ? `${seconds.toFixed(0)} s old` : "live";
  }, 500);
  for (;;) {
    await sleep(PICTURE_MS);
    if (document.hidden || refused) continue;
    try {
      const response = await ask(`/camera/${index}?after=${number}`);
      if (response.status !== 200) continue;
      number = Number(response.headers.get("X-Number"));
      const before = image.src;
      image.src = URL.createObjectURL(await response.blob());
      if (before) URL.revokeObjectURL(before);
      shown = performance.now();
    } catch {
      number = 0;
      await sleep(1000);
    }
  }
}

// Actions

async function stop() {
  set("answer", "");
  for (let attempt = 1; attempt <= 20; attempt++) {
    const second = post("/stop", {}, { signal: AbortSignal.timeout(2 * STOP_MS) });
    try {
      await Promise.any([confirmed(askStop("POST")), confirmed(second)]);
      return set("answer", "");
    } catch (all) {
      set("answer", `The stop was not confirmed (${all.errors[1].message}). Retrying; use the robot's own stop.`);
    }
    await sleep(250);
  }
}

async function confirmed(request) {
  const answer = await request;
  if (!answer.stopped) throw new Error(answer.error ?? "not stopped");
}

$("stop").addEventListener("pointerdown", stop); // not click, which waits until the finger is lifted
$("stop").addEventListener("keydown", (event) => {
  if ((event.key === "Enter" || event.key === " ") && !event.repeat) stop();
});
$("stop").addEventListener("click", (event) => {
  if (event.detail === 0) stop(); // from a screen reader or switch, without a pointer
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.repeat) stop();
});

let holding = null;

function hold(event) {
  event.preventDefault();
  if (holding !== null) return;
  $("rearm").classList.add("holding");
  holding = setTimeout(rearm, HOLD_MS);
}

function release() {
  clearTimeout(holding);
  holding = null;
  $("rearm").classList.remove("holding");
}

async function rearm() {
  release();
  set("answer", "");
  const reply = await post("/rearm", { reason: $("why").value.trim() });
  set("answer", reply.error ? `Not re-armed: ${reply.error}` : "");
  if (!reply.error) $("why").value = "";
}

$("rearm").addEventListener("pointerdown", hold);
$("rearm").addEventListener("contextmenu", (event) => event.preventDefault());
for (const kind of ["pointerup", "pointerleave", "pointercancel", "blur", "keyup"]) $("rearm").addEventListener(kind, release);
$("rearm").addEventListener("keydown", (event) => {
  if ((event.key === "Enter" || event.key === " ") && !event.repeat) hold(event);
});

async function instruct(text) {
  const reply = await post("/instruction", { text });
  set("answer", reply.error ?? "");
}

$("speak-form").addEventListener("submit", (event) => {
  event.preventDefault();
  instruct($("text").value);
  $("text").value = "";
});
$("own").addEventListener("click", () => instruct(null));

$("bench").addEventListener("click", async () => {
  set("benched", "measuring …");
  const reply = await post("/bench");
  const figures = () => `p50 ${reply.p50_ms.toFixed(2)} ms, p99 ${reply.p99_ms.toFixed(2)} ms, max ${reply.max_ms.toFixed(2)} ms of ${reply.calls} calls`;
  set("benched", reply.error ?? figures());
});

keepStopOpen();
if (token) listen();
else enter();
