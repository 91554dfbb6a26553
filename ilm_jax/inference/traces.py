"""Traces: a self-contained HTML page that animates how a text was generated, with the probability of each insertion."""

import html
import json

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>@TITLE@</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 16px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
#text { min-height: 6rem; border: 1px solid #ccc; border-radius: 6px; padding: 1rem; white-space: pre-wrap; }
#text span { border-radius: 3px; padding: 1px 0; }
#text .given { color: #888; }
#text .now { outline: 2px solid #14609f; }
#bar { display: flex; gap: .6rem; align-items: center; margin: 1rem 0; }
#slider { flex: 1; }
button { font: inherit; min-width: 2.4rem; }
#said { font-variant-numeric: tabular-nums; min-height: 1.6rem; }
svg { width: 100%; height: 150px; }
svg text { font-size: 11px; fill: #555; }
h2 { font-size: 1rem; margin: 1.2rem 0 .2rem; }
</style></head><body>
<h1 style="font-size:1.2rem">@TITLE@</h1>
<select id="which" hidden></select>
<div id="text"></div>
<div id="bar"><button id="back" title="back">&#9664;</button><button id="play" title="play">&#9654;&#9654;</button>
<button id="forward" title="forward">&#9654;</button><input id="slider" type="range" min="0" value="0">
<span id="step"></span></div>
<div id="said"></div>
<h2>Probability of each insertion (bars) and p(stop) (line)</h2>
<svg id="plot" preserveAspectRatio="none"></svg>
<script id="data" type="application/json">@DATA@</script>
<script>
const all = JSON.parse(document.getElementById('data').textContent);
const $ = id => document.getElementById(id);
let trace = all[0], step = 0, timer = null;
const colour = order => {
  const share = order / Math.max(1, trace.steps - 1);
  return `hsl(${210 + 150 * share} 70% ${88 - 18 * share}%)`;
};
function draw() {
  const box = $('text');
  box.replaceChildren();
  trace.pieces.forEach((piece, i) => {
    const order = trace.order[i];
    if (order >= step) return;
    const span = document.createElement('span');
    span.textContent = piece;
    if (order < 0) span.className = 'given';
    else {
      span.style.background = colour(order);
      span.title = `step ${order + 1}, probability ${trace.probabilities[order]}`;
      if (order === step - 1) span.className = 'now';
    }
    box.append(span);
  });
  $('slider').value = step;
  $('step').textContent = `${step} / ${trace.steps}`;
  const p = step ? `probability ${trace.probabilities[step - 1].toPrecision(3)}` : 'given text';
  const s = trace.stop[step];
  $('said').textContent = p + (s === undefined ? '' : `; p(stop) ${s.toPrecision(3)}`) +
    (step === trace.steps ? (trace.stopped ? '; stopped by the model' : '; stopped by a length limit') : '');
  plot();
}
function plot() {
  const n = Math.max(1, trace.steps), w = 600, h = 130, x = i => 30 + i * (w - 40) / n;
  let out = `<line x1="30" y1="${h - 15}" x2="${w - 10}" y2="${h - 15}" stroke="#999"/>` +
    `<text x="4" y="14">1</text><text x="4" y="${h - 12}">0</text>`;
  const y = p => h - 15 - p * (h - 25);
  trace.probabilities.forEach((p, i) => {
    out += `<rect x="${x(i)}" y="${y(p)}" width="${Math.max(1, (w - 40) / n - 1)}" height="${h - 15 - y(p)}" ` +
      `fill="${colour(i)}" stroke="${i === step - 1 ? '#14609f' : 'none'}"/>`;
  });
  out += `<polyline fill="none" stroke="#b3261e" stroke-width="1.5" points="` +
    trace.stop.map((p, i) => `${x(i)},${y(p)}`).join(' ') + '"/>';
  out += `<line x1="${x(step)}" x2="${x(step)}" y1="8" y2="${h - 15}" stroke="#14609f" stroke-dasharray="3 3"/>`;
  $('plot').setAttribute('viewBox', `0 0 ${w} ${h}`);
  $('plot').innerHTML = out;
}
function go(to) { step = Math.max(0, Math.min(trace.steps, to)); draw(); }
function pause() { clearInterval(timer); timer = null; $('play').textContent = '\\u25b6\\u25b6'; }
$('slider').oninput = () => { pause(); go(+$('slider').value); };
$('back').onclick = () => { pause(); go(step - 1); };
$('forward').onclick = () => { pause(); go(step + 1); };
$('play').onclick = () => {
  if (timer) return pause();
  if (step === trace.steps) step = 0;
  $('play').textContent = '\\u23f8';
  timer = setInterval(() => { if (step === trace.steps) pause(); else go(step + 1); }, 250);
};
document.onkeydown = e => {
  if (['INPUT', 'SELECT'].includes(e.target.tagName)) return;
  if (e.key === 'ArrowLeft') go(step - 1);
  if (e.key === 'ArrowRight') go(step + 1);
};
function choose(i) {
  pause();
  trace = all[i];
  $('slider').max = trace.steps;
  go(location.hash ? +location.hash.slice(1) : trace.steps);  // page.html#7 shows the text after seven decoding steps
}
if (all.length > 1) {
  $('which').hidden = false;
  all.forEach((t, i) => $('which').add(new Option(`${i + 1}: ${t.name}`, i)));
  $('which').onchange = () => choose(+$('which').value);
}
window.onhashchange = () => choose(all.indexOf(trace));
choose(0);
</script></body></html>
"""


def record(generation, pieces: list[str]) -> dict:
  """Return the data that the HTML page needs to animate one generated text.

  Args:
    generation: a Generation or an Infilling of `api`.
    pieces: the text of each token of `generation`.
  """
  return {
    'name': generation.text[:60],
    'pieces': pieces,
    'order': generation.order,
    'steps': max([*generation.order, -1]) + 1,
    'probabilities': generation.probabilities,
    'stop': generation.stop_probabilities,
    'stopped': generation.stopped,
  }


def page(records: list[dict], title: str = 'Insertion by insertion') -> str:
  """Return an HTML page that animates one or several records, made by `record`; the page needs no network access."""
  data = json.dumps(records, ensure_ascii=False).replace('<', '\\u003c')
  return PAGE.replace('@TITLE@', html.escape(title)).replace('@DATA@', data)
