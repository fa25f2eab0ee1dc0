/* The page: what was gathered of the runs, section by section. A section without anything to show is left out. */

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs.map((run, i) => ({
  ...run, i, color: `var(--run-${i % 8})`, dash: [undefined, "6 4", "2 4", "9 3 2 3"][Math.floor(i / 8) % 4],
}));
const settings = { hidden: new Set(), smooth: 0 };
const main = document.getElementById("top");
const lowerIsBetter = (name) => (DATA.scores[name]?.better ?? "lower") === "lower";
const NAMES = {
  denoising: "Denoising loss", loss: "Total loss", gradient_norm: "Gradient norm", learning_rate: "Learning rate",
  images_per_second: "Images per second", data_wait: "Share of time waiting for data", skipped: "Skipped steps",
  cka: "Linear CKA", cknna: "CKNNA", cosine: "Cosine through the head", linear_probe: "Linear probe accuracy",
};
const nice = (name) => NAMES[name] ?? titled(DATA.scores[name]?.title ?? name);
const titled = (name) => (name[0].toUpperCase() + name.slice(1)).replaceAll("_", " ");

function section(id, title, ...controls) {
  const head = el("div", { class: "head" }, el("h2", {}, title), ...controls);
  const node = el("section", { id }, head);
  main.append(node);
  document.getElementById("nav").append(el("a", { href: `#${id}` }, title.split(" ")[0]));  // a phone has room for a word of each
  return node;
}

const dot = (run) => el("i", { class: "dot", style: `--c:${run.color}` });
const note = (text) => el("p", { class: "note" }, text);
const redraw = () => LineChart.all.forEach((chart) => chart.draw());

function curve(run, name, sign = 1) {
  const values = run.metrics.series[name] ?? [];
  return values.map((y, i) => [run.metrics.steps[i], y === null ? null : sign * y]).filter(([, y]) => y !== null);
}

const last = (points) => points.at(-1)?.[1];

function alignmentLabel(run, n) {
  const a = run.alignments[n];
  return a ? `${a.tap} → ${a.encoder}` : `alignment ${n}`;
}

/* ---- overview ------------------------------------------------------------------------------------------------ */

function overview() {
  main.append(el("div", { class: "intro" },
    el("h1", {}, RUNS.length === 1 ? RUNS[0].name : RUNS.length <= 4 ? RUNS.map((r) => r.name).join(" · ") : `${RUNS.length} runs`),
    el("span", { class: "muted" }, `generated ${DATA.generated}`)));
  main.append(el("div", { class: `runs${RUNS.length > 4 ? " compact" : ""}` }, ...RUNS.map(runCard)));
  if (RUNS.length < 2) return;
  main.append(el("div", { class: "legend", role: "group", "aria-label": "Runs shown in the charts" }, ...RUNS.map((run) => {
    const key = el("svg", { viewBox: "0 0 20 10", "aria-hidden": "true" }, el("path", { class: "curve", style: `--c:${run.color};stroke-width:3`, d: "M1 5H19", "stroke-dasharray": run.dash }));
    const chip = el("button", { class: "chip", type: "button", "aria-pressed": "true", title: "Show or hide this run in the charts" }, key, run.name);
    chip.addEventListener("click", () => {
      const shown = settings.hidden.delete(run.i) || !settings.hidden.add(run.i);
      chip.setAttribute("aria-pressed", String(shown));
      redraw();
    });
    return chip;
  })));
}

