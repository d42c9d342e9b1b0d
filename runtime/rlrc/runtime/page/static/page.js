// The operator's page. What it shows comes as server-sent events; what it does are POSTs with the token.

import { WINDOW, colours, drawJoint, drawLatency } from "/chart.js";

const HOLD_MS = 2000;      // to re-arm
const SILENT_MS = 2500;    // without news there is no connection
const LOOP_SILENT_S = 2;   // the page's own process answers, the loop does not
const PICTURE_MS = 100;
const STOP_MS = 1500;      // the stop's own port is asked so often whether it is there, and given so long to answer
const EVENTS = 60;

const $ = (id) => document.getElementById(id);
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

let token = location.hash.slice(1) || sessionStorage.getItem("token") || "";
let hello = null, state = {}, heard = 0, greeted = 0, refused = false, connecting = null;
let steps = [], offset = 0, late = 0, plots = [], colour = colours();

if (location.hash) history.replaceState(null, "", location.pathname); // not for those who look over a shoulder

// Talking to rlrc

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
    } catch { /* begun again below */ }
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
  $("entry-error").textContent = token ? "That is another token." : "";
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

// The stop's own port: no other request keeps it busy. Regular requests keep its connection open, so that a stop does
// not wait for a new one.

let stopHeard = 0;

const stopUrl = () => `${location.protocol}//${location.hostname}:${hello.stop}/stop`;

async function askStop(method) {
  const response = await ask(stopUrl(), { method, signal: AbortSignal.timeout(STOP_MS) });
  const answer = await response.json();
  if (response.ok) stopHeard = performance.now();
  return answer;
}

async function keepStopOpen() {
  for (;;) {
    if (hello && !refused) await askStop("GET").catch(() => null);
    await sleep(STOP_MS);
  }
}

// What came

function take(kind, told) {
  heard = performance.now();
  if (kind === "hello") greet(told);
  state = told.state;
  for (const [t, lag, infer, held, skipped, command, measured] of told.steps) {
    const isLate = hello.kind === "run" ? skipped > 0 || (hello.deadline_ms && lag >= hello.deadline_ms) : held;
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
  if (told.steps.length) offset = newest - performance.now() / 1000;
  told.events.forEach(log);
  tellBoard(told.board);
  show();
}

function tellBoard(board) { // {} on a machine that is no Jetson
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

function greet(told) {
  hello = told;
  greeted = performance.now();
  sessionStorage.setItem("token", token);
  steps = [];
  late = 0;
  $("events").replaceChildren();
  $("main").hidden = $("stop").hidden = false;
  $("name").textContent = told.name;
  document.title = `${told.name} · rlrc ${told.kind}`;
  const serving = told.kind === "serve";
  $("lag-name").textContent = serving ? "with the queue, p99" : "step late by, p99";
  $("late-name").textContent = serving ? "refused" : "late or left out";
  $("key-lag").textContent = serving ? "queue and inference" : "command after it was due";
  $("key-deadline").textContent = told.deadline_ms === null ? "no deadline: no --hz" : serving ? "what a chunk lasts" : "deadline";
  for (const [id, wish] of [["speak-form", "instruction"], ["benching", "bench"]]) $(id).hidden = !told.can.includes(wish);
  $("speak").hidden = !told.can.includes("instruction");
  $("own").textContent = serving ? "The client's" : "Its own";
  $("facts").replaceChildren(...told.facts.flatMap(([name, value]) => [made("dt", name), made("dd", value)]));
  plots = told.rows.map(plotOf);
  $("plots").replaceChildren(...plots.map((plot) => plot.element));
  if (!$("cameras").childElementCount) told.cameras.forEach(watch);
}

function made(kind, text, name) {
  const element = document.createElement(kind);
  element.textContent = text;
  if (name) element.className = name;
  return element;
}

function plotOf(row) {
  const element = made("div", "", "plot"), heading = document.createElement("div");
  const canvas = document.createElement("canvas"), value = document.createElement("output");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${row.name}, the last ${WINDOW} seconds`);
  heading.append(made("b", row.name), value);
  element.append(heading, canvas);
  return { ...row, element, canvas, value, values: [] };
}

function log([t, act, text]) {
  const when = new Date((hello.clock[1] + t - hello.clock[0]) * 1000);
  const entry = made("li", "", act), time = made("time", when.toLocaleTimeString("en-GB"));
  time.dateTime = when.toISOString();
  entry.append(time, made("span", text));
  $("events").prepend(entry);
  while ($("events").childElementCount > EVENTS) $("events").lastChild.remove();
}

// What is shown

function judged() {
  if (refused) return ["lost", "Locked", ""];
  if (!hello || performance.now() - heard > SILENT_MS) return ["lost", "No connection", "what is shown is old; a stop may not arrive"];
  if (state.silent_s > LOOP_SILENT_S) return ["lost", "No answer", `the loop has said nothing for ${state.silent_s.toFixed(0)} s`];
  if (state.stopped) return ["stopped", "Stopped", state.stopped];
  if (state.unready) return ["waiting", "Not ready", state.unready];
  if (performance.now() - stopHeard > 4 * STOP_MS && performance.now() - greeted > 4 * STOP_MS) {
    return ["lost", "No stop", `port ${hello.stop}, which stops the robot, does not answer; a stop goes through this page`];
  }
  if (hello.kind === "run" && !steps.length) return ["waiting", "Starting", ""];
  if (hello.kind === "run" && waits()) return ["held", "Held", "waiting for an action"];
  return ["running", "Running", hello.kind === "serve" && state.waiting ? `${state.waiting} waiting` : ""];
}

function waits() { // for more than a second: between two chunks it may be held for some steps
  const newest = steps[steps.length - 1].t;
  return steps.every((step) => step.held || step.t < newest - 1);
}

const set = (id, text) => {
  if ($(id).textContent !== text) $(id).textContent = text; // a live region speaks what changes
};

function show() {
  const [kind, word, reason] = judged();
  document.body.dataset.state = kind;
  set("state", word);
  set("reason", reason);
  if (!hello) return;
  $("rearming").hidden = !(state.stopped && state.resting && hello.can.includes("rearm"));
  $("bench").disabled = hello.kind === "run" && !state.resting;
  set("words", state.instruction ?? (hello.kind === "serve" ? "what the client says" : "none"));
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
  drawLatency($("latency"), steps, newest, hello.deadline_ms, colour);
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
  const age = made("span", "no picture yet");
  image.alt = `Camera ${name}, live`;
  caption.append(made("span", name), age);
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

// What is done

async function stop() {
  set("answer", "");
  for (let attempt = 1; attempt <= 20; attempt++) {
    const second = post("/stop", {}, { signal: AbortSignal.timeout(2 * STOP_MS) });
    try {
      await Promise.any([confirmed(askStop("POST")), confirmed(second)]);
      return set("answer", "");
    } catch (all) {
      set("answer", `The stop was not confirmed (${all.errors[1].message}): trying again. Use the robot's own stop.`);
    }
    await sleep(250);
  }
}

