/* The page of the training runs: asks for them every few seconds while somebody can see it. */

import { loadRuns } from "./api.js";
import { el, sync } from "./dom.js";
import { readSettings } from "./store.js";

const POLL_MS = 3000;
const [WIDTH, HEIGHT] = [320, 160]; // of a chart, in the unit of its viewBox
const [LEFT, TOP, BOTTOM] = [44, 6, 24]; // its margins
const TITLES = {
  loss: "Loss", val_bpb: "Validation bits per byte", reward: "Reward",
  accuracy: "Held-out accuracy",
};
const count = (number) => number.toLocaleString("en", { maximumFractionDigits: 0 });
const short = (value) => value.toPrecision(3);
let timer = 0;

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function duration(seconds) {
  const minutes = Math.floor(seconds / 60);
  if (minutes >= 60) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return minutes ? `${minutes} min ${Math.floor(seconds % 60)} s` : `${Math.floor(seconds)} s`;
}

/* A curve of [step, value] pairs over the steps from 0 to `end`. */
function chart(name, points, end) {
  const values = points.map(([, value]) => value);
  const [low, high, last] = [Math.min(...values), Math.max(...values), values.at(-1)];
  const floor = HEIGHT - BOTTOM;
  const xOf = (step) => LEFT + ((WIDTH - LEFT) * step) / (end || 1);
  const yOf = (value) => floor - ((floor - TOP) * (value - low)) / (high - low || 1);
  const place = ([step, value]) => `${xOf(step).toFixed(1)},${yOf(value).toFixed(1)}`;
  const label = (x, y, text, anchor = "end") => svg("text", { x, y, "text-anchor": anchor }, text);
  const frame = svg("g", { class: "frame" },
    svg("path", { d: `M${LEFT},${TOP}H${WIDTH}M${LEFT},${floor}H${WIDTH}` }),
    label(LEFT - 5, TOP + 4, high > low ? short(high) : ""), label(LEFT - 5, floor + 4, short(low)),
    label(LEFT, HEIGHT - 4, "0", "start"), label(WIDTH, HEIGHT - 4, `step ${count(end)}`));
  const line = svg("path", { class: "curve", d: `M${points.map(place).join("L")}h.1` }); // or a dot
  const told = { role: "img", "aria-label": `from ${short(values[0])} to ${short(last)}` };
  const image = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, ...told }, frame, line);
  return el("figure", {}, el("figcaption", {}, TITLES[name], el("b", {}, short(last))), image);
}

function section({ stage, tag, state, step, steps, samples, curves, ...run }) {
  const facts = [`step ${count(step)}${steps ? ` of ${count(steps)}` : ""}`];
  if (state === "running" && steps) facts.push(`${duration(run.seconds_left)} left`);
  if (run.tok_per_second) facts.push(`${count(run.tok_per_second)} tok/s`);
  if (run.mfu) facts.push(`MFU ${(100 * run.mfu).toFixed(1)} %`);
  if (state !== "finished") facts.push(`written ${duration(run.age_seconds)} ago`);
  const title = el("h2", {}, `${stage} · ${tag}`, el("span", { className: state }, state));
  const bar = el("progress", { ...(steps && { max: steps, value: step }), ariaLabel: "Steps" });
  const charts = Object.entries(curves).map((curve) => chart(...curve, step));
  const texts = samples.map((text) => el("pre", {}, text));
  if (texts.length) texts.unshift(el("p", {}, "Its last samples:"));
  const figures = el("div", { className: "charts" }, ...charts);
  return el("section", {}, title, el("p", {}, facts.join(" · ")), bar, figures, ...texts);
}

async function poll() {
  clearTimeout(timer);
  if (document.hidden) return; // until it is seen again
  const fresh = document.createDocumentFragment();
  const tell = (text) => sync(document.querySelector("#state"), el("span", {}, text)); // if new
  try {
    const runs = await loadRuns(readSettings()); // read anew: the key may have changed
    tell(runs.length ? "" : "There is no run in this server's folder yet.");
    for (const run of runs) {
      try {
        fresh.append(section(run));
      } catch {
        fresh.append(el("p", {}, `The log of ${run?.stage} · ${run?.tag} is damaged.`));
      }
    }
    sync(document.querySelector("#runs"), fresh);
  } catch (error) {
    tell(error.message);
  }
  timer = setTimeout(poll, POLL_MS);
}

document.documentElement.dataset.theme = readSettings().theme;
addEventListener("visibilitychange", poll);
poll();