function runCard(run) {
  const numbers = [["Denoising loss", format(last(curve(run, "denoising")))]];
  const token = Object.keys(run.metrics.series).filter((n) => /^alignment\.\d+\.token$/.test(n));
  for (const name of token) numbers.push([token.length > 1 ? `Similarity ${name.split(".")[1]}` : "Similarity", format(last(curve(run, name, -1)))]);
  const judged = run.evaluations.filter((e) => e.own).at(-1) ?? run.evaluations.at(-1);
  for (const [name, value] of Object.entries(judged?.scores ?? {}).slice(0, 4)) numbers.push([nice(name), format(value)]);
  const speed = run.metrics.series.images_per_second?.filter((v) => v !== null).sort((a, b) => a - b) ?? [];
  if (speed.length) numbers.push(["Images/s", format(Math.round(speed[Math.floor(speed.length / 2)]))]);
  const state = run.steps === null ? `step ${format(run.step)}` : run.finished ? `${format(run.steps)} steps` : `step ${format(run.step)} of ${format(run.steps)}`;
  return el("article", { class: "card run", style: `--c:${run.color}` },
    el("div", { class: "name" }, el("span", {}, run.name), el("span", { class: "state" }, state)),
    run.steps && !run.finished ? el("div", { class: "progress" }, el("i", { style: `width:${(100 * run.step) / run.steps}%` })) : null,
    el("p", {}, run.description || "no description"),
    run.problems.length ? el("ul", { class: "problems" }, ...run.problems.map((p) => el("li", {}, p))) : null,
    el("dl", { class: "numbers" }, ...numbers.map(([k, v]) => el("div", {}, el("dt", {}, k), el("dd", {}, v)))));
}

/* ---- curves -------------------------------------------------------------------------------------------------- */

function curves() {
  const names = new Set(RUNS.flatMap((run) => Object.keys(run.metrics.series)));
  if (!names.size) return;
  const value = el("output", {}, "0");
  const slider = el("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: 0, "aria-label": "Smoothing of the curves" });
  slider.addEventListener("input", () => { settings.smooth = +slider.value; value.textContent = slider.value; redraw(); });
  const node = section("curves", "Curves", el("label", { class: "control" }, "Smoothing", slider, value));
  const grid = el("div", { class: "charts" });
  node.append(grid);
  const simple = (name, log, hint) => add(nice(name), RUNS.map((run) => ({ run, points: curve(run, name), label: run.name, dash: run.dash })), log, hint);
  const add = (title, series, log, hint) => {
    const found = series.filter((s) => s.points.length).map((s) => ({ ...s, run: s.run.i, color: s.run.color }));
    if (found.length) grid.append(new LineChart({ title, hint, series: found, log, settings }).node);
  };
  /* One curve for each alignment of a run: the first solid, the others dashed. */
  const aligned = (term, sign) => RUNS.flatMap((run) => [...names].filter((n) => n.match(`^alignment\\.\\d+\\.${term}$`)).sort().map((n) => {
    const index = +n.split(".")[1];
    return { run, points: curve(run, n, sign), label: run.alignments.length > 1 ? `${run.name}, ${alignmentLabel(run, index)}` : run.name, dash: index ? `${3 + 3 * index} 4` : run.dash };
  }));
  simple("denoising", true);
  add("Similarity to the encoder", aligned("token", -1), false, "cosine");
  add("Manifold loss", aligned("manifold", 1), true);
  const terms = new Set([...names].filter((n) => n.startsWith("alignment.")).map((n) => n.split(".")[2]));
  for (const term of [...terms].sort()) if (!["token", "manifold"].includes(term)) add(`${nice(term)}, of the alignment`, aligned(term, 1), false);
  if (names.size && [...names].some((n) => n.startsWith("alignment."))) simple("loss", false, "denoising + λ · alignment");
  const idle = new Set(["skipped"].filter((name) => RUNS.every((run) => curve(run, name).every(([, y]) => !y))));
  const known = /^(step|seconds|loss|denoising|alignment\..*)$/;
  for (const name of ["gradient_norm", "images_per_second", "data_wait"]) if (names.has(name)) simple(name, name === "gradient_norm");
  const rates = RUNS.flatMap((run) => curve(run, "learning_rate").map(([, y]) => y));
  if (new Set(rates).size > 1) simple("learning_rate", false);
  for (const name of [...names].sort()) if (!known.test(name) && !idle.has(name) && !["gradient_norm", "images_per_second", "data_wait", "learning_rate"].includes(name)) simple(name, false);
}

/* ---- samples ------------------------------------------------------------------------------------------------- */

function samples() {
  const steps = [...new Set(RUNS.flatMap((run) => run.samples.map((s) => s.step)))].sort((a, b) => a - b);
  if (!steps.length) return;
  const node = section("samples", "Samples over training");
  const shown = RUNS.filter((run) => run.samples.length);
  const figures = shown.map((run) => {
    const image = el("img", { alt: "", width: run.samples[0].width, height: run.samples[0].height });
    const step = el("span", { class: "muted" });
    return { run, image, step, node: el("figure", { class: "card" }, el("figcaption", {}, dot(run), run.name, step), image) };
  });
  const label = el("output", {});
  const slider = el("input", { type: "range", min: 0, max: steps.length - 1, value: steps.length - 1, "aria-label": "Training step of the samples" });
  const show = () => {
    const step = steps[+slider.value];
    label.textContent = `step ${format(step)}`;
    slider.setAttribute("aria-valuetext", `step ${step}`);
    for (const { run, image, step: own, node } of figures) {
      const newest = run.samples.filter((s) => s.step <= step).at(-1);
      image.hidden = !newest;
      own.textContent = newest ? (newest.step === step ? "" : `step ${format(newest.step)}`) : "none yet";
      if (newest) Object.assign(image, { src: newest.src, alt: `Samples of ${run.name} at step ${newest.step}` });
    }
  };
  let timer = null;
  const play = el("button", { class: "icon", type: "button", "aria-label": "Play or pause the samples over training" });
  const icon = () => play.replaceChildren(el("svg", { viewBox: "0 0 16 16" }, el("path", { d: timer ? "M4 3h3v10H4zM9 3h3v10H9z" : "M4 2.5v11l9-5.5z", fill: "currentColor" })));
  const stop = () => { clearInterval(timer); timer = null; icon(); };
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (+slider.value === steps.length - 1) slider.value = 0;
    show();
    timer = setInterval(() => {
      slider.value = +slider.value + 1;
      show();
      if (+slider.value === steps.length - 1) stop();
    }, 700);
    icon();
  });
  slider.addEventListener("input", () => { if (timer) stop(); show(); });
  icon();
  if (steps.length > 1) node.append(el("div", { class: "card player" }, play, slider, label));
  node.append(el("div", { class: "grids" }, ...figures.map((f) => f.node)));
  const without = RUNS.filter((run) => !run.samples.length).map((run) => run.name);
  if (without.length) node.append(el("p", { class: "muted", style: "margin-top:10px" }, `No sample grids: ${without.join(", ")}.`));
  show();
}

