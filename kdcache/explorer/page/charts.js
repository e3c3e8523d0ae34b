// Charts: small pictures of distributions. Each has its numbers in words for who cannot see it.

const WIDE = 320;
const HIGH = 120;
const FOOT = 18;

function figure(title, about, picture, note) {
  return make(
    "figure",
    {},
    make("figcaption", {}, make("strong", {}, title), note ? make("span", {}, note) : null),
    picture ?? make("p", { class: "unknown" }, about),
  );
}

function canvas(about, ...children) {
  return draw("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", "aria-label": about }, ...children);
}

function label(x, text, anchor, y = HIGH - 3) {
  const made = draw("text", { x, y, "text-anchor": anchor });
  made.textContent = text;
  return made;
}

/** Counts in bins as columns; `ends` are the words below its two ends. */
function columns(title, counts, ends, note) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  if (!total) return figure(title, "unknown", null, note);
  const most = Math.max(...counts);
  const step = WIDE / counts.length;
  const bars = counts.map((count, i) => {
    const height = count ? Math.max(1, (count / most) * (HIGH - FOOT - 4)) : 0;
    return draw("rect", { x: i * step + 0.5, y: HIGH - FOOT - height, width: Math.max(0.5, step - 1), height, rx: 1 });
  });
  const about = `${title}: ${thousands(total)} positions from ${ends[0]} to ${ends[1]}. ${note ?? ""}`;
  const line = draw("line", { x1: 0, x2: WIDE, y1: HIGH - FOOT, y2: HIGH - FOOT });
  return figure(
    title,
    about,
    canvas(about, ...bars, line, label(0, ends[0], "start"), label(WIDE, ends[1], "end")),
    note,
  );
}

/** Values in bins of one width. */
function histogram(title, values, unit, note, bins = 32) {
  const known = values.filter((value) => !Number.isNaN(value));
  if (!known.length) return figure(title, "unknown", null, note);
  const most = Math.max(
    known.reduce((a, b) => Math.max(a, b), 0),
    1e-9,
  );
  const counts = new Array(bins).fill(0);
  for (const value of known) counts[Math.min(bins - 1, Math.max(0, Math.floor((value / most) * bins)))]++;
  const end = Number.isInteger(most) ? thousands(most) : share(most);
  return columns(title, counts, ["0", `${end} ${unit}`.trim()], note);
}

/** A rising curve of shares by whole numbers from 1, with a mark at k. */
function curve(title, values, k, note) {
  const low = Math.floor(values[0] * 10) / 10; // where the picture begins; the labels say so
  const x = (i) => 4 + (i / Math.max(1, values.length - 1)) * (WIDE - 8);
  const y = (value) => 6 + (1 - (value - low) / (1 - low || 1)) * (HIGH - FOOT - 12);
  const points = values.map((value, i) => `${x(i).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
  const at = Math.min(k, values.length) - 1;
  const all = `${values.length} entries keep ${share(values.at(-1))} of the mass`;
  const about = `${title}: ${all}, ${at + 1} keep ${share(values[at])}`;
  const area = draw("polygon", { points: `${x(0)},${HIGH - FOOT} ${points} ${x(values.length - 1)},${HIGH - FOOT}` });
  return figure(
    title,
    about,
    canvas(
      about,
      area,
      draw("polyline", { points }),
      draw("line", { x1: 0, x2: WIDE, y1: HIGH - FOOT, y2: HIGH - FOOT }),
      draw("line", { class: "mark", x1: x(at), x2: x(at), y1: y(values[at]), y2: HIGH - FOOT }),
      draw("circle", { cx: x(at), cy: y(values[at]), r: 4 }),
      label(0, "1 entry", "start"),
      label(WIDE, `${values.length} entries`, "end"),
      label(0, `mass 1`, "start", 9),
      label(x(at) - 8, share(values[at]), "end", y(values[at]) - 8),
      label(6, `from ${low}`, "start", HIGH - FOOT - 5),
    ),
    note,
  );
}

/** Named amounts as rows of bars. */
function bars(title, amounts, shown, note) {
  if (!amounts.length) return figure(title, "none", null, note);
  const most = Math.max(...amounts.map(([, amount]) => amount));
  const rows = amounts.map(([name, amount]) => {
    const bar = make("span", { class: "amount" });
    bar.style.inlineSize = `${(amount / most) * 100}%`;
    return make(
      "tr",
      {},
      make("th", { scope: "row" }, name),
      make("td", {}, bar),
      make("td", { class: "number" }, shown(amount)),
    );
  });
  return figure(title, "", make("table", { class: "amounts" }, make("tbody", {}, ...rows)), note);
}