async function confirmed(request) {
  const answer = await request;
  if (!answer.stopped) throw new Error(answer.error ?? "not stopped");
}

$("stop").addEventListener("pointerdown", stop); // not click: that waits for the finger to rise
$("stop").addEventListener("keydown", (event) => {
  if ((event.key === "Enter" || event.key === " ") && !event.repeat) stop();
});
$("stop").addEventListener("click", (event) => {
  if (event.detail === 0) stop(); // a screen reader's or a switch's, without a pointer
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

function letGo() {
  clearTimeout(holding);
  holding = null;
  $("rearm").classList.remove("holding");
}

async function rearm() {
  letGo();
  set("answer", "");
  const told = await post("/rearm", { reason: $("why").value.trim() });
  set("answer", told.error ? `Not re-armed: ${told.error}` : "");
  if (!told.error) $("why").value = "";
}

$("rearm").addEventListener("pointerdown", hold);
$("rearm").addEventListener("contextmenu", (event) => event.preventDefault());
for (const kind of ["pointerup", "pointerleave", "pointercancel", "blur", "keyup"]) $("rearm").addEventListener(kind, letGo);
$("rearm").addEventListener("keydown", (event) => {
  if ((event.key === "Enter" || event.key === " ") && !event.repeat) hold(event);
});

async function tell(text) {
  const told = await post("/instruction", { text });
  set("answer", told.error ?? "");
}

$("speak-form").addEventListener("submit", (event) => {
  event.preventDefault();
  tell($("text").value);
  $("text").value = "";
});
$("own").addEventListener("click", () => tell(null));

$("bench").addEventListener("click", async () => {
  set("benched", "measuring …");
  const told = await post("/bench");
  const figures = () => `p50 ${told.p50_ms.toFixed(2)} ms, p99 ${told.p99_ms.toFixed(2)} ms, max ${told.max_ms.toFixed(2)} ms of ${told.calls} calls`;
  set("benched", told.error ?? figures());
});

keepStopOpen();
if (token) listen();
else enter();