/* ---- metrics ------------------------------------------------------------------------------------------------- */

function metrics() {
  const rows = RUNS.flatMap((run) => run.evaluations.map((e) => ({ run, ...e })));
  const scores = [...new Set(rows.flatMap((row) => Object.keys(row.scores)))];
  if (!scores.length) return;
  const node = section("metrics", "Metrics");
  const cards = el("div", { class: "charts few" });
  node.append(cards);
  for (const score of scores) {
    const groups = new Map();
    for (const row of rows) if (score in row.scores) {
      const key = `${row.run.i}\n${row.sampling}`;
      groups.set(key, [...(groups.get(key) ?? []), row]);
    }
    const hint = DATA.scores[score]?.hint ?? null;
    const reference = rows.map((row) => row.reference[score]).find((value) => value !== undefined);
    const lines = [...groups.values()].filter((group) => group.length > 1);
    if (lines.length) {
      const single = [...groups.values()].filter((group) => !lines.some((line) => line[0].run === group[0].run));
      const drawn = [...lines, ...onePerRun(single.flat()).map((row) => [row])];  // a run without a line has a point
      const several = new Set(drawn.map((g) => g[0].sampling)).size > 1;
      const series = drawn.map((group) => ({ run: group[0].run.i, color: group[0].run.color, dash: group[0].run.dash,
        label: several ? `${group[0].run.name}, ${group[0].sampling}` : group[0].run.name, points: group.map((row) => [row.step, row.scores[score]]) }));
      cards.append(new LineChart({ title: nice(score), hint, series, smooth: false, settings,
        reference: reference === undefined ? [] : [{ value: reference, label: "real images" }] }).node);
    } else cards.append(bars(score, hint, [...groups.values()].map((group) => group[0]), reference));
  }
  node.append(table(rows, scores));
}

/* Of the sampling that most runs share, so that like is compared with like. */
function onePerRun(rows) {
  const votes = rows.map((row) => rows.filter((other) => other.sampling === row.sampling).length);
  const common = rows[votes.indexOf(Math.max(...votes))]?.sampling;
  return RUNS.map((run) => rows.find((r) => r.run === run && r.sampling === common) ?? rows.find((r) => r.run === run)).filter(Boolean);
}

/* One bar for each run: of a share against 1, of other scores against the largest. A number with nothing to compare it
   with has no bar. */
function bars(score, hint, rows, reference) {
  const shown = onePerRun(rows), values = shown.map((row) => row.scores[score]).concat(reference ?? []);
  const most = DATA.scores[score]?.most ?? (values.length > 1 ? Math.max(...values) : null);
  const bar = (name, color, value) => el("div", { style: `--c:${color}` }, el("div", { class: "label" }, name, el("b", {}, format(value))),
    most === null ? null : el("div", { class: "track" }, el("i", { style: `width:${Math.max(0, (100 * value) / (most || 1))}%` })));
  return el("article", { class: "card chart" }, el("header", {}, el("h3", {}, nice(score), el("span", { class: "hint" }, hint))),
    el("div", { class: "bars" }, ...shown.map((row) => bar(row.run.name, row.run.color, row.scores[score])),
      reference === undefined ? null : bar("real images", "var(--muted)", reference)));
}

function table(rows, scores) {
  const best = Object.fromEntries(scores.map((score) => {
    const values = rows.map((row) => row.scores[score]).filter((v) => v !== undefined);
    return [score, lowerIsBetter(score) ? Math.min(...values) : Math.max(...values)];
  }));
  const body = rows.map((row) => el("tr", {}, el("td", {}, dot(row.run), " ", row.run.name), el("td", { class: "number" }, format(row.step)),
    el("td", {}, row.sampling || "–"), el("td", {}, row.classes || "–"), el("td", { class: "number" }, format(row.evaluations)),
    ...scores.map((score) => el("td", { class: `number${row.scores[score] === best[score] && rows.length > 1 ? " best" : ""}` }, format(row.scores[score])))));
  body.forEach((tr) => tr.querySelector(".dot").setAttribute("style", tr.querySelector(".dot").getAttribute("style") + ";display:inline-block;margin-right:5px"));
  return el("details", { class: "card", style: "margin-top:14px", open: rows.length <= 12 },
    el("summary", {}, rows.length === 1 ? "1 evaluation" : `All ${rows.length} evaluations`),
    el("div", { class: "table" }, el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "Run"), el("th", { class: "number" }, "Step"), el("th", {}, "Samples"),
      el("th", { title: "How the classes of the samples were chosen" }, "Classes"),
      el("th", { class: "number", title: "Network evaluations per image" }, "NFE"), ...scores.map((score) => el("th", { class: "number" }, nice(score))))), el("tbody", {}, ...body))));
}

/* ---- alignment ----------------------------------------------------------------------------------------------- */

function probe() {
  const probed = RUNS.filter((run) => run.probe);
  if (!probed.length) return;
  const scores = [...new Set(probed.flatMap((run) => Object.keys(run.probe.scores)))];
  const tabs = el("div", { class: "tabs", role: "group", "aria-label": "Measure" });
  const node = section("alignment", "Similarity to the encoder", tabs);
  const encoders = [...new Set(probed.map((run) => run.probe.encoder))].join(", ");
  const lead = el("p", { class: "lead" });
  const scale = el("p", { class: "scale" });
  const heats = el("div", { class: "heats" }), lines = el("div", { class: "charts few" });
  node.append(lead, heats, lines);
  const explain = {
    cka: `How alike the pooled features of a tap and of ${encoders} arrange the same images: 1 up to rotation and scale, 0 unrelated.`,
    cknna: `Unbiased CKA over mutual nearest neighbours alone: whether a tap and ${encoders} agree on which images are close.`,
    linear_probe: "Share of held-out images whose class a linear classifier reads from the pooled features of a tap.",
    cosine: `Cosine similarity of the trained head's tokens with those of ${encoders}, where a tap has a head.`,
  };
  const draw = (score) => {
    for (const button of tabs.children) button.setAttribute("aria-pressed", String(button.dataset.score === score));
    const shown = probed.filter((run) => run.probe.scores[score]);
    const all = shown.flatMap((run) => run.probe.scores[score].flat()).filter((v) => v !== null);
    const low = Math.min(0, ...all), high = Math.max(...all);
    const stops = RAMP.map((rgb) => `rgb(${rgb})`).join(",");
    scale.replaceChildren(format(low), el("i", { style: `background:linear-gradient(90deg,${stops})` }), format(high));
    lead.replaceChildren(`${explain[score] ?? nice(score)} Rows are taps in the order in which they run, columns noise levels (0 data, 1 noise); ● is a tap that was trained to align.`);
    heats.replaceChildren(...shown.map((run) => el("article", { class: "card chart" },
      el("header", {}, dot(run), el("h3", {}, run.name, el("span", { class: "hint" }, `${nice(score)}, step ${format(run.probe.step)}`))),
      new HeatMap({ rows: run.probe.taps, columns: run.probe.times, values: run.probe.scores[score], low, high, strong: run.probe.aligned ?? [], xTitle: "t", color: run.color, name: nice(score) }).node)));
    LineChart.all = LineChart.all.filter((chart) => chart.link !== "taps" && chart.link !== "times");
    const mean = (values) => { const v = values.filter((x) => x !== null); return v.length ? v.reduce((a, b) => a + b) / v.length : null; };
    /* Models of other taps have no names in common, but all have a depth. */
    const taps = shown[0].probe.taps, alike = shown.every((run) => String(run.probe.taps) === String(taps));
    const place = (run, k) => (alike ? k : k / Math.max(1, run.probe.taps.length - 1));
    const overTaps = shown.map((run) => ({ run: run.i, color: run.color, dash: run.dash, label: run.name,
      points: run.probe.taps.map((_, k) => [place(run, k), mean(run.probe.scores[score][k])]).filter(([, y]) => y !== null) }));
    const overTimes = shown.flatMap((run) => bestTap(run, score).map(({ tap, values }) => ({ run: run.i, color: run.color, dash: run.dash,
      label: `${run.name}, ${tap}`, points: run.probe.times.map((t, k) => [t, values[k]]).filter(([, y]) => y !== null) })));
    lines.replaceChildren(
      ...(overTaps.some((s) => s.points.length > 1) ? [new LineChart({ title: `${nice(score)} by tap`, hint: "mean over noise levels", series: overTaps, names: alike ? taps : null, xTitle: alike ? "tap" : "depth", link: "taps", smooth: false, settings }).node] : []),
      new LineChart({ title: `${nice(score)} over noise`, hint: "each run's best tap", series: overTimes, xTitle: "t", link: "times", smooth: false, settings }).node);
    lines.append(scale);
  };
  const bestTap = (run, score) => {
    const rated = run.probe.taps.map((tap, k) => ({ tap, values: run.probe.scores[score][k], mean: run.probe.scores[score][k].reduce((a, b) => a + (b ?? -1), 0) }));
    return rated.sort((a, b) => b.mean - a.mean).slice(0, 1);
  };
  for (const score of scores) {
    const button = el("button", { type: "button", "data-score": score }, nice(score));
    button.addEventListener("click", () => draw(score));
    tabs.append(button);
  }
  tabs.after(scale);
  draw(scores[0]);
  tabs.after(scale);
}

/* ---- guidance ------------------------------------------------------------------------------------------------ */

function guidance() {
  const tuned = RUNS.filter((run) => run.tuning?.values.length);
  if (!tuned.length) return;
  const node = section("guidance", "Guidance");
  node.append(el("p", { class: "lead" }, "The score over guidance scale and the interval of t in which it acts (0 data, 1 noise); a scale of 1 is no guidance."));
  node.append(el("div", { class: "heats" }, ...tuned.map((run) => {
    const { score, title, better, num, scales, intervals, values, best } = run.tuning;
    const all = values.flat().filter((v) => v !== null), [low, high] = [Math.min(...all), Math.max(...all)];
    const map = new HeatMap({ rows: intervals, columns: scales, values, low: better === "lower" ? high : low, high: better === "lower" ? low : high, xTitle: title, color: run.color, name: nice(score) });
    return el("article", { class: "card chart" },
      el("header", {}, dot(run), el("h3", {}, run.name, el("span", { class: "hint" }, `${nice(score)}, ${better} is better, ${format(num)} samples a cell`))), map.node,
      el("dl", { class: "bars" }, ...best.map((b, i) => el("div", { class: "label" }, el("code", {}, b.options), i ? "" : " (best)", el("b", {}, `${format(b.value)} with ${format(b.num)}`)))));
  })));
}

/* ---- recipe and machine -------------------------------------------------------------------------------------- */

/* Keys down, runs across; rows in which the runs differ are marked. */
function compare(id, title, tables, lead) {
  const keys = [...new Set(tables.flatMap((t) => Object.keys(t.values)))];
  if (!keys.length) return;
  const differs = (key) => new Set(tables.map((t) => t.values[key])).size > 1;
  const only = el("input", { type: "checkbox" });
  const find = el("input", { type: "search", placeholder: "Find a key", "aria-label": `Find a key in ${title}`, class: "find" });
  const controls = tables.length > 1 ? [el("label", { class: "control" }, only, "differences only")] : [];
  const node = section(id, title, ...controls, find);
  if (lead) node.append(el("p", { class: "lead" }, lead));
  const body = keys.map((key) => el("tr", { class: tables.length > 1 && differs(key) ? "differs" : "" }, el("th", { class: "mono", scope: "row" }, ...key.split(/(?<=[._])/).flatMap((part) => [part, el("wbr")])),
    ...tables.map((t) => el("td", { class: "mono" }, t.values[key] ?? "–"))));
  const refresh = () => body.forEach((tr, i) => {
    tr.hidden = (only.checked && !differs(keys[i])) || !keys[i].toLowerCase().includes(find.value.trim().toLowerCase());
  });
  only.addEventListener("change", refresh);
  find.addEventListener("input", refresh);
  node.append(el("div", { class: "card table" }, el("table", {},
    el("thead", {}, el("tr", {}, el("th", {}, "Key"), ...tables.map((t) => el("th", { scope: "col" }, dot(t.run), t.title)))), el("tbody", {}, ...body))));
}

/* ---- theme --------------------------------------------------------------------------------------------------- */

function theme() {
  const button = document.getElementById("theme"), root = document.documentElement;
  const dark = () => (root.style.colorScheme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const icon = () => button.replaceChildren(el("svg", { viewBox: "0 0 24 24", fill: "none", stroke: "currentColor", "stroke-width": 2, "stroke-linecap": "round", "stroke-linejoin": "round" },
    el("path", { d: dark() ? "M12 4V2m0 20v-2m8-8h2M2 12h2m13.7-5.7 1.4-1.4M4.9 19.1l1.4-1.4m0-11.4L4.9 4.9m14.2 14.2-1.4-1.4M16 12a4 4 0 1 1-8 0 4 4 0 0 1 8 0" : "M20.5 14.2A8.5 8.5 0 1 1 9.8 3.5a7 7 0 0 0 10.7 10.7" })));
  button.addEventListener("click", () => { root.style.colorScheme = dark() ? "light" : "dark"; icon(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", icon);
  icon();
}

theme();
overview();
curves();
samples();
metrics();
probe();
guidance();
compare("recipe", "Recipe", RUNS.map((run) => ({ run, title: run.name, values: run.recipe })),
  RUNS.length > 1 ? "The resolved recipes; rows in which the runs differ are marked." : "The resolved recipe, defaults filled in.");
compare("machine", "Machine", RUNS.flatMap((run) => run.environment.map((session, i) => ({
  run, values: session, title: run.environment.length > 1 ? `${run.name}, ${i ? `resume ${i}` : "start"}` : run.name }))), "");
main.append(el("footer", {}, `dic-repa ${DATA.version} · one file, nothing fetched`));
